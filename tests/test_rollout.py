"""Rollout, advantages and running statistics against slow references."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import train

import rat_continuous as rat


@pytest.mark.parametrize("kaczmarz", ["paper", "release", "off"])
@pytest.mark.parametrize(("script", "core"), [("rat_continuous", "kaczmarz_step"), ("rat_shared", "joint_step")])
def test_what_blocks_remember(script, core, kaczmarz, tmp_path, monkeypatch):
    """paper: the block before, in each rollout from nothing; release: across rollouts too; off: nothing."""
    original, seen = (
        getattr(module := importlib.import_module(script), core),
        [],
    )  # (memory before, after) of each block

    def recorded(*arguments):
        result = original(*arguments)
        seen.append((arguments[-1], result[2]))
        return result

    monkeypatch.setattr(module, core, recorded)
    train(script, "--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--total-timesteps", 192,
          "--update-epochs", 1, "--num-minibatches", 2, "--kaczmarz", kaczmarz, "--output-dir", tmp_path)  # fmt: skip
    assert len(seen) == 3 * 2
    for block, (before, _) in enumerate(seen):
        forgets = kaczmarz == "off" or block == 0 or (kaczmarz == "paper" and block % 2 == 0)
        assert before is (None if forgets else seen[block - 1][1])
        assert forgets or before is not None


def test_gae_by_hand():
    """gamma 0.5, lambda 0.5, one environment: a termination at step 1, its reset step 2, a truncation at step 4."""
    rewards = torch.tensor([[1.0], [2.0], [0.0], [3.0], [4.0]])
    values = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]])
    terminated = torch.tensor([[0.0], [1.0], [0.0], [0.0], [0.0]])
    done = torch.tensor([[0.0], [1.0], [0.0], [0.0], [1.0]])
    advantages = rat.gae(rewards, values, terminated, done, 0.5, 0.5).squeeze(1)
    # step 4, truncated:  4 + 0.5 * 60 - 50 = -16
    # step 3:             3 + 0.5 * 50 - 40 + 0.25 * -16 = -16
    # step 1, terminated: 2 - 20 = -18, nothing from step 2
    # step 0:             1 + 0.5 * 20 - 10 + 0.25 * -18 = -3.5
    assert advantages[[0, 1, 3, 4]].tolist() == [-3.5, -18.0, -16.0, -16.0]


def test_gae_against_each_episode_alone():
    generator = np.random.default_rng(0)
    steps, envs, gamma, lam = 40, 5, 0.97, 0.9
    rewards, values = generator.normal(size=(steps, envs)), generator.normal(size=(steps + 1, envs))
    done, terminated = np.zeros((steps, envs)), np.zeros((steps, envs))
    expected, valid = np.full((steps, envs), np.nan), np.ones((steps, envs))
    for env in range(envs):
        start = 0
        while start < steps:
            end = min(start + int(generator.integers(1, 12)), steps)  # steps start .. end - 1 are one episode
            finished = end < steps or generator.random() < 0.5
            final = finished and generator.random() < 0.5
            if finished:
                done[end - 1, env], terminated[end - 1, env] = 1, final
            targets = [rewards[t, env] + gamma * values[t + 1, env] - values[t, env] for t in range(start, end)]
            if final:
                targets[-1] -= gamma * values[end, env]
            for t in range(start, end):
                expected[t, env] = sum((gamma * lam) ** k * d for k, d in enumerate(targets[t - start :]))
            if end < steps:
                valid[end, env] = 0  # the reset step
            start = end + 1
    tensors = (torch.tensor(x) for x in (rewards, values, terminated, done))
    advantages = rat.gae(*tensors, gamma, lam).numpy()
    assert (valid == 0).sum() > 10 and terminated.sum() > 3 and (done - terminated).sum() > 3
    np.testing.assert_allclose(advantages[valid > 0], expected[valid > 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("env_id", "steps"), [("InvertedPendulum-v5", 60), ("Pendulum-v1", 210)])
def test_collector_replays_on_single_environments(env_id, steps, monkeypatch, num_envs=3):
    """Every step of the rollout again, one environment at a time, resetting by hand: terminations and truncations."""
    args = rat.Args(env_id=env_id, num_envs=num_envs)
    torch.manual_seed(0)
    envs, first = rat.make_envs(args, seed=7)
    agent = rat.Agent(envs.single_observation_space, envs.single_action_space)
    collector, taken, step = rat.Collector(envs, first), [], envs.step
    monkeypatch.setattr(envs, "step", lambda action: (taken.append(action), step(action))[1])
    parts = [collector.collect(agent, n, torch.device("cpu")) for n in (steps // 2, steps - steps // 2)]
    obs, actions, rewards, terminated, done, valid = (torch.cat([a, b]).numpy() for a, b in zip(*parts, strict=True))
    obs = np.delete(obs, steps // 2, axis=0)  # the second half starts with the first half's last observation
    low, high = envs.single_action_space.low, envs.single_action_space.high
    np.testing.assert_allclose(np.array(taken), low + (np.tanh(actions) + 1) / 2 * (high - low), rtol=1e-5, atol=1e-6)
    episodes = []
    for i in range(num_envs):
        env, needs_reset, total, length = gym.make(env_id), False, 0.0, 0
        now, _ = env.reset(seed=7 + i)
        for t in range(steps):
            np.testing.assert_allclose(obs[t, i], now, rtol=1e-6)
            assert valid[t, i] == (not needs_reset)
            if needs_reset:
                now, needs_reset, total, length = env.reset()[0], False, 0.0, 0
                assert rewards[t, i] == 0 and done[t, i] == 0
                continue
            now, reward, ends, cut, _ = env.step(taken[t][i])
            assert (terminated[t, i], done[t, i]) == (ends, ends or cut)
            assert rewards[t, i] == pytest.approx(reward, rel=1e-5)
            total, length, needs_reset = total + reward, length + 1, ends or cut
            if needs_reset:
                episodes.append((t, i, total, length))
        np.testing.assert_allclose(obs[steps, i], now, rtol=1e-6)
    assert len(episodes) >= num_envs
    expected = [(total, length) for _, _, total, length in sorted(episodes)]
    np.testing.assert_allclose(np.array(collector.finished), expected, rtol=1e-5)


@pytest.mark.parametrize(("env_id", "hidden"), [("Swimmer-v4", 2), ("HalfCheetah-v4", 1), ("Walker2d-v4", 1)])
def test_envpool_steps_like_gymnasium_from_the_same_state(env_id, hidden):
    """Tasks on which EnvPool's own version of MuJoCo and the pinned one agree; observations hide the first positions,
    on which nothing depends, and clip velocities at 10."""
    pytest.importorskip("envpool")
    envs, obs = rat.make_envs(rat.Args(env_id=env_id, num_envs=1, vectorization="envpool"), seed=3)
    twin = gym.make(env_id).unwrapped
    twin.reset(seed=0)
    positions, compared, generator = twin.model.nq - hidden, 0, np.random.default_rng(1)
    for _ in range(100):
        position, velocity = obs[0, :positions], obs[0, positions:]
        action = 0.6 * generator.uniform(-1, 1, envs.single_action_space.shape).astype(np.float32)
        obs, reward, terminated, truncated, _ = envs.step(action[None])
        if np.abs(velocity).max() < 10:
            twin.set_state(np.concatenate([np.zeros(hidden), position]), velocity)
            expected, expected_reward, end, _, _ = twin.step(action)
            assert np.allclose(obs[0], expected, rtol=1e-9, atol=1e-9) and end == terminated[0]
            assert reward[0] == pytest.approx(expected_reward, rel=1e-6, abs=1e-6)
            compared += 1
        if terminated[0] or truncated[0]:
            obs = envs.step(action[None])[0]
    assert compared > 50


def test_popart_keeps_its_outputs_and_averages_debiased():
    torch.manual_seed(0)
    head, features = rat.PopArt(16, beta=0.9), torch.randn(50, 16)
    before = (head(features) * head.std + head.mean).detach()
    first, second = 100 + 7 * torch.randn(400), -20 + 3 * torch.randn(300)
    for batch in (first, second):
        head.update(batch)
        after = (head(features) * head.std + head.mean).detach()
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)
    shares = np.array([0.9 * 0.1, 0.1]) / (1 - 0.9**2)  # weights of the two batches, debiased
    mean = shares @ [first.mean().item(), second.mean().item()]
    square = shares @ [first.double().square().mean().item(), second.double().square().mean().item()]
    assert head.mean.item() == pytest.approx(mean, rel=1e-6)
    assert head.std.item() == pytest.approx(np.sqrt(square - mean**2), rel=1e-6)
    head = rat.PopArt(16)
    head.update(first)
    assert (head.mean.item(), head.std.item()) == pytest.approx(
        (first.mean().item(), first.std(correction=0).item()), rel=1e-4
    )
    constant = rat.PopArt(16)
    constant.update(torch.full((100,), 5.0))
    assert constant.std.item() == pytest.approx(1e-3)


def test_observation_statistics_match_numpy_over_all_data():
    generator = np.random.default_rng(0)
    batches = [generator.normal(3, 20, size=(n, 4)) for n in (64, 1, 500, 37)]
    normalizer = rat.ObsNormalizer(4)
    for batch in batches:
        normalizer.update(torch.tensor(batch))
    data = np.concatenate(batches)
    count = len(data) + 1  # the prior counts as one sample of mean 0 and variance 1
    mean = data.sum(0) / count
    var = (((data - mean) ** 2).sum(0) + mean**2 + 1) / count
    np.testing.assert_allclose(normalizer.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(normalizer.var, var, rtol=1e-12)
    assert normalizer.count.item() == count
    expected = np.clip((data - mean) / np.sqrt(var + 1e-5), -5, 5)
    np.testing.assert_allclose(normalizer(torch.tensor(data)), expected, rtol=1e-5, atol=1e-6)


def test_actions_span_the_box():
    low, high = np.array([-0.4, 1.0], np.float32), np.array([0.4, 3.0], np.float32)
    agent = rat.Agent(gym.spaces.Box(-1, 1, (5,)), gym.spaces.Box(low, high))
    action, env_action = agent.act(torch.randn(2000, 5))
    expected = low + (np.tanh(action.numpy()) + 1) / 2 * (high - low)
    np.testing.assert_allclose(env_action, expected, rtol=1e-5, atol=1e-6)
    mean, _ = agent.act(torch.zeros(1, 5), deterministic=True)
    assert torch.equal(mean, agent.act(torch.zeros(1, 5), deterministic=True)[0])
    assert not torch.equal(mean, agent.act(torch.zeros(1, 5))[0])
