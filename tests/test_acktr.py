"""KFAC of acktr.py against dense Fisher blocks, explicit patches and per-sample gradients in float64; acktr's runs."""

import copy
import io

import pytest
import torch
from conftest import learn, train
from torch import nn
from torch.distributions import Independent, Normal

import acktr


class Policy(nn.Module):
    """A Gaussian over two actions from three inputs: three layers with bias, and log sigma, one without."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        self.log_std = nn.Linear(1, 2, bias=False)

    def forward(self, obs):
        return Normal(self.net(obs), self.log_std(obs.new_ones(len(obs), 1)).exp())


class Convolutions(nn.Module):
    """A Gaussian with unit variance over what two convolutions with every kind of geometry and a linear layer give."""

    def __init__(self):
        super().__init__()
        first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.net = nn.Sequential(first, nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.Flatten(), nn.Linear(36, 2))

    def forward(self, obs):
        return Normal(self.net(obs), torch.ones((), dtype=obs.dtype))


SHAPES = {Policy: (3,), Convolutions: (2, 7, 5)}


def batch(kind, samples=24, seed=0):
    """obs, noise in [0, 1) that makes up a model's actions, shares with some samples left out."""
    torch.manual_seed(seed)
    valid = (torch.rand(samples) > 0.25).double()
    obs = torch.randn(samples, *SHAPES[kind]).double()
    obs[valid == 0] = 50.0  # what must not enter
    return obs, torch.randn(samples, 2).double(), valid / valid.sum()


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    return kind().double()


def log_likelihood(policy, noise):
    return policy.log_prob((policy.mean + noise * policy.stddev).detach()).sum(1)


def update(kfac, model, obs, noise, share):
    """One update with an arbitrary loss; the gradients of the loss, one a parameter, and the clip factor."""
    policy = model(obs)
    loss = (policy.mean.sin().sum(1) + policy.stddev.square().sum(-1)) @ share
    kfac.update_statistics(log_likelihood(policy, noise), share)
    kfac.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], kfac.step()


def patches(conv, x):
    """[B, T, C * kh * kw] read off the padded image one position at a time."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2 * ph, x.shape[3] + 2 * pw, dtype=x.dtype)
    padded[:, :, ph : ph + x.shape[2], pw : pw + x.shape[3]] = x
    rows = []
    for top in range(0, padded.shape[2] - dh * (kh - 1), sh):
        for left in range(0, padded.shape[3] - dw * (kw - 1), sw):
            window = [padded[:, :, top + i * dh, left + j * dw] for i in range(kh) for j in range(kw)]
            rows.append(torch.stack(window, 2).flatten(1))
    return torch.stack(rows, 1)


def layers(model, obs, noise):
    """For each layer its parameters, inputs with the bias's 1 [B, T, d] and output gradients [B, T, d_out].

    A layer's output gradient is the one of a zero added to its output."""
    found = [m for m in model.modules() if list(m.parameters(recurse=False))]
    inputs, hooks, zeros = {}, [], {}

    def add_zero(m, x, z):
        inputs[m], zeros[m] = x[0].detach(), torch.zeros_like(z, requires_grad=True)
        return z + zeros[m]

    with torch.enable_grad():
        hooks = [m.register_forward_hook(add_zero) for m in found]
        score = log_likelihood(model(obs), noise).sum()
        for hook in hooks:
            hook.remove()
        grads = torch.autograd.grad(score, list(zeros.values()))
    result = []
    for m, g in zip(zeros, grads, strict=True):
        conv = isinstance(m, nn.Conv2d)
        x = patches(m, inputs[m]) if conv else inputs[m][:, None]
        g = g.flatten(2).transpose(1, 2) if conv else g[:, None]
        if m.bias is not None:
            x = torch.cat([x, torch.ones_like(x[..., :1])], 2)
        result.append((list(m.parameters(recurse=False)), x, g))
    return result


def factors(x, g, share):
    omega = sum(s * p.T @ p for s, p in zip(share, x, strict=True))
    gamma = sum(s * p.T @ p for s, p in zip(share, g, strict=True)) / x.shape[1]
    return omega, gamma


def per_sample(x, g):
    """Gradients of the log-likelihood [B, d_out, d]."""
    return torch.einsum("bto,bti->boi", g, x)


def joined(parameters, values):
    """Weight and bias of a layer as one matrix [d_out, d]."""
    return torch.cat([values[p].flatten(1) if values[p].dim() > 1 else values[p][:, None] for p in parameters], 1)


def close(a, b, tolerance=1e-9):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("kl_clip", [1e-6, 1e9])
@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_updates_are_the_dense_solves(kind, ekfac, kl_clip, lr=0.1, damping=0.03, decay=0.8, interval=3, momentum=0.6):
    """Eight updates, each on other data: running averages, decompositions when due, (10), clip and momentum of (11).

    K-FAC: the solve with Omega (x) Gamma + damping. EK-FAC: that in the eigenbasis with running second moments."""
    model = model_of(kind)
    kfac = acktr.KFAC(model, lr, damping, kl_clip, decay, interval, ekfac, momentum)
    averages, used, velocity = {}, {}, {}
    for number in range(8):
        data = batch(kind, seed=number)
        before = {p: p.detach().clone() for p in model.parameters()}
        explicit = layers(copy.deepcopy(model), *data[:2])
        gradients, clip = update(kfac, model, *data)
        gradients = dict(zip(model.parameters(), gradients, strict=True))
        steps, total = {}, 0
        for m, (_, x, g) in zip(kfac.layers, explicit, strict=True):
            stats, parameters, now = kfac.state[m.weight], list(m.parameters(recurse=False)), factors(x, g, data[2])
            if number:
                now = [decay * old + (1 - decay) * new for old, new in zip(averages[m], now, strict=True)]
            averages[m] = now
            assert close(stats["omega"], now[0]) and close(stats["gamma"], now[1])
            q = torch.kron(stats["q_gamma"], stats["q_omega"])
            if number % interval == 0:
                used[m] = torch.kron(now[1], now[0])
                diagonal = q.T @ used[m] @ q
                assert close(torch.diag(diagonal.diagonal()), diagonal)
            elif ekfac:
                rotated = stats["q_gamma"].T @ per_sample(x, g) @ stats["q_omega"]
                second = torch.einsum("b,boi->oi", data[2], rotated.square()).flatten()
                moments = decay * (q.T @ used[m] @ q).diagonal() + (1 - decay) * second
                used[m] = q @ torch.diag(moments) @ q.T
                assert close(stats["s"].flatten(), moments)
            gradient = joined(parameters, gradients)
            v = torch.linalg.solve(used[m] + damping * torch.eye(len(used[m])).double(), gradient.flatten())
            steps[m], total = (parameters, v.view_as(gradient)), total + v @ gradient.flatten()
        expected = min(1, (kl_clip / (lr**2 * total)) ** 0.5)
        assert clip.item() == pytest.approx(float(expected), rel=1e-6)
        assert lr**2 * clip**2 * total <= kl_clip * (1 + 1e-9)
        for m, (parameters, v) in steps.items():
            velocity[m] = momentum * velocity.get(m, 0) + (1 - momentum) * clip * v
            moved = joined(parameters, before) - joined(parameters, {p: p.detach() for p in parameters})
            assert close(moved, lr * velocity[m], 1e-6)
    assert (clip < 0.99) == (kl_clip < 1)


@pytest.mark.parametrize("constant", ["input", "output gradient"])
def test_rank_one_data_give_the_dense_fisher_solve(constant, damping=1e-3):
    """Where all inputs, or all output gradients up to sign, are one vector, K-FAC of a layer is no approximation."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    obs, noise = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    if constant == "input":
        obs = obs[:1].expand(40, 4)
    else:
        noise = noise[:1] * noise[:, :1].sign()
    kfac = acktr.KFAC(model, 1.0, damping, kl_clip=1e9, momentum=0.0)
    share, before = (
        torch.full((40,), 1 / 40).double(),
        joined(model.parameters(), {p: p.clone() for p in model.parameters()}),
    )
    z = model(obs)
    kfac.update_statistics((z * noise).sum(1), share)
    (z.sin().sum(1) @ share).backward()
    gradient = joined(model.parameters(), {p: p.grad for p in model.parameters()})
    kfac.step()
    ones = torch.cat([obs, torch.ones(40, 1).double()], 1)
    scores = torch.einsum("bo,bi->boi", noise, ones).flatten(1)
    fisher = scores.T @ scores / 40
    expected = torch.linalg.solve(fisher + damping * torch.eye(15).double(), gradient.flatten()).view(3, 5)
    after = joined(model.parameters(), {p: p.detach() for p in model.parameters()})
    assert close(before - after, expected, 1e-6)
    assert close((before - after)[:, -1], expected[:, -1], 1e-6)  # the bias alone


@pytest.mark.parametrize("kind", SHAPES)
def test_ekfac_is_nearer_to_the_fisher_than_kfac(kind):
    """Frobenius error over each layer's block, same data: never above K-FAC's, and below it at the exact moments."""
    model, (obs, noise, share) = model_of(kind), batch(kind)
    kfac = acktr.KFAC(model, 0.0, ekfac=True, inverse_interval=1000, stat_decay=0.5)
    update(kfac, model, obs, noise, share)
    errors = []
    for _ in range(30):  # s goes from the products of eigenvalues to the second moments
        errors.append([])
        for m, (_, x, g) in zip(kfac.layers, layers(copy.deepcopy(model), obs, noise), strict=True):
            stats, scores = kfac.state[m.weight], per_sample(x, g).flatten(1)
            q = torch.kron(stats["q_gamma"], stats["q_omega"])
            fisher = torch.einsum("b,bi,bj->ij", share, scores, scores)
            errors[-1].append((fisher - q @ torch.diag(stats["s"].flatten()) @ q.T).norm())
            best = (q.T @ fisher @ q).diagonal()
        kfac.update_statistics(log_likelihood(model(obs), noise), share)
    errors = torch.tensor(errors)
    assert (errors <= errors[0] * (1 + 1e-9)).all()
    assert (errors[-1] < errors[0] * 0.999).any()
    assert close(stats["s"].flatten(), best, 1e-6)


def test_statistics_leave_gradients_and_the_pass_alone():
    model, (obs, noise, share) = model_of(Policy), batch(Policy)
    kfac = acktr.KFAC(model, 0.1)
    policy = model(obs)
    kfac.update_statistics(log_likelihood(policy, noise), share)
    assert all(p.grad is None for p in model.parameters())
    policy.mean.sum().backward()
    with torch.no_grad():
        model(obs)  # is not recorded
    kfac.update_statistics(log_likelihood(model(obs), noise), share)


@pytest.mark.parametrize("ekfac", [False, True])
def test_state_survives_a_checkpoint(ekfac):
    """A copy from saved states goes on exactly as the original, through a decomposition."""
    file, twins = io.BytesIO(), []
    for seed in range(2):
        model = model_of(Policy, seed)
        twins.append((acktr.KFAC(model, 0.1 - seed / 100, inverse_interval=4, ekfac=ekfac), model))
    for number in range(2):
        update(*twins[0], *batch(Policy, seed=number))
    torch.save([part.state_dict() for part in twins[0]], file)
    file.seek(0)
    for part, state in zip(twins[1], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for number in range(2, 6):
        for kfac, model in twins:
            update(kfac, model, *batch(Policy, seed=number))
        assert all(torch.equal(a, b) for a, b in zip(twins[0][1].parameters(), twins[1][1].parameters(), strict=True))


@pytest.mark.parametrize("broken", ["loss", "score"])
def test_values_that_are_not_finite_raise(broken):
    model, (obs, noise, share) = model_of(Policy), batch(Policy)
    kfac = acktr.KFAC(model, 0.1)
    policy = model(obs)
    kfac.update_statistics(log_likelihood(policy, noise) * (torch.nan if broken == "score" else 1), share)
    ((policy.mean / policy.stddev).sum() * (torch.nan if broken == "loss" else 1)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises({"loss": FloatingPointError, "score": torch.linalg.LinAlgError}[broken]):
        kfac.step()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(2))


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


REFUSED = {
    "LayerNorm": lambda: nn.LayerNorm(3),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "Embedding": lambda: nn.Embedding(3, 3),
    "PReLU": nn.PReLU,
    "Conv1d": lambda: nn.Conv1d(2, 2, 1),
    "GRUCell": lambda: nn.GRUCell(3, 3),
    "Bare": Bare,
    "groups=2": lambda: nn.Conv2d(2, 2, 1, groups=2),
    "circular": lambda: nn.Conv2d(2, 2, 1, padding_mode="circular"),
    "padding=same": lambda: nn.Conv2d(2, 2, 1, padding="same"),
    "tied": tied,
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_modules_are_refused_by_name(case):
    model = nn.ModuleDict({"fine": nn.Linear(2, 2), "strange": REFUSED[case]()})
    with pytest.raises(TypeError, match=r"not (fine|strange\S*) " + ("Linear" if case == "tied" else "")) as error:
        acktr.KFAC(model, 0.1)
    assert case == "tied" or "strange" in str(error.value)


@pytest.mark.parametrize("case", ["twice", "never", "in place"])
def test_passes_that_hide_statistics_are_refused_by_name(case):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=case == "in place"))
    kfac = acktr.KFAC(model := nn.ModuleDict({"net": net, "head": nn.Linear(3, 1)}), 0.1)
    z = model["net"](torch.randn(8, 3))
    z = {"twice": lambda: model["head"](model["net"](z)), "never": lambda: z, "in place": lambda: model["head"](z)}[
        case
    ]()
    with pytest.raises(TypeError, match="not head" if case == "never" else r"not net\.0"):
        kfac.update_statistics(z.sum(1), torch.full((8,), 1 / 8))


SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--device", "cpu"]


@pytest.mark.parametrize("options", [[], ["--shared"]])
def test_reset_steps_and_earlier_gradients_enter_nothing(options, tmp_path, monkeypatch):
    """Whatever the observations, actions and rewards of steps that only reset are, and whatever an update leaves in
    .grad: the networks come out the same."""
    collect_, step_, weights, left_out = acktr.Collector.collect, acktr.KFAC.step, [], []
    for junk in (0, 3):

        def collect(self, *arguments, junk=junk):
            obs, actions, rewards, *flags, valid = collect_(self, *arguments)
            left_out.append((valid == 0).sum())
            for x in (obs[:-1], actions, rewards):
                x[valid == 0] += junk
            return obs, actions, rewards, *flags, valid

        def step(self, junk=junk):
            factor = step_(self)
            for p in (p for group in self.param_groups for p in group["params"]):
                p.grad += junk
            return factor

        monkeypatch.setattr(acktr.Collector, "collect", collect)
        monkeypatch.setattr(acktr.KFAC, "step", step)
        train("acktr", *SMALL, "--total-timesteps", 384, *options, "--output-dir", tmp_path, "--run-name", junk)
        saved = torch.load(tmp_path / str(junk) / "checkpoint.pt", weights_only=True)
        weights.append({**saved["agent"], **{f"kfac {i}": s["omega"] for i, s in saved["kfac"]["state"].items()}})
    assert sum(left_out) > 10
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("options", [[], ["--shared"]])
def test_the_fisher_is_the_true_one(options, tmp_path, monkeypatch):
    """Each update samples actions of its own. Output gradients have the second moments of a Gaussian's: 1 / sigma^2 for
    the mean, 2 for log sigma, 1 for the value."""
    samples, original = [], Independent.sample
    monkeypatch.setattr(Independent, "sample", lambda self: samples.append(0) or original(self))
    train("acktr", *SMALL, "--num-steps", 128, "--total-timesteps", 1536, "--update-epochs", 4, "--num-minibatches", 2,
          *options, "--output-dir", tmp_path, "--run-name", "x")  # fmt: skip
    assert len(samples) == 3 * (128 + 4 * 2)
    saved = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    gammas = {i: s["gamma"] for i, s in saved["kfac"]["state"].items()}
    sigma = saved["agent"]["actor.log_std.weight"].exp().item()
    expected = {4: 1 / sigma**2, **({6: 1, 8: 2} if options else {6: 2})}  # parameters in order, each layer's weight
    for i, moment in expected.items():
        assert gammas[i].item() == pytest.approx(moment, rel=0.25)


def test_stat_decay_of_one_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("acktr", "--stat-decay", 1.0, "--output-dir", tmp_path)
    assert stopped.value.code == 2 and "--stat-decay 1.0" in capsys.readouterr().err


def test_learns_inverted_pendulum(tmp_path):
    """As test_runs.py's test of the same name."""
    arguments = [*SMALL, "--num-envs", 8, "--num-steps", 64, "--total-timesteps", 40_000, "--update-epochs", 2,
                 "--num-minibatches", 4, "--inverse-interval", 10, "--shared", "--ekfac"]  # fmt: skip
    assert learn(tmp_path, "acktr", *arguments) >= 150
