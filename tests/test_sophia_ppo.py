"""Sophia, the Fisher matrix's diagonal, PPO's step against explicit float64 formulas; learning."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import flat, learn, read_csv, train
from recording import check_block, check_critic, check_statistics, recompute, record
from torch import nn
from torch.func import functional_call, jacrev

import sophia_ppo

SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16]
SMALL += ["--num-minibatches", 4]
SAMPLES = 60
both_networks = pytest.mark.parametrize("shared", [False, True])


def problem(shared):
    """A small actor away from its initialisation, observations, sampled actions."""
    torch.manual_seed(0)
    value_head = sophia_ppo.PopArt(8) if shared else None
    actor = sophia_ppo.Actor(4, 2, value_head, hidden=8)
    for p in actor.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs = torch.randn(SAMPLES, 4)
    policy, _ = actor(obs)
    return actor, obs, policy.sample()


def jacobian(actor, obs, quantity):
    """Derivatives [B, ..., p] in float64 of quantity(policy, value) by the parameters."""
    actor = copy.deepcopy(actor).double()
    named = {name: p.detach() for name, p in actor.named_parameters()}
    rows = jacrev(lambda named: quantity(*functional_call(actor, named, obs.double())))(named)
    parts = [rows[name].flatten(rows[name].dim() - p.dim()) for name, p in named.items()]
    return torch.cat(parts, -1)


def scores(actor, obs, actions):
    return jacobian(actor, obs, lambda policy, value: policy.log_prob(actions.double()))


def value_jacobian(actor, obs):
    return jacobian(actor, obs, lambda policy, value: value)


def in_order(actor, named):
    return flat(named[p] for p in actor.parameters()).double()


def relative(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


# Sophia


def test_sophia_is_the_published_update():
    """20 steps, a new estimate of h after each third, beside Sophia-G's update in NumPy."""
    generator = np.random.default_rng(0)
    shapes = [(3, 2), (2,)]
    theta = [generator.normal(size=shape) for shape in shapes]
    params = [nn.Parameter(torch.tensor(x)) for x in theta]
    optimizer = sophia_ppo.Sophia(params, lr=0.01, betas=(0.9, 0.8), rho=0.04)
    m = [np.zeros(shape) for shape in shapes]
    h = [np.zeros(shape) for shape in shapes]
    moved_less = 0
    for step in range(20):
        for i, p in enumerate(params):
            g = generator.normal(size=shapes[i])
            p.grad = torch.tensor(g)
            m[i] = 0.9 * m[i] + 0.1 * g
            fraction = np.minimum(np.abs(m[i]) / np.maximum(0.04 * h[i], 1e-12), 1)
            moved_less += (fraction < 1).sum()
            theta[i] = theta[i] - 0.01 * np.sign(m[i]) * fraction
        optimizer.step()
        if step % 3 == 2:
            estimate = [50 * generator.normal(size=shape) ** 2 for shape in shapes]
            optimizer.update_hessian({p: torch.tensor(x) for p, x in zip(params, estimate)})
            h = [0.8 * old + 0.2 * new for old, new in zip(h, estimate)]
    assert 20 < moved_less < 140  # clipped and unclipped coordinates
    for p, x in zip(params, theta):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12)


@both_networks
def test_hessian_estimate_is_the_squared_gradient_of_drawn_samples(shared):
    """B g * g, g the mean score of actions, and values, that the model draws."""
    actor, obs, actions = problem(shared)
    torch.manual_seed(7)
    estimate = in_order(actor, sophia_ppo.hessian_estimate(actor, obs))
    torch.manual_seed(7)
    policy, _ = actor(obs)
    drawn = policy.sample()
    assert not torch.allclose(drawn, actions)
    rows = scores(actor, obs, drawn)
    if shared:
        rows = rows + 2 * torch.randn(SAMPLES)[:, None] * value_jacobian(actor, obs)
    assert relative(estimate, SAMPLES * rows.mean(0).square()) < 1e-4


def test_hessian_estimates_average_to_the_diagonal_of_the_exact_fisher_matrix():
    """Each coordinate of 2000 deviates by sqrt(2 / 2000) = 3 %: within 6 % in norm."""
    actor, obs, _ = problem(shared=False)
    mean = jacobian(actor, obs, lambda policy, value: policy.mean)  # [B, act_dim, p]
    log_std = jacobian(actor, obs, lambda policy, value: policy.stddev.log())
    policy, _ = actor(obs)
    variance = policy.variance.detach().double()[..., None]
    exact = (mean.square() / variance + 2 * log_std.square()).sum(1).mean(0)
    estimates = [in_order(actor, sophia_ppo.hessian_estimate(actor, obs)) for _ in range(2000)]
    assert relative(torch.stack(estimates).mean(0), exact) <= 0.06


def test_sophia_renews_h_after_every_tenth_update():
    actor, block, _ = ppo_problem(shared=False)
    optimizer = sophia_ppo.Sophia(actor.parameters())
    assert optimizer.defaults["betas"] == (0.965, 0.99)
    assert optimizer.defaults["rho"] == 0.04
    args = sophia_ppo.Args(optimizer="sophia")
    seen = []
    for _ in range(21):
        torch.manual_seed(7)
        sophia_ppo.policy_step(args, actor, optimizer, block)
        seen.append(flat(optimizer.state[p]["h"] for p in actor.parameters()))
        if len(seen) == 10:
            torch.manual_seed(7)
            estimate = in_order(actor, sophia_ppo.hessian_estimate(actor, block.obs))
            assert relative(seen[-1], 0.01 * estimate) < 1e-5  # of the policy after the step
    changes = [i for i in range(1, 21) if not torch.equal(seen[i], seen[i - 1])]
    assert changes == [9, 19]
    assert (seen[8] == 0).all()


# The Fisher matrix's diagonal


@both_networks
def test_fisher_diagonal_is_that_of_per_sample_gradients(shared):
    actor, obs, actions = problem(shared)
    torch.manual_seed(5)
    diagonal = sophia_ppo.fisher_diagonal(actor, obs, actions)
    rows = scores(actor, obs, actions)
    if shared:
        torch.manual_seed(5)
        rows = rows + 2 * torch.randn(SAMPLES)[:, None] * value_jacobian(actor, obs)
    assert diagonal.keys() == set(actor.parameters())
    assert relative(in_order(actor, diagonal), rows.square().mean(0)) <= 1e-5


def with_layer_norm(actor):
    actor.trunk.append(nn.LayerNorm(8))


def with_a_layer_called_twice(actor):
    actor.trunk.append(actor.trunk[2])


def with_an_output_changed_in_place(actor):
    actor.trunk[1] = nn.ReLU(inplace=True)


@pytest.mark.parametrize(
    "change", [with_layer_norm, with_a_layer_called_twice, with_an_output_changed_in_place]
)
def test_fisher_diagonal_refuses_other_networks(change):
    actor, obs, actions = problem(shared=False)
    change(actor)
    with pytest.raises(TypeError, match="Linear layers, each called once"):
        sophia_ppo.fisher_diagonal(actor, obs, actions)


# The steps


def ppo_problem(shared, spread=0.5):
    """An actor, a block whose log ratios go from -spread to spread, and those."""
    actor, obs, actions = problem(shared)
    log_ratio = torch.linspace(-spread, spread, SAMPLES)[torch.randperm(SAMPLES)]
    policy, _ = actor(obs)
    log_prob = policy.log_prob(actions).detach() - log_ratio
    advantages, returns = torch.randn(2, SAMPLES)
    block = sophia_ppo.Samples(obs, actions, 2 + 3 * advantages, returns, log_prob)
    return actor, block, log_ratio.double()


def step(actor, block, **options):
    """Gradients [p] that a policy_step which moves nothing leaves, and what it returned."""
    args = sophia_ppo.Args(**{"max_grad_norm": 1e9} | options)
    still = torch.optim.SGD(actor.parameters(), lr=0.0)
    torch.manual_seed(7)
    result = sophia_ppo.policy_step(args, actor, still, block)
    return flat(p.grad for p in actor.parameters()).double(), result


def centred(advantages):
    y = advantages.double() - advantages.double().mean()
    return y / y.square().mean().sqrt()


def critic_gradient(actor, block):
    """Of the mean squared error."""
    _, value = actor(block.obs)
    error = (value - block.returns).detach().double()
    return 2 * error @ value_jacobian(actor, block.obs) / SAMPLES


@both_networks
def test_ppo_step_is_the_gradient_of_the_clipped_surrogate(shared):
    actor, block, log_ratio = ppo_problem(shared)
    gradient, result = step(actor, block, ent_coef=0.03, vf_coef=0.7)
    y = centred(block.advantages)
    ratio = log_ratio.exp()
    flat_out = ((y > 0) & (ratio > 1.2)) | ((y < 0) & (ratio < 0.8))
    outside = (ratio - 1).abs() > 0.2
    assert 5 < flat_out.sum() < outside.sum() < 55  # inside, outside and moving back, outside
    exact = -(y * ratio * ~flat_out) @ scores(actor, block.obs, block.actions) / SAMPLES
    entropy = jacobian(actor, block.obs, lambda policy, value: policy.entropy().mean())
    exact = exact - 0.03 * entropy
    if shared:
        exact = exact + 0.7 * critic_gradient(actor, block)
    assert relative(gradient, exact) <= 1e-5
    approx_kl = (ratio - 1 - log_ratio).mean()
    np.testing.assert_allclose(result, [exact.norm(), approx_kl], rtol=1e-4)


@both_networks
def test_diag_step_is_the_weighted_score_over_diagonal_and_damping(shared):
    """Ratios from 0.05 to 20, clamped to [0.1, 10]; those outside keep their score."""
    actor, block, log_ratio = ppo_problem(shared, spread=3.0)
    options = {"optimizer": "diag", "shared": shared, "damping": 0.3, "vf_coef": 0.7}
    gradient, _ = step(actor, block, **options)
    rows = scores(actor, block.obs, block.actions)
    weights = log_ratio.exp().clamp(0.1, 10)
    assert 10 < (weights != log_ratio.exp()).sum() < 50
    exact = -(weights * centred(block.advantages)) @ rows / SAMPLES
    if shared:
        exact = exact + 0.7 * critic_gradient(actor, block)
        torch.manual_seed(7)
        rows = rows + 2 * torch.randn(SAMPLES)[:, None] * value_jacobian(actor, block.obs)
    exact = exact / (rows.square().mean(0) + 0.3)
    assert relative(gradient, exact) <= 1e-4


@pytest.mark.parametrize("optimizer", ["adam", "diag"])
def test_the_bound_holds_for_what_moves_the_policy(optimizer):
    """The gradient's norm; for diag that of the direction, after the diagonal."""
    actor, block, _ = ppo_problem(shared=False)
    free, result = step(actor, block, optimizer=optimizer)
    bounded, bounded_result = step(actor, block, optimizer=optimizer, max_grad_norm=0.01)
    assert free.norm() > 0.05
    assert result[0] == bounded_result[0] == pytest.approx(free.norm().item(), rel=1e-4)
    torch.testing.assert_close(bounded, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-8)


@both_networks
def test_agent_has_the_networks_it_says(shared):
    """The values of the shared forward pass are the critic's, the policy's trunk is its trunk."""
    box = gym.spaces.Box(-1, 1, (3,))
    agent = sophia_ppo.Agent(box, box, shared)
    obs = torch.randn(5, 3)
    policy, value = agent.actor(obs)
    assert torch.equal(policy.mean, agent.policy(obs).mean)
    if shared:
        assert torch.equal(value, agent.critic(obs))
        assert set(agent.parameters()) == set(agent.actor.parameters())
    else:
        assert value is None
        assert not set(agent.critic.parameters()) & set(agent.actor.parameters())


# Whole runs


@pytest.mark.parametrize("optimizer", ["adam", "sophia", "diag"])
@both_networks
def test_a_run_hands_over_what_numpy_recomputes(optimizer, shared, tmp_path, monkeypatch):
    """y, ratios, returns, observations, running statistics, KL, clips of two iterations."""
    surrogate = "weighted_surrogate" if optimizer == "diag" else "clipped_surrogate"
    original = getattr(sophia_ppo, surrogate)
    handed = []

    def recorded(log_ratio, y, *more):
        handed.append((log_ratio.detach().exp(), y))
        return original(log_ratio, y, *more)

    monkeypatch.setattr(sophia_ppo, surrogate, recorded)
    options = ["--optimizer", optimizer, "--target-kl", None, "--learning-rate", 3e-3]
    options += ["--shared"] if shared else []
    iterations = record("sophia_ppo", "policy_loss", tmp_path, monkeypatch, *options)
    expected = recompute(iterations)
    check_statistics(iterations, expected)
    if not shared:
        check_critic(iterations, expected)
    assert len(handed) == 2 * 2 * 4  # iterations, passes, blocks
    for iteration, wanted in zip(iterations, expected):
        seen = []
        for (_, block), agent in iteration.core:
            ratio, y = handed.pop(0)
            data = iteration.policy, block.obs, block.actions, y, ratio, agent
            rows = check_block(wanted, *data, limits=(0, np.inf))
            np.testing.assert_allclose(block.returns, wanted.returns[rows], rtol=1e-3, atol=1e-4)
            seen += rows
        assert sorted(seen) == sorted(2 * [*range(len(wanted.obs))])
        if shared:
            values = iteration.trained.critic(torch.tensor(wanted.obs, dtype=torch.float32))
            error = values.detach().numpy() - wanted.returns
            np.testing.assert_allclose(iteration.row["value_loss"], (error**2).mean(), rtol=1e-3)
        assert iteration.clips.count(0.5) == 2 * 4


DEFAULTS = {"adam": (3e-4, 10, 16), "sophia": (1e-4, 10, 16), "diag": (0.05, 4, 4)}


@pytest.mark.parametrize("optimizer", DEFAULTS)
def test_each_optimizer_has_its_defaults(optimizer, tmp_path, monkeypatch):
    """The three fields without a value in Args, Adam's epsilon, and which class steps."""
    original = sophia_ppo.policy_step
    found = []
    monkeypatch.setattr(sophia_ppo, "policy_step", lambda *a: found.append(a[2]) or original(*a))
    options = ["--env-id", "InvertedPendulum-v5", "--num-envs", "4", "--num-steps", "16"]
    options += ["--total-timesteps", "64", "--target-kl", "None", "--optimizer", optimizer]
    options += ["--output-dir", str(tmp_path), "--run-name", "x"]
    sophia_ppo.main(tyro.cli(sophia_ppo.Args, args=options))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    values = tuple(config[n] for n in ("learning_rate", "update_epochs", "num_minibatches"))
    assert values == DEFAULTS[optimizer]
    assert len(found) == values[1] * values[2]
    kinds = {"adam": torch.optim.Adam, "sophia": sophia_ppo.Sophia, "diag": torch.optim.SGD}
    assert type(found[0]) is kinds[optimizer]
    assert optimizer != "adam" or found[0].defaults["eps"] == 1e-5


def test_given_values_are_kept():
    args = sophia_ppo.Args(optimizer="diag", learning_rate=0.01, update_epochs=3)
    assert (args.learning_rate, args.update_epochs, args.num_minibatches) == (0.01, 3, 4)


@pytest.mark.parametrize("optimizer", ["adam", "sophia", "diag"])
def test_values_that_are_not_finite_end_the_run(optimizer, tmp_path, capsys):
    """Sophia too, whose estimate draws from a policy that is no longer finite."""
    options = ["--env-id", "toy_envs:HugeReward-v0", "--num-envs", 4, "--num-steps", 16]
    options += ["--total-timesteps", 640, "--update-epochs", 10, "--optimizer", optimizer]
    with pytest.raises(SystemExit) as ended:
        train("sophia_ppo", *options, "--output-dir", tmp_path, "--run-name", "x")
    assert ended.value.code == 1
    assert "is not finite" in capsys.readouterr().err.splitlines()[-1]
    saved = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 128
    assert all(t.isfinite().all() for t in saved["agent"].values())


SCHEDULES = {  # options: step sizes of the five iterations, passes over a rollout
    "annealed": (["--anneal-lr", "--target-kl", None], [0.01, 0.008, 0.006, 0.004, 0.002], 3),
    "one pass": (["--target-kl", 1e-9], 5 * [0.01], 1),
    "diag has no bound": (["--optimizer", "diag", "--target-kl", 1e-9], None, 3),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_annealing_and_target_kl(case, tmp_path, monkeypatch):
    options, rates, passes = SCHEDULES[case]
    original = sophia_ppo.policy_step
    steps = []
    monkeypatch.setattr(sophia_ppo, "policy_step", lambda *a: steps.append(1) or original(*a))
    options = [*options, "--learning-rate", 0.01, "--update-epochs", 3, "--total-timesteps", 320]
    train("sophia_ppo", *SMALL, *options, "--output-dir", tmp_path, "--run-name", "x")
    assert len(steps) == 5 * passes * 4
    if rates:
        found = [float(row["learning_rate"]) for row in read_csv(tmp_path / "x")]
        np.testing.assert_allclose(found, rates)


def test_there_is_a_bound_on_the_kl_by_default(tmp_path, monkeypatch):
    original = sophia_ppo.policy_step
    steps = []
    monkeypatch.setattr(sophia_ppo, "policy_step", lambda *a: steps.append(1) or original(*a))
    options = ["--learning-rate", 0.01, "--update-epochs", 3, "--total-timesteps", 320]
    train("sophia_ppo", *SMALL, *options, "--output-dir", tmp_path)
    assert len(steps) < 5 * 3 * 4


def test_annealing_is_refused_where_the_kl_adapts():
    with pytest.raises(ValueError, match="--anneal-lr"):
        sophia_ppo.Args(optimizer="diag", anneal_lr=True)


LEARNS = {
    "sophia": ["--optimizer", "sophia", "--num-minibatches", 8],
    "diag": ["--optimizer", "diag", "--num-minibatches", 4],
    "adam, shared": ["--shared", "--num-minibatches", 8],
}


@pytest.mark.parametrize("case", LEARNS)
def test_learns_inverted_pendulum(case, tmp_path):
    options = ["--env-id", "InvertedPendulum-v5", "--num-envs", 8, "--num-steps", 64]
    options += ["--total-timesteps", 12_000, *LEARNS[case]]
    assert learn(tmp_path, "sophia_ppo", *options) >= 25


@pytest.mark.parametrize("optimizer", ["sophia", "diag"])
def test_resume_keeps_the_optimizer(optimizer, tmp_path):
    options = [*SMALL, "--total-timesteps", 640, "--optimizer", optimizer, "--shared"]
    options += ["--output-dir", tmp_path, "--run-name", "x"]
    train("sophia_ppo", *options)
    before = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)["optimizer"]
    train("sophia_ppo", *options, "--resume")
    after = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)["optimizer"]
    assert before["param_groups"] == after["param_groups"]
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["state"][index][name])
    if optimizer == "sophia":
        assert all((state["h"] > 0).any() for state in before["state"].values())
