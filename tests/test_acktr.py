"""KFAC of acktr.py against dense Fisher blocks in float64; acktr's runs against NumPy."""

import copy
import io

import numpy as np
import pytest
import torch
from conftest import checkpoint, flat, learn, train
from recording import check_critic, check_statistics, log_prob, recompute, record
from torch import nn
from torch.distributions import Independent, Normal

import acktr


class Policy(nn.Module):
    """A Gaussian over two actions: three layers with bias, and log sigma, one without."""

    def __init__(self):
        super().__init__()
        hidden = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()]
        self.net = nn.Sequential(*hidden, nn.Linear(4, 2))
        self.log_std = nn.Linear(1, 2, bias=False)

    def forward(self, obs):
        return Normal(self.net(obs), self.log_std(obs.new_ones(len(obs), 1)).exp())


def policy_of(seed):
    torch.manual_seed(seed)
    return Policy().double()


def data_of(seed, samples=24):
    """Observations [B, 3] and the noise [B, 2] that makes up actions."""
    torch.manual_seed(seed)
    return torch.randn(samples, 3).double(), torch.randn(samples, 2).double()


def log_likelihood(policy, noise):
    """Of actions that are the policy's own, given by noise, [B]."""
    return policy.log_prob((policy.mean + noise * policy.stddev).detach()).sum(1)


def update(kfac, model, obs, noise):
    """One update with an arbitrary loss; the loss's gradients and the trust region's factor."""
    policy = model(obs)
    loss = (policy.mean.sin().sum(1) + policy.stddev.square().sum(1)).mean()
    kfac.update_statistics(log_likelihood(policy, noise))
    kfac.zero_grad()
    loss.backward()
    return {p: p.grad.clone() for p in model.parameters()}, kfac.step()


def explicit_layers(model, obs, noise):
    """x [B, d], with the bias's 1, and g [B, d_out] of each layer, in the order of a pass.

    g is the gradient of a zero that is added to the layer's output."""
    twin = Policy().double()
    twin.load_state_dict(model.state_dict())
    inputs, zeros = {}, {}

    def add_zero(layer, x, z):
        inputs[layer] = x[0].detach()
        zeros[layer] = torch.zeros_like(z, requires_grad=True)
        return z + zeros[layer]

    for layer in (m for m in twin.modules() if isinstance(m, nn.Linear)):
        layer.register_forward_hook(add_zero)
    score = log_likelihood(twin(obs), noise).sum()
    grads = torch.autograd.grad(score, list(zeros.values()))
    result = []
    for (layer, x), g in zip(inputs.items(), grads, strict=True):
        ones = x.new_ones(len(x), 0 if layer.bias is None else 1)
        result.append((torch.cat([x, ones], 1), g))
    return result


def mean_outer(x):
    """E[x x^T], one sample after the other."""
    return sum(torch.outer(row, row) for row in x) / len(x)


def per_sample(x, g):
    """Gradients of the log-likelihood [B, d_out, d]."""
    return torch.einsum("bo,bi->boi", g, x)


def joined(layer, values):
    """A layer's weight and bias as one matrix [d_out, d]."""
    return torch.cat([values[p].view(len(p), -1) for p in layer.parameters()], 1)


def close(a, b, tolerance=1e-9):
    return (a - b).norm() <= tolerance * b.norm()


class Dense:
    """A layer's Fisher block [d_out d, d_out d], with the averages that it is made of."""

    def __init__(self, ema, ekfac, period):
        self.ema, self.ekfac, self.period = ema, ekfac, period
        self.block = self.omega = self.gamma = None

    def average(self, old, new):
        return new if old is None else self.ema * old + (1 - self.ema) * new

    def renew(self, number, x, g, stats):
        """The block after update `number`; stats are KFAC's, for its choice of eigenvectors."""
        self.omega = self.average(self.omega, mean_outer(x))
        self.gamma = self.average(self.gamma, mean_outer(g))
        assert close(stats["omega"], self.omega)
        assert close(stats["gamma"], self.gamma)
        q = torch.kron(stats["q_gamma"], stats["q_omega"])
        if number % self.period == 0:
            self.block = torch.kron(self.gamma, self.omega)
            rotated = q.T @ self.block @ q
            assert close(torch.diag(rotated.diagonal()), rotated)
        elif self.ekfac:
            rotated = stats["q_gamma"].T @ per_sample(x, g) @ stats["q_omega"]
            second = rotated.square().mean(0).flatten()
            moments = self.average((q.T @ self.block @ q).diagonal(), second)
            self.block = q @ torch.diag(moments) @ q.T
            assert close(stats["s"].flatten(), moments)

    def solve(self, gradient, damping):
        damped = self.block + damping * torch.eye(len(self.block)).double()
        return torch.linalg.solve(damped, gradient.flatten()).view_as(gradient)


@pytest.mark.parametrize("kl_clip", [1e-6, 1e9])
@pytest.mark.parametrize("ekfac", [False, True])
def test_updates_are_the_dense_solves(ekfac, kl_clip, lr=0.1, damping=0.03, ema=0.8, period=3):
    """Eight updates, each on other data: (9), decompositions when due, (10), clip and momentum.

    K-FAC solves with Gamma (x) Omega, EK-FAC with running second moments in its eigenbasis."""
    model = policy_of(0)
    kfac = acktr.KFAC(model, lr, damping, kl_clip, period, ekfac, ema)
    blocks = {m: Dense(ema, ekfac, period) for m in kfac.layers}
    velocity = dict.fromkeys(kfac.layers, 0.0)
    for number in range(8):
        obs, noise = data_of(number)
        before = {p: p.detach().clone() for p in model.parameters()}
        explicit = explicit_layers(model, obs, noise)
        gradients, clip = update(kfac, model, obs, noise)
        directions, total = {}, 0.0
        for (m, block), (x, g) in zip(blocks.items(), explicit, strict=True):
            block.renew(number, x, g, kfac.state[m.weight])
            gradient = joined(m, gradients)
            directions[m] = block.solve(gradient, damping)
            total += (directions[m] * gradient).sum().item()
        assert clip.item() == pytest.approx(min(1.0, (kl_clip / (lr**2 * total)) ** 0.5), rel=1e-6)
        for m, v in directions.items():
            velocity[m] = 0.9 * velocity[m] + 0.1 * clip * v
            moved = joined(m, before) - joined(m, {p: p.detach() for p in m.parameters()})
            assert close(moved, lr * velocity[m], 1e-6)
    assert (clip < 0.99) == (kl_clip < 1)


@pytest.mark.parametrize("constant", ["input", "output gradient"])
def test_rank_one_data_give_the_dense_fisher_solve(constant, damping=1e-3):
    """Where x, or g up to its sign, is one vector, K-FAC of a layer is no approximation."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    obs, noise = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    if constant == "input":
        obs = obs[:1].expand(40, 4)
    else:
        noise = noise[:1] * noise[:, :1].sign()
    kfac = acktr.KFAC(model, 1.0, damping, kl_clip=1e9)
    before = joined(model, {p: p.detach().clone() for p in model.parameters()})
    z = model(obs)
    kfac.update_statistics((z * noise).sum(1))
    z.sin().sum(1).mean().backward()
    gradient = joined(model, {p: p.grad for p in model.parameters()})
    kfac.step()
    scores = per_sample(torch.cat([obs, torch.ones(40, 1)], 1), noise).flatten(1)
    damped = mean_outer(scores) + damping * torch.eye(15).double()
    expected = torch.linalg.solve(damped, gradient.flatten()).view(3, 5)
    moved = before - joined(model, {p: p.detach() for p in model.parameters()})
    assert close(moved, 0.1 * expected, 1e-6)
    assert close(moved[:, -1], 0.1 * expected[:, -1], 1e-6)  # the bias alone


def test_ekfac_is_nearer_to_the_fisher_than_kfac():
    """Frobenius error of each layer's block on the same data over and over.

    It starts as K-FAC's, never exceeds it and falls to that of the exact second moments."""
    model, (obs, noise) = policy_of(0), data_of(0)
    kfac = acktr.KFAC(model, 0.0, ekfac=True, curvature_ema=0.5)
    update(kfac, model, obs, noise)
    explicit = explicit_layers(model, obs, noise)
    errors = []
    for _ in range(30):  # s goes from the products of eigenvalues to the second moments
        errors.append([])
        for m, (x, g) in zip(kfac.layers, explicit, strict=True):
            stats = kfac.state[m.weight]
            q = torch.kron(stats["q_gamma"], stats["q_omega"])
            fisher = mean_outer(per_sample(x, g).flatten(1))
            block = q @ torch.diag(stats["s"].flatten()) @ q.T
            errors[-1].append((fisher - block).norm())
            best = (q.T @ fisher @ q).diagonal()
        kfac.update_statistics(log_likelihood(model(obs), noise))
    errors = torch.tensor(errors)
    assert (errors <= errors[0] + 1e-12).all()
    assert (errors[-1] < errors[0] * 0.999).any()
    assert close(stats["s"].flatten(), best, 1e-6)


def rank_one_factor(seed, size=257):
    """Omega in float32 of a layer whose 32 inputs are one vector after a ReLU, and a 1."""
    torch.manual_seed(seed)
    x = torch.cat([0.1 * torch.randn(size - 1).relu(), torch.ones(1)]).expand(32, size)
    return acktr.factors(x, x)["omega"]


def test_factors_of_rank_one_have_eigenbases():
    """Float32's eigh raises or returns NaN for a third of these."""
    for seed in range(60):
        factor = rank_one_factor(seed)
        values, vectors = acktr.eigenbasis(factor)
        assert values.dtype == vectors.dtype == torch.float32
        assert (values >= 0).all()
        assert close(vectors.T @ vectors, torch.eye(len(factor)), 1e-5)
        assert close(vectors * values @ vectors.T, factor, 1e-5)


def test_a_task_without_a_state_trains():
    """All observations are zero, so that every layer's input is one vector."""
    torch.manual_seed(0)
    actor = acktr.Actor(1, 1)
    kfac = acktr.KFAC(actor, 0.01, inverse_update_period=1)
    for _ in range(10):
        policy, _ = actor(torch.zeros(64, 1))
        kfac.update_statistics(policy.log_prob(policy.sample()))
        kfac.zero_grad()
        (-policy.log_prob(torch.ones(64, 1)).mean()).backward()
        clip = kfac.step()
        assert 0 < clip <= 1
    assert all(p.isfinite().all() for p in actor.parameters())
    assert (actor(torch.zeros(1, 1))[0].mean - policy.mean[0]) > 0


def test_statistics_leave_gradients_and_the_pass_alone():
    model, (obs, noise) = policy_of(0), data_of(0)
    kfac = acktr.KFAC(model, 0.1)
    policy = model(obs)
    kfac.update_statistics(log_likelihood(policy, noise))
    assert all(p.grad is None for p in model.parameters())
    policy.mean.sum().backward()
    with torch.no_grad():
        model(obs)  # is not recorded
    kfac.update_statistics(log_likelihood(model(obs), noise))


@pytest.mark.parametrize("ekfac", [False, True])
def test_state_survives_a_checkpoint(ekfac):
    """A copy from saved states goes on exactly as the original, through a decomposition."""
    twins = []
    for seed in range(2):
        model = policy_of(seed)
        kfac = acktr.KFAC(model, 0.1 - seed / 100, inverse_update_period=4, ekfac=ekfac)
        twins.append((kfac, model))
    for number in range(2):
        update(*twins[0], *data_of(number))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in twins[0]], file)
    file.seek(0)
    for part, state in zip(twins[1], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for number in range(2, 6):
        for kfac, model in twins:
            update(kfac, model, *data_of(number))
        original, restored = (list(model.parameters()) for _, model in twins)
        assert all(map(torch.equal, original, restored))


@pytest.mark.parametrize(
    ("broken", "error"), [("loss", FloatingPointError), ("score", torch.linalg.LinAlgError)]
)
def test_values_that_are_not_finite_raise_before_the_step(broken, error):
    model, (obs, noise) = policy_of(0), data_of(0)
    kfac = acktr.KFAC(model, 0.1)
    factors = dict.fromkeys(("loss", "score"), 1.0) | {broken: torch.nan}
    policy = model(obs)
    kfac.update_statistics(log_likelihood(policy, noise) * factors["score"])
    ((policy.mean / policy.stddev).sum() * factors["loss"]).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        kfac.step()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


class Bare(nn.Module):
    """A module with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * x


class Own(nn.Linear):
    """A layer that may compute anything."""


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


class Never(Twice):
    """A layer that is not called."""

    def forward(self, x):
        return x


class OneRow(Twice):
    """A layer that sees one row for all samples."""

    def forward(self, x):
        return x + self.layer(x[:1])


class ManyRows(Twice):
    """A layer that sees several rows of each sample."""

    def forward(self, x):
        return self.layer(x[:, None].expand(-1, 2, -1)).sum(1)


def overwritten():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def frozen():
    net = nn.Linear(3, 3)
    net.bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("strange", "problem"),
    [
        (lambda: nn.LayerNorm(3), "1 LayerNorm.* is no Linear"),
        (lambda: nn.BatchNorm1d(3), "1 BatchNorm1d.* is no Linear"),
        (lambda: nn.PReLU(), "1 PReLU.* is no Linear"),
        (lambda: nn.GRUCell(3, 3), "1 GRUCell.* is no Linear"),
        (Bare, "1 Bare.* is no Linear"),
        (lambda: Own(3, 3), "1 Own.* is no Linear"),
        (Twice, "1.layer Linear.* is not called once with a row a sample"),
        (Never, "1.layer Linear.* is not called once with a row a sample"),
        (OneRow, "1.layer Linear.* is not called once with a row a sample"),
        (ManyRows, "1.layer Linear.* is not called once with a row a sample"),
        (overwritten, "1.0 Linear.* has its output overwritten in place"),
        (tied, "1.0 Linear.* has a parameter that is frozen or another layer's too"),
        (frozen, "1 Linear.* has a parameter that is frozen or another layer's too"),
    ],
)
def test_layers_that_it_does_not_know_are_refused_by_name(strange, problem):
    model = nn.Sequential(nn.Linear(3, 3), strange())
    kfac = acktr.KFAC(model, 0.1)
    with pytest.raises(TypeError, match=f"^KFAC: layer {problem}$"):
        kfac.update_statistics(model(torch.randn(8, 3)).sum(1))


class NormedActor(acktr.Actor):
    """A fork's policy with a layer that is not linear."""

    def __init__(self, obs_dim, act_dim, value_head=None):
        super().__init__(obs_dim, act_dim, value_head)
        self.trunk.append(nn.LayerNorm(256))


SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--device", "cpu"]


def test_a_refused_network_leaves_no_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acktr, "Actor", NormedActor)
    with pytest.raises(SystemExit) as stopped:
        train("acktr", *SMALL, "--total-timesteps", 64, "--output-dir", tmp_path / "runs")
    assert stopped.value.code == 2
    assert "layer trunk.5 LayerNorm" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


both = pytest.mark.parametrize("options", [[], ["--shared"]], ids=["separate", "shared"])


@both
def test_the_fisher_is_the_true_one(options, tmp_path, monkeypatch):
    """Each update draws actions anew.

    Output gradients have the second moments of a Gaussian's: 1 / sigma^2 for the mean, 2 for
    log sigma, 1 for the value."""
    samples, original = [], Independent.sample
    monkeypatch.setattr(Independent, "sample", lambda self: samples.append(0) or original(self))
    more = ["--num-steps", 128, "--total-timesteps", 1536, "--num-minibatches", 2]
    where = ["--update-epochs", 4, "--output-dir", tmp_path, "--run-name", "x"]
    train("acktr", *SMALL, *more, *where, *options)
    assert len(samples) == 1 + 3 * (128 + 4 * 2)
    saved = checkpoint(tmp_path / "x")
    gammas = {i: s["gamma"] for i, s in saved["kfac"]["state"].items()}
    sigma = saved["agent"]["actor.log_std.weight"].exp().item()
    moments = [1 / sigma**2, 1, 2] if options else [1 / sigma**2, 2]
    for i, moment in zip((4, 6, 8), moments):  # parameters in order, each layer's weight
        assert gammas[i].item() == pytest.approx(moment, rel=0.25)


def loss_gradients(agent, wanted, rows, before):
    """Gradients of the block's loss in float64, from the recomputed samples, and its ratios.

    Separate networks: of -mean(w y log pi), w a constant. One trunk: of -mean(w y), w clamped,
    plus half the mean squared error of the values."""
    actor = copy.deepcopy(agent.actor).double()
    for module in actor.modules():
        module._forward_hooks.clear()
    obs, actions = wanted.obs[rows], wanted.actions[rows]
    advantages = wanted.advantages[rows]
    y = torch.tensor((advantages - advantages.mean()) / advantages.std())
    old = torch.tensor(log_prob(before, obs, actions))
    policy, value = actor(torch.tensor(obs))
    now = policy.log_prob(torch.tensor(actions).double())
    ratio = (now - old).exp().clamp(0.1, 10)
    if value is None:
        loss = -(ratio.detach() * y * now).mean()
    else:
        error = value - torch.tensor(wanted.returns[rows])
        loss = -(ratio * y).mean() + error.square().mean() / 2
    grads = torch.autograd.grad(loss, list(actor.parameters()))
    return flat(grads).numpy(), ratio.detach().numpy()


@both
def test_a_run_hands_kfac_and_critic_what_the_rollout_says(options, tmp_path, monkeypatch):
    """Two iterations with many resets: each block's gradient, recomputed from the rollout."""
    blocks, handed = [], []
    loss, step = acktr.actor_critic_loss, acktr.KFAC.step

    def recorded_loss(policy, value, block):
        blocks.append(block)
        return loss(policy, value, block)

    def recorded_step(self):
        handed.append(flat([p.grad for p in self.param_groups[0]["params"]]).double().numpy())
        return step(self)

    monkeypatch.setattr(acktr, "actor_critic_loss", recorded_loss)
    monkeypatch.setattr(acktr.KFAC, "step", recorded_step)
    more = ["--update-epochs", 2, "--num-minibatches", 2, "--learning-rate", 1.0, "--kl-clip", 1.0]
    iterations = record("acktr", "normalized", tmp_path, monkeypatch, *more, *options)
    expected = recompute(iterations)
    check_statistics(iterations, expected)
    if not options:
        check_critic(iterations, expected)
    ratios = []
    for iteration, wanted in zip(iterations, expected, strict=True):
        seen = []
        for _, agent in iteration.core:
            rows = wanted.rows(blocks.pop(0).actions.numpy())
            gradient, ratio = loss_gradients(agent, wanted, rows, iteration.policy)
            error = np.linalg.norm(handed.pop(0) - gradient)
            assert error < 1e-3 * np.linalg.norm(gradient)
            seen += rows
            ratios.append(ratio)
        assert sorted(seen) == sorted(2 * list(range(len(wanted.obs))))
    assert np.concatenate(ratios).max() > 2
    assert np.concatenate(ratios).min() < 0.5


def test_learns_inverted_pendulum(tmp_path):
    """As the test of the same name in test_runs.py, with one trunk and EK-FAC."""
    more = ["--num-envs", 8, "--num-steps", 64, "--total-timesteps", 12_000]
    more += ["--update-epochs", 2, "--num-minibatches", 4, "--inverse-update-period", 10]
    assert learn(tmp_path, "acktr", *SMALL, *more, "--shared", "--ekfac") >= 25
