"""Fisher-vector products, conjugate gradients, TRPO and the rank-1 step against dense formulas."""

import copy
import importlib

import numpy as np
import pytest
import torch
from conftest import flat, learn, read_csv, same, score_matrix, train
from recording import check_critic, check_statistics, log_prob, recompute, record
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call, jacrev
from torch.nn.functional import cosine_similarity

import npg_cg
import npg_rank1
import rat_continuous as rat

SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--device", "cpu"]
both_policies = pytest.mark.parametrize("kind", ["gaussian", "categorical"])


class Discrete(nn.Module):
    """A policy over four actions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, obs):
        return Categorical(logits=self.net(obs))


def problem(kind, samples=300):
    """A policy away from its initialisation and Samples of it, whose advantages it can explain."""
    torch.manual_seed(0)
    actor = npg_cg.Actor(4, 2, 16) if kind == "gaussian" else Discrete()
    for p in actor.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs = torch.randn(samples, 4)
    with torch.no_grad():
        policy = actor(obs)
        actions = policy.sample()
    distance = (actions.view(samples, -1) - obs[:, :1]).square().sum(1)
    y = npg_cg.normalized(torch.randn(samples) - distance)
    return actor, npg_cg.Samples(obs, actions, y, y, policy.log_prob(actions))


def jacobian(actor, obs, quantity):
    """d quantity / d theta, one row for each sample and action dimension: [B * act_dim, p]."""
    named = {name: p.detach() for name, p in actor.named_parameters()}
    rows = jacrev(lambda named: quantity(functional_call(actor, named, obs)))(named)
    return torch.cat([rows[name].flatten(2) for name in named], 2).flatten(0, 1)


def fisher(actor, obs):
    """F [p, p] in float64, the mean over obs by the textbook's formulas.

    Gaussian: J^T diag(1 / sigma^2, 2) J, with the Jacobian J of mean and log sigma.
    Categorical: sum_a pi(a|s) h h^T, with the scores h of all actions."""
    actor = copy.deepcopy(actor).double()
    obs = obs.double()
    policy = actor(obs)
    if isinstance(policy, Categorical):
        total = 0.0
        for a, probability in enumerate(policy.probs.detach().unbind(1)):
            h = score_matrix(actor, obs, torch.full((len(obs),), a))
            total = total + (probability[:, None] * h).T @ h
        return total / len(obs)
    mean = jacobian(actor, obs, lambda policy: policy.mean)
    log_std = jacobian(actor, obs, lambda policy: policy.stddev.log())
    precision = 1 / policy.variance.detach().flatten()[:, None]
    return ((precision * mean).T @ mean + 2 * log_std.T @ log_std) / len(obs)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def spy(monkeypatch, module, name):
    """(arguments, result) of all calls of module's function from here on."""
    original = getattr(module, name)
    calls = []

    def recorded(*arguments):
        result = original(*arguments)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(module, name, recorded)
    return calls


def rows(folder, script, *options):
    """progress.csv of a small run, as numbers."""
    train(script, *SMALL, "--output-dir", folder, "--run-name", "x", *options)
    return [{name: float(value) for name, value in row.items()} for row in read_csv(folder / "x")]


# ---- Gradient, Fisher-vector product, conjugate gradients ------------------------------------


@both_policies
def test_policy_gradient_is_scores_times_weighted_advantages(kind):
    """H^T Sigma y, with ratios on both sides of their bounds, 0.1 and 10."""
    actor, block = problem(kind)
    log_ratio = 2 * torch.randn(len(block.obs))
    block = block._replace(log_prob=block.log_prob - log_ratio, advantages=7 + block.advantages)
    assert log_ratio.exp().min() < 0.1
    assert log_ratio.exp().max() > 10
    w = log_ratio.exp().clamp(0.1, 10).double()
    y = (block.advantages - block.advantages.mean()).double()
    y = y / y.square().mean().sqrt()
    expected = score_matrix(actor, block.obs, block.actions).T @ (w * y) / len(y)
    assert relative(npg_cg.policy_gradient(actor, block), expected) < 1e-4


@both_policies
def test_fisher_product_is_the_explicit_one_symmetric_and_positive(kind):
    actor, block = problem(kind)
    product = npg_cg.fisher_product(actor, block.obs)
    dense = fisher(actor, block.obs)
    vectors = torch.randn(6, len(dense))
    images = [product(v) for v in vectors]
    for v, image in zip(vectors, images):
        assert relative(image, dense @ v.double()) < 1e-5
        assert v @ image > 0
        for u, other in zip(vectors, images):
            assert abs(u @ image - v @ other) < 1e-5 * u.norm() * image.norm()


def test_conjugate_gradients_are_best_in_their_krylov_space():
    """After k iterations: the minimiser of x^T A x / 2 - b^T x over span(b, A b, ... A^(k-1) b)."""
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix = damped(root @ root.T / 12, 0.1)
    b = torch.randn(12, dtype=torch.float64)
    powers = [b]
    for k in range(1, 6):
        basis, _ = torch.linalg.qr(torch.stack(powers, 1))  # [12, k]
        best = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
        x = npg_cg.conjugate_gradients(lambda v: matrix @ v, b, k)
        torch.testing.assert_close(x, best, rtol=1e-8, atol=1e-8)
        powers.append(matrix @ powers[-1])


def test_conjugate_gradients_end_at_a_small_residual():
    products = []

    def double(v):
        products.append(v)
        return 2 * v

    b = torch.ones(3)
    assert torch.equal(npg_cg.conjugate_gradients(double, b, 10), b / 2)
    assert len(products) == 1
    assert torch.equal(npg_cg.conjugate_gradients(double, 1e-6 * b, 10), 0 * b)
    assert len(products) == 1


@pytest.mark.parametrize("damping", [0.01, 0.1])
@both_policies
def test_natural_gradient_solves_the_dense_system(kind, damping):
    actor, block = problem(kind)
    g = npg_cg.policy_gradient(actor, block)
    dense = damped(fisher(actor, block.obs), damping)
    d = npg_cg.natural_gradient(actor, block.obs, g, damping, 300)
    assert relative(d, torch.linalg.solve(dense, g.double())) < 1e-3
    left = []
    for iterations in (1, 3, 10):
        d = npg_cg.natural_gradient(actor, block.obs, g, damping, iterations)
        curvature = (d.double() @ dense @ d.double()).item()
        assert (d @ g).item() == pytest.approx(curvature, rel=0.02)  # the step sizes count on it
        left.append(relative(dense @ d.double(), g.double()))
        mine = npg_cg.relative_residual(actor, block.obs, damping, g, d).item()
        assert mine == pytest.approx(left[-1], rel=1e-3)
    assert left[2] < left[1] < left[0] < 1


@pytest.mark.parametrize("broken", ["obs", "gradient"])
def test_values_that_are_not_finite_raise(broken):
    actor, block = problem("gaussian")
    g = npg_cg.policy_gradient(actor, block)
    {"obs": block.obs, "gradient": g}[broken].view(-1)[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        npg_cg.natural_gradient(actor, block.obs, g, 0.1, 10)


@both_policies
def test_rat_is_the_empirical_fisher_solve(kind):
    actor, block = problem(kind)
    scores = score_matrix(actor, block.obs, block.actions)
    g = npg_cg.policy_gradient(actor, block).double()
    expected = torch.linalg.solve(damped(scores.T @ scores / len(scores), 0.1), g)
    ones = torch.ones(len(scores))
    found = rat.rat_direction(actor, block.obs, block.actions, block.advantages, ones, 0.1)
    assert relative(flat(found), expected) < 1e-4


def test_rat_and_conjugate_gradients_agree_in_the_limit_of_many_samples():
    """With actions from the policy the empirical Fisher goes to the Fisher: RAT's claim."""
    cosines = []
    for samples in (64, 512, 4096):
        actor, block = problem("gaussian", samples)
        g = npg_cg.policy_gradient(actor, block)
        mine = npg_cg.natural_gradient(actor, block.obs, g, 0.1, 100)
        ones = torch.ones(samples)
        rats = rat.rat_direction(actor, block.obs, block.actions, block.advantages, ones, 0.1)
        cosines.append(cosine_similarity(mine, flat(rats), dim=0).item())
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] >= 0.95
    assert cosine_similarity(mine, g, dim=0) < 0.8  # and the plain gradient points elsewhere


# ---- Step sizes, TRPO ------------------------------------------------------------------------


@both_policies
def test_line_search_keeps_to_its_bounds(kind, target_kl=0.01):
    """Random directions, the gradient and the natural one, over seven decades of length."""
    actor, block = problem(kind)
    before = copy.deepcopy(actor.state_dict())
    g = npg_cg.policy_gradient(actor, block)
    natural = npg_cg.natural_gradient(actor, block.obs, g, 0.1, 15)
    y = block.advantages
    factors = []

    def acceptable(step):
        moved = copy.deepcopy(actor)
        npg_cg.move(moved, step)
        with torch.no_grad():
            policy = moved(block.obs)
            ratio = (policy.log_prob(block.actions) - block.log_prob).exp()
            kl = kl_divergence(actor(block.obs), policy).mean()
        return kl <= target_kl and (ratio * y).mean() > y.mean()

    for direction in (natural, g, *torch.randn(8, len(g))):
        for scale in 10.0 ** torch.arange(-3, 3):
            step = scale * direction / direction.norm()
            factor = npg_cg.line_search(actor, block, step, target_kl)
            first = [0.8**k for k in range(10) if acceptable(0.8**k * step)][:1]
            assert [factor] == (first or [0.0])
            factors.append(factor)
    assert {0.0, 1.0} < set(factors)
    assert same(actor.state_dict(), before)


@pytest.mark.parametrize("scale", [-1.0, -1e-3, 0.0, torch.nan])
def test_a_direction_that_cannot_improve_is_not_taken(scale):
    actor, block = problem("gaussian")
    step = scale * npg_cg.policy_gradient(actor, block)
    assert npg_cg.line_search(actor, block, step, 0.01) == 0


def test_trpo_step_goes_to_the_bound_of_the_quadratic_model(monkeypatch):
    """eta^2 d^T (F + lambda I) d / 2 = delta, of which F's part is the KL divergence, nearly."""
    actor, block = problem("gaussian")
    args = npg_cg.Args(line_search=True, target_kl=1e-6, damping=1e-3)
    g = npg_cg.policy_gradient(actor, block)
    d = npg_cg.natural_gradient(actor, block.obs, g, args.damping, 300)
    searched = spy(monkeypatch, npg_cg, "line_search")
    eta = npg_cg.trpo_step_size(args, actor, block, g, d)
    (_, _, step, target_kl), factor = searched[0]
    dense = damped(fisher(actor, block.obs), args.damping)
    full = (2 * target_kl / (d.double() @ dense @ d.double())).sqrt()
    assert target_kl == args.target_kl
    assert relative(step, full * d.double()) < 1e-3
    assert relative(eta, full * factor) < 1e-3
    actor, obs = actor.double(), block.obs.double()
    moved = copy.deepcopy(actor)
    npg_cg.move(moved, step.double())
    kl = kl_divergence(actor(obs), moved(obs)).mean()
    model = kl + args.damping * step.square().sum() / 2
    assert model.item() == pytest.approx(target_kl, rel=0.02)


def test_trpo_learns_inverted_pendulum(tmp_path):
    """As test_runs.py's test of the same name."""
    arguments = [*SMALL, "--total-timesteps", 12_000, "--num-envs", 8, "--num-steps", 64]
    more = ["--cg-iterations", 15, "--line-search"]
    assert learn(tmp_path, "npg_cg", *arguments, *more) >= 25


def test_trpo_takes_one_step_a_rollout_within_target_kl(tmp_path, monkeypatch):
    searched = spy(monkeypatch, npg_cg, "line_search")
    options = ["--total-timesteps", 640, "--line-search", "--target-kl", 0.03]
    found = rows(tmp_path, "npg_cg", *options, "--update-epochs", 3, "--num-minibatches", 2)
    assert len(searched) == len(found) == 10
    assert all(row["kl"] <= 0.03 * (1 + 1e-3) for row in found)
    assert sum(row["kl"] > 0.017 and row["step_size"] > 0 for row in found) >= 8
    assert {row["learning_rate"] for row in found} == {npg_cg.Args.learning_rate}  # not adapted


@pytest.mark.parametrize(("options", "iterations"), [({}, 10), ({"line_search": True}, 15)])
def test_iterations_of_a_solve_by_default(options, iterations):
    assert npg_cg.Args(**options).cg_iterations == iterations
    assert npg_cg.Args(**options, cg_iterations=7).cg_iterations == 7


@pytest.mark.parametrize("clip", ["normalize", "fisher", "l2", "none"])
@pytest.mark.parametrize("bound", [0.01, 100.0])
def test_step_sizes(clip, bound):
    """normalize: of the same length in the damped Fisher norm; fisher: its square is bounded."""
    actor, block = problem("gaussian")
    args = npg_cg.Args(clip=clip, max_grad_norm=bound)
    g = npg_cg.policy_gradient(actor, block)
    d = npg_cg.natural_gradient(actor, block.obs, g, args.damping, args.cg_iterations)
    dense = damped(fisher(actor, block.obs), args.damping)
    curvature = (d.double() @ dense @ d.double()).item()
    found = npg_cg.step_size(args, g, d, 0.03).item()
    if clip == "normalize":
        assert found * curvature**0.5 == pytest.approx(0.03, rel=1e-3)
        assert npg_cg.step_size(args, 0 * g, 0 * d, 0.03).isfinite()
        return
    length = {"fisher": curvature, "l2": d.norm().item(), "none": 0.0}[clip]
    expected = 0.03 * min(1, bound / (length + 1e-6))
    assert found == pytest.approx(expected, rel=1e-3)
    assert (expected < 0.02) == (bound == 0.01 and clip != "none")


@pytest.mark.parametrize(("clip", "bounded"), [("normalize", False), ("fisher", True)])
def test_a_step_size_grows_without_a_limit_only_where_steps_are_normalized(clip, bounded, tmp_path):
    options = ["--total-timesteps", 640, "--clip", clip, "--learning-rate", 1e-3]
    sizes = [row["learning_rate"] for row in rows(tmp_path, "npg_cg", *options)]
    assert max(sizes) == (1e-3 if bounded else sizes[-1])
    assert (sizes[-1] > 1e-3) != bounded


# ---- Rank one --------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_rank1_direction_is_the_dense_inverse(damping):
    torch.manual_seed(0)
    g, u = torch.randn(2, 40, dtype=torch.float64)
    expected = torch.linalg.solve(damped(torch.outer(u, u), damping), g)
    assert relative(npg_rank1.rank1_direction(g, u, damping), expected) < 1e-6


@pytest.mark.parametrize("broken", [0, 1])
def test_rank1_direction_of_values_that_are_not_finite_raises(broken):
    vectors = torch.ones(2, 5)
    vectors[broken, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        npg_rank1.rank1_direction(*vectors, 0.1)


@both_policies
def test_block_score_is_a_row_of_the_score_matrix_or_their_mean(kind):
    """Every row is drawn, and with the same probability."""
    actor, block = problem(kind, 8)
    scores = score_matrix(actor, block.obs, block.actions)
    assert relative(npg_rank1.block_score(actor, block, "mean"), scores.mean(0)) < 1e-4
    drawn = []
    for _ in range(400):
        distances = (scores - npg_rank1.block_score(actor, block, "sample")).norm(dim=1)
        drawn.append(distances.argmin().item())
        assert distances.min() < 1e-4 * scores.norm(dim=1).max()
    assert min(map(drawn.count, range(8))) > 25  # 50 expected, standard deviation 6.6


# ---- Whole runs ------------------------------------------------------------------------------


def weighted_gradient(actor, obs, actions, weighted):
    """Gradient of mean(weighted log pi(a|s)) in float64."""
    actor = copy.deepcopy(actor).double()
    log_likelihood = actor(torch.tensor(obs)).log_prob(torch.tensor(actions))
    loss = (torch.tensor(weighted) * log_likelihood).mean()
    return flat(torch.autograd.grad(loss, list(actor.parameters())))


def applied(clip, bound, row, gradient, direction):
    """The step that a direction leads to: eta of the row, bounded or normalised."""
    curvature = direction @ gradient
    if clip == "normalize":
        return row["learning_rate"] / curvature.sqrt() * direction
    length = curvature if clip == "fisher" else direction.norm()
    return row["learning_rate"] * min(1.0, bound / (length.item() + 1e-6)) * direction


def check_core(script, handed, actor, block, g):
    """g and lambda, with the block's observations or the score of one of its samples."""
    if script == "npg_cg":
        _, obs, gradient, damping, _ = handed
        assert torch.equal(obs, block.obs)
    else:
        gradient, u, damping = handed
        scores = score_matrix(actor, block.obs, block.actions)
        assert (scores - u).norm(dim=1).min() < 1e-3 * u.norm()
    assert gradient is g
    assert damping == 0.1


@pytest.mark.parametrize(
    ("script", "core", "clip", "bound", "rate"),
    [
        ("npg_cg", "natural_gradient", "normalize", 0.5, 0.4),
        ("npg_cg", "natural_gradient", "fisher", 0.5, 0.6),
        ("npg_rank1", "rank1_direction", "l2", 5.0, 0.02),
    ],
)
def test_a_run_hands_its_core_and_critic_what_the_rollout_says(
    script, core, clip, bound, rate, tmp_path, monkeypatch
):
    """Two iterations with many resets, recomputed in NumPy: gradients, ratios, steps, metrics."""
    module = importlib.import_module(script)
    gradients = spy(monkeypatch, module, "policy_gradient")
    directions = spy(monkeypatch, module, core)
    more = ["--update-epochs", 2, "--num-minibatches", 2, "--learning-rate", rate]
    more += ["--max-grad-norm", bound]
    more += ["--clip", clip] if script == "npg_cg" else []
    iterations = record(script, "policy_gradient", tmp_path, monkeypatch, *more)
    expected = recompute(iterations)
    check_statistics(iterations, expected)
    check_critic(iterations, expected)
    blocks = zip(gradients, directions, strict=True)
    ratios = []
    for iteration, wanted in zip(iterations, expected):
        seen = []
        agents = [agent for _, agent in iteration.core] + [iteration.trained]
        for (block,), now, after in zip([c for c, _ in iteration.core], agents, agents[1:]):
            (_, g), (handed, d) = next(blocks)
            chosen = wanted.rows(block.actions.numpy())
            obs, actions = wanted.obs[chosen], wanted.actions[chosen].astype(float)
            np.testing.assert_allclose(block.obs, obs, rtol=1e-3, atol=1e-4)
            advantages = wanted.advantages[chosen]
            y = (advantages - advantages.mean()) / advantages.std()
            before = log_prob(iteration.policy, obs, actions)
            ratio = np.exp(log_prob(now, obs, actions) - before)
            weighted = np.clip(ratio, 0.1, 10) * y
            assert relative(g, weighted_gradient(now.policy, obs, actions, weighted)) < 1e-2
            check_core(script, handed, now.policy, block, g)
            moved = flat(after.policy.parameters()) - flat(now.policy.parameters())
            step = applied(clip, bound, iteration.row, g, d)
            torch.testing.assert_close(moved, step, rtol=1e-2, atol=1e-5)
            seen += chosen
            ratios += ratio.tolist()
        assert sorted(seen) == sorted(2 * list(range(len(wanted.obs))))
    assert max(ratios) > 2
    assert min(ratios) < 0.5
