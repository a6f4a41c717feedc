"""rat_targets and joint_step of rat_shared.py against explicit float64 formulas with materialised scores."""

import copy

import gymnasium as gym
import pytest
import torch
from conftest import flat, learn, train
from torch.func import functional_call, jacrev

import rat_shared as rat

SPACES = {"Gaussian": gym.spaces.Box(-1, 1, (2,)), "Categorical": gym.spaces.Discrete(3)}


def problem(policy, samples=90, hidden=16, obs_dim=4, seed=0):
    """An agent away from its initialisation and a joint_step block of it with a fifth of the samples invalid."""
    torch.manual_seed(seed)
    agent = rat.Agent(gym.spaces.Box(-1, 1, (obs_dim,)), SPACES[policy], hidden)
    for p in agent.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs, valid = torch.randn(samples, obs_dim), (torch.rand(samples) > 0.2).float()
    with torch.no_grad():
        output = agent(obs)
        actions = output.policy.sample()
        old_log_prob = output.policy.log_prob(actions) + torch.randn(samples)  # a few ratios beyond the clamp
    epsilon, returns, y = torch.randn(3, samples)
    return agent, (obs, actions, epsilon, returns, old_log_prob, y, valid / valid.sum())


def explicit(agent, obs, actions):
    """In float64 log pi, V, entropy [3, B] and their Jacobians [3, B, p], columns as in agent.parameters()."""
    agent = copy.deepcopy(agent).double()

    def values(named):
        policy, value = functional_call(agent, named, obs.double())
        return torch.stack([policy.log_prob(actions), value, policy.entropy()])

    named = {name: p.detach() for name, p in agent.named_parameters()}
    rows = jacrev(values)(named)
    return values(named), torch.cat([rows[name].flatten(2) for name in named], 2)


def explicit_targets(scores, weights, sides, damping):
    """(damping I + H H^T Sigma)^-1 of the columns of sides [B, 2], zero where the weight is."""
    sigma = torch.diag(weights.double() / (weights > 0).sum())
    system = damping * torch.eye(len(weights)).double() + scores @ scores.T @ sigma
    return torch.linalg.solve(system, sides) * (weights > 0)[:, None]


def explicit_step(args, agent, block, start):
    """-grad L of (8), flat, for the right-hand sides y + H start and 1 + H start."""
    epsilon, returns, old_log_prob, y, share = (x.double() for x in block[2:])
    (log_prob, value, _), (d_log_prob, d_value, d_entropy) = explicit(agent, block[0], block[1])
    scores = d_log_prob + 2 * epsilon[:, None] * d_value
    ratio = (log_prob - old_log_prob).exp()
    sides = torch.stack([y, torch.ones_like(y)], 1) + (scores @ start)[:, None]
    a, c = explicit_targets(scores, ratio.clamp(0.1, 10) * (share > 0), sides, args.damping).T
    inside = (ratio > 0.1) & (ratio < 10)
    assert not inside.all()
    ascent = (share * a * ratio * inside) @ d_log_prob + args.ent_coef * share @ d_entropy
    return ascent - args.vf_coef * (share * 2 * (value - returns) * c) @ d_value


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("jacobian", ["tape", "vmap"])
@pytest.mark.parametrize("with_previous", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.1, 10])
@pytest.mark.parametrize("policy", SPACES)
def test_targets_solve_the_dual_system(policy, damping, with_previous, jacobian):
    agent, (obs, actions, epsilon, _, _, y, share) = problem(policy)
    weights = (0.1 + 2 * torch.rand(len(y))) * (share > 0)
    previous = [0.1 * torch.randn_like(p) for p in agent.parameters()] if with_previous else None
    _, (d_log_prob, d_value, _) = explicit(agent, obs, actions)
    scores = d_log_prob + 2 * epsilon.double()[:, None] * d_value
    sides = torch.stack([y, torch.ones_like(y)], 1).double()
    if with_previous:
        sides -= (scores @ flat(previous).double())[:, None]
    targets = rat.rat_targets(agent, obs, actions, epsilon, y, weights, damping, previous, jacobian)
    for target, expected in zip(targets, explicit_targets(scores, weights, sides, damping).T, strict=True):
        assert relative(target, expected) < 1e-4
        assert (target[weights == 0] == 0).all()


@pytest.mark.parametrize("jacobian", ["tape", "vmap"])
@pytest.mark.parametrize("kaczmarz", ["paper", "release", "off"])
@pytest.mark.parametrize("policy", SPACES)
def test_steps_are_their_direct_form_over_three_blocks(policy, kaczmarz, jacobian):
    """The gradient of (8), and what each setting adds to the right-hand sides and remembers."""
    args, memory = rat.Args(kaczmarz=kaczmarz, jacobian=jacobian, vf_coef=0.7, ent_coef=0.3), None
    sign = {"paper": -1, "release": 1, "off": 0}[kaczmarz]
    mine = torch.zeros_like(flat(problem(policy)[0].parameters())).double()
    for seed in range(3):
        agent, block = problem(policy, seed=seed)
        ascent = explicit_step(args, agent, block, sign * mine)
        unclipped = mine + ascent if kaczmarz == "paper" else ascent
        clipped = unclipped * min(1, args.max_grad_norm / (unclipped.norm().item() + 1e-6))
        mine = unclipped if kaczmarz == "paper" else clipped
        applied, norm, memory, value_loss = rat.joint_step(args, agent, block, memory)
        assert [d.shape for d in applied] == [p.shape for p in agent.parameters()]
        assert relative(flat(applied), clipped) < 1e-4 and relative(norm, unclipped.norm()) < 1e-4
        assert memory is None if kaczmarz == "off" else relative(flat(memory), mine) < 1e-4
        error = agent(block[0]).value - block[3]
        assert value_loss.item() == pytest.approx((error.square() * block[-1]).sum().item(), rel=1e-5)


@pytest.mark.parametrize("jacobian", ["tape", "vmap"])
@pytest.mark.parametrize("policy", SPACES)
def test_kernel_of_one_draw_is_that_of_its_scores(policy, jacobian, damping=0.1):
    """The targets of B unit vectors are the columns of (damping I + K Sigma)^-1, which gives K back in float64."""
    agent, (obs, actions, epsilon, *_) = problem(policy, samples=20, hidden=8)
    agent, obs, epsilon = agent.double(), obs.double(), epsilon.double()
    actions = actions.double() if policy == "Gaussian" else actions
    weights = 0.1 + torch.rand(len(obs)).double()
    columns = [
        rat.rat_targets(agent, obs, actions, epsilon, unit, weights, damping, jacobian=jacobian)[0]
        for unit in torch.eye(len(obs)).double()
    ]
    inverse, identity = torch.stack(columns, 1), torch.eye(len(obs)).double()
    kernel = (torch.linalg.inv(inverse) - damping * identity) * len(obs) / weights
    _, (d_log_prob, d_value, _) = explicit(agent, obs, actions)
    scores = d_log_prob + 2 * epsilon[:, None] * d_value
    assert relative(kernel, scores @ scores.T) < 1e-9


@pytest.mark.parametrize("policy", SPACES)
def test_curvature_is_that_of_both_in_expectation_over_epsilon(policy, draws=20_000):
    """Mean of H^T H over draws of eps: within 2 % of its limit, whose standard error is below 1 %."""
    agent, (obs, actions, *_) = problem(policy, samples=5, hidden=4, obs_dim=2)
    _, (d_log_prob, d_value, _) = explicit(agent, obs, actions)
    expected = d_log_prob.T @ d_log_prob + 4 * d_value.T @ d_value
    actions = actions.view(len(obs), -1).repeat(draws, 1)
    drawn = torch.cat([actions, torch.randn(len(actions), 1)], 1)
    layers = rat.tape_scores(agent, obs.repeat(draws, 1), drawn)
    rows = {}
    for x, g, (weight, *bias) in layers:
        rows[weight] = (g[:, :, None] * x[:, None]).flatten(1)
        rows |= dict.fromkeys(bias, g)
    scores = torch.cat([rows[p] for p in agent.parameters()], 1)
    assert relative(scores.T @ scores / draws, expected) < 0.02
    cross = d_log_prob.T @ d_value  # and the curvature has none of this
    assert cross.norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("broken", [0, 2, 5])
def test_values_that_are_not_finite_raise(broken):
    agent, block = problem("Categorical")
    block[broken].view(-1)[block[-1].argmax() * (4 if broken == 0 else 1)] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        rat.joint_step(rat.Args(), agent, block, None)


def test_ratios_of_any_size_have_finite_gradients():
    agent, block = problem("Gaussian")
    block[4][:2] = torch.tensor([1e3, -1e3])
    applied, *_ = rat.joint_step(rat.Args(), agent, block, None)
    assert flat(applied).isfinite().all()


def test_discrete_actions_start_where_the_space_does():
    agent = rat.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(3, start=5))
    action, env_action = agent.act(torch.randn(200, 4))
    assert action.unique().tolist() == [0, 1, 2] and torch.equal(env_action, action + 5)
    obs = torch.randn(50, 4)
    most_likely = agent(agent.normalizer(obs)).policy.probs.argmax(1)
    assert torch.equal(agent.act(obs, deterministic=True)[0], most_likely)


def test_learns_cart_pole(tmp_path):
    """As test_runs.py's learning test, after 30k steps; without learning 28."""
    arguments = ["--env-id", "CartPole-v1", "--total-timesteps", 30_000, "--num-envs", 8, "--num-steps", 32]
    assert learn(tmp_path, "rat_shared", *arguments) >= 150


def test_negative_entropy_bonus_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("rat_shared", "--ent-coef", -0.1, "--output-dir", tmp_path)
    assert stopped.value.code == 2 and "--ent-coef -0.1" in capsys.readouterr().err
