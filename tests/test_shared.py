"""rat_shared.py's core against explicit float64 formulas with materialised scores, and its run."""

import copy
import itertools
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import flat, learn
from recording import check_block, check_statistics, recompute, record, values_of
from torch import nn
from torch.distributions import kl_divergence
from torch.func import functional_call, jacrev

import rat_shared as rat

OBS = gym.spaces.Box(-1, 1, (3,))
SPACES = {"Gaussian": gym.spaces.Box(-1, 1, (2,)), "Categorical": gym.spaces.Discrete(3)}
every_policy = pytest.mark.parametrize("policy", SPACES)


def problem(policy, samples=90, hidden=16, obs_dim=4, seed=0, activation="Tanh"):
    """An agent away from its initialisation, a block of samples and eps.

    A few of the block's ratios lie beyond the clamp."""
    torch.manual_seed(seed)
    agent = rat.Agent(gym.spaces.Box(-1, 1, (obs_dim,)), SPACES[policy], activation, hidden)
    for p in agent.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs = torch.randn(samples, obs_dim)
    with torch.no_grad():
        distribution = agent.policy(obs)
        actions = distribution.sample()
        old_log_prob = distribution.log_prob(actions) + 1.5 * torch.randn(samples)
    epsilon, returns, advantages = torch.randn(3, samples)
    block = rat.Samples(obs, actions, 3 + 2 * advantages, returns, old_log_prob)
    return agent, block, epsilon


def explicit(agent, obs, actions):
    """In float64 log pi, V [2, B] and their Jacobians [2, B, p].

    Columns are as in agent.parameters()."""
    agent = copy.deepcopy(agent).double()

    def values(named):
        policy, value = functional_call(agent, named, obs.double())
        return torch.stack([policy.log_prob(actions), value])

    named = {name: p.detach() for name, p in agent.named_parameters()}
    rows = jacrev(values)(named)
    return values(named), torch.cat([rows[name].flatten(2) for name in named], 2)


def explicit_scores(agent, obs, actions, epsilon):
    """H [B, p] in float64."""
    _, (d_log_prob, d_value) = explicit(agent, obs, actions)
    return d_log_prob + 2 * epsilon.double()[:, None] * d_value


def explicit_targets(scores, weights, rhs, damping):
    """(damping I + H H^T Sigma)^-1 of the rows of rhs [2, B], zero where the weight is."""
    sigma = torch.diag(weights.double() / (weights > 0).sum())
    matrix = damping * torch.eye(len(weights)).double() + scores @ scores.T @ sigma
    return torch.linalg.solve(matrix, rhs.T).T * (weights > 0)


def explicit_ascent(args, agent, block, epsilon, shift):
    """-grad L of (8), flat, for the right-hand sides y + H shift and 1 + H shift."""
    obs, actions, advantages, returns, old_log_prob = block
    (log_prob, value), (d_log_prob, d_value) = explicit(agent, obs, actions)
    scores = explicit_scores(agent, obs, actions, epsilon)
    ratio = (log_prob - old_log_prob).exp()
    inside = (ratio > 0.1) & (ratio < 10)  # no gradient beyond the clamp
    assert not inside.all()
    y = (advantages - advantages.mean()) / advantages.std(correction=0)
    rhs = torch.stack([y, torch.ones_like(y)]) + scores @ shift
    a, c = explicit_targets(scores, ratio.clamp(0.1, 10), rhs, args.damping)
    actor = (a * ratio * inside) @ d_log_prob
    critic = (2 * (value - returns) * c) @ d_value
    return (actor - args.vf_coef * critic) / len(obs)


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def like(agent, vector):
    """A flat float64 vector by parameter, in float32."""
    parts = vector.float().split([p.numel() for p in agent.parameters()])
    return {p: part.view_as(p) for part, p in zip(parts, agent.parameters())}


@pytest.mark.parametrize(("memory", "share"), [(0.0, 1), (0.8, 1), (0.8, 1 / 4)])
@every_policy
def test_joint_step_is_the_least_squares_solution_over_three_blocks(policy, memory, share):
    """(8b) the p x p way: policy's and critic's rows, damping relative to their mean square.

    Where the KL bound is a share of kl_low, beta is its root of critic_step."""
    args = rat.Args(damping=0.02, vf_coef=0.6, critic_step=0.7, kl_low=1e9)  # no bound
    beta = 0.7 * share**0.5
    step = torch.zeros(1).double()
    for seed in range(3):
        agent, block, _ = problem(policy, seed=seed)
        obs, actions, advantages, returns, old_log_prob = block
        (log_prob, value), (h, v) = explicit(agent, obs, actions)
        w = (log_prob - old_log_prob).exp().clamp(0.1, 10)
        y = ((advantages - advantages.mean()) / advantages.std(correction=0)).double()
        policy_trace = (w * h.square().sum(1)).mean()
        c_square = 0.6 * policy_trace / v.square().sum(1).mean()
        damping = 0.02 * (policy_trace + 0.6 * policy_trace)
        start = memory * step.expand(h.shape[1])
        curvature = (h.T * w @ h + c_square * v.T @ v) / len(y)
        pull = (h.T @ (w * 0.3 * y) + c_square * v.T @ (beta * (returns - value))) / len(y)
        system = curvature + damping * torch.eye(h.shape[1]).double()
        step = torch.linalg.solve(system, pull + damping * start)
        applied, remembered, metrics = rat.joint_step(
            args, agent, block, like(agent, start), 0.3, share * args.kl_low
        )
        assert relative(flat(applied.values()), step) < 1e-4
        assert torch.equal(flat(remembered.values()), flat(applied.values()))
        norm = (w * (h @ step).square()).mean().sqrt().item()
        assert float(metrics["rat/fisher_norm"]) == pytest.approx(norm, rel=1e-3)
        assert float(metrics["rat/damping"]) == pytest.approx(damping.item() / 2, rel=1e-4)


@every_policy
def test_a_block_moves_the_policy_no_further_than_the_kl_allows(policy):
    """Else the step is shortened as if the KL were quadratic in it, and is what is remembered."""
    agent, block, _ = problem(policy)
    nothing = {p: torch.zeros_like(p) for p in agent.parameters()}
    before = flat(agent.parameters())
    whole, *_ = rat.joint_step(rat.Args(kl_low=4e8), agent, block, nothing, 0.3, 1e8)
    moved = copy.deepcopy(agent)
    for p, d in zip(moved.parameters(), whole.values()):
        p.data += d
    kl = kl_divergence(agent.policy(block.obs), moved.policy(block.obs)).mean().item()
    args = rat.Args(kl_low=4 * kl / 9)  # the bound is a quarter of it, as above
    step, remembered, _ = rat.joint_step(args, agent, block, nothing, 0.3, kl / 9)
    expected = flat(whole.values()).double() / 3
    assert relative(flat(step.values()), expected) < 1e-3
    assert torch.equal(flat(remembered.values()), flat(step.values()))
    torch.testing.assert_close(flat(agent.parameters()), before, rtol=0, atol=1e-6)


PUBLISHED = {  # passes, lambda, what the next rollout starts from, KL bounds, networks
    "paper": (4, 0.1, 0.0, 0.005, "ReLU"),
    "release": (4, 0.1, 1.0, 0.005, "ReLU"),
    "off": (4, 0.1, 0.0, 0.005, "ReLU"),
}


@pytest.mark.parametrize("bound", [0.5, 1e3])
@pytest.mark.parametrize("kaczmarz", PUBLISHED)
@every_policy
def test_published_rules_are_their_direct_form_over_three_blocks(
    policy, kaczmarz, bound, monkeypatch
):
    """The gradient of (8), and what each setting adds to the right-hand sides and remembers."""
    args = rat.Args(kaczmarz=kaczmarz, vf_coef=0.7, max_grad_norm=bound)
    found = (args.update_epochs, args.damping, args.memory, args.kl_low, args.activation)
    assert found == PUBLISHED[kaczmarz]
    sign = {"paper": -1, "release": 1, "off": 0}[kaczmarz]
    mine = torch.zeros(1).double()  # g_{j-1} or d_{j-1}
    for seed in range(3):
        agent, block, epsilon = problem(policy, seed=seed, activation=args.activation)
        mine = mine.expand(sum(p.numel() for p in agent.parameters()))
        previous = like(agent, abs(sign) * -sign * mine)
        unclipped = explicit_ascent(args, agent, block, epsilon, sign * mine)
        if kaczmarz == "paper":
            unclipped += mine
        norm = unclipped.norm().item()
        clipped = unclipped * min(1, args.max_grad_norm / (norm + 1e-6))
        assert (norm > bound) == (bound == 0.5)
        mine = {"paper": unclipped, "release": clipped, "off": mine}[kaczmarz]
        monkeypatch.setattr(torch, "randn_like", lambda y, drawn=epsilon: drawn)
        step, remembered, metrics = rat.sampled_step(args, agent, block, previous, 0.02)
        monkeypatch.undo()
        assert [d.shape for d in step.values()] == [p.shape for p in agent.parameters()]
        assert relative(flat(step.values()), 0.02 * clipped) < 1e-4
        assert metrics["rat/direction_norm"].item() == pytest.approx(norm, rel=1e-4)
        if kaczmarz == "off":
            assert not flat(remembered.values()).any()
        else:
            assert relative(-sign * flat(remembered.values()), mine) < 1e-4


@every_policy
def test_curvature_is_that_of_both_in_expectation_over_epsilon(policy, draws=20_000):
    """Mean of H^T H over draws of eps: within 2 % of its limit, standard error below 1 %."""
    agent, block, _ = problem(policy, samples=5, hidden=4, obs_dim=2)
    _, (d_log_prob, d_value) = explicit(agent, block.obs, block.actions)
    expected = d_log_prob.T @ d_log_prob + 4 * d_value.T @ d_value
    actions = torch.cat([block.actions] * draws)
    layers = rat.tape_scores(agent, block.obs.repeat(draws, 1), (actions, torch.randn(5 * draws)))
    rows = {}
    for layer in layers:
        matrices = layer.grad_out[:, :, None] * layer.x[:, None]  # [B, d_out, d_in (+ 1)]
        weight, *bias = layer.params
        rows[weight] = matrices[:, :, : weight.shape[1]].flatten(1)
        rows.update((b, matrices[:, :, -1]) for b in bias)
    scores = torch.cat([rows[p] for p in agent.parameters()], 1)
    assert relative(scores.T @ scores / draws, expected) < 0.02
    cross = d_log_prob.T @ d_value
    assert 2 * (cross + cross.T).norm() > 0.1 * expected.norm()  # what eps = 1 would add


RULES = {"track": partial(rat.joint_step, low=0.008), "release": rat.sampled_step}
every_rule = pytest.mark.parametrize("kaczmarz", RULES)


def step_of(kaczmarz, agent, block):
    nothing = {p: torch.zeros_like(p) for p in agent.parameters()}
    step, *_ = RULES[kaczmarz](rat.Args(kaczmarz=kaczmarz), agent, block, nothing, 0.05)
    return flat(step.values())


def test_a_kl_that_rounding_leaves_below_zero_does_not_spoil_the_step(monkeypatch):
    agent, block, _ = problem("Categorical")
    monkeypatch.setattr(rat, "kl_divergence", lambda old, new: torch.full((90,), -1e-12))
    assert step_of("track", agent, block).isfinite().all()


@pytest.mark.parametrize("broken", ["obs", "advantages", "log_prob"])
@every_rule
def test_values_that_are_not_finite_raise(broken, kaczmarz):
    agent, block, _ = problem("Categorical")
    getattr(block, broken)[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        step_of(kaczmarz, agent, block)


@every_rule
def test_ratios_of_any_size_have_finite_gradients(kaczmarz):
    agent, block, _ = problem("Gaussian")
    block.log_prob[:2] = torch.tensor([1e3, -1e3])
    assert step_of(kaczmarz, agent, block).isfinite().all()


@every_rule
def test_a_layer_that_is_not_linear_is_refused_with_the_way_out(kaczmarz):
    agent, block, _ = problem("Gaussian")
    agent.trunk.append(nn.LayerNorm(16))
    with pytest.raises(TypeError, match=r"trunk.4 LayerNorm.*must be Linear"):
        step_of(kaczmarz, agent, block)


def test_discrete_actions_start_where_the_space_does():
    agent = rat.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(3, start=5))
    action, env_action = agent.act(torch.randn(200, 4))
    assert action.unique().tolist() == [0, 1, 2]
    assert torch.equal(env_action, action + 5)
    obs = torch.randn(50, 4)
    most_likely = agent.policy(agent.normalizer(obs)).probs.argmax(1)
    assert torch.equal(agent.act(obs, deterministic=True)[0], most_likely)


def test_actions_of_a_box_stay_inside_it():
    """Where tanh is 1, rounding must not lead above high."""
    high = np.linspace(0.1, 9, 500, dtype=np.float32)
    agent = rat.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-high / 3, high))
    agent.head.bias.data.fill_(50.0)
    _, env_action = agent.act(torch.zeros(1, 3), deterministic=True)
    np.testing.assert_allclose(env_action[0], high, rtol=1e-6)
    assert (env_action.numpy() <= high).all()


REFUSED = {
    "image observations": (gym.spaces.Box(0, 1, (8, 8, 3)), SPACES["Gaussian"], "Flatten"),
    "discrete observations": (gym.spaces.Discrete(3), SPACES["Gaussian"], "Flatten"),
    "several discrete actions": (OBS, gym.spaces.MultiDiscrete([2, 3]), "TransformAction"),
    "unbounded actions": (OBS, gym.spaces.Box(-np.inf, np.inf, (2,)), "finite bounds"),
    "integer actions": (OBS, gym.spaces.Box(0, 3, (2,), np.int64), "floats"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_spaces_that_the_networks_do_not_take_are_refused(case, capsys):
    obs_space, act_space, named = REFUSED[case]
    with pytest.raises(SystemExit) as stopped:
        rat.check_spaces("Task-v0", obs_space, act_space)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@every_policy
def test_spaces_that_the_networks_take_are_not_refused(policy):
    rat.check_spaces("Task-v0", OBS, SPACES[policy])


def record_calls(monkeypatch, name, keep):
    """What keep(arguments, result) makes of each call of a function of rat_shared, a list."""
    original = getattr(rat, name)
    kept = []

    def recorded(*arguments, **named):
        result = original(*arguments, **named)
        kept.append(keep(arguments, result))
        return result

    monkeypatch.setattr(rat, name, recorded)
    return kept


@pytest.mark.parametrize("kaczmarz", ["track", "off"])
def test_a_run_hands_on_what_the_rollout_says(kaczmarz, tmp_path, monkeypatch):
    """Two iterations with many resets, recomputed in NumPy; every sample is in one block a pass."""
    if kaczmarz == "track":  # targets and weights of actor and critic, damping

        def targets_of(given, _):
            scores, residual, weights, damping, previous = given
            return residual + rat.product(scores, previous), weights, damping

        solved = record_calls(monkeypatch, "kaczmarz_step", targets_of)
    else:
        solved = record_calls(monkeypatch, "solve", lambda given, _: given[1:4])
    core = "joint_step" if kaczmarz == "track" else "sampled_step"
    steps = iter(record_calls(monkeypatch, core, lambda _, result: flat(result[0].values())))
    more = ["--update-epochs", 2, "--num-minibatches", 2, "--kaczmarz", kaczmarz]
    more += ["--learning-rate", 0.3 if kaczmarz == "track" else 2.0, "--max-grad-norm", 5.0]
    more += ["--kl-steps", 256]  # a rollout
    iterations = record("rat_shared", core, tmp_path, monkeypatch, *more)
    expected = recompute(iterations)
    check_statistics(iterations, expected)
    handed = iter(solved)
    ratios = []
    for iteration, wanted in zip(iterations, expected):
        seen = []
        rate = iteration.row["learning_rate"]
        for (_, block, *_), agent in iteration.core:
            targets, weights, damping = next(handed)
            y, ratio = targets, weights
            if kaczmarz == "track":
                y, to_fit = targets.chunk(2)
                y, ratio = y / rate, weights.chunk(2)[0]
                error = block.returns - agent(block.obs).value.detach()
                beta = (256 / iteration.row["global_step"]) ** 0.5
                np.testing.assert_allclose(to_fit, beta * error, rtol=1e-4, atol=1e-5)
            else:
                y = targets[0]
                assert (targets[1] == 1).all()
                assert damping == 0.1
            policy = iteration.policy
            rows = check_block(wanted, policy, block.obs, block.actions, y, ratio, agent)
            seen += rows
            ratios.append(ratio)
            np.testing.assert_allclose(block.returns, wanted.returns[rows], rtol=1e-3, atol=1e-4)
        assert sorted(seen) == sorted(2 * list(range(len(wanted.obs))))
        parameters = [flat(agent.parameters()) for _, agent in iteration.core]
        parameters.append(flat(iteration.trained.parameters()))
        for before, after in itertools.pairwise(parameters):
            np.testing.assert_allclose(after, before + next(steps), rtol=1e-4, atol=1e-6)
        fitted = iteration.trained(torch.tensor(wanted.obs).float()).value.detach().numpy()
        value_loss = ((fitted - wanted.returns) ** 2).mean()
        assert iteration.row["value_loss"] == pytest.approx(value_loss, rel=1e-3)
    assert torch.cat(ratios).max() > 1.2
    assert torch.cat(ratios).min() < 0.8


def test_popart_keeps_the_values(tmp_path, monkeypatch):
    """Before the first update of an iteration, but for the new observation statistics."""
    iterations = record("rat_shared", "joint_step", tmp_path, monkeypatch)
    for iteration in iterations:
        rescaled = copy.deepcopy(iteration.policy)
        rescaled.normalizer = iteration.agent.normalizer
        before, after = (values_of(a, iteration.rollout.obs) for a in (iteration.agent, rescaled))
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


def test_learns_cart_pole(tmp_path):
    """As test_runs.py's learning test, after 15k steps: 89, without learning 28."""
    size = ["--total-timesteps", 15_000, "--num-envs", 8, "--num-steps", 32]
    assert learn(tmp_path, "rat_shared", "--env-id", "CartPole-v1", *size) >= 55
