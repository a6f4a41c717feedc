"""Rollout, advantages and running statistics against slow references, and what a run hands on."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import flat, read_csv, train
from recording import check_block, check_critic, check_statistics, recompute, record

import rat_continuous as rat

STEPS = {  # script and rule: the function that every block is handed to
    ("rat_continuous", "track"): "kaczmarz_direction",
    ("rat_continuous", "paper"): "kaczmarz_direction",
    ("rat_continuous", "release"): "kaczmarz_direction",
    ("rat_continuous", "off"): "kaczmarz_direction",
    ("rat_shared", "track"): "joint_step",
    ("rat_shared", "paper"): "sampled_step",
    ("rat_shared", "release"): "sampled_step",
    ("rat_shared", "off"): "sampled_step",
}
MEMORY = {"track": 0.7, "paper": 0.0, "release": 1.0, "off": 0.0}


@pytest.mark.parametrize(("script", "kaczmarz"), STEPS)
def test_what_blocks_remember(script, kaczmarz, tmp_path, monkeypatch):
    """Within a rollout what the block before left, at its start a share of that; off: zero."""
    module = importlib.import_module(script)
    core = STEPS[script, kaczmarz]
    original = getattr(module, core)
    seen = []  # (previous before, after) of each block
    measured = []

    def recorded(args, model, block, previous, *more, **named):
        result = original(args, model, block, previous, *more, **named)
        seen.append((flat(previous.values()), flat(result[1].values())))
        measured.append({name: float(value) for name, value in result[2].items()})
        return result

    monkeypatch.setattr(module, core, recorded)
    small = ["--num-envs", 4, "--num-steps", 16, "--total-timesteps", 192, "--num-minibatches", 2]
    arguments = ["--env-id", "InvertedPendulum-v5", *small, "--update-epochs", 1]
    if kaczmarz == "track":
        arguments += ["--memory", 0.7]
    where = ["--output-dir", tmp_path, "--run-name", "x"]
    train(script, *arguments, "--kaczmarz", kaczmarz, *where)
    assert len(seen) == 3 * 2
    for number, row in enumerate(read_csv(tmp_path / "x")):  # metrics: the mean of two blocks
        for tag, first in measured[2 * number].items():
            mean = (first + measured[2 * number + 1][tag]) / 2
            assert float(row[tag.split("/")[1]]) == pytest.approx(mean, rel=1e-5, abs=1e-8)
    left = torch.zeros_like(seen[0][0])
    for number, (before, after) in enumerate(seen):
        share = MEMORY[kaczmarz] if number % 2 == 0 else 1
        torch.testing.assert_close(before, share * left)
        assert after.any() == (kaczmarz != "off")
        left = after


def rollout(rewards, terminated, done):
    """A Rollout of which gae reads only these."""
    nothing = torch.zeros(0)
    return rat.Rollout(nothing, nothing, rewards, terminated, done, nothing)


def test_gae_by_hand():
    """gamma and lambda 0.5: terminates at step 1, resets in step 2, is truncated at step 4."""
    rewards = torch.tensor([[1.0], [2.0], [0.0], [3.0], [4.0]])
    values = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]])
    terminated = torch.tensor([[0.0], [1.0], [0.0], [0.0], [0.0]])
    done = torch.tensor([[0.0], [1.0], [0.0], [0.0], [1.0]])
    advantages = rat.gae(rollout(rewards, terminated, done), values, 0.5, 0.5).squeeze(1)
    # step 4, truncated:  4 + 0.5 * 60 - 50 = -16
    # step 3:             3 + 0.5 * 50 - 40 + 0.25 * -16 = -16
    # step 1, terminated: 2 - 20 = -18, nothing from step 2
    # step 0:             1 + 0.5 * 20 - 10 + 0.25 * -18 = -3.5
    assert advantages[[0, 1, 3, 4]].tolist() == [-3.5, -18.0, -16.0, -16.0]


def random_episodes(generator, steps, envs):
    """Flags of episodes of 1 to 12 steps: terminated, done, valid [steps, envs]; their spans."""
    terminated = np.zeros((steps, envs))
    done = np.zeros((steps, envs))
    valid = np.ones((steps, envs))
    spans = []  # (environment, first step, step after the last)
    for env in range(envs):
        start = 0
        while start < steps:
            end = min(start + int(generator.integers(1, 12)), steps)
            spans.append((env, start, end))
            if end < steps or generator.random() < 0.5:
                done[end - 1, env] = 1
                terminated[end - 1, env] = generator.random() < 0.5
            if end < steps:
                valid[end, env] = 0  # the step that only resets
            start = end + 1
    return terminated, done, valid, spans


def test_gae_against_each_episode_alone(steps=40, envs=5, gamma=0.97, lam=0.9):
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=(steps, envs))
    values = generator.normal(size=(steps + 1, envs))
    terminated, done, valid, spans = random_episodes(generator, steps, envs)
    expected = np.full((steps, envs), np.nan)
    for env, start, end in spans:
        deltas = []
        for t in range(start, end):
            bootstrap = gamma * values[t + 1, env] * (1 - terminated[t, env])
            deltas.append(rewards[t, env] + bootstrap - values[t, env])
        for t in range(start, end):
            later = deltas[t - start :]
            expected[t, env] = sum((gamma * lam) ** k * d for k, d in enumerate(later))
    flags = rollout(*map(torch.tensor, (rewards, terminated, done)))
    advantages = rat.gae(flags, torch.tensor(values), gamma, lam).numpy()
    assert (valid == 0).sum() > 10
    assert terminated.sum() > 3
    assert (done - terminated).sum() > 3
    np.testing.assert_allclose(advantages[valid > 0], expected[valid > 0], rtol=1e-12, atol=1e-12)


def replay(env_id, seed, actions, obs, rewards, terminated, done, valid):
    """The same steps in one environment, reset by hand; (step, return, length) of its episodes."""
    env = gym.make(env_id)
    needs_reset = False
    total, length, episodes = 0.0, 0, []
    now, _ = env.reset(seed=seed)
    for t, action in enumerate(actions):
        np.testing.assert_allclose(obs[t], now, rtol=1e-6)
        assert valid[t] == (not needs_reset)
        if needs_reset:
            now, _ = env.reset()
            needs_reset, total, length = False, 0.0, 0
            assert (rewards[t], done[t]) == (0, 0)
            continue
        now, reward, ends, cut, _ = env.step(action)
        assert (terminated[t], done[t]) == (ends, ends or cut)
        assert rewards[t] == pytest.approx(reward, rel=1e-5)
        total, length = total + reward, length + 1
        needs_reset = ends or cut
        if needs_reset:
            episodes.append((t, total, length))
    np.testing.assert_allclose(obs[-1], now, rtol=1e-6)
    return episodes


@pytest.mark.parametrize(("env_id", "steps"), [("InvertedPendulum-v5", 60), ("Pendulum-v1", 210)])
def test_collect_replays_on_single_environments(env_id, steps, monkeypatch, num_envs=3):
    """Terminations and truncations, over two rollouts, and the episodes' returns and lengths."""
    args = rat.Args(env_id=env_id, num_envs=num_envs)
    seeds = rat.seed_generators(args, 0)
    envs, first = rat.make_envs(args, seeds)
    agent = rat.Agent(envs.single_observation_space, envs.single_action_space)
    taken, step = [], envs.step
    monkeypatch.setattr(envs, "step", lambda action: (taken.append(action), step(action))[1])
    a = rat.collect(envs, agent, torch.tensor(first), torch.zeros(num_envs), steps // 2)
    b = rat.collect(envs, agent, a.obs[-1], a.done[-1], steps - steps // 2)
    obs = torch.cat([a.obs[:-1], b.obs]).numpy()
    columns = [torch.cat([getattr(r, name) for r in (a, b)]).numpy() for name in a._fields[1:]]
    actions, rewards, terminated, done, valid = columns
    low, high = envs.single_action_space.low, envs.single_action_space.high
    expected = low + (np.tanh(actions) + 1) / 2 * (high - low)
    np.testing.assert_allclose(np.array(taken), expected, rtol=1e-5, atol=1e-6)
    episodes = []
    for i, seed in enumerate(seeds):
        flags = [x[:, i] for x in (rewards, terminated, done, valid)]
        episodes += replay(env_id, seed, np.array(taken)[:, i], obs[:, i], *flags)
    assert len(episodes) >= num_envs
    episodes.sort(key=lambda episode: episode[0])
    returns, lengths = zip(*(episode[1:] for episode in episodes))
    np.testing.assert_allclose(sorted(envs.return_queue), sorted(returns), rtol=1e-5)
    assert sorted(envs.length_queue) == sorted(lengths)


HIDDEN = [("Swimmer-v4", 2), ("HalfCheetah-v4", 1), ("Walker2d-v4", 1)]


@pytest.mark.parametrize(("env_id", "hidden"), HIDDEN)
def test_envpool_steps_like_gymnasium_from_the_same_state(env_id, hidden):
    """Tasks on which EnvPool's own version of MuJoCo and the pinned one agree.

    Observations hide the first positions, on which nothing depends, and clip velocities at 10."""
    pytest.importorskip("envpool")
    args = rat.Args(env_id=env_id, num_envs=1, vectorization="envpool")
    envs, obs = rat.make_envs(args, [3])
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
            np.testing.assert_allclose(obs[0], expected, rtol=1e-9, atol=1e-9)
            assert end == terminated[0]
            assert reward[0] == pytest.approx(expected_reward, rel=1e-6, abs=1e-6)
            compared += 1
        if terminated[0] or truncated[0]:
            obs = envs.step(action[None])[0]
    assert compared > 50


def test_popart_keeps_its_outputs_and_averages_debiased():
    torch.manual_seed(0)
    head, features = rat.PopArt(16), torch.randn(50, 16)
    before = (head(features) * head.std + head.mean).detach()
    first, second = 100 + 7 * torch.randn(400), -20 + 3 * torch.randn(300)
    for batch in (first, second):
        head.update(batch)
        after = (head(features) * head.std + head.mean).detach()
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)
    shares = np.array([0.99999, 1]) / 1.99999  # weights of the two batches, debiased
    mean = shares @ [first.mean().item(), second.mean().item()]
    square = shares @ [batch.double().square().mean().item() for batch in (first, second)]
    assert head.mean.item() == pytest.approx(mean, rel=1e-6)
    assert head.std.item() == pytest.approx(np.sqrt(square - mean**2), rel=1e-6)


@pytest.mark.parametrize(
    ("returns", "mean", "std"),
    [([4.0, 6.0, 11.0], 7.0, np.std([4, 6, 11])), ([5.0] * 100, 5.0, 1e-3)],
)
def test_popart_after_one_batch_has_its_moments(returns, mean, std):
    head = rat.PopArt(16)
    head.update(torch.tensor(returns))
    assert head.mean.item() == pytest.approx(mean, rel=1e-6)
    assert head.std.item() == pytest.approx(std, rel=1e-4)


def test_fit_critic_regresses_on_the_returns():
    """The first loss it reports is the critic's error; a step reduces it."""
    torch.manual_seed(0)
    critic = rat.mlp(3, rat.PopArt(16), 16)
    obs, other, returns = torch.randn(64, 3), torch.randn(64), torch.randn(64)
    samples = rat.Samples(obs, other, other, returns, other)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    args = rat.Args(critic_epochs=1, critic_minibatches=1)
    errors = []
    for _ in range(5):
        with torch.no_grad():
            errors.append((critic(obs) - returns).square().mean().item())
        assert rat.fit_critic(args, critic, optimizer, samples).item() == pytest.approx(errors[-1])
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("offset", [0.0, 1.7e9])
def test_observation_statistics_match_numpy_over_all_data(offset):
    """In float64, so that an offset far above the spread does not hide what varies."""
    generator = np.random.default_rng(0)
    batches = [offset + generator.normal(3, 20, size=(n, 4)) for n in (64, 1, 500, 37)]
    normalizer = rat.ObsNormalizer(4)
    for batch in batches:
        normalizer.update(torch.tensor(batch))
    data = np.concatenate(batches)
    np.testing.assert_allclose(normalizer.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.var, data.var(0), rtol=1e-6)
    assert normalizer.count.item() == len(data)
    std = np.sqrt(data.var(0) + 1 / (len(data) + 1) + 1e-5)
    expected = np.clip((data - data.mean(0)) / std, -5, 5)
    np.testing.assert_allclose(normalizer(torch.tensor(data)), expected, rtol=1e-4, atol=1e-6)


def test_actions_span_the_box():
    low, high = np.array([-0.4, 1.0], np.float32), np.array([0.4, 3.0], np.float32)
    agent = rat.Agent(gym.spaces.Box(-1, 1, (5,)), gym.spaces.Box(low, high))
    action, env_action = agent.act(torch.randn(2000, 5))
    expected = low + (np.tanh(action.numpy()) + 1) / 2 * (high - low)
    np.testing.assert_allclose(env_action, expected, rtol=1e-5, atol=1e-6)
    mean, _ = agent.act(torch.zeros(1, 5), deterministic=True)
    assert torch.equal(mean, agent.act(torch.zeros(1, 5), deterministic=True)[0])
    assert not torch.equal(mean, agent.act(torch.zeros(1, 5))[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_stay_inside_the_box(dtype):
    """Where tanh is 1, rounding must not lead above high; actions have the space's own type."""
    generator = np.random.default_rng(0)
    low = generator.uniform(-9, 0, 500).astype(dtype)
    high = generator.uniform(0.1, 9, 500).astype(dtype)
    agent = rat.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(low, high, dtype=dtype))
    for level in (50.0, -50.0):
        agent.policy.mean[-1].bias.data.fill_(level)
        _, env_action = agent.act(torch.zeros(1, 3), deterministic=True)
        assert env_action.numpy().dtype == dtype
        assert (env_action.numpy() <= high).all()
        assert (env_action.numpy() >= low).all()


def test_a_run_hands_its_core_and_critic_what_the_rollout_says(tmp_path, monkeypatch):
    """Two iterations with many resets, recomputed in NumPy; every sample is in one block a pass."""
    more = ["--update-epochs", 2, "--num-minibatches", 2, "--learning-rate", 0.5]
    more += ["--max-grad-norm", 5.0, "--kaczmarz", "off"]
    handed = []
    kaczmarz_step = rat.kaczmarz_step

    def recorded(scores, residual, ratio, damping, previous):
        handed.append((residual.clone(), ratio.clone(), damping))  # y, as previous is zero
        return kaczmarz_step(scores, residual, ratio, damping, previous)

    monkeypatch.setattr(rat, "kaczmarz_step", recorded)
    iterations = record("rat_continuous", "kaczmarz_direction", tmp_path, monkeypatch, *more)
    expected = recompute(iterations)
    check_statistics(iterations, expected)
    check_critic(iterations, expected)
    blocks = iter(handed)
    for iteration, wanted in zip(iterations, expected):
        seen = []
        for (_, block, _), agent in iteration.core:
            y, ratio, damping = next(blocks)
            obs, actions = block.obs, block.actions
            seen += check_block(wanted, iteration.policy, obs, actions, y, ratio, agent)
            assert damping == 0.1
        assert sorted(seen) == sorted(2 * list(range(len(wanted.obs))))
    ratios = torch.cat([ratio for _, ratio, _ in handed])
    assert ratios.max() > 2
    assert ratios.min() < 0.5
