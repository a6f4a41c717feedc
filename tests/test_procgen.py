"""rat_procgen: convolutions against float64 scores, the adapter against the raw package, runs."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, environment, flat, read_csv, run, same, score_matrix, train
from torch import nn
from torch.distributions import Categorical

import rat_procgen as rat

if sys.version_info >= (3, 13):
    pytest.skip("Procgen has no wheel for this Python", allow_module_level=True)
TINY = ["--channels", 2, 2, 2, "--hidden", 8, "--num-envs", 4, "--num-steps", 16, "--device", "cpu"]
TINY += ["--num-minibatches", 2, "--critic-minibatches", 2, "--update-epochs", 1]
TINY += ["--critic-epochs", 1, "--eval-levels", 0]  # 64-step iterations
LEVELS = {"num_envs": 4, "env_id": "fruitbot", "num_levels": 5, "start_level": 3}


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def tiny_agent():
    torch.manual_seed(0)
    spaces = rat.Procgen.single_observation_space, rat.Procgen.single_action_space
    return rat.Agent(*spaces, channels=(2, 2, 2), hidden=8)


def raw_games(seed, **levels):
    """The package without the adapter."""
    from procgen import ProcgenGym3Env

    return ProcgenGym3Env(4, "fruitbot", distribution_mode="easy", rand_seed=seed, **levels)


# ---- The core --------------------------------------------------------------------------------


class Strided(nn.Module):
    """Strides, paddings and kernels that are not square, a sum, a convolution without bias."""

    def __init__(self, **setting):
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1))
        self.inner = nn.Conv2d(4, 4, 3, **{"padding": 1, "bias": False, **setting})
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, obs):
        x = self.first(obs.permute(0, 3, 1, 2) / 255)  # [B, 4, 7, 8]
        x = self.pool(x + self.inner(x.relu()))
        return Categorical(logits=self.head(x.flatten(1)))


class Overwritten(Strided):
    """A convolution whose output an activation overwrites."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(self.inner, nn.ReLU(inplace=True))


class OneRow(Strided):
    """A layer that sees one row for all samples."""

    def __init__(self):
        super().__init__()
        self.head.register_forward_pre_hook(lambda _, inputs: inputs[0][:1])


class Frozen(Strided):
    """A convolution that is not trained."""

    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


def impala():
    return rat.Actor((16, 8, 3), (2, 3, 4), 8, nn.Linear(8, 5))


SHAPES = {impala: (16, 8, 3), Strided: (15, 7, 3)}


class Problem:
    """A block of 60 with a fifth of the weights zero, previous g, and H [60, p] in float64."""

    def __init__(self, policy):
        torch.manual_seed(0)
        self.actor = policy()
        for p in self.actor.parameters():
            p.data += 0.1 * torch.randn_like(p)
        self.obs = torch.randint(256, (60, *SHAPES[policy]), dtype=torch.uint8)
        self.actions = torch.randint(5, (60,))
        self.y = torch.randn(60)
        self.ratio = torch.rand(60).clamp(min=0.1) * (torch.rand(60) > 0.2)
        self.previous = [0.1 * torch.randn_like(p) for p in self.actor.parameters()]
        self.scores = score_matrix(self.actor, self.obs, self.actions)

    def direction(self, damping, previous=None):
        scores = rat.tape_scores(self.actor, self.obs, self.actions)
        zeros = [torch.zeros_like(p) for p in self.actor.parameters()]
        start = dict(zip(self.actor.parameters(), previous or zeros))
        residual = self.y - rat.product(scores, start)
        return list(rat.kaczmarz_step(scores, residual, self.ratio, damping, start).values())

    def minimiser(self, damping, previous):
        """argmin_g |y - H g|^2_Sigma + damping |g - previous|^2, the p x p way."""
        weighted = self.scores.T * (self.ratio.double() / (self.ratio > 0).sum())
        curvature = weighted @ self.scores + damping * torch.eye(self.scores.shape[1]).double()
        return torch.linalg.solve(curvature, weighted @ self.y.double() + damping * previous)


def forward_sizes(actor, monkeypatch):
    """A list that gets the number of samples of each forward pass."""
    sizes = []
    forward = actor.forward

    def recorded(obs):
        sizes.append(len(obs))
        return forward(obs)

    monkeypatch.setattr(actor, "forward", recorded)
    return sizes


@pytest.mark.parametrize("policy", [impala, Strided])
def test_tape_gives_kernel_and_both_products(policy, monkeypatch):
    """K, H v and H^T u, from chunks of the samples."""
    problem = Problem(policy)
    actor, scores = problem.actor, problem.scores
    sizes = forward_sizes(actor, monkeypatch)
    tape = rat.tape_scores(actor, problem.obs, problem.actions)
    assert sizes == [1, 32, 28]
    assert relative(rat.kernel(tape), scores @ scores.T) < 1e-4
    assert relative(rat.score_norm_sq(tape), scores.square().sum(1)) < 1e-4
    v = dict(zip(actor.parameters(), problem.previous))
    assert relative(rat.product(tape, v), scores @ flat(problem.previous).double()) < 1e-4
    u = torch.randn(60)
    transposed = rat.transposed_product(tape, u)
    found = flat([transposed[p] for p in actor.parameters()])
    assert relative(found, scores.T @ u.double()) < 1e-4


@pytest.mark.parametrize("with_previous", [False, True])
@pytest.mark.parametrize("damping", [1e-2, 1])
def test_direction_is_the_proximal_minimiser(damping, with_previous):
    problem = Problem(impala)
    previous = problem.previous if with_previous else None
    start = flat(problem.previous).double() * with_previous
    direction = problem.direction(damping, previous)
    assert [d.shape for d in direction] == [p.shape for p in problem.actor.parameters()]
    assert relative(flat(direction), problem.minimiser(damping, start)) < 1e-4


def test_damping_survives_large_scores_and_copies_are_made_a_layer_at_a_time(monkeypatch):
    """Damping of 1e-7 of the kernel's trace: float32 would round it off."""
    problem = Problem(impala)
    trace = (problem.ratio / (problem.ratio > 0).sum()) @ problem.scores.square().sum(1).float()
    original = rat.kernel

    def lazy(scores):
        assert not isinstance(scores, list | tuple)
        return original(scores)

    monkeypatch.setattr(rat, "kernel", lazy)
    damping = 1e-7 * trace.item()
    # its solution is ill-conditioned: held by the residual of the problem that it solves
    found = flat(problem.direction(damping)).double()
    best = problem.minimiser(damping, 0)
    sigma = problem.ratio.double() / (problem.ratio > 0).sum()

    def loss(g):
        misfit = problem.y.double() - problem.scores @ g
        return (sigma @ misfit.square() + damping * g.square().sum()).item()

    assert loss(found) < 1.01 * loss(best)
    assert relative(found, best) < 0.05


def test_ppo_step_descends_the_clipped_surrogate(monkeypatch):
    """The gradient before its clip at 0.5, from the scores in float64; only the actor moves."""
    problem = Problem(impala)
    policy = problem.actor(problem.obs)
    shift = torch.randn(60) / 4  # log ratios
    old = (policy.log_prob(problem.actions) - shift).detach()
    advantages = 3 * problem.y + 1
    block = rat.Samples(problem.obs, problem.actions, advantages, None, old)
    y = ((advantages - advantages.mean()) / advantages.std(correction=0)).double()
    ratio = shift.exp().double()
    clipped = ((y > 0) & (ratio > 1.2)) | ((y < 0) & (ratio < 0.8))
    assert 10 < clipped.sum() < 50
    parameters = list(problem.actor.parameters())
    entropy = flat(torch.autograd.grad(policy.entropy().mean(), parameters)).double()
    gradient = -problem.scores.T @ (ratio * y * ~clipped) / 60 - 0.01 * entropy

    clips = []
    monkeypatch.setattr(
        nn.utils,
        "clip_grad_norm_",
        lambda ps, bound: clips.append((flat([p.grad for p in ps]), bound)),
    )
    other = nn.Parameter(torch.ones(3))
    before = flat(parameters).clone()
    rat.ppo_step(problem.actor, torch.optim.SGD([*parameters, other], lr=0.1), block)
    ((found, bound),) = clips
    assert bound == 0.5
    assert relative(found, gradient) < 1e-4
    assert relative(flat(parameters) - before, -0.1 * gradient) < 1e-3
    assert torch.equal(other, torch.ones(3))


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        (lambda: Strided(groups=2), "inner Conv2d"),
        (lambda: Strided(dilation=(1, 2), padding=(1, 2)), "inner Conv2d"),
        (lambda: Strided(padding_mode="circular"), "inner Conv2d"),
        (Overwritten, r"inner\.0 Conv2d"),
        (OneRow, "head Linear"),
        (Frozen, "first Conv2d"),
    ],
)
def test_the_tape_refuses_what_it_does_not_know(policy, named):
    obs = torch.randint(256, (8, 15, 7, 3), dtype=torch.uint8)
    with pytest.raises(TypeError, match=f"{named}.*has vmap_scores"):
        rat.tape_scores(policy(), obs, torch.zeros(8, dtype=torch.int64))


def test_the_tape_knows_padding_by_name():
    torch.manual_seed(0)
    actor = Strided(padding="same")
    obs, actions = torch.randint(256, (8, 15, 7, 3), dtype=torch.uint8), torch.randint(5, (8,))
    scores = score_matrix(actor, obs, actions)
    assert relative(rat.kernel(rat.tape_scores(actor, obs, actions)), scores @ scores.T) < 1e-4


def test_without_gradients_a_network_takes_its_images_in_parts(monkeypatch):
    agent = tiny_agent()
    obs = torch.randint(256, (3, 400, 64, 64, 3), dtype=torch.uint8)
    sizes = forward_sizes(agent.policy.body, monkeypatch)
    whole = agent.policy(obs[0][:50]).logits
    values = agent.value(obs[0][:50])
    sizes.clear()
    with torch.no_grad():
        logits = agent.policy(obs.flatten(0, 1)).logits
        assert agent.value(obs).shape == (3, 400)
    assert sizes == [512, 512, 176]
    torch.testing.assert_close(logits[:50], whole)
    torch.testing.assert_close(agent.value(obs[:1, :50])[0], values)


# ---- The games -------------------------------------------------------------------------------


class Recorder(rat.gym.vector.VectorWrapper):
    """Keeps the raw rewards; replaces them where there are others to give."""

    def __init__(self, env, replaced=()):
        super().__init__(env)
        self.raw = []
        self.replaced = dict(replaced)

    def step(self, actions):
        obs, reward, *others = self.env.step(actions)
        reward = self.replaced.get(len(self.raw), reward)
        self.raw.append(reward)
        return obs, reward, *others


def wrapped(games, gamma):
    """As main wraps them: environments to step, and what keeps the statistics of raw rewards."""
    statistics = rat.gym.wrappers.vector.RecordEpisodeStatistics(games)
    scaled = rat.gym.wrappers.vector.NormalizeReward(statistics, gamma)
    return rat.gym.wrappers.vector.ClipReward(scaled, -10, 10), statistics


@pytest.fixture(scope="module")
def played():
    """400 steps of 4 games by a fixed policy, and what the raw package gives for its actions."""
    agent = tiny_agent()
    envs, statistics = wrapped(rat.Procgen(rat.Args(**LEVELS), seed=11), gamma=0.9)
    obs = torch.tensor(envs.reset()[0])
    rollout = rat.collect(envs, agent, obs, 400)
    games = raw_games(11, num_levels=5, start_level=3)
    seen = [games.observe()]
    for action in rollout.actions.numpy():
        games.act(action)
        seen.append(games.observe())
    return rollout, statistics, seen


def test_adapter_gives_what_the_raw_package_gives(played):
    rollout, statistics, seen = played
    assert rollout.obs.dtype == torch.uint8
    assert rollout.obs.shape == (401, 4, 64, 64, 3)
    for mine, (_, raw, _) in zip(rollout.obs.numpy(), seen, strict=True):
        np.testing.assert_array_equal(mine, raw["rgb"])
    first = np.array([first for _, _, first in seen])
    assert first[0].all()
    assert first[1:].sum() > 4
    np.testing.assert_array_equal(rollout.terminated, first[1:])
    np.testing.assert_array_equal(rollout.done, first[1:])
    episodes = []
    returns, lengths = np.zeros(4), np.zeros(4)
    for reward, _, ends in seen[1:]:
        returns += reward
        lengths += 1
        episodes += zip(returns[ends], lengths[ends])
        returns[ends] = lengths[ends] = 0
    assert any(episode_return for episode_return, _ in episodes)
    found = np.transpose([statistics.return_queue, statistics.length_queue])
    np.testing.assert_allclose(found, episodes[-100:])


def test_rewards_are_in_units_of_the_discounted_returns_deviation_so_far(played):
    rollout, _, seen = played
    running = np.zeros(4)
    history = []
    for step, (reward, _, ends) in enumerate(seen[1:]):
        history.append(reward + 0.9 * running * ~ends)
        running = history[-1] * ~ends
        if step >= 100:  # Gymnasium starts from a variance of 1 with little weight
            expected = np.clip(reward / np.std(history), -10, 10)
            np.testing.assert_allclose(rollout.rewards[step], expected, rtol=1e-3, atol=1e-5)
    assert rollout.rewards[100:].std() > 0.1


def test_rewards_are_clipped_and_their_statistics_are_saved(tmp_path, monkeypatch):
    """A run's rewards with one of -1000, and what its resume starts from."""
    huge = {27: np.array([-1e3, 0, 0, 0], np.float32)}  # in the second iteration
    original = rat.Procgen
    monkeypatch.setattr(rat, "Procgen", lambda *arguments: Recorder(original(*arguments), huge))
    rollouts = []
    collect = rat.collect

    def recorded(envs, *arguments):
        rollouts.append((collect(envs, *arguments), copy.deepcopy(vars(envs.env.return_rms))))
        return rollouts[-1][0]

    monkeypatch.setattr(rat, "collect", recorded)
    arguments = [*TINY, "--output-dir", tmp_path, "--run-name", "a", "--total-timesteps"]
    train("rat_procgen", *arguments, 128)
    rewards = torch.cat([rollout.rewards for rollout, _ in rollouts])
    assert rewards.min() == -10  # 1000 over the deviation of one in 112 would be -10.6
    assert checkpoint(tmp_path / "a")["reward_statistics"] == rollouts[1][1]
    assert rollouts[1][1]["count"] == pytest.approx(128, abs=1e-3)
    train("rat_procgen", *arguments, 192, "--resume")
    assert checkpoint(tmp_path / "a")["reward_statistics"]["count"] == pytest.approx(192, abs=1e-3)


def test_evaluation_is_the_first_episode_of_each_environment_to_its_end(monkeypatch):
    args = rat.Args(**LEVELS, eval_levels=2, device="cpu")
    agent = tiny_agent()
    actions = []
    act = agent.act

    def recorded(obs):
        actions.append(act(obs)[1])
        return actions[-1], actions[-1]

    monkeypatch.setattr(agent, "act", recorded)
    torch.manual_seed(0)
    score = rat.evaluate(args, agent, 13)
    games = raw_games(13, num_levels=2, start_level=8)
    returns, ended = np.zeros(4), np.zeros(4, bool)
    later = 0.0  # rewards of second episodes
    for action in actions:
        assert not ended.all()
        games.act(action.numpy())
        reward, _, first = games.observe()
        returns += np.where(ended, 0, reward)
        later += np.abs(reward[ended]).sum()
        ended |= first
    assert ended.all()
    assert returns.any()
    assert later > 0
    assert score == pytest.approx(returns.mean())
    with monkeypatch.context() as patch:
        patch.setattr(rat, "gathered", lambda value: [value, value + 1])  # another process
        torch.manual_seed(0)
        assert rat.evaluate(args, agent, 13) == pytest.approx(score + 0.5)


@pytest.mark.parametrize(("unseen", "levels"), [(False, {7, 8, 9}), (True, {10, 11})])
def test_evaluation_plays_levels_that_training_does_not(unseen, levels):
    args = rat.Args(num_envs=8, num_levels=3, start_level=7, eval_levels=2)
    envs = rat.Procgen(args, 1, unseen)
    generator = np.random.default_rng(0)
    found = set()
    for _ in range(150):
        found |= {info["level_seed"] for info in envs.env.get_info()}
        envs.step(generator.integers(15, size=8))
    assert found == levels


# ---- Runs ------------------------------------------------------------------------------------

GAMMA, LAMBDA, BETA = 0.9, 0.8, 0.99999
CRITIC_CLIP = 3.0


class Recording:
    """What an iteration of a run hands to its core and its critic; tensors are copies."""

    def __init__(self, agent, rollout):
        self.agent = agent  # as it stepped the games
        self.rollout = rollout
        self.blocks = []  # (agent then, block, y, ratio, damping, previous, g) of each block
        self.samples = None  # of the critic
        self.trained = None  # the agent after all updates of its policy
        self.clips = []  # bounds on the critic's gradients


def record(folder, monkeypatch, kaczmarz, *more):
    """Train two iterations of two passes with large steps; a Recording each, rows of the CSV."""
    recordings = []
    collect, step, fit = rat.collect, rat.kaczmarz_step, rat.fit_critic
    block_scores = rat.block_scores
    clip = nn.utils.clip_grad_norm_
    agents = []
    blocks = []

    def recorded_collect(envs, agent, *arguments):
        agents[:] = [agent]
        before = copy.deepcopy(agent)
        rollout = collect(envs, agent, *arguments)
        recordings.append(Recording(before, rollout))
        return rollout

    def recorded_scores(args, actor, block):
        blocks.append(block)
        return block_scores(args, actor, block)

    def recorded_step(scores, residual, ratio, damping, previous):
        before = copy.deepcopy(agents[0])
        y = residual + rat.product(scores, previous)
        result = step(scores, residual, ratio, damping, previous)
        ends = flat(previous.values()), flat(result.values())
        recordings[-1].blocks.append((before, blocks[-1], y, ratio, damping, *ends))
        return result

    def recorded_fit(args, critic, optimizer, samples):
        recordings[-1].trained = copy.deepcopy(agents[0])
        recordings[-1].samples = samples
        return fit(args, critic, optimizer, samples)

    def recorded_clip(parameters, bound):
        recordings[-1].clips.append(bound)
        return clip(parameters, bound)

    monkeypatch.setattr(rat, "collect", recorded_collect)
    monkeypatch.setattr(rat, "block_scores", recorded_scores)
    monkeypatch.setattr(rat, "kaczmarz_step", recorded_step)
    monkeypatch.setattr(rat, "fit_critic", recorded_fit)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", recorded_clip)
    arguments = [*TINY, "--env-id", "fruitbot", "--num-steps", 64, "--total-timesteps", 512]
    arguments += ["--update-epochs", 2, "--learning-rate", 0.5, "--gamma", GAMMA]
    arguments += ["--gae-lambda", LAMBDA]
    arguments += ["--kaczmarz", kaczmarz, "--critic-max-grad-norm", CRITIC_CLIP, *more]
    train("rat_procgen", *arguments, "--output-dir", folder, "--run-name", "x")
    return recordings, read_csv(folder / "x")


def advantages_of(rollout, values):
    """Generalised advantage estimation, one environment and one step after the other."""
    rewards, terminated = rollout.rewards.double().numpy(), rollout.terminated.numpy() > 0
    result = np.zeros_like(rewards)
    for env in range(rewards.shape[1]):
        trace = 0.0
        for t in reversed(range(len(rewards))):
            lives = not terminated[t, env]
            delta = rewards[t, env] + GAMMA * values[t + 1, env] * lives - values[t, env]
            trace = delta + GAMMA * LAMBDA * trace * lives
            result[t, env] = trace
    return result.ravel()


def log_probs(agent, obs):
    """log pi(.|s) [n, 15] by its formula."""
    with torch.no_grad():
        logits = agent.policy(obs).logits.double().numpy()
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_a_run_hands_its_core_and_critic_what_the_rollout_says(tmp_path, monkeypatch):
    """y, ratios, returns, PopArt and KL of two iterations, recomputed in NumPy."""
    recordings, rows = record(tmp_path, monkeypatch, "paper", "--max-grad-norm", 4.0)
    moments = np.zeros(3)
    ratios = []
    for recording, row in zip(recordings, rows, strict=True):
        rollout = recording.rollout
        assert rollout.terminated.any()
        with torch.no_grad():
            values = recording.agent.value(rollout.obs).double().numpy()
        advantages = advantages_of(rollout, values)
        returns = advantages + values[:-1].ravel()
        powers = np.array([1.0, returns.mean(), (returns**2).mean()])
        moments = BETA * moments + (1 - BETA) * powers
        mean, square = moments[1:] / moments[0]
        std = np.sqrt(square - mean**2)
        obs, actions = rollout.obs[:-1].flatten(0, 1), rollout.actions.flatten()
        taken = np.arange(256), actions.numpy()
        old = log_probs(recording.agent, obs)

        samples = recording.samples
        assert torch.equal(samples.obs, obs)
        assert torch.equal(samples.actions, actions)
        np.testing.assert_allclose(samples.returns, (returns - mean) / std, rtol=1e-3, atol=1e-4)
        assert recording.clips == [CRITIC_CLIP] * 2

        places = {(o.numpy().tobytes(), int(a)): i for i, (o, a) in enumerate(zip(obs, actions))}
        assert len(places) == 256
        seen = []
        for before, handed, y, ratio, damping, *_ in recording.blocks:
            played = zip(handed.obs, handed.actions)
            block = [places[o.numpy().tobytes(), int(a)] for o, a in played]
            seen += block
            wanted = advantages[block] - advantages[block].mean()
            np.testing.assert_allclose(y, wanted / wanted.std(), rtol=1e-3, atol=1e-3)
            moved = np.exp(log_probs(before, obs)[taken] - old[taken])[block]
            np.testing.assert_allclose(ratio, moved.clip(0.1, 10), rtol=1e-3)
            ratios += list(moved)
            assert damping == 0.1
        assert sorted(seen) == sorted(2 * list(range(256)))

        new = log_probs(recording.trained, obs)
        kl = (np.exp(old) * (old - new)).sum(1).mean()
        np.testing.assert_allclose(float(row["kl"]), kl, rtol=1e-3)
        entropy = -(np.exp(new) * new).sum(1).mean()
        np.testing.assert_allclose(float(row["entropy"]), entropy, rtol=1e-4)
        explained = 1 - advantages.var() / returns.var()
        np.testing.assert_allclose(float(row["explained_variance"]), explained, rtol=2e-2)
        rms = advantages.std(ddof=1)
        np.testing.assert_allclose(float(row["advantage_rms"]), rms, rtol=1e-3)
    assert max(ratios) > 2.5
    assert min(ratios) < 0.4


@pytest.mark.parametrize("kaczmarz", ["track", "paper"])
def test_a_rollouts_blocks_are_kaczmarz_steps(kaczmarz, tmp_path, monkeypatch):
    """track: g starts from 0.6 of the last; steps have length eta in the Fisher norm.

    paper: a rollout starts from zero, and steps are eta min(1, nu/|g|) g."""
    more = ["--memory", 0.6] if kaczmarz == "track" else ["--max-grad-norm", 0.3]
    more += ["--num-steps", 16, "--total-timesteps", 128]  # score_matrix is slow here
    recordings, rows = record(tmp_path, monkeypatch, kaczmarz, *more)
    last = torch.zeros(1)
    for recording, row in zip(recordings, rows, strict=True):
        assert len(recording.blocks) == 4
        policies = [before.policy for before, *_ in recording.blocks] + [recording.trained.policy]
        mean = np.mean([float(damping) for _, _, _, _, damping, *_ in recording.blocks])
        assert float(row["damping"]) == pytest.approx(mean, rel=1e-5)
        last = last * (0.6 if kaczmarz == "track" else 0.0)
        for i, (before, block, _, ratio, damping, previous, g) in enumerate(recording.blocks):
            torch.testing.assert_close(previous, last.expand_as(previous))
            last = g
            scores = score_matrix(before.policy, block.obs, block.actions)
            if kaczmarz == "track":
                trace = (ratio * scores.square().sum(1)).mean().item()
                assert float(damping) == pytest.approx(0.03 * trace, rel=1e-3)
                scale = 1 / (ratio * (scores @ g.double()).square()).mean().sqrt().item()
            else:
                assert g.norm() > 0.3
                scale = 0.3 / g.norm().item()
            step = float(row["learning_rate"]) * scale * g
            start, end = (flat(policy.parameters()) for policy in policies[i : i + 2])
            torch.testing.assert_close(end, start + step, rtol=1e-3, atol=1e-5)


def test_a_run_its_resume_and_its_play(tmp_path):
    arguments = [*TINY, "--output-dir", tmp_path, "--run-name", "a", "--total-timesteps", 128]
    evaluated = [*arguments, "--eval-levels", 50, "--eval-interval", 2]
    torch.set_flush_denormal(False)
    train("rat_procgen", *evaluated)
    assert torch.tensor([1e-39]).mul(1).count_nonzero() == 0  # Adam's would be slow
    folder = tmp_path / "a"
    before = checkpoint(folder)
    rows = read_csv(folder)
    assert [int(row["global_step"]) for row in rows] == [64, 128]
    wanted = {"kl", "entropy", "episodic_return", "eval_return", "value_loss", "fisher_norm"}
    assert wanted <= set(rows[0])
    assert before["eval_return"] == float(rows[1]["eval_return"])
    assert any(g.any() for g in before["previous"])
    train("rat_procgen", *evaluated, "--resume")  # nothing left to do: the state stays
    after = checkpoint(folder)
    for key in before.keys() - {"args", "wall_seconds"}:
        assert same(before[key], after[key]), key
    resume = ["--resume", "--output-dir", tmp_path, "--run-name", "a"]  # the rest as it was
    train("rat_procgen", *resume, "--total-timesteps", 192)
    assert checkpoint(folder)["global_step"] == 192
    assert [int(row["global_step"]) for row in read_csv(folder)] == [64, 128, 192]
    video = tmp_path / "a.mp4"
    words = [sys.executable, ROOT / "enjoy.py", folder / "checkpoint.pt", "--episodes", 2]
    words += ["--stochastic", "--json", "--video", video]
    played = subprocess.run(
        list(map(str, words)), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert played.returncode == 0, played.stderr
    assert json.loads(played.stdout)["env_id"] == "starpilot"
    assert min(json.loads(played.stdout)["lengths"]) > 10
    assert video.stat().st_size > 1000


def test_a_run_with_ppos_step_and_its_resume(tmp_path, capsys):
    """Three passes of Adam on actor and critic, whose states a resumed run goes on with."""
    arguments = [*TINY, "--kaczmarz", "ppo", "--output-dir", tmp_path, "--run-name", "a"]
    arguments += ["--kl-low", 1e-9]  # no rule may lower the step size
    train("rat_procgen", *arguments, "--update-epochs", 3, "--total-timesteps", 64)
    before = checkpoint(tmp_path / "a")
    steps = [state["step"].item() for state in before["optimizer"]["state"].values()]
    assert set(steps) == {2, 6}  # two minibatches a pass
    assert [group["lr"] for group in before["optimizer"]["param_groups"]] == [5e-4, 5e-4]
    assert not any(g.any() for g in before["previous"])
    resume = ["--resume", "--output-dir", tmp_path, "--run-name", "a"]
    with pytest.raises(SystemExit) as stopped:
        train("rat_procgen", *resume, "--total-timesteps", 128, "--kaczmarz", "track")
    assert stopped.value.code == 2
    assert "cannot change a run to or from --kaczmarz ppo" in capsys.readouterr().err
    assert checkpoint(tmp_path / "a")["global_step"] == 64
    train("rat_procgen", *resume, "--total-timesteps", 128, "--learning-rate", 1e-4)
    after = checkpoint(tmp_path / "a")
    assert [group["lr"] for group in after["optimizer"]["param_groups"]] == [5e-4, 1e-4]
    steps = {state["step"].item() for state in after["optimizer"]["state"].values()}
    assert steps == {4, 12}
    rows = read_csv(tmp_path / "a")
    assert [float(row["learning_rate"]) for row in rows] == [5e-4, 1e-4]
    assert {"gradient_norm"} <= set(rows[0])


def test_ppos_defaults_are_its_own():
    args = rat.Args(kaczmarz="ppo")
    assert (args.update_epochs, args.learning_rate) == (3, 5e-4)
    assert rat.Args(kaczmarz="ppo", learning_rate=1e-3).learning_rate == 1e-3
    assert rat.Args().learning_rate == 0.05


def test_same_seed_same_csv(tmp_path):
    rows = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        where = ["--output-dir", tmp_path, "--run-name", name]
        train("rat_procgen", *TINY, "--total-timesteps", 64, "--seed", seed, *where)
        rows.append([{**row, "sps": 0, "wall_seconds": 0} for row in read_csv(tmp_path / name)])
    assert rows[0] == rows[1] != rows[2]


def test_a_run_prints_nothing_but_its_own(tmp_path):
    """gym, which Procgen imports, would say that it is unmaintained."""
    result = run("rat_procgen", *TINY, "--total-timesteps", 64, "--output-dir", tmp_path)
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


BAD = {
    "unknown game": (["--env-id", "pong"], "--env-id pong"),
    "gymnasium's name": (["--env-id", "procgen-starpilot-v0"], "--env-id procgen-starpilot-v0"),
    "negative level": (["--start-level", "-1"], "--start-level -1"),
    "negative levels": (["--num-levels", "-1"], "--num-levels -1"),
    "nothing unseen": (["--num-levels", 0, "--eval-levels", 10], "--num-levels 0"),
    "no hidden": (["--hidden", 0], "--hidden 0"),
    "too many blocks": (["--num-minibatches", 17], "--num-minibatches 17"),
    "gamma above 1": (["--gamma", 1.1], "--gamma 1.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case, tmp_path, capsys):
    arguments, named = BAD[case]
    where = ["--total-timesteps", 64, "--output-dir", tmp_path / "runs"]
    with pytest.raises(SystemExit) as stopped:
        train("rat_procgen", *TINY, *where, *arguments)
    output = capsys.readouterr()
    assert (stopped.value.code, output.out) == (2, "")
    assert named in output.err
    assert "Traceback" not in output.err
    assert not (tmp_path / "runs").exists()


def test_a_network_that_the_tape_refuses_is_named(tmp_path, monkeypatch, capsys):
    original = rat.conv
    monkeypatch.setattr(rat, "conv", lambda a, b: nn.Sequential(original(a, b), nn.GroupNorm(1, b)))
    where = ["--total-timesteps", 64, "--output-dir", tmp_path / "runs"]
    with pytest.raises(SystemExit) as stopped:
        train("rat_procgen", *TINY, *where)
    assert stopped.value.code == 1
    assert "layer body.0.1 GroupNorm" in capsys.readouterr().err


def test_python_without_procgen(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "procgen.env", None)  # as if there were none
    with pytest.raises(SystemExit) as stopped:
        train("rat_procgen", *TINY, "--total-timesteps", 64, "--output-dir", tmp_path / "runs")
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence.count("\n") == 1
    assert "Python 3.11 or 3.12" in sentence


def test_benchmark_prints_every_row():
    program = str(ROOT / "benchmark" / "procgen_speed.py")
    result = subprocess.run(
        [sys.executable, program, "--quick"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()[-2:]] == ["tape", "vmap"]
