"""RAT's direction and its rules against explicit float64 formulas with materialised scores."""

import pytest
import torch
from conftest import flat, score_matrix
from torch import nn
from torch.distributions import Categorical, Independent, Normal

import rat_continuous as rat


def problem(obs_dim, act_dim, hidden, samples, seed=0):
    """An actor away from its initialisation and a block with a fifth of the weights zero."""
    torch.manual_seed(seed)
    actor = rat.Actor(obs_dim, act_dim, hidden)
    for p in actor.parameters():
        p.data += 0.1 * torch.randn_like(p)
    obs, actions = torch.randn(samples, obs_dim), 1.3 * torch.randn(samples, act_dim)
    weights = (0.1 + 2 * torch.rand(samples)) * (torch.rand(samples) > 0.2)
    return actor, obs, actions, torch.randn(samples), weights


def primal(scores, y, weights, damping, previous):
    """argmin_g |y - H g|^2_Sigma + damping |g - previous|^2, the p x p way: without a kernel."""
    weighted = scores.T * (weights.double() / (weights > 0).sum())  # H^T Sigma
    curvature = weighted @ scores + damping * torch.eye(scores.shape[1], dtype=torch.float64)
    return torch.linalg.solve(curvature, weighted @ y.double() + damping * previous)


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("jacobian", ["tape", "vmap"])
@pytest.mark.parametrize("with_previous", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10])
@pytest.mark.parametrize("size", [(3, 1, 16, 64), (17, 6, 32, 100), (8, 2, 24, 257)])
def test_direction_is_the_proximal_minimiser(size, damping, with_previous, jacobian):
    actor, obs, actions, y, weights = problem(*size)
    previous = [0.1 * torch.randn_like(p) for p in actor.parameters()] if with_previous else None
    start = (
        flat(previous).double()
        if with_previous
        else torch.zeros(sum(p.numel() for p in actor.parameters())).double()
    )
    expected = primal(score_matrix(actor, obs, actions), y, weights, damping, start)
    direction = rat.rat_direction(actor, obs, actions, y, weights, damping, previous, jacobian)
    assert [d.shape for d in direction] == [p.shape for p in actor.parameters()]
    assert relative(flat(direction), expected) < 1e-4


def test_tape_and_vmap_agree_at_the_default_size():
    actor, *block = problem(17, 6, 256, 512)
    previous = [0.01 * torch.randn_like(p) for p in actor.parameters()]
    tape, vmap = (
        flat(rat.rat_direction(actor, *block, 0.1, previous, j)) for j in ("tape", "vmap")
    )
    assert relative(tape, vmap.double()) < 1e-4


def test_rows_of_weight_zero_change_nothing():
    actor, obs, actions, y, weights = problem(5, 2, 16, 80)
    dead = weights == 0
    kept = rat.rat_direction(actor, obs[~dead], actions[~dead], y[~dead], weights[~dead], 0.1)
    obs[dead], actions[dead], y[dead] = 100.0, -50.0, 1e4
    assert (
        relative(flat(rat.rat_direction(actor, obs, actions, y, weights, 0.1)), flat(kept).double())
        < 1e-5
    )


def kaczmarz_block(seed=0):
    """An actor and a block of samples whose ratios are the weights returned, y and w as used."""
    actor, obs, actions, y, _ = problem(4, 2, 16, 120, seed)
    weights = 0.2 + 2 * torch.rand(120)
    log_prob = actor(obs).log_prob(actions).detach() - weights.log()
    block = rat.Samples(obs, actions, 3 + 5 * y, torch.zeros(120), log_prob)
    y = (y - y.mean()) / y.std(correction=0)
    return actor, block, (obs, actions, y, weights)


def nothing(actor):
    return {p: torch.zeros_like(p) for p in actor.parameters()}


def three_blocks():
    """Of each an actor, a block, its y, w and float64 scores; other parameters every time."""
    for seed in range(3):
        actor, block, (obs, actions, y, weights) = kaczmarz_block(seed)
        yield actor, block, y.double(), weights, score_matrix(actor, obs, actions)


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_track_is_its_direct_form_over_three_blocks(memory):
    """Damping relative to the mean squared score, a step of Fisher norm 1; g is remembered."""
    args = rat.Args(damping=0.05, memory=memory)
    g = torch.zeros(1)
    for actor, block, y, weights, scores in three_blocks():
        g = memory * g.expand(scores.shape[1]).double()
        previous = dict(zip(actor.parameters(), like(actor, g)))
        trace = (weights * scores.square().sum(1)).mean().item()
        g = primal(scores, y, weights, 0.05 * trace, g)
        norm = (weights * (scores @ g).square()).mean().sqrt().item()
        applied, remembered, metrics = rat.kaczmarz_direction(args, actor, block, previous)
        assert relative(flat(applied.values()), g / norm) < 1e-4
        assert relative(flat(remembered.values()), g) < 1e-4
        assert float(metrics["rat/damping"]) == pytest.approx(0.05 * trace, rel=1e-4)
        assert float(metrics["rat/relative_damping"]) == pytest.approx(0.05, rel=1e-4)
        assert float(metrics["rat/fisher_norm"]) == pytest.approx(norm, rel=1e-4)


def like(actor, vector):
    """A flat float64 vector as a float32 tensor for each parameter."""
    parts = vector.float().split([p.numel() for p in actor.parameters()])
    return [part.view_as(p) for part, p in zip(parts, actor.parameters())]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_track_knows_no_units(scale):
    """Advantages in other units change nothing; log pi times s divides the step by s."""
    actor, block, _ = kaczmarz_block()
    first, *_ = rat.kaczmarz_direction(rat.Args(), actor, block, nothing(actor))
    block = block._replace(advantages=scale * block.advantages - 7)
    second, *_ = rat.kaczmarz_direction(rat.Args(), actor, block, nothing(actor))
    assert relative(flat(second.values()), flat(first.values()).double()) < 1e-4


def test_release_is_its_direct_form_over_three_blocks():
    """The published code's rule: d_j = clip(increment for y + H d_{j-1}), a plus."""
    args = rat.Args(kaczmarz="release")
    d = torch.zeros(1).double()
    for actor, block, y, weights, scores in three_blocks():
        d = d.expand(scores.shape[1])
        previous = dict(zip(actor.parameters(), like(actor, -d)))
        sigma = torch.diag(weights.double() / len(weights))
        system = 0.1 * torch.eye(len(y)).double() + scores @ scores.T @ sigma
        increment = scores.T @ sigma @ torch.linalg.solve(system, y + scores @ d)
        d = increment * min(1, 0.5 / (increment.norm().item() + 1e-6))
        applied, remembered, _ = rat.kaczmarz_direction(args, actor, block, previous)
        assert relative(flat(applied.values()), d) < 1e-4
        assert torch.equal(flat(remembered.values()), -flat(applied.values()))


def test_paper_remembers_the_unclipped_iterate_and_off_nothing():
    actor, block, data = kaczmarz_block()
    paper = rat.Args(kaczmarz="paper", max_grad_norm=0.05)
    first = rat.rat_direction(actor, *data, 0.1)
    applied, previous, metrics = rat.kaczmarz_direction(paper, actor, block, nothing(actor))
    assert relative(flat(previous.values()), flat(first).double()) < 1e-4
    assert flat(first).norm() > 0.05
    assert flat(applied.values()).norm().item() == pytest.approx(0.05, rel=1e-4)
    assert metrics["rat/damping"] == 0.1
    _, second, _ = rat.kaczmarz_direction(paper, actor, block, previous)
    expected = flat(rat.rat_direction(actor, *data, 0.1, first))
    assert relative(flat(second.values()), expected.double()) < 1e-4
    off = rat.Args(kaczmarz="off", max_grad_norm=0.05)
    applied, previous, _ = rat.kaczmarz_direction(off, actor, block, nothing(actor))
    assert not flat(previous.values()).any()
    clipped = flat(first).double() * 0.05 / flat(first).norm()
    assert relative(flat(applied.values()), clipped) < 1e-4


@pytest.mark.parametrize("kaczmarz", ["paper", "release", "off"])
def test_a_short_direction_is_not_made_longer(kaczmarz):
    actor, block, data = kaczmarz_block()
    args = rat.Args(kaczmarz=kaczmarz, max_grad_norm=1e3)
    applied, *_ = rat.kaczmarz_direction(args, actor, block, nothing(actor))
    expected = flat(rat.rat_direction(actor, *data, 0.1)).double()
    assert relative(flat(applied.values()), expected) < 1e-4


@pytest.mark.parametrize("kaczmarz", ["track", "paper", "release", "off"])
def test_advantages_that_are_all_equal_move_nothing(kaczmarz):
    actor, block, _ = kaczmarz_block()
    block = block._replace(advantages=torch.full((120,), 7.0))
    args = rat.Args(kaczmarz=kaczmarz)
    applied, *_ = rat.kaczmarz_direction(args, actor, block, nothing(actor))
    assert (flat(applied.values()) == 0).all()


PUBLISHED = {  # passes, lambda, what the next rollout starts from, KL bounds
    "paper": (4, 0.1, 0.0, 0.004),
    "release": (4, 0.1, 1.0, 0.004),
    "off": (4, 0.1, 0.0, 0.004),
}


@pytest.mark.parametrize("kaczmarz", PUBLISHED)
def test_one_flag_gives_the_published_constants(kaczmarz):
    args = rat.Args(kaczmarz=kaczmarz)
    found = (args.update_epochs, args.damping, args.memory, args.kl_low)
    assert found == PUBLISHED[kaczmarz]
    assert (args.max_grad_norm, args.learning_rate) == (0.5, 0.05)
    given = rat.Args(kaczmarz=kaczmarz, damping=1.0, update_epochs=2, memory=0.5, kl_low=0.1)
    assert (given.update_epochs, given.damping, given.memory, given.kl_low) == (2, 1.0, 0.5, 0.1)


@pytest.mark.parametrize(("ratio", "used"), [(0.5, 0.5), (3.0, 3.0), (0.001, 0.1), (100.0, 10.0)])
def test_ratios_are_clamped(ratio, used):
    """Half of the samples have the ratio, half 1."""
    actor, block, (obs, actions, y, _) = kaczmarz_block()
    ratios, weights = torch.ones(120), torch.ones(120)
    ratios[::2], weights[::2] = ratio, used
    log_prob = actor(obs).log_prob(actions).detach() - ratios.log()
    block = block._replace(log_prob=log_prob)
    args = rat.Args(kaczmarz="paper")
    _, found, _ = rat.kaczmarz_direction(args, actor, block, nothing(actor))
    expected = rat.rat_direction(actor, obs, actions, y, weights, 0.1)
    assert relative(flat(found.values()), flat(expected).double()) < 1e-4


@pytest.mark.parametrize("jacobian", ["tape", "vmap"])
@pytest.mark.parametrize(("damping", "error"), [(1e-2, 1e-3), (1e-4, 1e-2)])
def test_scores_far_above_the_damping(damping, error, jacobian):
    """Mean squared scores of 1e6 and more times the damping, where float32 loses the damping."""
    actor, obs, actions, y, weights = problem(17, 6, 64, 256)
    actor.log_std.weight.data -= 2.5
    actions = actor(obs).sample()
    scores = score_matrix(actor, obs, actions)
    trace = scores.square().sum(1).mean().item()
    assert trace > 1e6 * damping
    expected = primal(scores, y, weights, damping, torch.zeros(scores.shape[1]).double())
    direction = rat.rat_direction(actor, obs, actions, y, weights, damping, jacobian=jacobian)
    assert relative(flat(direction), expected) < error


def test_pieces_are_products_with_the_score_matrix():
    """kernel (5), product (6), transposed_product (7), score_norm_sq, against H itself."""
    actor, obs, actions, y, _ = problem(5, 2, 16, 80)
    scores = score_matrix(actor, obs, actions)
    factors = rat.tape_scores(actor, obs, actions)
    assert relative(rat.kernel(factors), scores @ scores.T) < 1e-5
    assert relative(rat.score_norm_sq(factors), scores.square().sum(1)) < 1e-5
    v = {p: torch.randn_like(p) for p in actor.parameters()}
    expected = scores @ flat(v[p] for p in actor.parameters()).double()
    assert relative(rat.product(factors, v), expected) < 1e-5
    found = rat.transposed_product(factors, y)
    expected = scores.T @ y.double()
    assert relative(flat(found[p] for p in actor.parameters()), expected) < 1e-5


class LinearGaussian(nn.Module):
    """Few, well-conditioned parameters, so that Theorem 1's rate is one that 30 steps can show."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Linear(3, 2), nn.Linear(1, 2, bias=False)

    def forward(self, obs):
        std = self.log_std(obs.new_ones(len(obs), 1)).exp()
        return Independent(Normal(self.mean(obs), std), 1)


def consistent_blocks(blocks=6, samples=8):
    """Scores of several blocks at one parameter vector, and a solution g in their row space."""
    torch.manual_seed(3)
    actor = LinearGaussian().double()
    data = [
        (torch.randn(samples, 3).double(), torch.randn(samples, 2).double()) for _ in range(blocks)
    ]
    weights = [0.5 + torch.rand(samples).double() for _ in data]
    scores = [score_matrix(actor, *d) for d in data]
    _, singular, rows = torch.linalg.svd(torch.cat(scores), full_matrices=False)
    basis = rows[singular > 1e-8 * singular[0]].T  # row space of all blocks
    return actor, data, weights, scores, basis, basis @ torch.randn(basis.shape[1]).double()


def contraction(scores, weights, basis, damping):
    """Q = H^T Sigma (damping I + H H^T Sigma)^-1 of blocks; mu = lambda_min(E[Q H]) on the rows."""
    maps = []
    for rows, w in zip(scores, weights, strict=True):
        sigma = torch.diag(w / len(w))
        maps.append(
            rows.T
            @ sigma
            @ torch.linalg.inv(damping * torch.eye(len(w)).double() + rows @ rows.T @ sigma)
        )
    mean = sum(q @ h for q, h in zip(maps, scores, strict=True)) / len(maps)
    return maps, torch.linalg.eigvalsh(basis.T @ mean @ basis)[0].item()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_kaczmarz_converges_as_theorems_1_and_2_say(noise, damping=0.1, steps=30, repeats=100):
    actor, data, weights, scores, basis, solution = consistent_blocks()
    maps, mu = contraction(scores, weights, basis, damping)
    floor = noise**2 * sum(q.square().sum().item() for q in maps) / len(maps) / mu  # sigma^2 / mu
    errors = torch.zeros(steps + 1).double()
    for _ in range(repeats):
        iterate = [torch.zeros_like(p) for p in actor.parameters()]
        errors[0] += solution.square().sum() / repeats
        for step in range(1, steps + 1):
            block = torch.randint(len(data), ()).item()
            y = scores[block] @ solution + noise * torch.randn(len(weights[block])).double()
            iterate = rat.rat_direction(actor, *data[block], y, weights[block], damping, iterate)
            errors[step] += (flat(iterate) - solution).square().sum() / repeats
    bound = errors[0] * (1 - mu) ** torch.arange(steps + 1) + floor
    assert 0 < mu < 1
    assert (errors <= bound * (1 + 1e-9)).all()
    if noise:
        assert (
            errors[-1] > 0.01 * floor
        )  # at the floor, not below: consistent targets would be far under it
    else:
        assert errors[-1] < 0.01 * errors[0]


class Normed(nn.Module):
    """A policy with a layer that the tape does not know."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, obs):
        return Categorical(logits=self.net(obs))


class Overwritten(Normed):
    """A policy whose activation overwrites the layer's output in place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


class Tied(Normed):
    """A policy with one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
        self.net[2].weight = self.net[0].weight


class Twice(Normed):
    """A policy that calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, obs):
        return Categorical(logits=self.net(self.net[0](obs)))


class OneRow(Normed):
    """A policy with a layer that sees one row for all samples."""

    def __init__(self):
        super().__init__()
        self.net, self.offset = nn.Linear(4, 3), nn.Linear(1, 3, bias=False)

    def forward(self, obs):
        return Categorical(logits=self.net(obs) + self.offset(obs.new_ones(1, 1)))


class Frozen(Normed):
    """A policy with a bias that is not trained."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.net[0].bias.requires_grad_(False)


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        (Normed, "LayerNorm"),
        (Overwritten, "net.0.*changed in place"),
        (Tied, "net.0.*shared"),
        (Twice, "net.0.*once"),
        (OneRow, "offset.*once"),
        (Frozen, "frozen"),
    ],
)
def test_the_tape_refuses_what_it_does_not_know_and_vmap_takes_it(policy, named):
    torch.manual_seed(0)
    actor, obs, actions = policy(), torch.randn(40, 4), torch.randint(3, (40,))
    y, weights = torch.randn(40), torch.ones(40)
    with pytest.raises(TypeError, match=f"{named}.*--jacobian vmap"):
        rat.rat_direction(actor, obs, actions, y, weights, 0.1)
    trained = flat([torch.full_like(p, p.requires_grad) for p in actor.parameters()])
    scores = score_matrix(actor, obs, actions) * trained
    expected = primal(scores, y, weights, 0.1, torch.zeros(scores.shape[1]).double())
    direction = flat(rat.rat_direction(actor, obs, actions, y, weights, 0.1, jacobian="vmap"))
    assert relative(direction, expected) < 1e-4 and not direction[trained == 0].any()


@pytest.mark.parametrize("broken", ["obs", "advantages"])
def test_values_that_are_not_finite_raise(broken):
    actor, obs, actions, y, weights = problem(3, 1, 8, 20)
    {"obs": obs, "advantages": y}[broken].view(-1)[
        weights.argmax() * (3 if broken == "obs" else 1)
    ] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        rat.rat_direction(actor, obs, actions, y, weights, 0.1)
