"""Natural policy gradient by conjugate gradients on Fisher-vector products; with --line-search TRPO (Schulman, 2015).

Run: python npg_cg.py --env-id HalfCheetah-v5    Same networks, rollout and critic as rat_continuous.py.
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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "npg_cg"


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id: flat Box observations, bounded Box actions
    total_timesteps: int = 1_000_000  # environment steps of the whole run, all environments together
    num_envs: int = 32  # environments stepped side by side
    num_steps: int = 64  # steps of each environment in one rollout
    vectorization: Literal["sync", "async", "envpool"] = "sync"  # one process, one an environment, EnvPool's threads
    cg_iterations: int | None = None  # conjugate gradient iterations of an update; default 10, with --line-search 15
    damping: float = 0.1  # lambda, added to the Fisher's diagonal, > 0
    clip: Literal["fisher", "l2", "none"] = "fisher"  # bound on d: d^T (F + lambda I) d (no root), |d|, or none
    max_grad_norm: float = 0.5  # that bound
    update_epochs: int = 4  # actor passes over the rollout
    num_minibatches: int = 4  # actor blocks in a pass, each of num_envs * num_steps / num_minibatches samples
    learning_rate: float = 0.05  # first and largest actor step size; the KL adapts it below that
    line_search: bool = False  # TRPO: one update a rollout on all of it; the five fields above have no effect
    target_kl: float = 0.01  # with --line-search: largest KL of an update, delta
    critic_epochs: int = 4  # critic passes over the rollout
    critic_minibatches: int = 8  # critic minibatches in a pass
    critic_learning_rate: float = 1e-3  # Adam step size of the critic
    critic_max_grad_norm: float = 5.0  # l2 bound on the critic's gradient
    gamma: float = 0.99  # discount, in (0, 1]
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation, in (0, 1]
    seed: int = 1  # of networks, sampling and environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_name: str = ""  # folder below output_dir; default {env_id}__npg_cg__{seed}__{unix time}
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


def mlp(obs_dim: int, head: nn.Module, hidden: int) -> nn.Sequential:
    """Two ReLU layers and a head, in PyTorch's default initialisation."""
    return nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), head)


class Actor(nn.Module):
    """Diagonal Gaussian of the action before its tanh, whose Jacobian cancels in ratios and scores: log_prob(a) [B]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int = 256):
        super().__init__()
        self.mean = mlp(obs_dim, nn.Linear(hidden, act_dim), hidden)
        self.log_std = nn.Linear(1, act_dim, bias=False)  # state-independent log sigma is a layer with the input 1
        nn.init.zeros_(self.log_std.weight)

    def forward(self, obs: Tensor) -> Distribution:
        std = self.log_std(obs.new_ones(len(obs), 1)).exp()  # [B, act_dim]
        return Independent(Normal(self.mean(obs), std, validate_args=False), 1, validate_args=False)


class Agent(nn.Module):
    """All that it takes to play: observation statistics, actor, critic (in PopArt's units), action bounds."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box):
        super().__init__()
        obs_dim, act_dim = observation_space.shape[0], action_space.shape[0]
        self.normalizer, self.actor = ObsNormalizer(obs_dim), Actor(obs_dim, act_dim)
        self.critic = mlp(obs_dim, PopArt(256), 256)
        self.register_buffer("low", torch.as_tensor(action_space.low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(action_space.high, dtype=torch.float32))

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Raw obs [B, obs_dim] to the policy's sample (or mean) and the environment's action, both [B, act_dim]."""
        policy = self.actor(self.normalizer(obs))
        action = policy.mean if deterministic else policy.sample()
        return action, self.low + (action.tanh() + 1) / 2 * (self.high - self.low)


# The algorithm's core: Fisher-vector products, conjugate gradients, line search
def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in one vector [p]."""
    return torch.cat([t.flatten() for t in tensors])


def unflatten(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse: vector [p] in tensors of the shapes of like."""
    return [v.view_as(t) for v, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def fisher_product(actor: nn.Module, obs: Tensor, valid: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Function v [p] to F v [p], F the Fisher matrix over actor.parameters(), mean over obs where valid [B] is not 0.

    F is the Hessian of KL(pi_ref || pi) at pi = pi_ref, so that F v = grad(grad KL . v): F is never formed."""
    parameters, policy = list(actor.parameters()), actor(obs)
    with torch.no_grad():
        reference = actor(obs)
    kl = kl_divergence(reference, policy)  # [B], zero, and so is its gradient
    share = torch.full_like(kl, 1 / len(kl)) if valid is None else valid / valid.sum().clamp(min=1)
    gradient = flatten(torch.autograd.grad(kl @ share, parameters, create_graph=True))  # [p]
    return lambda v: flatten(torch.autograd.grad(gradient, parameters, v, retain_graph=True))


def natural_gradient(
    actor: nn.Module, obs: Tensor, gradient: Tensor, damping: float, iterations: int, valid: Tensor | None = None
) -> Tensor:
    """x [p] with (F + damping I) x = gradient [p], by conjugate gradients from zero, stopped where residual^2 < 1e-10.

    F, valid: see fisher_product. Order as in actor.parameters(). Raises FloatingPointError where x is not finite."""
    product = fisher_product(actor, obs, valid)
    x, residual = torch.zeros_like(gradient), gradient  # residual = gradient - (F + damping I) x
    towards, square = residual, residual @ residual
    for _ in range(iterations):
        if square < 1e-10:
            break
        image = product(towards) + damping * towards
        step = square / (towards @ image)
        x, residual = x + step * towards, residual - step * image
        previous, square = square, residual @ residual
        towards = residual + square / previous * towards
    if not x.isfinite().all():
        raise FloatingPointError("the conjugate gradients are not finite: bad scores or advantages, low damping")
    return x


@torch.no_grad()
def line_search(actor: nn.Module, step: Tensor, batch: tuple, target_kl: float) -> float:
    """TRPO's backtracking: adds 0.8^k step [p] to the parameters and returns 0.8^k, with the first k < 10 at which
    KL(pi || pi_k) is at most target_kl and the mean of y pi_k / pi improves; without one returns 0 and changes nothing.
    batch holds obs [B, ...], actions [B, ...], y [B], share [B]; x @ share is a mean."""
    obs, actions, y, share = batch
    named, policy = dict(actor.named_parameters()), actor(obs)
    for factor in (0.8**k for k in range(10)):
        changes = zip(named.items(), unflatten(factor * step, list(named.values())), strict=True)
        moved = {name: p + change for (name, p), change in changes}
        trial = functional_call(actor, moved, obs)
        ratio = (trial.log_prob(actions) - policy.log_prob(actions)).exp()  # [B]
        if kl_divergence(policy, trial) @ share <= target_kl and (ratio * y) @ share > y @ share:
            torch._foreach_copy_(list(named.values()), list(moved.values()))
            return factor
    return 0.0


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
    args.cg_iterations = (15 if args.line_search else 10) if args.cg_iterations is None else args.cg_iterations
    check_args(args)
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
    learning_rate = saved.get("learning_rate", args.learning_rate)
    epochs, size = (1, batch_size) if args.line_search else (args.update_epochs, batch_size // args.num_minibatches)
    envs, obs = make_envs(args, args.seed + global_step)  # a resumed run starts new episodes
    collector = Collector(envs, obs)
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    actor, critic, popart = agent.actor, agent.critic, agent.critic[-1]
    parameters = list(actor.parameters())
    optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_learning_rate)
    if saved:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
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
            "algorithm": ALGORITHM, "args": asdict(args), "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(), "learning_rate": learning_rate, "global_step": global_step,
            "wall_seconds": time.time() - started, "episodes": list(collector.finished), "rng": torch.get_rng_state(),
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
            obs, actions, rewards, terminated, done, valid = collector.collect(agent, args.num_steps, device)
            with torch.no_grad():
                values = critic(agent.normalizer(obs)) * popart.std + popart.mean  # [T + 1, N]
                advantages = gae(rewards, values, terminated, done, args.gamma, args.gae_lambda)  # [T, N]
                returns, valid = (advantages + values[:-1]).flatten(), valid.flatten()  # flat from here on
                obs, actions, advantages = obs[:-1].flatten(0, 1), actions.flatten(0, 1), advantages.flatten()
                popart.update(returns[valid > 0])
                returns = (returns - popart.mean) / popart.std
                agent.normalizer.update(obs[valid > 0])
                obs = agent.normalizer(obs)
                old_actor = copy.deepcopy(actor)
                old_log_prob = old_actor(obs).log_prob(actions)
            norms, steps = [], []
            shuffles = [torch.randperm(batch_size, device=device) for _ in range(epochs)]
            for block in (blocks := torch.cat(shuffles).split(size)):
                phase = f"actor update {len(norms) + 1}"
                share = valid[block] / valid[block].sum().clamp(min=1)  # x @ share: mean of x [B] over valid samples
                y = advantages[block] - advantages[block] @ share
                rms = (y.square() @ share).sqrt() + 1e-8
                log_prob = actor(obs[block]).log_prob(actions[block])  # [B]
                weights = (log_prob.detach() - old_log_prob[block]).exp().clamp(0.1, 10) * share  # [B]
                g = flatten(torch.autograd.grad(log_prob @ (weights * y / rms), parameters))  # [p]
                d = natural_gradient(actor, obs[block], g, args.damping, args.cg_iterations, valid[block])  # [p]
                curvature = d @ g  # d^T (F + lambda I) d: CG's residual is orthogonal to d, up to rounding
                if len(norms) + 1 == len(blocks):
                    left = g - fisher_product(actor, obs[block], valid[block])(d) - args.damping * d
                if args.line_search:
                    eta = (2 * args.target_kl / curvature.clamp(min=1e-10)).sqrt()  # a quadratic KL is target_kl there
                    eta *= line_search(actor, eta * d, (obs[block], actions[block], y / rms, share), args.target_kl)
                else:
                    length = {"fisher": curvature, "l2": d.norm(), "none": 0 * curvature}[args.clip] + 1e-6
                    eta = learning_rate * (args.max_grad_norm / length).clamp(max=1)
                    with torch.no_grad():
                        torch._foreach_add_(parameters, unflatten(eta * d, parameters))
                norms.append(d.norm())
                steps.append(eta)
            with torch.no_grad():  # on the last block: how far this rollout's updates moved the policy
                policy = actor(obs[block])
                log_ratio = policy.log_prob(actions[block]) - old_log_prob[block]  # [B]
                explained = 1 - advantages[valid > 0].var() / returns[valid > 0].var() / popart.std**2
                metrics = {
                    "npg/kl": kl_divergence(old_actor(obs[block]), policy) @ share,
                    "losses/approx_kl": (log_ratio.exp() - 1 - log_ratio) @ share,  # the same, sampled
                    "losses/entropy": policy.entropy() @ share,
                    "losses/explained_variance": explained,
                    "npg/direction_norm": torch.stack(norms).mean(),
                    "npg/step_size": torch.stack(steps).mean(),  # what multiplies the direction; 0: no step
                    "npg/cg_residual": left.norm() / g.norm().clamp(min=1e-12),  # |g - (F + lambda I) d| / |g|
                    "npg/ratio_max": torch.where(share > 0, log_ratio, -torch.inf).max().exp(),
                    "npg/advantage_rms": rms,
                }

            phase, losses = "critic updates", []
            for _ in range(args.critic_epochs):
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
            for tag in ("npg/kl", "losses/entropy", "npg/direction_norm", "losses/value_loss"):
                if not math.isfinite(metrics[tag]):
                    raise FloatingPointError(f"{tag} is not finite")
        except FloatingPointError as error:
            save(last_good)
            fail(f"iteration {global_step // batch_size}, {phase}: {error}; {checkpoint} holds the state before.", 1)
        wall_seconds = time.time() - started
        episode = np.mean(collector.finished or [(math.nan, math.nan)], 0).tolist()  # nan before the first one ends
        metrics |= {"charts/episodic_return": episode[0], "charts/episodic_length": episode[1]}
        metrics |= {"charts/learning_rate": learning_rate, "npg/damping": args.damping}
        metrics |= {"charts/SPS": global_step / wall_seconds, "charts/wall_seconds": wall_seconds}
        logger.write(global_step, metrics)
        factor = 1 / 1.5 if metrics["npg/kl"] > 0.016 else 1.5 if metrics["npg/kl"] < 0.004 else 1
        learning_rate = min(max(learning_rate * factor, 1e-4), args.learning_rate)  # no part of TRPO
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
