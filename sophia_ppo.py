"""PPO (Schulman et al. 2017) by Adam or Sophia-G (Liu et al. 2023), and RAT's diagonal baseline: first-order policies.

Run: python sophia_ppo.py --env-id HalfCheetah-v5    Same rollout and, unless shared, same critic as rat_continuous.py.
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
from dataclasses import asdict, dataclass, replace
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

ALGORITHM = "sophia_ppo"
DEFAULTS = {"adam": (3e-4, 10, 16), "sophia": (1e-4, 10, 16), "diag": (0.05, 4, 4)}  # of the three fields with None


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id: flat Box observations, bounded Box actions
    total_timesteps: int = 1_000_000  # environment steps of the whole run, all environments together
    num_envs: int = 32  # environments stepped side by side
    num_steps: int = 64  # steps of each environment in one rollout
    vectorization: Literal["sync", "async", "envpool"] = "sync"  # one process, one an environment, EnvPool's threads
    optimizer: Literal["adam", "sophia", "diag"] = "adam"  # of the policy; diag: gradient over Fisher's diagonal
    shared: bool = False  # one trunk and one step for actor and critic; the four critic_ fields have no effect
    learning_rate: float | None = None  # default: adam 3e-4, sophia 1e-4; diag 0.05, which the KL adapts below that
    anneal_lr: bool = False  # adam, sophia: lower the step size linearly to zero over total_timesteps
    update_epochs: int | None = None  # actor passes over the rollout; default 10, diag 4
    num_minibatches: int | None = None  # actor blocks in a pass; default 16, diag 4
    clip_coef: float = 0.2  # adam, sophia: the surrogate is flat where the ratio leaves 1 +- clip_coef
    clip_vloss: bool = False  # bound the change of values in the critic's loss in the same way, in PopArt's units
    target_kl: float | None = 0.02  # adam, sophia: no further pass after one whose approximate KL was above; or None
    ent_coef: float = 0.0  # weight of the entropy bonus, >= 0
    vf_coef: float = 0.5  # shared: weight of the critic's loss
    max_grad_norm: float = 0.5  # l2 bound on the gradient, with diag on the direction
    damping: float = 0.1  # diag: lambda, added to the Fisher's diagonal, > 0
    critic_epochs: int = 4  # critic passes over the rollout
    critic_minibatches: int = 8  # critic minibatches in a pass
    critic_learning_rate: float = 1e-3  # Adam step size of the critic
    critic_max_grad_norm: float = 5.0  # l2 bound on the critic's gradient
    gamma: float = 0.99  # discount, in (0, 1]
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation, in (0, 1]
    seed: int = 1  # of networks, sampling and environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_name: str = ""  # folder below output_dir; default {env_id}__sophia_ppo__{seed}__{unix time}
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


class Agent(nn.Module):
    """Observation statistics, actor, critic (in PopArt's units); shared: the critic is a head on the actor's trunk."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, shared: bool = False):
        super().__init__()
        obs_dim, act_dim, self.shared = observation_space.shape[0], action_space.shape[0], shared
        self.normalizer, self.actor = ObsNormalizer(obs_dim), mlp(obs_dim, nn.Linear(256, act_dim), 256)
        self.log_std = nn.Linear(1, act_dim, bias=False)  # state-independent log sigma is a layer with the input 1
        nn.init.zeros_(self.log_std.weight)
        self.critic = PopArt(256) if shared else mlp(obs_dim, PopArt(256), 256)
        self.register_buffer("low", torch.as_tensor(action_space.low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(action_space.high, dtype=torch.float32))

    def forward(self, obs: Tensor, valued: bool = True) -> tuple[Distribution, Tensor | None]:
        """Normalised obs to the policy, of the action before its tanh (whose Jacobian cancels), and, valued, V [B]."""
        features, std = self.actor[:-1](obs), self.log_std(obs.new_ones(*obs.shape[:-1], 1)).exp()
        policy = Independent(Normal(self.actor[-1](features), std, validate_args=False), 1, validate_args=False)
        return policy, self.critic(features if self.shared else obs) if valued else None

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Raw obs [B, obs_dim] to the policy's sample (or mean) and the environment's action, both [B, act_dim]."""
        policy, _ = self(self.normalizer(obs), valued=False)
        action = policy.mean if deterministic else policy.sample()
        return action, self.low + (action.tanh() + 1) / 2 * (self.high - self.low)


# The algorithm's core: Sophia, the Fisher matrix's diagonal, the step
class Sophia(torch.optim.Optimizer):
    """Sophia-G (Liu et al. 2023) without weight decay: theta -= lr clip(m / max(rho h, 1e-12), +-1), where m averages
    p.grad and h averages B g^2, g being the gradient of the mean log-likelihood of B samples drawn from the model
    (Gauss-Newton-Bartlett): in expectation the diagonal of its Fisher matrix."""

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.965, 0.99), rho: float = 0.04):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "updates": 0})
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"m": torch.zeros_like(p), "h": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:
        """One update from p.grad; before the first estimate h is 0 and every coordinate moves by lr."""
        for group in self.param_groups:
            group["updates"] += 1
            for p in group["params"]:
                m, h = self.state[p]["m"], self.state[p]["h"]
                m.lerp_(p.grad, 1 - group["betas"][0])
                p.sub_((m / (group["rho"] * h).clamp(min=1e-12)).clamp(-1, 1), alpha=group["lr"])

    @torch.no_grad()
    def update_hessian(self, gradients: list[Tensor], samples: Tensor | float) -> None:
        """Average B g^2 into h: gradients holds g, one tensor a parameter in the order of params, samples is B."""
        params = [(p, group["betas"][1]) for group in self.param_groups for p in group["params"]]
        for (p, beta), g in zip(params, gradients, strict=True):
            self.state[p]["h"].lerp_(samples * g.square(), 1 - beta)


def log_likelihood(agent: Agent, obs: Tensor, actions: Tensor | None = None) -> Tensor:
    """Log pi [B] of actions, by default drawn; shared: plus a sampled likelihood of V, with the score 2 eps grad V."""
    policy, value = agent(obs, valued=agent.shared)
    log_prob = policy.log_prob(policy.rsample().detach() if actions is None else actions)
    return log_prob - (value - (value + torch.randn_like(value)).detach()).square() if agent.shared else log_prob


def fisher_diagonal(agent: Agent, obs: Tensor, actions: Tensor, share: Tensor) -> dict[nn.Parameter, Tensor]:
    """Mean squared per-sample gradient of log_likelihood, in the shape of each parameter; x @ share is a mean. Of a
    layer with inputs X and output gradients G sum_i (g_i x_i^T)^2 = (G * G)^T (X * X): no g_i x_i^T is stored."""
    calls, diagonal, layers = [], {}, [module for module in agent.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call)) for layer in layers]
    total = log_likelihood(agent, obs, actions).sum()
    for hook in hooks:
        hook.remove()
    for (layer, (x,), _), g in zip(calls, torch.autograd.grad(total, [z for _, _, z in calls]), strict=True):
        squares = share[:, None] * g.square()  # [B, d_out]
        diagonal |= dict(zip(layer.parameters(), (squares.T @ x.detach().square(), squares.sum(0)), strict=False))
    return diagonal


def value_loss(args: Args, value: Tensor, old_value: Tensor, returns: Tensor) -> Tensor:
    """(V - R)^2 [B]; with clip_vloss the larger of that and the error of V held within clip_coef of its old value."""
    held = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef) if args.clip_vloss else value
    return torch.max((value - returns).square(), (held - returns).square())


def policy_step(args: Args, agent: Agent, optimizer: torch.optim.Optimizer, batch: tuple) -> Tensor:
    """One update of the actor, with --shared of all, on the block (obs, actions, log pi_old, V_old, R, y, share), where
    share [B] is 1/n for n valid samples: x @ share is a mean. Returns [5], before the update: gradient norm, sampled
    KL, share of ratios outside the clip range, critic's loss (0 unless shared), policy's loss."""
    obs, actions, old_log_prob, old_value, returns, y, share = batch
    policy, value = agent(obs, valued=args.shared)
    ratio = (log_ratio := policy.log_prob(actions) - old_log_prob).exp()  # [B]
    loss = -torch.min(ratio * y, ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * y)  # PPO, equation 7
    if args.optimizer == "diag":  # RAT's policy gradient: weights without gradient, so the score survives their clamp
        loss = -ratio.detach().clamp(0.1, 10) * y * log_ratio
    error = value_loss(args, value, old_value, returns) if args.shared else torch.zeros_like(y)
    optimizer.zero_grad()
    ((loss - args.ent_coef * policy.entropy() + args.vf_coef * error) @ share).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if args.optimizer == "diag":
        diagonal = fisher_diagonal(agent, obs, actions, share)  # knows linear layers: others are a KeyError
        torch._foreach_div_([p.grad for p in parameters], [diagonal[p] + args.damping for p in parameters])
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    if args.optimizer == "sophia" and optimizer.param_groups[0]["updates"] % 10 == 0:
        estimate = torch.autograd.grad(log_likelihood(agent, obs) @ share, parameters)
        optimizer.update_hessian(estimate, (share > 0).sum())
    outside = ((ratio - 1).abs() > args.clip_coef).float()
    return torch.stack([norm, *(x @ share for x in (ratio - 1 - log_ratio, outside, error, loss))]).detach()


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
    for key, value in zip(("learning_rate", "update_epochs", "num_minibatches"), DEFAULTS[args.optimizer], strict=True):
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    check_args(replace(args, ent_coef=args.ent_coef or 1.0))  # which may be 0, the other coefficients may not
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
    critic, popart = agent.critic, agent.critic if args.shared else agent.critic[-1]
    trained = [*agent.actor.parameters(), *agent.log_std.parameters(), *(critic.parameters() if args.shared else ())]
    kind = {"adam": torch.optim.Adam, "sophia": Sophia, "diag": torch.optim.SGD}[args.optimizer]
    optimizer = kind(trained, args.learning_rate, **({"eps": 1e-5} if args.optimizer == "adam" else {}))
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate)  # not used when shared
    if saved:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        critic_optimizer.load_state_dict(saved["critic_optimizer"])
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
            "algorithm": ALGORITHM, "args": asdict(args), "agent": agent.state_dict(), "global_step": global_step,
            "optimizer": optimizer.state_dict(), "critic_optimizer": critic_optimizer.state_dict(),
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
    group = optimizer.param_groups[0]
    while global_step + batch_size <= args.total_timesteps and not stop:
        last_good, phase = copy.deepcopy(state()), "rollout"
        try:
            global_step += batch_size
            obs, actions, rewards, terminated, done, valid = collector.collect(agent, args.num_steps, device)
            with torch.no_grad():
                values = agent(agent.normalizer(obs))[1] * popart.std + popart.mean  # [T + 1, N]
                advantages = gae(rewards, values, terminated, done, args.gamma, args.gae_lambda)  # [T, N]
                returns, valid, used = (advantages + values[:-1]).flatten(), valid.flatten(), valid.flatten() > 0
                obs, actions, advantages = obs[:-1].flatten(0, 1), actions.flatten(0, 1), advantages.flatten()
                popart.update(returns[used])
                returns = (returns - popart.mean) / popart.std
                agent.normalizer.update(obs[used])
                obs = agent.normalizer(obs)
                old_policy, old_value = agent(obs)
                data, logged = (obs, actions, old_policy.log_prob(actions), old_value, returns), []
            if args.anneal_lr and args.optimizer != "diag":
                group["lr"] = args.learning_rate * (1 - (global_step - batch_size) / args.total_timesteps)
            for _ in range(args.update_epochs):
                for block in torch.randperm(batch_size, device=device).split(batch_size // args.num_minibatches):
                    share = valid[block] / valid[block].sum().clamp(min=1)  # x @ share: mean of x [B] over valid ones
                    y = advantages[block] - advantages[block] @ share
                    rms = (y.square() @ share).sqrt() + 1e-8
                    logged.append(policy_step(args, agent, optimizer, (*(x[block] for x in data), y / rms, share)))
                approx_kl = torch.stack(logged[-args.num_minibatches :])[:, 1].mean()  # in this pass, sampled
                if args.optimizer != "diag" and args.target_kl is not None and approx_kl > args.target_kl:
                    break
            logged, losses = torch.stack(logged), []
            broken = ~logged.isfinite().all(1)
            phase = f"actor update {int(broken.long().argmax()) + 1}" if broken.any() else "critic updates"
            for _ in range(0 if args.shared else args.critic_epochs):
                for block in torch.randperm(batch_size, device=device).split(batch_size // args.critic_minibatches):
                    share = valid[block] / valid[block].sum().clamp(min=1)
                    loss = value_loss(args, critic(obs[block]), old_value[block], returns[block]) @ share
                    critic_optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(critic.parameters(), args.critic_max_grad_norm)
                    critic_optimizer.step()
                    losses.append(loss.detach())
            with torch.no_grad():  # over the rollout: how far its updates moved the policy
                share, (policy, _), means = valid / valid.sum(), agent(obs), logged.mean(0)
                metrics = {
                    "ppo/kl": kl_divergence(old_policy, policy) @ share, "losses/approx_kl": approx_kl,
                    "losses/entropy": policy.entropy() @ share, "ppo/advantage_rms": rms,
                    "losses/explained_variance": 1 - advantages[used].var() / returns[used].var() / popart.std**2,
                    "losses/value_loss": torch.stack(losses).mean() if losses else means[3],
                    "losses/clipfrac": means[2], "losses/policy_loss": means[4], "ppo/gradient_norm": means[0],
                    "ppo/ratio_max": (policy.log_prob(actions) - data[2])[used].max().exp(),
                }  # fmt: skip
            metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            if bad := [t for t in ("ppo/kl", "losses/entropy", "losses/value_loss") if not math.isfinite(metrics[t])]:
                raise FloatingPointError(f"{bad[0]} is not finite")
        except FloatingPointError as error:
            save(last_good)
            fail(f"iteration {global_step // batch_size}, {phase}: {error}; {checkpoint} holds the state before.", 1)
        wall = time.time() - started
        episode = np.mean(collector.finished or [(math.nan, math.nan)], 0).tolist()  # nan before the first one ends
        metrics |= dict(zip(("charts/episodic_return", "charts/episodic_length"), episode, strict=True))
        metrics |= {"charts/learning_rate": group["lr"], "charts/wall_seconds": wall, "charts/SPS": global_step / wall}
        logger.write(global_step, metrics)
        if args.optimizer == "diag":
            low = 0.005 if args.shared else 0.004
            factor = 1 / 1.5 if metrics["ppo/kl"] > 4 * low else 1.5 if metrics["ppo/kl"] < low else 1
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
