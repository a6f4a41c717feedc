"""Sophia, the Fisher matrix's diagonal and PPO's step against explicit float64 formulas; learning of each optimizer."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import flat, learn, read_csv, train
from torch import nn
from torch.func import functional_call, jacrev

import sophia_ppo

SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--num-minibatches", 4]


def problem(shared, samples=60):
    """A small agent away from its initialisation, observations, sampled actions, and shares of which some are zero."""
    torch.manual_seed(0)
    agent = sophia_ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Box(-1, 1, (2,)), shared)
    agent.actor = sophia_ppo.mlp(4, nn.Linear(8, 2), 8)
    agent.critic = sophia_ppo.PopArt(8) if shared else sophia_ppo.mlp(4, sophia_ppo.PopArt(8), 8)
    for p in agent.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs = torch.randn(samples, 4)
    share = (torch.arange(samples) % 5 > 0) / (0.8 * samples)
    return agent, obs, agent(obs)[0].sample(), share


def trained(agent):
    return [p for name, p in agent.named_parameters() if agent.shared or not name.startswith("critic")]


def jacobian(agent, quantity):
    """Derivatives [B, ..., p] in float64 of quantity(policy, value) by the trained parameters."""
    double = {name: p.detach().double() for name, p in agent.named_parameters()}
    names = [name for name in double if agent.shared or not name.startswith("critic")]
    rows = jacrev(lambda named: quantity(named | {k: v for k, v in double.items() if k not in names}))(
        {name: double[name] for name in names}
    )
    start = next(iter(rows.values())).dim() - double[names[0]].dim()
    return torch.cat([rows[name].flatten(start) for name in names], start)


def scores(agent, obs, actions):
    return jacobian(agent, lambda named: functional_call(agent, named, obs.double())[0].log_prob(actions.double()))


def value_jacobian(agent, obs):
    return jacobian(agent, lambda named: functional_call(agent, named, obs.double())[1])


def test_sophia_is_the_published_update():
    """20 steps, a new estimate of h after each third, beside a transcription of Sophia-G's update in NumPy."""
    generator, shapes = np.random.default_rng(0), [(3, 2), (2,)]
    theta = [generator.normal(size=shape) for shape in shapes]
    params = [nn.Parameter(torch.tensor(x)) for x in theta]
    optimizer = sophia_ppo.Sophia(params, lr=0.01, betas=(0.9, 0.8), rho=0.04)
    m, h = [np.zeros(shape) for shape in shapes], [np.zeros(shape) for shape in shapes]
    moved_less = 0
    for step in range(20):
        gradients = [generator.normal(size=shape) for shape in shapes]
        for i, g in enumerate(gradients):
            params[i].grad = torch.tensor(g)
            m[i] = 0.9 * m[i] + 0.1 * g
            fraction = np.minimum(np.abs(m[i]) / np.maximum(0.04 * h[i], 1e-12), 1)
            moved_less += (fraction < 1).sum()
            theta[i] = theta[i] - 0.01 * np.sign(m[i]) * fraction
        optimizer.step()
        if step % 3 == 2:
            estimates = [generator.normal(size=shape) for shape in shapes]
            optimizer.update_hessian([torch.tensor(g) for g in estimates], 50)
            h = [0.8 * old + 0.2 * 50 * g * g for old, g in zip(h, estimates, strict=True)]
    assert 20 < moved_less < 140  # clipped and unclipped coordinates
    for p, x in zip(params, theta, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12)


def test_sophias_estimate_converges_to_the_diagonal_of_the_exact_fisher_matrix():
    """The plain mean of 2000 estimates, each coordinate deviates by sqrt(2 / 2000) = 3 %: within 6 % in norm."""
    agent, obs, _, share = problem(shared=False)
    call = lambda named: functional_call(agent, named, obs.double())[0]  # noqa: E731
    mean, log_std = jacobian(agent, lambda n: call(n).mean), jacobian(agent, lambda n: call(n).stddev.log())
    variance = agent(obs)[0].variance.detach().double()[..., None]
    exact = ((mean.square() / variance + 2 * log_std.square()).sum(1) * share[:, None]).sum(0)
    optimizer = sophia_ppo.Sophia(trained(agent), betas=(0.965, 0.999))
    for draw in range(2000):
        optimizer.param_groups[0]["betas"] = 0.965, draw / (draw + 1)
        likelihood = sophia_ppo.log_likelihood(agent, obs) @ share
        optimizer.update_hessian(torch.autograd.grad(likelihood, trained(agent)), 1 / share.max())
    estimate = flat(optimizer.state[p]["h"] for p in trained(agent))
    assert (estimate - exact).norm() <= 0.06 * exact.norm()


@pytest.mark.parametrize("shared", [False, True])
def test_fisher_diagonal_is_that_of_per_sample_gradients(shared):
    agent, obs, actions, share = problem(shared)
    torch.manual_seed(5)
    diagonal = sophia_ppo.fisher_diagonal(agent, obs, actions, share)
    rows = scores(agent, obs, actions)
    if shared:
        torch.manual_seed(5)
        rows = rows + 2 * torch.randn(len(obs))[:, None] * value_jacobian(agent, obs)
    exact = (rows.square() * share[:, None]).sum(0)
    assert set(diagonal) == set(trained(agent))
    assert (flat(diagonal[p] for p in trained(agent)) - exact).norm() <= 1e-5 * exact.norm()


def step(optimizer, shared, **options):
    """Gradients [p] left by a policy_step that moves nothing, what it returned, and what a reference needs."""
    agent, obs, actions, share = problem(shared)
    args = sophia_ppo.Args(**{"optimizer": optimizer, "shared": shared, "max_grad_norm": 1e9} | options)
    log_ratio = torch.linspace(-0.5, 0.5, len(obs))[torch.randperm(len(obs))]
    y, returns, old_value = torch.randn(3, len(obs))
    with torch.no_grad():
        policy, value = agent(obs)
    old_log_prob = policy.log_prob(actions) - log_ratio
    batch = (obs, actions, old_log_prob, old_value, returns, y, share)
    result = sophia_ppo.policy_step(args, agent, torch.optim.SGD(trained(agent), lr=0.0), batch)
    context = agent, obs, actions, share.double(), y.double(), log_ratio.double(), value, old_value, returns
    return flat(p.grad for p in trained(agent)).double(), result, context


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_ppo_step_is_the_gradient_of_the_clipped_surrogate(shared, clip_vloss):
    options = {"ent_coef": 0.03, "vf_coef": 0.7, "clip_vloss": clip_vloss}
    gradient, result, context = step("adam", shared, **options)
    agent, obs, actions, share, y, log_ratio, value, old_value, returns = context
    ratio = log_ratio.exp()
    flat_out = ((y > 0) & (ratio > 1.2)) | ((y < 0) & (ratio < 0.8))
    outside = (ratio - 1).abs() > 0.2
    assert 5 < flat_out.sum() < outside.sum() < 55  # inside, outside and moving back, outside
    exact = -(share * y * ratio * ~flat_out) @ scores(agent, obs, actions)
    log_std = [i for p, i in zip(trained(agent), range(99), strict=False) if p is agent.log_std.weight]
    before = sum(p.numel() for p in trained(agent)[: log_std[0]])
    exact[before : before + 2] -= 0.03  # the entropy is sum(log sigma) + constant
    error = (value - returns).square()
    if shared:
        pulled = value - returns
        if clip_vloss:
            held = old_value + (value - old_value).clamp(-0.2, 0.2)
            worse = (held - returns).square() > error
            pulled = torch.where(worse, torch.where((value - old_value).abs() < 0.2, held - returns, 0.0), pulled)
            error = torch.max(error, (held - returns).square())
            assert 5 < worse.sum() < 55
        exact += 0.7 * 2 * (share * pulled) @ value_jacobian(agent, obs)
    assert (gradient - exact).norm() <= 1e-5 * exact.norm()
    loss = error.double() @ share if shared else 0
    surrogate = -torch.where(flat_out, ratio.clamp(0.8, 1.2), ratio) * y
    expected = [exact.norm(), (ratio - 1 - log_ratio) @ share, outside.double() @ share, loss, surrogate @ share]
    np.testing.assert_allclose(result, expected, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_diag_step_is_the_weighted_score_over_diagonal_and_damping(shared):
    torch.manual_seed(0)
    gradient, _, context = step("diag", shared, damping=0.3, vf_coef=0.7)
    agent, obs, actions, share, y, log_ratio, value, _, returns = context
    rows = scores(agent, obs, actions)
    weights = log_ratio.exp().clamp(0.1, 10)
    exact, second = -(share * weights * y) @ rows, rows
    if shared:
        exact += 0.7 * 2 * (share * (value - returns)) @ value_jacobian(agent, obs)
        problem(shared)  # the random state at the beginning of step
        torch.randperm(len(obs)), torch.randn(3, len(obs))
        second = rows + 2 * torch.randn(len(obs))[:, None] * value_jacobian(agent, obs)
    exact /= (second.square() * share[:, None]).sum(0) + 0.3
    assert (gradient - exact).norm() <= 1e-4 * exact.norm()


def test_sophia_estimates_its_hessian_after_every_tenth_update():
    agent, obs, actions, share = problem(shared=False)
    optimizer, args = sophia_ppo.Sophia(trained(agent)), sophia_ppo.Args(optimizer="sophia")
    batch = (obs, actions, agent(obs)[0].log_prob(actions).detach(), None, None, torch.randn(len(obs)), share)
    assert optimizer.defaults["betas"] == (0.965, 0.99) and optimizer.defaults["rho"] == 0.04
    seen = []
    for _ in range(21):
        torch.manual_seed(7)
        sophia_ppo.policy_step(args, agent, optimizer, batch)
        seen.append(flat(optimizer.state[p]["h"] for p in trained(agent)))
        if len(seen) == 10:  # 0.01 B g^2: g of actions drawn anew, B the number of valid samples, after the step
            torch.manual_seed(7)
            drawn = agent(obs)[0].sample()
            assert not torch.allclose(drawn, actions)
            g = share.double() @ scores(agent, obs, drawn)
            expected = 0.01 * (share > 0).sum() * g.square()
            assert (seen[-1] - expected).norm() < 1e-4 * expected.norm()
    changes = [i for i in range(1, 21) if not torch.equal(seen[i], seen[i - 1])]
    assert changes == [9, 19] and (seen[8] == 0).all()


def test_clipped_values_cost_the_larger_error():
    value, old, returns = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, 0.9, 0.0, 0.0], [3.0, 2.0, 0.0, -3.0]])
    clipped = sophia_ppo.value_loss(sophia_ppo.Args(clip_vloss=True, clip_coef=0.2), value, old, returns)
    torch.testing.assert_close(clipped, torch.tensor([2.8**2, 1.0, 1.0, 2.8**2]))
    plain = sophia_ppo.value_loss(sophia_ppo.Args(clip_coef=0.2), value, old, returns)
    torch.testing.assert_close(plain, torch.tensor([4.0, 1.0, 1.0, 4.0]))


@pytest.mark.parametrize("optimizer", ["adam", "diag"])
def test_the_bound_holds_for_what_moves_the_policy(optimizer):
    """The gradient's norm; for diag that of the direction, after the diagonal."""
    free, result, _ = step(optimizer, False)
    bounded, bounded_result, _ = step(optimizer, False, max_grad_norm=0.01)
    assert free.norm() > 0.05 and bounded_result[0] == result[0] == pytest.approx(free.norm().item(), rel=1e-4)
    torch.testing.assert_close(bounded, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-8)


def test_each_optimizer_has_its_defaults(tmp_path, monkeypatch):
    """The three fields without a value in Args, and Adam's epsilon."""
    expected = {"adam": (3e-4, 10, 16), "sophia": (1e-4, 10, 16), "diag": (0.05, 4, 4)}
    original, found = sophia_ppo.policy_step, []
    monkeypatch.setattr(sophia_ppo, "policy_step", lambda *a: found.append(a[2]) or original(*a))
    for name, values in expected.items():
        found.clear()
        options = ["--env-id", "InvertedPendulum-v5", "--num-envs", "4", "--num-steps", "16", "--total-timesteps", "64"]
        options += ["--optimizer", name, "--target-kl", "None", "--output-dir", str(tmp_path), "--run-name", name]
        sophia_ppo.main(tyro.cli(sophia_ppo.Args, args=options))
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["learning_rate"], config["update_epochs"], config["num_minibatches"]) == values
        assert len(found) == values[1] * values[2]
        assert name != "adam" or found[0].defaults["eps"] == 1e-5


def test_values_that_are_not_finite_stop_sophia_too(tmp_path, capsys):
    """Whose estimate draws from a policy that is no longer finite."""
    arguments = ["--env-id", "toy_envs:HugeReward-v0", "--num-envs", 4, "--num-steps", 16, "--total-timesteps", 640]
    with pytest.raises(SystemExit) as stopped:
        train("sophia_ppo", *arguments, "--optimizer", "sophia", "--output-dir", tmp_path, "--run-name", "x",
              "--update-epochs", 10)  # fmt: skip
    assert stopped.value.code == 1 and "iteration 3, actor update 1" in capsys.readouterr().err.splitlines()[-1]
    saved = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 128 and all(t.isfinite().all() for t in saved["agent"].values())


def test_annealing_and_target_kl(tmp_path, monkeypatch):
    passes, original = [], sophia_ppo.policy_step
    monkeypatch.setattr(sophia_ppo, "policy_step", lambda *a: passes.append(1) or original(*a))
    common = [*SMALL, "--total-timesteps", 320, "--output-dir", tmp_path]
    options = ["--anneal-lr", "--target-kl", None, "--learning-rate", 0.01, "--update-epochs", 3]
    train("sophia_ppo", *common, "--run-name", "anneal", *options)
    rates = [float(row["learning_rate"]) for row in read_csv(tmp_path / "anneal")]
    np.testing.assert_allclose(rates, [0.01, 0.008, 0.006, 0.004, 0.002])
    assert len(passes) == 5 * 3 * 4
    options = ["--optimizer", "diag", "--learning-rate", 1e-3, "--anneal-lr", "--target-kl", 1e-9]
    passes.clear()
    train("sophia_ppo", *common, "--run-name", "diag", *options)
    assert {float(row["learning_rate"]) for row in read_csv(tmp_path / "diag")} <= {1e-3, 1e-3 / 1.5, 1e-3 / 1.5**2}
    assert len(passes) == 5 * 2 * 4  # neither option is for diag
    passes.clear()
    train("sophia_ppo", *common, "--run-name", "target", "--target-kl", 1e-9, "--update-epochs", 3)
    assert len(passes) == 5 * 4  # one pass a rollout
    assert {float(row["learning_rate"]) for row in read_csv(tmp_path / "target")} == {3e-4}
    passes.clear()
    train("sophia_ppo", *common, "--run-name", "default", "--learning-rate", 0.01, "--update-epochs", 3)
    assert len(passes) < 5 * 3 * 4  # there is a bound by default


LEARNS = {
    "sophia": ["--optimizer", "sophia", "--num-minibatches", 8],
    "diag": ["--optimizer", "diag", "--num-minibatches", 4],
    "adam, shared": ["--shared", "--num-minibatches", 8],
}


@pytest.mark.parametrize("case", LEARNS)
def test_learns_inverted_pendulum(case, tmp_path):
    arguments = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", 60_000, "--num-envs", 8, "--num-steps", 64]
    assert learn(tmp_path, "sophia_ppo", *arguments, *LEARNS[case]) >= 150


@pytest.mark.parametrize("optimizer", ["sophia", "diag"])
def test_resume_keeps_the_optimizer(optimizer, tmp_path):
    arguments = [*SMALL, "--total-timesteps", 640, "--output-dir", tmp_path, "--run-name", "x", "--shared"]
    train("sophia_ppo", *arguments, "--optimizer", optimizer)
    before = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    train("sophia_ppo", *arguments, "--optimizer", optimizer, "--resume")
    after = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    assert before["optimizer"]["param_groups"] == after["optimizer"]["param_groups"]
    for index, state in before["optimizer"]["state"].items():
        assert all(torch.equal(value, after["optimizer"]["state"][index][name]) for name, value in state.items())
    if optimizer == "sophia":
        assert all((state["h"] > 0).any() for state in before["optimizer"]["state"].values())
