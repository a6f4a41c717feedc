"""ACKTR (Wu et al. 2017): actor-critic with a Kronecker-factored trust region, K-FAC or EK-FAC, separate or shared.

Run: python acktr.py --env-id HalfCheetah-v5    Equation numbers: README.md, "How it works".
"""

import atexit
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
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "acktr"


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id: flat Box observations, bounded Box actions
    total_timesteps: int = 1_000_000  # environment steps of the whole run, all environments together
    num_envs: int = 32  # environments stepped side by side
    num_steps: int = 64  # steps of each environment in one rollout
    vectorization: Literal["sync", "async", "envpool"] = "sync"  # one process, one an environment, EnvPool's threads
    shared: bool = False  # one trunk for actor and critic, one step for both; the critic_* fields have no effect then
    ekfac: bool = False  # second moments measured in the eigenbasis of the factors, instead of their eigenvalues
    update_epochs: int = 4  # passes of K-FAC over the rollout
    num_minibatches: int = 4  # blocks in a pass, each of num_envs * num_steps / num_minibatches samples
    learning_rate: float = 0.01  # first and largest K-FAC step size
    damping: float = 0.01  # added to the eigenvalues of a layer's Fisher block, > 0
    kl_clip: float = 1e-3  # bound on lr^2 v.grad, twice the KL that the quadratic model predicts for a step
    stat_decay: float = 0.95  # share of the old statistics in the running averages, in (0, 1)
    inverse_interval: int = 10  # updates between eigendecompositions of the factors
    critic_epochs: int = 4  # critic passes over the rollout
    critic_minibatches: int = 8  # critic minibatches in a pass
    critic_learning_rate: float = 1e-3  # Adam step size of the critic
    critic_max_grad_norm: float = 5.0  # l2 bound on the critic's gradient
    gamma: float = 0.99  # discount, in (0, 1]
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation, in (0, 1]
    seed: int = 1  # of networks, sampling and environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_name: str = ""  # folder below output_dir; default {env_id}__acktr__{seed}__{unix time}
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
    for name, value in vars(args).items():
        flag, least = f"--{name.replace('_', '-')} {value}", {"seed": 0, "num_steps": 2}.get(name, 1)
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


def make_envs(args: Args, seed: int) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """Vector environment and first observations [N, obs_dim]; NEXT_STEP: the step after `done` only resets."""
    gym.logger.min_level = gym.logger.ERROR  # "v4 is out of date" is the caller's choice, not news
    if args.vectorization == "envpool":
        try:
            import envpool
        except ImportError:
            fail("--vectorization envpool needs EnvPool: pip install envpool, or use --vectorization sync.")
        if args.env_id not in envpool.list_all_envs():
            fail(f"--env-id {args.env_id} is not among EnvPool's environments, use --vectorization sync.")
        options = {"num_envs": args.num_envs, "seed": seed % 2**31, "num_threads": torch.get_num_threads()}
        options |= {"post_constraint": True} if args.env_id[:-3] in ("Humanoid", "HumanoidStandup") else {}  # contacts
        envs = envpool.make_gymnasium(args.env_id, **options)
    else:
        mode = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        try:
            envs = gym.make_vec(args.env_id, args.num_envs, args.vectorization, vector_kwargs=mode)
        except (gym.error.Error, ImportError) as error:
            fail(f"--env-id {args.env_id} cannot be made: {error}")
    atexit.register(envs.close)  # whatever ends the program, asynchronous workers end with it
    obs_space, act_space = envs.single_observation_space, envs.single_action_space
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs_space, act_space))
    if not flat or not act_space.is_bounded():
        fail(f"--env-id {args.env_id} maps {obs_space} to {act_space}, {ALGORITHM} needs flat Boxes, actions bounded.")
    return envs, (envs.reset() if args.vectorization == "envpool" else envs.reset(seed=seed))[0]


# Networks
class ObsNormalizer(nn.Module):
    """Running mean and variance of observations: forward gives (o - mean) / sqrt(var + 1e-5), clipped to +-5."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(obs_dim, dtype=torch.float64))
        self.register_buffer("count", torch.ones((), dtype=torch.float64))

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / (self.var + 1e-5).sqrt()).clamp(-5, 5).float()

    def update(self, obs: Tensor) -> None:
        """Merge the moments of obs [N, obs_dim] (Chan et al. 1979)."""
        obs, share = obs.double(), len(obs) / (self.count + len(obs))
        delta = obs.mean(0) - self.mean
        self.var.lerp_(obs.var(0, correction=0), share).add_(delta.square() * share * (1 - share))
        self.mean.add_(delta * share)
        self.count.add_(len(obs))


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


class Actor(nn.Module):
    """Diagonal Gaussian of the action before its tanh, and if shared a value [B], else None."""

    def __init__(self, obs_dim: int, act_dim: int, shared: bool = False, hidden: int = 256):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.mean, self.value = nn.Linear(hidden, act_dim), PopArt(hidden) if shared else None
        self.log_std = nn.Linear(1, act_dim, bias=False)  # state-independent log sigma is a layer with the input 1
        nn.init.zeros_(self.log_std.weight)

    def forward(self, obs: Tensor) -> tuple[Distribution, Tensor | None]:
        features, std = self.trunk(obs), self.log_std(obs.new_ones(len(obs), 1)).exp()  # [B, hidden], [B, act_dim]
        policy = Independent(Normal(self.mean(features), std, validate_args=False), 1, validate_args=False)
        return policy, self.value(features) if self.value else None


class Agent(nn.Module):
    """All that it takes to play: observation statistics, actor, critic (in PopArt's units), action bounds."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, shared: bool = False):
        super().__init__()
        obs_dim, act_dim = observation_space.shape[0], action_space.shape[0]
        self.normalizer, self.actor = ObsNormalizer(obs_dim), Actor(obs_dim, act_dim, shared)
        own = [nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), PopArt(256)]
        self.critic = nn.Sequential(*([self.actor.trunk, self.actor.value] if shared else own))
        self.register_buffer("low", torch.as_tensor(action_space.low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(action_space.high, dtype=torch.float32))

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Raw obs [B, obs_dim] to the policy's sample (or mean) and the environment's action, both [B, act_dim]."""
        policy, _ = self.actor(self.normalizer(obs))
        action = policy.mean if deterministic else policy.sample()
        return action, self.low + (action.tanh() + 1) / 2 * (self.high - self.low)


# The algorithm's core: Kronecker factors, eigenbases, the clipped step
class KFAC(torch.optim.Optimizer):
    """Natural gradient with a Kronecker-factored Fisher block for each layer, (9) to (11): K-FAC or EK-FAC.

    An update: a forward pass with gradients on, update_statistics(), the loss's backward(), step(). A layer's factors,
    their eigenvectors, s and momentum are the state of its weight, the bias as last column. Raises TypeError by name
    for any other module with parameters than Linear and plain Conv2d, and for one that a pass calls twice or never."""

    def __init__(
        self, model: nn.Module, lr: float, damping: float = 0.01, kl_clip: float = 1e-3, stat_decay: float = 0.95,
        inverse_interval: int = 10, ekfac: bool = False, momentum: float = 0.9,
    ):  # fmt: skip
        self.layers, self.calls = {m: name for name, m in model.named_modules() if m._parameters}, []
        owned = [p for m in self.layers for p in m.parameters(recurse=False)]
        for m, name in self.layers.items():
            plain = type(m) is nn.Conv2d and (m.groups, m.padding_mode, type(m.padding)) == (1, "zeros", tuple)
            if not (plain or type(m) is nn.Linear) or len(set(owned)) < len(owned):
                raise TypeError(f"KFAC takes Linear and Conv2d (one group, zero padding), none tied, not {name} {m}")
            m.register_forward_hook(lambda m, x, z: self.calls.extend([(m, *x, z)] * z.requires_grad))
        settings = {"lr": lr, "damping": damping, "kl_clip": kl_clip, "stat_decay": stat_decay, "ekfac": ekfac}
        settings |= {"inverse_interval": inverse_interval, "momentum": momentum, "steps": 0}
        super().__init__(model.parameters(), settings)

    @torch.no_grad()
    def update_statistics(self, log_likelihood: Tensor, share: Tensor) -> None:
        """Running averages of (9) and s from log_likelihood [B] of outputs drawn from the last pass's distribution,
        weighted by share [B], which sums to 1. Keeps the pass for the loss, puts nothing into .grad."""
        calls, self.calls = [c for c in self.calls if c[0] in self.layers], []  # without those of a model's copy
        for m, name in self.layers.items():  # _version: an in-place activation has overwritten the output
            if [z._version for module, _, z in calls if module is m] != [0]:
                raise TypeError(f"KFAC takes layers called once, their outputs not overwritten, not {name} {m}")
        group, weights = self.param_groups[0], share[:, None, None]
        grads = torch.autograd.grad(log_likelihood, [z for *_, z in calls], torch.ones_like(share), retain_graph=True)
        for (m, x, _), g in zip(calls, grads, strict=True):
            if type(m) is nn.Conv2d:  # a linear layer at T positions
                x, g = nn.functional.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).mT, g.flatten(2).mT
            x, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))  # [B, T, d], [B, T, d_out]
            x = x if m.bias is None else nn.functional.pad(x, (0, 1), value=1.0)
            now, stats = {}, self.state[m.weight]
            now["omega"] = (weights * x).flatten(0, 1).T @ x.flatten(0, 1)  # (9)
            now["gamma"] = (weights * g).flatten(0, 1).T @ g.flatten(0, 1) / g.shape[1]
            if group["ekfac"] and "s" in stats:
                x, g = x @ stats["q_omega"], g @ stats["q_gamma"]
                once = g.shape[1] == 1  # the outer product's squares are those of its factors
                now["s"] = (weights * g**2)[:, 0].T @ x[:, 0] ** 2 if once else (weights * (g.mT @ x) ** 2).sum(0)
            for key, value in now.items():
                stats[key] = stats[key].lerp(value, 1 - group["stat_decay"]) if key in stats else value

    @torch.no_grad()
    def eigendecompose(self) -> None:
        """Eigenbases of the factors; s starts again from the products of their eigenvalues."""
        for stats in (self.state[m.weight] for m in self.layers):
            d_omega, stats["q_omega"] = torch.linalg.eigh(stats["omega"])
            d_gamma, stats["q_gamma"] = torch.linalg.eigh(stats["gamma"])
            stats["s"] = d_gamma.clamp(min=0)[:, None] * d_omega.clamp(min=0)  # rounding leaves some below 0

    @torch.no_grad()
    def step(self) -> Tensor:
        """Decompose when due, then (10) and (11) with the gradients in .grad. Returns the trust region's factor."""
        group, directions, total = self.param_groups[0], [], 0.0
        if group["steps"] % group["inverse_interval"] == 0:
            self.eigendecompose()
        group["steps"] += 1
        for m in self.layers:
            params, stats = list(m.parameters(recurse=False)), self.state[m.weight]
            gradient = torch.cat([p.grad.reshape(len(p), -1) for p in params], 1)  # V, [d_out, d]
            rotated = stats["q_gamma"].T @ gradient @ stats["q_omega"]
            v = stats["q_gamma"] @ (rotated / (stats["s"] + group["damping"])) @ stats["q_omega"].T  # (10)
            total = total + (v * gradient).sum()
            directions.append((params, stats, v))
        if not total.isfinite():
            raise FloatingPointError("the K-FAC step is not finite: bad gradients, low damping or factors of low rank")
        clip = (group["kl_clip"] / (group["lr"] ** 2 * total)).sqrt().clamp(max=1)
        for params, stats, v in directions:  # (11)
            buffer = stats.setdefault("momentum", torch.zeros_like(v)).lerp_(clip * v, 1 - group["momentum"])
            for p, part in zip(params, buffer.split([p[0].numel() for p in params], 1), strict=True):
                p.sub_(part.reshape(p.shape), alpha=group["lr"])
        return clip


# Rollout and generalised advantage estimation
class Collector:
    """Steps the environments; holds what outlives a rollout: last observations, done flags, running episodes."""

    def __init__(self, envs: gym.vector.VectorEnv, obs: np.ndarray):
        self.envs, self.obs, self.done = envs, obs, np.zeros(len(obs), dtype=bool)
        self.running = np.zeros((len(obs), 2))  # return and length so far
        self.finished = deque(maxlen=100)  # (return, length) of the last 100 episodes

    def collect(self, agent: Agent, num_steps: int, device: torch.device) -> tuple[Tensor, ...]:
        """T = num_steps steps of all N environments with the observation statistics frozen.

        Returns raw obs [T + 1, N, obs_dim], actions [T, N, act_dim], and rewards, terminated, done (terminated or
        truncated), valid (0 where the step only reset) [T, N]. Raises FloatingPointError at values not finite."""
        obs, actions, steps = [torch.as_tensor(self.obs, dtype=torch.float32, device=device)], [], []
        for _ in range(num_steps):
            valid = ~self.done
            action, env_action = agent.act(obs[-1])
            self.obs, reward, terminated, truncated, _ = self.envs.step(env_action.cpu().numpy())
            for name, value in (("an observation", self.obs), ("a reward", reward)):
                if not np.isfinite(value).all():
                    raise FloatingPointError(f"the environment returned {name} that is not finite")
            self.done = terminated | truncated
            self.running += np.stack([reward * valid, valid], 1)
            self.finished.extend(map(tuple, self.running[self.done].tolist()))
            self.running[self.done] = 0
            actions.append(action)
            obs.append(torch.as_tensor(self.obs, dtype=torch.float32, device=device))
            steps.append(np.stack([reward, terminated, self.done, valid]))
        steps = torch.as_tensor(np.stack(steps, 1), dtype=torch.float32, device=device)  # [4, T, N]
        return torch.stack(obs), torch.stack(actions), *steps


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
    free = ("total_timesteps", "checkpoint_interval", "vectorization", "device", "output_dir", "resume")
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
    if args.stat_decay >= 1:
        fail(f"--stat-decay {args.stat_decay} must lie in (0, 1).")
    args.run_name = args.run_name or f"{args.env_id}__{ALGORITHM}__{args.seed}__{time.time():.3f}".replace("/", "_")
    checkpoint = (folder := Path(args.output_dir) / args.run_name) / "checkpoint.pt"
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    saved = load_checkpoint(args, checkpoint) if args.resume else {}
    stop = []  # holds the signal that asked for the end; async workers inherit the handler, so Ctrl-C leaves them alive
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    torch.manual_seed(args.seed)
    batch_size = args.num_envs * args.num_steps
    global_step, started = saved.get("global_step", 0), time.time() - saved.get("wall_seconds", 0.0)
    envs, obs = make_envs(args, args.seed + global_step)  # a resumed run starts new episodes
    collector = Collector(envs, obs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.shared).to(device)
    actor, critic, popart = agent.actor, agent.critic, agent.critic[-1]
    settings = args.damping, args.kl_clip, args.stat_decay, args.inverse_interval, args.ekfac
    kfac = KFAC(actor, args.learning_rate, *settings)
    optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_learning_rate)
    parts = {"agent": agent, "kfac": kfac, "optimizer": optimizer}
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        collector.finished.extend(saved["episodes"])
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
            "algorithm": ALGORITHM, "args": asdict(args), **{name: part.state_dict() for name, part in parts.items()},
            "global_step": global_step, "wall_seconds": time.time() - started, "episodes": list(collector.finished),
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
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
            obs, actions, rewards, terminated, done, valid = collector.collect(agent, args.num_steps, device)
            with torch.no_grad():
                values = critic(agent.normalizer(obs)) * popart.std + popart.mean  # [T + 1, N]
                advantages = gae(rewards, values, terminated, done, args.gamma, args.gae_lambda)  # [T, N]
                returns, valid, used = (advantages + values[:-1]).flatten(), valid.flatten(), valid.flatten() > 0
                obs, actions, advantages = obs[:-1].flatten(0, 1), actions.flatten(0, 1), advantages.flatten()
                popart.update(returns[used])
                returns = (returns - popart.mean) / popart.std
                agent.normalizer.update(obs[used])
                obs = agent.normalizer(obs)
                old_actor = copy.deepcopy(actor)
                old_log_prob = old_actor(obs)[0].log_prob(actions)
            clips, losses, size = [], [], batch_size // args.num_minibatches
            for block in torch.rand(args.update_epochs, batch_size, device=device).argsort(1).flatten().split(size):
                phase = f"actor update {len(clips) + 1}"
                share = valid[block] / valid[block].sum().clamp(min=1)  # x @ share: mean of x [B] over valid samples
                y = advantages[block] - advantages[block] @ share
                y = y / ((y.square() @ share).sqrt() + 1e-8)
                policy, value = actor(obs[block])
                drawn = policy.log_prob(policy.sample())  # [B], of the policy's own actions: the true Fisher
                log_prob = policy.log_prob(actions[block])  # [B]
                ratio = (log_prob - old_log_prob[block]).clamp(math.log(0.1), math.log(10)).exp()  # [B]
                loss = -((ratio if args.shared else ratio.detach() * log_prob) * y) @ share
                if args.shared:
                    drawn = drawn + torch.randn_like(value) * value  # the score of a draw from N(V, 1) is eps grad V
                    error = (value - returns[block]).square() @ share
                    loss = loss + error / 2
                    losses.append(error.detach())
                kfac.update_statistics(drawn, share)
                kfac.zero_grad()
                loss.backward()
                clips.append(kfac.step())
            with torch.no_grad():  # on the last block: how far this rollout's updates moved the policy
                log_ratio = (policy := actor(obs[block])[0]).log_prob(actions[block]) - old_log_prob[block]  # [B]
                metrics = {
                    "kfac/kl": kl_divergence(old_actor(obs[block])[0], policy) @ share,
                    "losses/approx_kl": (log_ratio.exp() - 1 - log_ratio) @ share,  # the same, sampled
                    "losses/entropy": policy.entropy() @ share,
                    "losses/explained_variance": 1 - advantages[used].var() / returns[used].var() / popart.std**2,
                    "kfac/clip": torch.stack(clips).mean(),  # factor of (11); 1: no step was clipped
                }
            phase = "critic updates"
            for _ in range(0 if args.shared else args.critic_epochs):
                for block in torch.randperm(batch_size, device=device).split(batch_size // args.critic_minibatches):
                    share = valid[block] / valid[block].sum().clamp(min=1)
                    loss = (critic(obs[block]) - returns[block]).square() @ share
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(critic.parameters(), args.critic_max_grad_norm)
                    optimizer.step()
                    losses.append(loss.detach())
            metrics["losses/value_loss"] = torch.stack(losses).mean()
            metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            for tag in ("kfac/kl", "losses/entropy", "kfac/clip", "losses/value_loss"):
                if not math.isfinite(metrics[tag]):
                    raise FloatingPointError(f"{tag} is not finite")
        except (FloatingPointError, torch.linalg.LinAlgError) as error:  # eigh's: not finite, or of low rank
            save(last_good)
            fail(f"iteration {global_step // batch_size}, {phase}: {error}; {checkpoint} holds the state before.", 1)
        low, group = 0.005 if args.shared else 0.004, kfac.param_groups[0]
        episode = np.mean(collector.finished or [(math.nan, math.nan)], 0).tolist()  # nan before the first one ends
        metrics |= {"charts/episodic_return": episode[0], "charts/episodic_length": episode[1]}
        metrics |= {"charts/learning_rate": group["lr"], "charts/wall_seconds": time.time() - started}
        logger.write(global_step, metrics | {"charts/SPS": global_step / metrics["charts/wall_seconds"]})
        factor = 1 / 1.5 if metrics["kfac/kl"] > 4 * low else 1.5 if metrics["kfac/kl"] < low else 1
        group["lr"] = min(max(group["lr"] * factor, 1e-4), args.learning_rate)
        if global_step // batch_size % args.checkpoint_interval == 0:
            save(state())
    save(state())
    for part in (envs, logger.bar, logger.csv, logger.events):
        part.close()
    episodic_return = np.mean([episode[0] for episode in collector.finished] or math.nan)
    print(f"{args.env_id}: episodic_return {episodic_return:.1f} after {global_step} steps, {checkpoint}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stop:
        fail(f"stopped by signal {stop[0]}, continue with --resume --run-name {args.run_name}.", 128 + stop[0])


if __name__ == "__main__":
    main(tyro.cli(Args))
