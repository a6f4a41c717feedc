"""rat_shared.py's core against explicit float64 formulas with materialised scores, and its run."""

import copy
import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import flat, learn, train
from recording import check_block, check_statistics, recompute, record, values_of
from torch import nn
from torch.func import functional_call, jacrev

import rat_shared as rat

OBS = gym.spaces.Box(-1, 1, (3,))
SPACES = {"Gaussian": gym.spaces.Box(-1, 1, (2,)), "Categorical": gym.spaces.Discrete(3)}
every_policy = pytest.mark.parametrize("policy", SPACES)


def problem(policy, samples=90, hidden=16, obs_dim=4, seed=0):
    """An agent away from its initialisation, a block of samples and eps.

    A few of the block's ratios lie beyond the clamp."""
    torch.manual_seed(seed)
    agent = rat.Agent(gym.spaces.Box(-1, 1, (obs_dim,)), SPACES[policy], hidden)
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
    """In float64 log pi, V, entropy [3, B] and their Jacobians [3, B, p].

    Columns are as in agent.parameters()."""
    agent = copy.deepcopy(agent).double()

    def values(named):
        policy, value = functional_call(agent, named, obs.double())
        return torch.stack([policy.log_prob(actions), value, policy.entropy()])

    named = {name: p.detach() for name, p in agent.named_parameters()}
    rows = jacrev(values)(named)
    return values(named), torch.cat([rows[name].flatten(2) for name in named], 2)


def explicit_scores(agent, obs, actions, epsilon):
    """H [B, p] in float64."""
    _, (d_log_prob, d_value, _) = explicit(agent, obs, actions)
    return d_log_prob + 2 * epsilon.double()[:, None] * d_value


def explicit_targets(scores, weights, rhs, damping):
    """(damping I + H H^T Sigma)^-1 of the rows of rhs [2, B], zero where the weight is."""
    sigma = torch.diag(weights.double() / (weights > 0).sum())
    matrix = damping * torch.eye(len(weights)).double() + scores @ scores.T @ sigma
    return torch.linalg.solve(matrix, rhs.T).T * (weights > 0)


def explicit_ascent(args, agent, block, epsilon, shift):
    """-grad L of (8), flat, for the right-hand sides y + H shift and 1 + H shift."""
    obs, actions, advantages, returns, old_log_prob = block
    (log_prob, value, _), (d_log_prob, d_value, d_entropy) = explicit(agent, obs, actions)
    scores = explicit_scores(agent, obs, actions, epsilon)
    ratio = (log_prob - old_log_prob).exp()
    inside = (ratio > 0.1) & (ratio < 10)  # no gradient beyond the clamp
    assert not inside.all()
    y = (advantages - advantages.mean()) / advantages.std(correction=0)
    rhs = torch.stack([y, torch.ones_like(y)]) + scores @ shift
    a, c = explicit_targets(scores, ratio.clamp(0.1, 10), rhs, args.damping)
    actor = (a * ratio * inside) @ d_log_prob
    entropy = d_entropy.sum(0)
    critic = (2 * (value - returns) * c) @ d_value
    return (actor + args.ent_coef * entropy - args.vf_coef * critic) / len(obs)


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("with_previous", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.1, 10])
@every_policy
def test_targets_solve_the_dual_system(policy, damping, with_previous):
    """A fifth of the weights is zero."""
    agent, block, epsilon = problem(policy)
    obs, actions, y = block.obs, block.actions, block.advantages
    weights = (0.1 + 2 * torch.rand(len(y))) * (torch.rand(len(y)) > 0.2)
    scores = explicit_scores(agent, obs, actions, epsilon)
    rhs = torch.stack([y, torch.ones_like(y)]).double()
    previous = None
    if with_previous:
        previous = [0.1 * torch.randn_like(p) for p in agent.parameters()]
        rhs -= scores @ flat(previous).double()
    targets = rat.rat_targets(agent, obs, actions, epsilon, y, weights, damping, previous)
    expected = explicit_targets(scores, weights, rhs, damping)
    for target, wanted in zip(targets, expected, strict=True):
        assert relative(target, wanted) < 1e-4
        assert (target[weights == 0] == 0).all()


@pytest.mark.parametrize("kaczmarz", ["paper", "release", "off"])
@every_policy
def test_directions_are_their_direct_form_over_three_blocks(policy, kaczmarz, monkeypatch):
    """The gradient of (8), and what each setting adds to the right-hand sides and remembers."""
    args = rat.Args(kaczmarz=kaczmarz, vf_coef=0.7, ent_coef=0.3)
    sign = {"paper": -1, "release": 1, "off": 0}[kaczmarz]
    agent, *_ = problem(policy)
    previous = [torch.zeros_like(p) for p in agent.parameters()]
    mine = flat(previous).double()  # g_{j-1} or d_{j-1}
    for seed in range(3):
        agent, block, epsilon = problem(policy, seed=seed)
        unclipped = explicit_ascent(args, agent, block, epsilon, sign * mine)
        if kaczmarz == "paper":
            unclipped += mine
        norm = unclipped.norm().item()
        clipped = unclipped * min(1, args.max_grad_norm / (norm + 1e-6))
        assert norm > args.max_grad_norm
        mine = {"paper": unclipped, "release": clipped, "off": mine}[kaczmarz]
        monkeypatch.setattr(torch, "randn_like", lambda y, drawn=epsilon: drawn)
        applied, my_norm, previous = rat.joint_direction(args, agent, block, previous)
        monkeypatch.undo()
        assert [d.shape for d in applied] == [p.shape for p in agent.parameters()]
        assert relative(flat(applied), clipped) < 1e-4
        assert my_norm.item() == pytest.approx(norm, rel=1e-4)
        if kaczmarz == "off":
            assert not flat(previous).any()
        else:
            assert relative(-sign * flat(previous), mine) < 1e-4


@every_policy
def test_kernel_of_one_draw_is_that_of_its_scores(policy, damping=0.1):
    """The targets of B unit vectors are the columns of (damping I + K Sigma)^-1: K in float64."""
    agent, block, epsilon = problem(policy, samples=20, hidden=8)
    agent, obs, epsilon = agent.double(), block.obs.double(), epsilon.double()
    actions = block.actions.double() if policy == "Gaussian" else block.actions
    weights = 0.1 + torch.rand(len(obs)).double()
    identity = torch.eye(len(obs)).double()
    targets = [
        rat.rat_targets(agent, obs, actions, epsilon, unit, weights, damping) for unit in identity
    ]
    inverse = torch.stack([a for a, _ in targets], 1)
    kernel = (torch.linalg.inv(inverse) - damping * identity) * len(obs) / weights
    scores = explicit_scores(agent, obs, actions, epsilon)
    assert relative(kernel, scores @ scores.T) < 1e-9


@every_policy
def test_curvature_is_that_of_both_in_expectation_over_epsilon(policy, draws=20_000):
    """Mean of H^T H over draws of eps: within 2 % of its limit, standard error below 1 %."""
    agent, block, _ = problem(policy, samples=5, hidden=4, obs_dim=2)
    _, (d_log_prob, d_value, _) = explicit(agent, block.obs, block.actions)
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


@pytest.mark.parametrize("broken", ["obs", "advantages", "log_prob"])
def test_values_that_are_not_finite_raise(broken):
    agent, block, _ = problem("Categorical")
    getattr(block, broken)[0] = torch.nan
    nothing = [torch.zeros_like(p) for p in agent.parameters()]
    with pytest.raises(FloatingPointError, match="not finite"):
        rat.joint_direction(rat.Args(), agent, block, nothing)


def test_ratios_of_any_size_have_finite_gradients():
    agent, block, _ = problem("Gaussian")
    block.log_prob[:2] = torch.tensor([1e3, -1e3])
    nothing = [torch.zeros_like(p) for p in agent.parameters()]
    applied, *_ = rat.joint_direction(rat.Args(), agent, block, nothing)
    assert flat(applied).isfinite().all()


def test_a_layer_that_is_not_linear_is_refused_with_the_way_out():
    agent, block, epsilon = problem("Gaussian")
    agent.trunk.append(nn.LayerNorm(16))
    with pytest.raises(TypeError, match=r"trunk.4 LayerNorm.*use Linear"):
        rat.tape_scores(agent, block.obs, (block.actions, epsilon))


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
    agent.head.mean.bias.data.fill_(50.0)
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


def test_a_run_hands_on_what_the_rollout_says(tmp_path, monkeypatch):
    """Two iterations with many resets, recomputed in NumPy; every sample is in one block a pass."""
    losses = []  # what each block's loss is made of
    joint_loss = rat.joint_loss

    def recorded(args, policy, value, ratio, returns, a, c):
        losses.append((value.detach(), ratio.detach(), returns))
        return joint_loss(args, policy, value, ratio, returns, a, c)

    applied = []  # each block's direction
    joint_direction = rat.joint_direction

    def recorded_direction(*arguments):
        result = joint_direction(*arguments)
        applied.append(flat(result[0]))
        return result

    monkeypatch.setattr(rat, "joint_loss", recorded)
    monkeypatch.setattr(rat, "joint_direction", recorded_direction)
    more = ["--update-epochs", 2, "--num-minibatches", 2, "--learning-rate", 2.0]
    more += ["--max-grad-norm", 5.0, "--kaczmarz", "off"]
    iterations = record("rat_shared", "rat_targets", tmp_path, monkeypatch, *more)
    expected = recompute(iterations)
    check_statistics(iterations, expected)
    handed = iter(losses)
    steps = iter(applied)
    for iteration, wanted in zip(iterations, expected):
        seen = []
        for (obs, actions, epsilon, y, weights, damping, _), agent in iteration.core:
            rows = check_block(wanted, iteration.policy, obs, actions, y, weights, agent)
            seen += rows
            value, ratio, returns = next(handed)
            assert torch.equal(ratio, weights)
            assert damping == 0.1
            assert 0.7 < epsilon.std() < 1.3
            np.testing.assert_allclose(returns, wanted.returns[rows], rtol=1e-3, atol=1e-4)
            my_value = agent(obs).value.detach()
            np.testing.assert_allclose(value, my_value, rtol=1e-5, atol=1e-6)
        assert sorted(seen) == sorted(2 * list(range(len(wanted.obs))))
        parameters = [flat(agent.parameters()) for _, agent in iteration.core]
        parameters.append(flat(iteration.trained.parameters()))
        for before, after in itertools.pairwise(parameters):
            step = iteration.row["learning_rate"] * next(steps)
            np.testing.assert_allclose(after, before + step, rtol=1e-4, atol=1e-6)
        fitted = iteration.trained(torch.tensor(wanted.obs).float()).value.detach().numpy()
        value_loss = ((fitted - wanted.returns) ** 2).mean()
        assert iteration.row["value_loss"] == pytest.approx(value_loss, rel=1e-3)
    ratios = torch.cat([ratio for _, ratio, _ in losses])
    assert ratios.max() > 2
    assert ratios.min() < 0.5


def test_popart_keeps_the_values(tmp_path, monkeypatch):
    """Before the first update of an iteration, but for the new observation statistics."""
    iterations = record("rat_shared", "rat_targets", tmp_path, monkeypatch)
    for iteration in iterations:
        rescaled = copy.deepcopy(iteration.policy)
        rescaled.normalizer = iteration.agent.normalizer
        before, after = (values_of(a, iteration.rollout.obs) for a in (iteration.agent, rescaled))
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


def test_learns_cart_pole(tmp_path):
    """As test_runs.py's learning test, after 30k steps; without learning 28."""
    size = ["--total-timesteps", 30_000, "--num-envs", 8, "--num-steps", 32]
    assert learn(tmp_path, "rat_shared", "--env-id", "CartPole-v1", *size) >= 150


def test_negative_entropy_bonus_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("rat_shared", "--ent-coef", -0.1, "--output-dir", tmp_path)
    assert stopped.value.code == 2
    assert "--ent-coef -0.1" in capsys.readouterr().err
