"""Fisher-vector products, conjugate gradients, line search and rank-1 step against dense float64 formulas."""

import copy

import pytest
import torch
from conftest import flat, learn, read_csv, score_matrix, train
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call, jacrev
from torch.nn.functional import cosine_similarity

import npg_cg
import npg_rank1
import rat_continuous as rat


class Discrete(nn.Module):
    """A policy over four actions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, obs):
        return Categorical(logits=self.net(obs), validate_args=False)


def problem(kind, samples=300, seed=0):
    """A policy away from its initialisation, observations, actions sampled from it, advantages they explain in part."""
    torch.manual_seed(seed)
    actor = npg_cg.Actor(4, 2, 16) if kind == "gaussian" else Discrete()
    for p in actor.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs = torch.randn(samples, 4)
    with torch.no_grad():
        actions = actor(obs).sample()
    y = torch.randn(samples) - (actions.view(samples, -1) - obs[:, :1]).square().sum(1)
    return actor, obs, actions, (y - y.mean()) / y.std()


def fisher(actor, obs):
    """F [p, p] in float64: for a Gaussian J^T diag(1 / sigma^2, 2) J with the Jacobian J of mean and log sigma, for a
    Categorical sum_a pi(a|s) h h^T with the scores h of all actions; the mean over obs."""
    actor, obs = copy.deepcopy(actor).double(), obs.double()
    named = {name: p.detach() for name, p in actor.named_parameters()}
    if isinstance(policy := actor(obs), Categorical):
        parts = [
            (policy.probs[:, a].detach(), score_matrix(actor, obs, torch.full((len(obs),), a)))
            for a in range(policy.probs.shape[1])
        ]
        return sum((p[:, None] * h).T @ h for p, h in parts) / len(obs)

    def jacobian(quantity):
        rows = jacrev(lambda named: quantity(functional_call(actor, named, obs)))(named)
        return torch.cat([rows[name].flatten(2) for name in named], 2).flatten(0, 1)  # [B * act_dim, p]

    mean, log_std = jacobian(lambda policy: policy.mean), jacobian(lambda policy: policy.stddev.log())
    precision = policy.variance.detach().flatten()[:, None].reciprocal()
    return ((precision * mean).T @ mean + 2 * log_std.T @ log_std) / len(obs)


def surrogate_gradient(actor, obs, actions, y):
    log_prob = actor(obs).log_prob(actions)
    return flat(torch.autograd.grad((log_prob * y).mean(), list(actor.parameters())))


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_fisher_product_is_the_explicit_one_symmetric_and_positive(kind):
    actor, obs, *_ = problem(kind)
    product, dense = npg_cg.fisher_product(actor, obs), fisher(actor, obs)
    vectors = torch.randn(6, len(dense))
    images = [product(v) for v in vectors]
    for v, image in zip(vectors, images, strict=True):
        assert relative(image, dense @ v.double()) < 1e-5
        assert v @ image > 0
        for u, other in zip(vectors, images, strict=True):
            assert abs(u @ image - v @ other) < 1e-5 * u.norm() * image.norm()


@pytest.mark.parametrize("damping", [0.01, 0.1])
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_conjugate_gradients_solve_the_dense_system(kind, damping):
    actor, obs, actions, y = problem(kind)
    g, dense = surrogate_gradient(actor, obs, actions, y), fisher(actor, obs)
    damped = dense + damping * torch.eye(len(dense)).double()
    d = npg_cg.natural_gradient(actor, obs, g, damping, 300)
    assert relative(d, torch.linalg.solve(damped, g.double())) < 1e-3
    residuals = []
    for iterations in (1, 3, 10):
        d = npg_cg.natural_gradient(actor, obs, g, damping, iterations)
        assert (d @ g).item() == pytest.approx((d.double() @ damped @ d.double()).item(), rel=0.02)  # main counts on it
        residuals.append(relative(damped @ d.double(), g.double()))
    assert residuals[2] < residuals[1] < residuals[0] < 1


def test_reset_steps_change_nothing():
    actor, obs, actions, y = problem("gaussian")
    valid = (torch.rand(len(obs)) > 0.3).float()
    kept = valid > 0
    g = surrogate_gradient(actor, obs[kept], actions[kept], y[kept])
    expected = npg_cg.natural_gradient(actor, obs[kept], g, 0.1, 10)
    obs[~kept] = 50.0
    assert relative(npg_cg.natural_gradient(actor, obs, g, 0.1, 10, valid), expected.double()) < 1e-4


@pytest.mark.parametrize("broken", ["obs", "gradient"])
def test_values_that_are_not_finite_raise(broken):
    actor, obs, actions, y = problem("gaussian")
    g = surrogate_gradient(actor, obs, actions, y)
    {"obs": obs, "gradient": g}[broken].view(-1)[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        npg_cg.natural_gradient(actor, obs, g, 0.1, 10)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_rat_is_the_empirical_fisher_solve(kind):
    actor, obs, actions, y = problem(kind)
    scores = score_matrix(actor, obs, actions)
    damped = scores.T @ scores / len(obs) + 0.1 * torch.eye(scores.shape[1]).double()
    expected = torch.linalg.solve(damped, surrogate_gradient(actor, obs, actions, y).double())
    assert relative(flat(rat.rat_direction(actor, obs, actions, y, torch.ones(len(obs)), 0.1)), expected) < 1e-4


def test_rat_and_conjugate_gradients_agree_in_the_limit_of_many_samples():
    """With actions from the policy the empirical Fisher goes to the Fisher: the claim that RAT rests on."""
    cosines = []
    for samples in (64, 512, 4096):
        actor, obs, actions, y = problem("gaussian", samples)
        g = surrogate_gradient(actor, obs, actions, y)
        mine = npg_cg.natural_gradient(actor, obs, g, 0.1, 100)
        rats = flat(rat.rat_direction(actor, obs, actions, y, torch.ones(samples), 0.1))
        cosines.append(cosine_similarity(mine, rats, dim=0).item())
    assert cosines[0] < cosines[1] < cosines[2] and cosines[2] >= 0.95
    assert cosine_similarity(mine, g, dim=0) < 0.8  # and the plain gradient points elsewhere


def test_rank1_direction_is_the_dense_inverse():
    torch.manual_seed(0)
    for damping in (1e-3, 0.1, 10):
        g, u = torch.randn(2, 40, dtype=torch.float64)
        dense = torch.outer(u, u) + damping * torch.eye(40).double()
        assert relative(npg_rank1.rank1_direction(g, u, damping), torch.linalg.solve(dense, g)) < 1e-6
    with pytest.raises(FloatingPointError, match="not finite"):
        npg_rank1.rank1_direction(g * torch.nan, u, 0.1)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_line_search_keeps_to_its_bounds(kind, target_kl=0.01):
    """Random directions and the natural one, over seven decades: never above target_kl, never worse, else untouched."""
    actor, obs, actions, y = problem(kind)
    share = torch.full_like(y, 1 / len(y))
    g = surrogate_gradient(actor, obs, actions, y)
    natural = npg_cg.natural_gradient(actor, obs, g, 0.1, 15)
    accepted = []
    for direction in (natural, g, *torch.randn(8, len(g))):
        for scale in 10.0 ** torch.arange(-4, 3):
            moved = copy.deepcopy(actor)
            step = scale * direction / direction.norm()
            factor = npg_cg.line_search(moved, step, (obs, actions, y, share), target_kl)
            accepted.append(factor)
            if factor == 0:
                assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), actor.parameters(), strict=True))
                continue
            torch.testing.assert_close(flat(moved.parameters()), flat(actor.parameters()) + factor * step)
            with torch.no_grad():
                old, new = actor(obs), moved(obs)
                assert kl_divergence(old, new).mean() <= target_kl * (1 + 1e-5)
                assert ((new.log_prob(actions) - old.log_prob(actions)).exp() * y).mean() > y.mean()
    assert 0 in accepted and 1 in accepted and any(0 < factor < 1 for factor in accepted)


@pytest.mark.parametrize("scale", [-1.0, -1e-3, 0.0, torch.nan])
def test_a_direction_that_cannot_improve_changes_no_bit(scale):
    actor, obs, actions, y = problem("gaussian")
    before = copy.deepcopy(actor)
    step = scale * surrogate_gradient(actor, obs, actions, y)
    assert npg_cg.line_search(actor, step, (obs, actions, y, torch.full_like(y, 1 / len(y))), 0.01) == 0
    assert all(torch.equal(a, b) for a, b in zip(actor.parameters(), before.parameters(), strict=True))


SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--device", "cpu"]


def rows(tmp_path, *options):
    train("npg_cg", *SMALL, "--output-dir", tmp_path, "--run-name", "x", *options)
    return [{name: float(value) for name, value in row.items()} for row in read_csv(tmp_path / "x")]


def test_trpo_learns_inverted_pendulum(tmp_path):
    """As test_runs.py's test of the same name, after 30k steps."""
    arguments = [*SMALL, "--total-timesteps", 30_000, "--num-envs", 8, "--num-steps", 64, "--cg-iterations", 15]
    assert learn(tmp_path, "npg_cg", *arguments, "--line-search") >= 150


def test_trpo_keeps_every_update_within_target_kl(tmp_path):
    found = rows(tmp_path, "--total-timesteps", 640, "--line-search", "--target-kl", 0.003)
    assert all(row["kl"] <= 0.003 * (1 + 1e-3) for row in found)
    assert sum(row["kl"] > 0.001 and row["step_size"] > 0 for row in found) >= 8


@pytest.mark.parametrize("clip", ["fisher", "l2", "none"])
def test_clip_bounds_the_step(clip, tmp_path, monkeypatch):
    """Of the one update of each rollout, for its recorded gradient g and direction d; fisher: d^T g without a root."""
    original, seen = npg_cg.natural_gradient, []

    def recorded(actor, obs, gradient, *arguments):
        seen.append((gradient, original(actor, obs, gradient, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr(npg_cg, "natural_gradient", recorded)
    one = ["--num-minibatches", 1, "--update-epochs", 1, "--cg-iterations", 2]
    found = rows(tmp_path, "--total-timesteps", 128, *one, "--clip", clip, "--max-grad-norm", 0.01)
    for row, (g, d) in zip(found, seen, strict=True):
        length = {"fisher": (d @ g).item(), "l2": d.norm().item(), "none": 0}[clip]
        assert row["step_size"] == pytest.approx(row["learning_rate"] * min(1, 0.01 / (length + 1e-6)), rel=1e-4)
        assert clip == "none" or row["step_size"] < 0.5 * row["learning_rate"]


@pytest.mark.parametrize("score", ["sample", "mean"])
def test_rank1_takes_the_score_of_a_valid_sample_or_their_mean_and_clips(score, tmp_path, monkeypatch):
    """u of each update is a row of H, or the mean of H's rows, over samples that are no resets; l2 clip of the step."""
    policies, forward = [], npg_rank1.Actor.forward  # (actor, its parameters, obs) of each pass
    seen, original, actions, masks = [], npg_rank1.rank1_direction, [], []

    def passed(self, obs):
        policies.append((copy.deepcopy(self.state_dict()), obs))
        return forward(self, obs)

    def recorded(gradient, u, damping):
        seen.append((u, policies[-1], original(gradient, u, damping)))
        return seen[-1][-1]

    def collect(self, *arguments, collect_=npg_rank1.Collector.collect):
        rollout = collect_(self, *arguments)
        actions.append(rollout[1].flatten(0, 1))
        masks.append(rollout[-1].flatten() > 0)
        return rollout

    monkeypatch.setattr(npg_rank1.Actor, "forward", passed)
    monkeypatch.setattr(npg_rank1, "rank1_direction", recorded)
    monkeypatch.setattr(npg_rank1.Collector, "collect", collect)
    monkeypatch.setattr(npg_rank1.torch, "randperm", lambda n, device: torch.arange(n))  # blocks in the rollout's order
    train("npg_rank1", *SMALL, "--total-timesteps", 256, "--num-minibatches", 2, "--update-epochs", 1, "--score", score,
          "--max-grad-norm", 0.01, "--output-dir", tmp_path, "--run-name", "x")  # fmt: skip
    monkeypatch.undo()
    chosen, resets = set(), 0
    for i, (u, (weights, obs), d) in enumerate(seen):
        actor = npg_rank1.Actor(4, 1)
        actor.load_state_dict(weights)
        half, valid = slice(i % 2 * 32, i % 2 * 32 + 32), masks[i // 2]
        h = score_matrix(actor, obs, actions[i // 2][half])[valid[half]]
        resets += int((~valid[half]).sum())
        if score == "mean":
            assert relative(u, h.mean(0)) < 1e-4
        else:
            distances = (h - u).norm(dim=1) / u.norm()
            assert distances.min() < 1e-4
            chosen.add(int(distances.argmin()))
        if i % 2 == 0:  # the pass after it is the next update's
            moved = flat(seen[i + 1][1][0][name] for name in weights) - flat(weights.values())
            rate = float(read_csv(tmp_path / "x")[i // 2]["learning_rate"])
            torch.testing.assert_close(moved, rate * min(1, 0.01 / d.norm().item()) * d, rtol=1e-3, atol=1e-7)
    assert len(seen) == 8 and resets > 0 and (score == "mean" or len(chosen) > 4)
