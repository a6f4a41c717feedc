"""rat_procgen: convolution taps against float64 per-sample gradients, the adapter against the raw package, runs."""

import importlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, command, environment, flat, read_csv, same, score_matrix, train
from torch import nn
from torch.distributions import Categorical

import enjoy
import rat_procgen as rat

if sys.version_info >= (3, 13):
    pytest.skip("Procgen has no wheel for this Python", allow_module_level=True)
TINY = ["--channels", 2, 2, 2, "--hidden", 8, "--num-envs", 4, "--num-steps", 16, "--num-minibatches", 2,
        "--critic-minibatches", 2, "--update-epochs", 1, "--critic-epochs", 1, "--eval-levels", 0,
        "--device", "cpu"]  # fmt: skip


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


class Strided(nn.Module):
    """Strides, paddings and kernels that are not square, a residual sum, a convolution without bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1))
        self.inner, self.pool = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, obs):
        x = self.first(obs.permute(0, 3, 1, 2) / 255)  # [B, 4, 7, 8]
        x = self.pool(x + self.inner(x.relu()))
        return Categorical(logits=self.head(x.flatten(1)), validate_args=False)


def impala():
    return rat.Actor((16, 8, 3), (2, 3, 4), 8, nn.Linear(8, 5))


def problem(policy, samples=60):
    """A block with a fifth of the weights zero, previous g, and H [B, p] in float64."""
    torch.manual_seed(0)
    actor = policy()
    with torch.no_grad():
        for p in actor.parameters():
            p.add_(0.1 * torch.randn_like(p))
    obs = torch.randint(256, (samples, *((16, 8, 3) if policy is impala else (15, 7, 3))), dtype=torch.uint8)
    actions, y = torch.randint(5, (samples,)), torch.randn(samples)
    weights = torch.rand(samples).clamp(min=0.1) * (torch.rand(samples) > 0.2)
    previous = [0.1 * torch.randn_like(p) for p in actor.parameters()]
    return actor, obs, actions, y, weights, previous, score_matrix(actor, obs, actions)


@pytest.mark.parametrize("chunk", [1, 7, 60])
@pytest.mark.parametrize("policy", [impala, Strided])
def test_taps_give_kernel_and_both_products(policy, chunk, monkeypatch):
    """K, H v and H^T u from the factors alone, whatever the number of samples that fit into memory at once."""
    actor, obs, actions, _, _, previous, rows = problem(policy)
    sizes, forward = [], actor.forward
    monkeypatch.setattr(actor, "forward", lambda x: (sizes.append(len(x)), forward(x))[1])
    scores = rat.tape_scores(actor, obs, actions, 512)
    assert sizes == [1, 59]
    held = sum(t.nbytes for x, g, _ in scores for t in (x, g))
    layers = [(x.numel(), z.numel()) for x, z in calls_of(actor, obs[:1])]
    used = 4 * sum(x + 5 * z for x, z in layers)
    sizes.clear()
    scores = rat.tape_scores(actor, obs, actions, (held + chunk * used) / 2**20)
    assert max(sizes) == min(chunk, 59) and sum(sizes) == 60
    v, u = dict(zip(actor.parameters(), previous, strict=True)), torch.randn(60)
    kernel, product, transposed = 0, 0, {}
    for x, g, params in scores:
        kernel = kernel + (g @ g.T) * (x @ x.T + len(params) - 1)
        full = torch.cat([(g[:, :, None] * x[:, None]).flatten(1), *([g] if len(params) > 1 else [])], 1)
        product = product + full @ torch.cat([v[p].flatten() for p in params])
        transposed |= zip(params, (full.T @ u).split([p.numel() for p in params]), strict=True)
    assert relative(kernel, rows @ rows.T) < 1e-4
    assert relative(product, rows @ flat(previous).double()) < 1e-4
    assert relative(flat([transposed[p] for p in actor.parameters()]), rows.T @ u.double()) < 1e-4


def calls_of(actor, obs):
    calls = []
    layers = [m for m in actor.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, x, z: calls.append((*x, z))) for m in layers]
    actor(obs)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("jacobian", ["tape", "vmap"])
@pytest.mark.parametrize("with_previous", [False, True])
@pytest.mark.parametrize("damping", [1e-2, 1])
def test_direction_is_the_proximal_minimiser(damping, with_previous, jacobian):
    """argmin_g |y - H g|^2_Sigma + damping |g - previous|^2, the p x p way in float64."""
    actor, obs, actions, y, weights, previous, rows = problem(impala)
    start = flat(previous).double() * with_previous
    weighted = rows.T * (weights.double() / (weights > 0).sum())
    curvature = weighted @ rows + damping * torch.eye(rows.shape[1]).double()
    expected = torch.linalg.solve(curvature, weighted @ y.double() + damping * start)
    given = previous if with_previous else None
    direction = rat.rat_direction(actor, obs, actions, y, weights, damping, given, jacobian)
    assert [d.shape for d in direction] == [p.shape for p in actor.parameters()]
    assert relative(flat(direction), expected) < 1e-4


def test_the_tape_refuses_what_it_does_not_know():
    torch.manual_seed(0)
    obs, actions = torch.randint(256, (8, 15, 7, 3), dtype=torch.uint8), torch.randint(5, (8,))
    for setting in (
        {"groups": 2},
        {"dilation": (1, 2), "padding": (1, 2)},
        {"padding_mode": "circular"},
        {"padding": "same"},
    ):
        actor = Strided()
        actor.inner = nn.Conv2d(4, 4, 3, **{"padding": 1} | setting)
        with pytest.raises(TypeError, match=r"inner Conv2d.*--jacobian vmap"):
            rat.tape_scores(actor, obs, actions, 512)
    actor = Strided()
    actor.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
    with pytest.raises(TypeError, match=r"inner.0 Conv2d.*--jacobian vmap"):
        rat.tape_scores(actor, obs, actions, 512)
    actor = Strided()
    actor.head.register_forward_pre_hook(lambda _, inputs: inputs[0][:1])  # one row for all samples
    with pytest.raises(TypeError, match=r"head Linear.*--jacobian vmap"):
        rat.tape_scores(actor, obs, actions, 512)
    with pytest.raises(MemoryError, match="raise --kernel-memory 1, too little for blocks of 30000 samples"):
        rat.tape_scores(Strided(), obs[:1].expand(30000, -1, -1, -1), actions[:1].expand(30000), 1)


@pytest.fixture(scope="module")
def rollout():
    """500 steps of 4 environments in two rollouts by a fixed policy, and what the raw package gave for its actions."""
    from procgen import ProcgenGym3Env

    args = rat.Args(num_envs=4, env_id="fruitbot", num_levels=5, start_level=3)
    torch.manual_seed(0)
    agent = rat.Agent(rat.Procgen.single_observation_space, rat.Procgen.single_action_space, (2, 2, 2), 8)
    collector = rat.Collector(rat.Procgen(args, seed=11), gamma=0.9)
    parts = [collector.collect(agent, n, torch.device("cpu")) for n in (300, 200)]
    actions = torch.cat([part[1] for part in parts]).numpy()
    raw = ProcgenGym3Env(4, "fruitbot", distribution_mode="easy", num_levels=5, start_level=3, rand_seed=11)
    seen = [raw.observe()]
    for action in actions:
        raw.act(action)
        seen.append(raw.observe())
    return collector, parts, seen


def test_adapter_gives_what_the_raw_package_gives(rollout):
    collector, parts, seen = rollout
    obs = torch.cat([parts[0][0][:-1], parts[1][0]])
    assert obs.dtype == torch.uint8 and obs.shape == (501, 4, 64, 64, 3)
    assert all(np.array_equal(mine, raw["rgb"]) for mine, (_, raw, _) in zip(obs.numpy(), seen, strict=True))
    first = np.array([f for _, _, f in seen])
    assert first[0].all() and first[1:].sum() > 4  # the first observation after an end is an episode's first
    np.testing.assert_array_equal(torch.cat([part[3] for part in parts]).numpy(), first[1:])
    episodes, running = [], np.zeros((4, 2))
    for reward, _, ends in seen[1:]:
        running += np.stack([reward, np.ones(4)], 1)
        episodes += map(tuple, running[ends].tolist())
        running[ends] = 0
    assert len(episodes) > 4 and any(r for r, _ in episodes)
    np.testing.assert_allclose(np.array(collector.finished), episodes[-100:])
    np.testing.assert_allclose(collector.running[:2].T, running)


def test_rewards_are_in_units_of_the_discounted_returns_deviation(rollout):
    _, parts, seen = rollout
    running, history, moments = np.zeros(4), [], []
    for reward, _, ends in seen[1:]:
        running = 0.9 * running + reward
        history.append(running)
        running = running * ~ends
    raw = np.array([reward for reward, _, _ in seen[1:]])
    for part, steps, start in ((parts[0], 300, 0), (parts[1], 500, 300)):
        expected = np.clip(raw[start:steps] / np.sqrt(np.var(history[:steps]) + 1e-8), -10, 10)
        np.testing.assert_allclose(part[2].numpy(), expected, rtol=1e-5, atol=1e-6)
        moments.append(expected.std())
    assert min(moments) > 0.1


def test_rewards_are_clipped(monkeypatch):
    collector = rat.Collector(rat.Procgen(rat.Args(num_envs=4), 1), gamma=0.9)
    step, agent = (
        collector.envs.step,
        rat.Agent(rat.Procgen.single_observation_space, rat.Procgen.single_action_space, (2, 2, 2), 8),
    )
    count = iter(range(1000))
    monkeypatch.setattr(
        collector.envs,
        "step",
        lambda a: ((out := step(a))[0], np.full(4, -1e3 if next(count) == 299 else 0.0, np.float32), *out[2:]),
    )
    rewards = collector.collect(agent, 300, torch.device("cpu"))[2]
    assert rewards.min() == -10


def test_a_run_its_resume_and_its_play(tmp_path, capsys):
    arguments = [*TINY, "--total-timesteps", 128, "--output-dir", tmp_path, "--run-name", "a"]
    evaluated = [*arguments, "--eval-levels", 50, "--eval-interval", 2]
    train("rat_procgen", *evaluated)
    path = tmp_path / "a" / "checkpoint.pt"
    before = torch.load(path, weights_only=True)
    assert [int(row["global_step"]) for row in read_csv(tmp_path / "a")] == [64, 128]
    assert {"kl", "entropy", "episodic_return", "eval_return", "value_loss"} <= set(read_csv(tmp_path / "a")[0])
    torch.manual_seed(99)
    train("rat_procgen", *evaluated, "--resume")  # nothing left to do: the state stays
    after = torch.load(path, weights_only=True)
    for key in before.keys() - {"args", "wall_seconds"}:
        assert same(before[key], after[key]), key
    assert before["moments"][0] == 128 and before["eval_return"] == float(read_csv(tmp_path / "a")[1]["eval_return"])
    train("rat_procgen", *evaluated, "--resume", "--total-timesteps", 192)
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 192 and state["moments"][0] == 192
    assert [int(row["global_step"]) for row in read_csv(tmp_path / "a")] == [64, 128, 192]
    capsys.readouterr()
    video = tmp_path / "a.mp4"
    enjoy.main(enjoy.Args(path, episodes=2, stochastic=True, json=True, video=video))
    played = json.loads(capsys.readouterr().out)
    assert played["env_id"] == "starpilot" and min(played["lengths"]) > 10 and video.stat().st_size > 1000


def test_a_rollouts_blocks_are_kaczmarz_steps(tmp_path, monkeypatch):
    """Every block starts from the g before it, the first from zero; the policy moves by eta min(1, nu / |g|) g."""
    original, steps = rat.rat_direction, []

    def recorded(actor, *arguments):
        steps.append((flat(actor.parameters()), arguments, original(actor, *arguments)))
        return steps[-1][-1]

    monkeypatch.setattr(rat, "rat_direction", recorded)
    train("rat_procgen", *TINY, "--num-steps", 64, "--total-timesteps", 512, "--learning-rate", 0.3, "--update-epochs",
          2, "--max-grad-norm", 0.02, "--output-dir", tmp_path, "--run-name", "x")  # fmt: skip
    saved = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)["agent"]
    after = [p for p, _, _ in steps[1:]] + [flat([v for k, v in saved.items() if k.startswith("actor.")])]
    rates = [float(row["learning_rate"]) for row in read_csv(tmp_path / "x")]
    assert len(steps) == 2 * 2 * 2
    for i, (before, (_, _, y, weights, damping, previous, jacobian, memory), direction) in enumerate(steps):
        assert (damping, jacobian, memory) == (0.1, "tape", 512)
        assert previous is (None if i % 4 == 0 else steps[i - 1][-1])
        assert abs(y.mean()) < 1e-5 and abs(y.std(correction=0) - 1) < 1e-3
        assert ((weights - 1).abs().max() < 1e-4) == (i % 4 == 0)
        g = flat(direction)
        scale = min(1, 0.02 / g.norm().item())
        torch.testing.assert_close(after[i], before + rates[i // 4] * scale * g, rtol=0, atol=1e-6)
        assert scale < 1 and (after[i] - before).norm() > 1e-4


def test_evaluation_is_the_first_episode_of_each_environment_to_its_end(monkeypatch):
    from procgen import ProcgenGym3Env

    args = rat.Args(num_envs=4, env_id="fruitbot", num_levels=5, start_level=3, eval_levels=2)
    torch.manual_seed(0)
    agent = rat.Agent(rat.Procgen.single_observation_space, rat.Procgen.single_action_space, (2, 2, 2), 8)
    actions, act, state = [], agent.act, torch.get_rng_state()
    monkeypatch.setattr(agent, "act", lambda obs: (actions.append(act(obs)[1]), actions[-1:] * 2)[1])
    score = rat.evaluate(args, agent, 11, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    raw = ProcgenGym3Env(4, "fruitbot", distribution_mode="easy", num_levels=2, start_level=8, rand_seed=11)
    returns, ended = np.zeros(4), np.zeros(4, bool)
    for action in actions:
        assert not ended.all()
        raw.act(action.numpy())
        reward, _, first = raw.observe()
        returns += np.where(ended, 0, reward)
        ended |= first
    assert ended.all() and returns.any()
    assert score == pytest.approx(returns.mean())


def test_a_signal_ends_a_run_that_resumes_and_damage_is_named(tmp_path, monkeypatch, capsys):
    arguments = [*TINY, "--output-dir", tmp_path, "--run-name", "a"]
    original = rat.gae
    monkeypatch.setattr(rat, "gae", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), original(*a))[1])
    path = tmp_path / "a" / "checkpoint.pt"
    for step in (64, 128):  # stopped, resumed and stopped again
        with pytest.raises(SystemExit) as stopped:
            train("rat_procgen", *arguments, "--total-timesteps", 640, *(["--resume"] if step > 64 else []))
        assert stopped.value.code == 128 + signal.SIGTERM
        assert torch.load(path, weights_only=True)["global_step"] == step
    path.write_bytes(path.read_bytes()[:-1000])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train("rat_procgen", *arguments, "--total-timesteps", 640, "--resume")
    assert stopped.value.code == 2 and "is damaged" in capsys.readouterr().err


def test_evaluation_plays_levels_that_training_does_not():
    args = rat.Args(num_envs=8, num_levels=3, start_level=7, eval_levels=2)
    levels = {False: set(), True: set()}
    for unseen, found in levels.items():
        envs = rat.Procgen(args, 1, unseen)
        for _ in range(150):
            found |= {info["level_seed"] for info in envs.env.get_info()}
            envs.step(np.random.default_rng(0).integers(15, size=8))
    assert levels == {False: {7, 8, 9}, True: {10, 11}}


def test_same_seed_same_csv_and_no_notice_from_gym(tmp_path):
    rows = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(
            "rat_procgen", *TINY, "--total-timesteps", 64, "--seed", seed, "--output-dir", tmp_path, "--run-name", name
        )
        rows.append([{**row, "sps": 0, "wall_seconds": 0} for row in read_csv(tmp_path / name)])
    assert rows[0] == rows[1] != rows[2]
    arguments = [*TINY, "--total-timesteps", 64, "--output-dir", tmp_path, "--run-name", "d"]
    result = subprocess.run(
        command("rat_procgen", *arguments), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and result.stdout.count("\n") == 1
    assert all(line.startswith("step ") for line in result.stderr.splitlines()), result.stderr


BAD = {
    "unknown game": (["--env-id", "pong"], "--env-id pong"),
    "gymnasium's name": (["--env-id", "procgen-starpilot-v0"], "--env-id procgen-starpilot-v0"),
    "negative level": (["--start-level", "-1"], "--start-level -1"),
    "negative levels": (["--num-levels", "-1"], "--num-levels -1"),
    "levels beyond the last": (["--start-level", 2**31 - 100, "--num-levels", 200], "--start-level 2147483548"),
    "unseen beyond the last": (["--start-level", 2**31 - 300, "--eval-levels", 200], "--start-level 2147483348"),
    "nothing unseen": (["--num-levels", 0, "--eval-levels", 10], "--num-levels 0"),
    "nothing first": (["--num-levels", 0, "--start-level", 5], "--num-levels 0"),
    "no channels": (["--channels", 2, 0, 2], "--channels 0"),
    "no hidden": (["--hidden", 0], "--hidden 0"),
    "no memory": (["--kernel-memory", 0], "--kernel-memory 0"),
    "indivisible": (["--num-minibatches", 3], "--num-minibatches 3"),
    "gamma above 1": (["--gamma", 1.1], "--gamma 1.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case, tmp_path, capsys):
    arguments, named = BAD[case]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train("rat_procgen", *TINY, "--total-timesteps", 64, "--output-dir", tmp_path / "runs", *arguments)
    output = capsys.readouterr()
    assert (stopped.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    assert output.err.startswith("rat_procgen: ") and named in output.err
    assert not (tmp_path / "runs").exists()


def test_python_without_procgen(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "procgen.env", None)  # importing it fails as if there were none
    with pytest.raises(SystemExit) as stopped:
        train("rat_procgen", *TINY, "--total-timesteps", 64, "--output-dir", tmp_path / "runs")
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence.count("\n") == 1 and "Python 3.11 or 3.12" in sentence


def test_benchmark_prints_every_row():
    program = importlib.util.spec_from_file_location("procgen_speed", ROOT / "benchmark" / "procgen_speed.py")
    result = subprocess.run(
        [sys.executable, program.origin, "--quick"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert [line.split(" ")[1] for line in result.stdout.splitlines()[-2:]] == ["tape", "vmap"]
