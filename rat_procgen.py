"""RAT (Randomized Advantage Transformation, Sun, ICML 2026, arXiv:2605.18591) from pixels: IMPALA networks, Procgen.

Run: python rat_procgen.py --env-id starpilot    Equation numbers: README.md, "How it works".
"""

import copy
import json
import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, kl_divergence
from torch.func import functional_call, grad, vmap
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "rat_procgen"


@dataclass
class Args:
    env_id: str = "starpilot"  # one of Procgen's 16 games
    total_timesteps: int = 25_000_000  # environment steps of the whole run, all environments together
    num_envs: int = 64  # environments stepped side by side
    num_steps: int = 256  # steps of each environment in one rollout
    distribution_mode: Literal["easy", "hard"] = "easy"  # the two difficulties that every game has
    num_levels: int = 200  # training levels, 0: all there are
    start_level: int = 0  # first training level
    eval_levels: int = 1000  # unseen levels, those after the training levels, for the evaluation; 0: none
    eval_interval: int = 25  # iterations between evaluations of num_envs episodes each
    channels: tuple[int, int, int] = (16, 32, 32)  # of the three convolutional stages, actor and critic
    hidden: int = 256  # units of the layer after them
    jacobian: Literal["tape", "vmap"] = "tape"  # kernel from layer inputs and gradients, or all of H (most modules)
    kernel_memory: int = 512  # MiB that the tape may take for a block, without the kernel
    update_epochs: int = 4  # actor passes over the rollout
    num_minibatches: int = 16  # actor blocks in a pass, each of num_envs * num_steps / num_minibatches samples
    damping: float = 0.1  # lambda of equation (1), > 0
    learning_rate: float = 0.05  # first and largest actor step size; the KL adapts it below that
    max_grad_norm: float = 0.5  # l2 bound on the applied direction, nu of equation (4)
    critic_epochs: int = 3  # critic passes over the rollout
    critic_minibatches: int = 16  # critic minibatches in a pass
    critic_learning_rate: float = 5e-4  # Adam step size of the critic, CleanRL's for this network
    critic_max_grad_norm: float = 5.0  # l2 bound on the critic's gradient
    gamma: float = 0.999  # discount, in (0, 1]
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation, in (0, 1]
    seed: int = 1  # of networks, sampling and environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_name: str = ""  # folder below output_dir; default {env_id}__rat_procgen__{seed}__{unix time}
    output_dir: str = "runs"  # where run folders go
    checkpoint_interval: int = 50  # iterations between checkpoints; also at the end and on SIGINT or SIGTERM
    resume: bool = False  # continue run_name from its checkpoint


# Arguments and environments
def fail(sentence: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr. Exit code 2: bad input; 1: the run broke down."""
    print(f"{ALGORITHM}: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(code)


def check_args(args: Args) -> None:
    """Refuse values that cannot work."""
    batch_size = args.num_envs * args.num_steps
    for name, value in [*vars(args).items(), *(("channels", c) for c in args.channels)]:
        flag, least = f"--{name.replace('_', '-')} {value}", 0 if name == "seed" or "level" in name else 1
        if type(value) is int and not least <= value < 2**31:
            fail(f"{flag} must lie in [{least}, 2**31).")
        if type(value) is float and not 0 < value < math.inf:
            fail(f"{flag} must be positive and finite.")
        if name in ("gamma", "gae_lambda") and value > 1:
            fail(f"{flag} must lie in (0, 1].")
        if name.endswith("minibatches") and (batch_size % value or batch_size == value):
            fail(f"{flag} does not divide num_envs * num_steps = {batch_size} into blocks of two samples and more.")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout, num_envs * num_steps = {batch_size}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no CUDA device here, use --device cpu.")
    if not args.num_levels and (args.start_level or args.eval_levels):
        fail("--num-levels 0 takes all levels: none is first or unseen, use --start-level 0 --eval-levels 0.")
    if args.start_level + args.num_levels + args.eval_levels >= 2**31:
        fail(f"--start-level {args.start_level}: it, --num-levels and --eval-levels must add up to less than 2**31.")


class Procgen:
    """A Procgen game as a vector environment. It resets within the step: the observation that comes with `terminated`
    is the next episode's first one. Timeouts count as terminations, Procgen does not tell them apart."""

    single_observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    single_action_space = gym.spaces.Discrete(15)

    def __init__(self, args: Args, seed: int, unseen: bool = False, render_mode: str | None = None):
        sys.modules.setdefault("gym_notices", None)  # where gym, which it imports, says that it is unmaintained
        try:
            from procgen.env import ENV_NAMES, ProcgenGym3Env
        except ImportError as error:
            fail(f"Procgen cannot be imported ({error}): use Python 3.11 or 3.12, pip install -r requirements.txt.")
        if args.env_id not in ENV_NAMES:
            fail(f"--env-id {args.env_id} is no Procgen game, use one of {', '.join(ENV_NAMES)}.")
        self.env = ProcgenGym3Env(
            args.num_envs, args.env_id, distribution_mode=args.distribution_mode, rand_seed=seed % 2**31,
            num_levels=args.eval_levels if unseen else args.num_levels, render_mode=render_mode,
            start_level=args.start_level + unseen * args.num_levels, num_threads=min(4, torch.get_num_threads()),
        )  # fmt: skip

    def step(self, actions: np.ndarray) -> tuple:
        """Actions [N] to obs [N, 64, 64, 3] uint8, rewards [N], terminated [N], truncated (never) [N], info."""
        self.env.act(actions)
        rewards, obs, first = self.env.observe()
        return obs["rgb"], rewards, first, np.zeros_like(first), {}


# Networks
class PopArt(nn.Module):
    """Linear value head over returns normalised by their running moments (van Hasselt et al. 2016): [B, d] to [B]."""

    def __init__(self, in_features: int, beta: float = 0.99999):
        super().__init__()
        self.linear, self.beta = nn.Linear(in_features, 1), beta
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))  # running averages of 1, R, R^2
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.ones((), dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features).squeeze(-1)

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Move the statistics towards returns [N] and rescale the head so that mean + std * output stays the same."""
        old_mean, old_std, returns = self.mean.clone(), self.std.clone(), returns.double()
        now = torch.stack([torch.ones_like(old_mean), returns.mean(), returns.square().mean()])
        weight, first, second = self.moments.lerp_(now, 1 - self.beta)
        self.mean.copy_(first / weight)  # over the weight so far: debiased
        self.std.copy_((second / weight - self.mean.square()).clamp(min=1e-6).sqrt())
        self.linear.weight.mul_(old_std / self.std)
        self.linear.bias.mul_(old_std).add_(old_mean - self.mean).div_(self.std)


class Residual(nn.Sequential):
    """x plus what the layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Impala(nn.Sequential):
    """Espeholt et al. 2018: three stages that halve the image, a hidden layer and a head, [B, h, w, 3] to [B, d].
    Glorot initialisation up to the head: PyTorch's default leaves a new policy's scores far below the damping."""

    def __init__(self, shape: tuple, channels: tuple[int, ...], hidden: int, head: nn.Module):
        layers, (height, width, planes) = [], shape
        for c, d in zip((planes, *channels), channels, strict=False):
            convs = [nn.Conv2d(d, d, 3, padding=1) for _ in range(4)]
            layers += [nn.Conv2d(c, d, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            layers += [Residual(nn.ReLU(), convs[i], nn.ReLU(), convs[i + 1]) for i in (0, 2)]
        features = channels[-1] * (height // 8) * (width // 8)
        super().__init__(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(features, hidden), nn.ReLU())
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)
        self.append(head)

    def forward(self, obs: Tensor) -> Tensor:
        return super().forward(obs.permute(0, 3, 1, 2) / 255)  # channels stay last in memory: twice as fast on a CPU


class Actor(Impala):
    """Categorical policy: forward gives a distribution whose log_prob(a) is [B]."""

    def forward(self, obs: Tensor) -> Distribution:
        return Categorical(logits=super().forward(obs), validate_args=False)


class Agent(nn.Module):
    """All that it takes to play: actor; and the critic, in PopArt's units."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, channels=(16, 32, 32), hidden=256):
        super().__init__()
        self.actor = Actor(observation_space.shape, channels, hidden, nn.Linear(hidden, int(action_space.n)))
        self.critic = Impala(observation_space.shape, channels, hidden, PopArt(hidden))

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Obs [B, height, width, 3] to the policy's sample (or mode) and the environment's action, the same [B]."""
        policy = self.actor(obs)
        return (policy.mode if deterministic else policy.sample(),) * 2


# The algorithm's core: scores, direction, Kaczmarz
def tape_scores(actor: nn.Module, obs: Tensor, actions: Tensor, kernel_memory: int) -> list[tuple]:
    """H, the rows d log pi(a_i|s_i) / d theta, factored by layer, from one forward and one backward pass in chunks.

    Returns (x [B, d_in], g [B, d_out], [weight, bias]) a layer: its input and the gradient of log pi at its output.
    Row i holds g_i x_i^T for the weight and g_i for the bias. A convolution is two such layers with the input 1, for
    P_i of (12) and for its bias. Raises TypeError where that is not known, MemoryError above kernel_memory MiB."""
    layers = {module: name for name, module in actor.named_modules() if module._parameters}
    owned, rows, start, size = [p for m in layers for p in m.parameters(recurse=False)], {}, 0, 1
    while start < len(obs):
        part, calls = slice(start, start + size), {module: [] for module in layers}  # (input, output) of each call
        hooks = [m.register_forward_hook(lambda m, x, z, calls=calls: calls[m].append((*x, z))) for m in layers]
        with torch.enable_grad():
            log_prob = actor(obs[part]).log_prob(actions[part]).sum()
        for hook in hooks:
            hook.remove()
        for m, name in layers.items():  # _version: an in-place activation has overwritten the output
            plain = (1, (1, 1), "zeros", tuple)
            conv = type(m) is nn.Conv2d and (m.groups, m.dilation, m.padding_mode, type(m.padding)) == plain
            once = [(len(z), z.dim(), z._version) for *_, z in calls[m]] == [(len(obs[part]), 4 if conv else 2, 0)]
            if not (conv or type(m) is nn.Linear) or not once or sum(p.requires_grad for p in set(owned)) < len(owned):
                raise TypeError(f"the tape takes trained Linear, plain Conv2d once, not {name} {m}: --jacobian vmap")
        for m, g in zip(layers, torch.autograd.grad(log_prob, [calls[m][0][1] for m in layers]), strict=True):
            found = [(x := calls[m][0][0].detach(), g, params := list(m.parameters()))]
            if type(m) is nn.Conv2d:  # patches x [B, T, kh * kw * c_in], P [B, c_out * c_in * kh * kw]
                (kh, kw), (sh, sw), (ph, pw) = m.kernel_size, m.stride, m.padding
                x = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)).unfold(1, kh, sh).unfold(2, kw, sw)
                p = g.flatten(2) @ x.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
                p = p.unflatten(2, (kh * kw, -1)).transpose(2, 3).flatten(1)  # in the order of the weight
                found = [(x.new_ones(len(x), 1), t, [q]) for t, q in zip((p, g.sum((2, 3))), params, strict=False)]
            for x, g, params in found:
                if start == 0:
                    rows[tuple(params)] = [t.new_empty(len(obs), t.shape[1]) for t in (x, g)]
                for whole, t in zip(rows[tuple(params)], (x, g), strict=True):
                    whole[part] = t
        if start == 0:  # of one sample, to learn how many fit: values, gradients, what pooling and patches add
            used = sum(x.nbytes + 5 * z.nbytes for [(x, z)] in calls.values())
            spare = kernel_memory * 2**20 - sum(t.nbytes for whole in rows.values() for t in whole)
            if spare < used:
                raise MemoryError(f"raise --kernel-memory {kernel_memory}, too little for blocks of {len(obs)} samples")
        start, size = part.stop, int(spare // used)
    return [(x, g, list(params)) for params, (x, g) in rows.items()]


def vmap_scores(actor: nn.Module, obs: Tensor, actions: Tensor) -> list[tuple[Tensor, Tensor, list[nn.Parameter]]]:
    """The same from materialised per-sample gradients, for most modules: each parameter is a layer with input 1."""
    score = grad(lambda named, obs, action: functional_call(actor, named, obs[None]).log_prob(action[None])[0])
    params = {n: p for n, p in actor.named_parameters() if p.requires_grad}
    rows = vmap(score, in_dims=(None, 0, 0), chunk_size=128)({n: p.detach() for n, p in params.items()}, obs, actions)
    return [(rows[n].new_ones(len(obs), 1), rows[n].flatten(1), [p]) for n, p in params.items()]


def rat_direction(
    actor: nn.Module, obs: Tensor, actions: Tensor, advantages: Tensor, weights: Tensor, damping: float,
    previous: list[Tensor] | None = None, jacobian: Literal["tape", "vmap"] = "tape", kernel_memory: int = 512,
) -> list[Tensor]:  # fmt: skip
    """One block Kaczmarz step, the minimiser of |y - H g|^2_Sigma + damping |g - previous|^2: equation (3).

    advantages are y [B], used as given; weights are w [B] >= 0 and Sigma = diag(w) / #(w > 0), so that rows of weight
    zero drop out; previous is g_{j-1}, without it the step starts from zero and is equation (1).
    Returns g_j, an ascent direction, one tensor per actor.parameters() in that order. Raises FloatingPointError
    where scores or advantages are not finite, TypeError and MemoryError as tape_scores does."""
    scores = vmap_scores(actor, obs, actions) if jacobian == "vmap" else tape_scores(actor, obs, actions, kernel_memory)
    memory = dict(zip(actor.parameters(), previous, strict=True)) if previous is not None else {}
    with torch.no_grad():
        kernel, residual = 0.0, advantages
        for x, g, (weight, *bias) in scores:
            kernel = kernel + (g @ g.T) * (x @ x.T + len(bias))  # H H^T, [B, B], (5)
            if memory:  # y - H g_{j-1}, [B], (6)
                residual = residual - ((g @ memory[weight].view(g.shape[1], x.shape[1])) * x).sum(1)
                residual = residual - sum(g @ memory[b] for b in bias)

        root = (weights / weights.count_nonzero().clamp(min=1)).sqrt()  # S = Sigma^1/2, [B]
        system = root[:, None] * kernel * root + damping * torch.eye(len(root), dtype=root.dtype, device=root.device)
        factor, info = torch.linalg.cholesky_ex(system)  # S H H^T S + lambda I = L L^T, [B, B]
        u = root * torch.cholesky_solve((root * residual)[:, None], factor)[:, 0]  # Sigma A-bar, [B], (2)
        if not (info == 0) & u.isfinite().all():
            raise FloatingPointError("the kernel's Cholesky solve is not finite: bad scores or advantages, low damping")
        direction = {p: torch.zeros_like(p) for p in actor.parameters()}  # 0 where frozen
        for x, g, (weight, *bias) in scores:  # H^T u, (7)
            direction[weight] = ((u[:, None] * g).T @ x).view_as(weight)
            direction |= dict.fromkeys(bias, u @ g)
        return [direction[p] + memory[p] if memory else direction[p] for p in actor.parameters()]


# Rollout and generalised advantage estimation
class Collector:
    """Steps the environments; holds what outlives a rollout. R is an episode's discounted return so far."""

    def __init__(self, envs: Procgen, gamma: float):
        self.envs, self.gamma, self.obs = envs, gamma, envs.env.observe()[1]["rgb"]
        self.running, self.moments = np.zeros((3, len(self.obs))), np.zeros(3)  # return, length, R; sums of 1, R, R^2
        self.finished = deque(maxlen=100)  # (return, length) of the last 100 episodes

    def collect(self, agent: Agent, num_steps: int, device: torch.device) -> tuple[Tensor, ...]:
        """T = num_steps steps of N environments, all data, to obs [T + 1, N, 64, 64, 3] uint8, actions, rewards and
        terminated [T, N]. Rewards are divided by the deviation of R up to the rollout's end, then clipped to +-10."""
        obs = torch.empty(num_steps + 1, *self.obs.shape, dtype=torch.uint8, device=device)
        obs[0], steps = torch.as_tensor(self.obs), []  # actions, rewards, terminated
        for t in range(num_steps):
            action = agent.act(obs[t])[1].cpu().numpy()
            self.obs, reward, terminated, _, _ = self.envs.step(action)
            self.running = self.running * [[1], [1], [self.gamma]] + [reward, np.ones_like(reward), reward]
            self.moments += [len(reward), self.running[2].sum(), (self.running[2] ** 2).sum()]
            self.finished.extend(map(tuple, self.running[:2, terminated].T.tolist()))
            self.running[:, terminated] = 0
            obs[t + 1] = torch.as_tensor(self.obs)
            steps.append(np.stack([action, reward, terminated]))
        mean, square = self.moments[1:] / self.moments[0]
        actions, rewards, terminated = torch.as_tensor(np.stack(steps, 1), dtype=torch.float32, device=device)
        return obs, actions.long(), (rewards / (square - mean**2 + 1e-8) ** 0.5).clamp(-10, 10), terminated


def evaluate(args: Args, agent: Agent, seed: int, device: torch.device) -> float:
    """Mean return on unseen levels, of the first episode of each of num_envs new environments, played to its end."""
    envs, returns, live = Procgen(args, seed, unseen=True), np.zeros(args.num_envs), np.ones(args.num_envs, bool)
    obs = envs.env.observe()[1]["rgb"]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training does not notice
        while live.any():
            action = agent.act(torch.as_tensor(obs, device=device))[1].cpu().numpy()
            obs, rewards, terminated, _, _ = envs.step(action)
            returns += rewards * live
            live &= ~terminated
    return returns.mean().item()


def gae(rewards: Tensor, values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages [T, N] from values [T + 1, N] (Schulman 2016): truncation bootstraps, the trace ends at done."""
    advantages, trace = torch.zeros_like(rewards), 0.0
    deltas = rewards + gamma * values[1:] * (1 - terminated) - values[:-1]
    for t in reversed(range(len(deltas))):
        advantages[t] = trace = deltas[t] + gamma * lam * (1 - done[t]) * trace
    return advantages


# Checkpoint and logging
def load_checkpoint(args: Args, path: Path) -> dict:
    """Read a checkpoint for --resume; refuse one that is missing, damaged, or from a run with other arguments."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs, done = {"algorithm": saved["algorithm"], **saved["args"]}, saved["global_step"]
    except Exception as error:
        fail(f"--resume: {path} is {'damaged' if path.exists() else 'missing, check --run-name'} ({error}).")
    free = ("total_timesteps", "checkpoint_interval", "device", "output_dir", "resume", "kernel_memory")
    for name, value in {"algorithm": ALGORITHM, **asdict(args)}.items():
        if (name not in free and theirs.get(name) != value) or (name == "total_timesteps" and value < done):
            fail(f"--resume: {path} belongs to a run with {name} {theirs.get(name)}, not {value}.")
    return saved


class Logger:
    """progress.csv, TensorBoard events and the progress bar (a line every 5 % where stderr is no terminal)."""

    def __init__(self, folder: Path, step: int, total: int):
        path, self.total, self.printed = folder / "progress.csv", total, step
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [r for r in rows if r.endswith("\n") and (r is rows[0] or int(r.split(",")[0]) <= step)]
        self.csv = open(path, "a", buffering=1)  # noqa: SIM115
        self.csv.truncate(len("".join(kept)))  # what came after the checkpoint will be written again
        self.events = SummaryWriter(str(folder), purge_step=step + 1 if rows else None)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row and one point a tag; metrics maps tag to value, the column is what follows the slash."""
        row = {"global_step": step} | {tag.split("/")[1].lower(): value for tag, value in metrics.items()}
        if os.path.getsize(self.csv.name) == 0:
            print(*row, sep=",", file=self.csv)
        print(*row.values(), sep=",", file=self.csv)
        for tag, value in metrics.items():
            self.events.add_scalar(tag, value, step)
        line = f"return {row['episodic_return']:.1f}, KL {row['kl']:.4f}"
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (step - self.printed) * 20 >= self.total:
            print(f"step {step} of {self.total}: {line}, {row['sps']:.0f} steps/s", file=sys.stderr)
            self.printed = step


# Training
def main(args: Args) -> None:
    """Train. Raises SystemExit 2 on bad input, 1 when a value stops being finite, 128 + n after signal n."""
    check_args(args)
    args.run_name = args.run_name or f"{args.env_id}__{ALGORITHM}__{args.seed}__{time.time():.3f}".replace("/", "_")
    checkpoint = (folder := Path(args.output_dir) / args.run_name) / "checkpoint.pt"
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    saved = load_checkpoint(args, checkpoint) if args.resume else {}
    stop = []  # holds the signal that asked for the end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    torch.manual_seed(args.seed)
    batch_size = args.num_envs * args.num_steps
    global_step, started = saved.get("global_step", 0), time.time() - saved.get("wall_seconds", 0.0)
    learning_rate, eval_return = saved.get("learning_rate", args.learning_rate), saved.get("eval_return", math.nan)
    collector = Collector(Procgen(args, args.seed + global_step), args.gamma)  # a resumed run starts new episodes
    agent = Agent(Procgen.single_observation_space, Procgen.single_action_space, args.channels, args.hidden).to(device)
    actor, critic, popart = agent.actor, agent.critic, agent.critic[-1]
    optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_learning_rate)
    if saved:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        collector.finished, collector.moments = deque(saved["episodes"], 100), np.array(saved["moments"])
        torch.set_rng_state(saved["rng"])
        if device.type == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"])
    try:
        folder.mkdir(parents=True, exist_ok=args.resume)
        (folder / "config.json").write_text(json.dumps({"algorithm": ALGORITHM, **asdict(args)}, indent=2))
        logger = Logger(folder, global_step, args.total_timesteps // batch_size * batch_size)
    except OSError as error:
        fail(f"cannot write {folder} ({error.strerror}): take another --output-dir or --run-name, or --resume the run.")

    def state() -> dict:
        return {
            "algorithm": ALGORITHM, "args": asdict(args), "agent": agent.state_dict(), "eval_return": eval_return,
            "optimizer": optimizer.state_dict(), "learning_rate": learning_rate, "global_step": global_step,
            "wall_seconds": time.time() - started, "episodes": list(collector.finished), "rng": torch.get_rng_state(),
            "moments": collector.moments.tolist(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        }  # fmt: skip

    def save(state: dict) -> None:
        logger.events.flush()  # the points and rows that a checkpoint counts on reach the operating system before it
        with open(checkpoint.with_suffix(".partial"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, checkpoint)  # a crash leaves the old file or the new one

    save(state())
    while global_step + batch_size <= args.total_timesteps and not stop:
        last_good, phase = copy.deepcopy(state()), "rollout"
        try:
            global_step += batch_size
            obs, actions, rewards, done = collector.collect(agent, args.num_steps, device)
            with torch.no_grad():  # 512 images at a time: of a whole rollout the first stage would take gigabytes
                values = torch.cat([critic(part) for part in obs.flatten(0, 1).split(512)]) * popart.std + popart.mean
                advantages = gae(rewards, values.view(-1, args.num_envs), done, done, args.gamma, args.gae_lambda)
                obs, actions, advantages = obs[:-1].flatten(0, 1), actions.flatten(), advantages.flatten()
                returns = advantages + values[:batch_size]  # all [T * N] from here on
                popart.update(returns)
                returns = (returns - popart.mean) / popart.std
                old_logits = torch.cat([actor(part).logits for part in obs.split(512)])  # [T * N, 15]
                g, norms = None, []  # g_0 = 0
                for _ in range(args.update_epochs):
                    for block in torch.randperm(batch_size, device=device).split(batch_size // args.num_minibatches):
                        phase, old = f"actor update {len(norms) + 1}", Categorical(logits=old_logits[block])
                        log_ratio = actor(obs[block]).log_prob(actions[block]) - old.log_prob(actions[block])  # [B]
                        y = advantages[block]
                        y = (y - y.mean()) / (y.std(correction=0) + 1e-8)
                        batch = (obs[block], actions[block], y, log_ratio.exp().clamp(0.1, 10))
                        g = rat_direction(actor, *batch, args.damping, g, args.jacobian, args.kernel_memory)  # g_j, (3)
                        norms.append(nn.utils.get_total_norm(g))
                        eta = learning_rate * (args.max_grad_norm / (norms[-1] + 1e-6)).clamp(max=1)
                        torch._foreach_add_(list(actor.parameters()), torch._foreach_mul(g, eta))  # (4)
                policy = actor(obs[block])  # how far this rollout's updates moved the policy, on the last block
                metrics = {
                    "rat/kl": kl_divergence(old, policy).mean(),
                    "losses/approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),  # sampled, before the last update
                    "losses/entropy": policy.entropy().mean(),
                    "losses/explained_variance": 1 - advantages.var() / returns.var() / popart.std**2,
                    "rat/direction_norm": torch.stack(norms).mean(),
                }
            phase, losses = "critic updates", []
            for _ in range(args.critic_epochs):
                for block in torch.randperm(batch_size, device=device).split(batch_size // args.critic_minibatches):
                    loss = (critic(obs[block]) - returns[block]).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(critic.parameters(), args.critic_max_grad_norm)
                    optimizer.step()
                    losses.append(loss.detach())
            metrics["losses/value_loss"] = torch.stack(losses).mean()
            metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            if bad := [t for t in ("rat/kl", "losses/entropy", "losses/value_loss") if not math.isfinite(metrics[t])]:
                raise FloatingPointError(f"{bad[0]} is not finite")
        except (FloatingPointError, MemoryError) as error:
            save(last_good)
            fail(f"iteration {global_step // batch_size}, {phase}: {error}; {checkpoint} holds the state before.", 1)
        metrics["charts/wall_seconds"] = wall = time.time() - started
        episode = np.mean(collector.finished or [(math.nan, math.nan)], 0).tolist()  # nan before the first one ends
        metrics |= {"charts/episodic_return": episode[0], "charts/episodic_length": episode[1]}
        if args.eval_levels and global_step // batch_size % args.eval_interval == 0:
            eval_return = evaluate(args, agent, args.seed + global_step, device)
        metrics["charts/eval_return"] = eval_return  # the last one's, nan before the first
        metrics |= {"charts/learning_rate": learning_rate, "charts/SPS": global_step / wall}
        logger.write(global_step, metrics)
        factor = 1 / 1.5 if metrics["rat/kl"] > 0.016 else 1.5 if metrics["rat/kl"] < 0.004 else 1
        learning_rate = min(max(learning_rate * factor, 1e-4), args.learning_rate)
        if global_step // batch_size % args.checkpoint_interval == 0:
            save(state())
    save(state())
    for part in (logger.bar, logger.csv, logger.events):
        part.close()
    episodic_return = np.mean([episode[0] for episode in collector.finished] or math.nan)
    print(f"{args.env_id}: episodic_return {episodic_return:.1f} after {global_step} steps, {checkpoint}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stop:
        fail(f"stopped by signal {stop[0]}, continue with --resume --run-name {args.run_name}.", 128 + stop[0])


if __name__ == "__main__":
    main(tyro.cli(Args))
