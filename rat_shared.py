"""RAT (Randomized Advantage Transformation, Sun, ICML 2026, arXiv:2605.18591), one trunk for actor and critic.

Run: python rat_shared.py --env-id HalfCheetah-v5    Equation numbers: README.md, "How it works".
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
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.func import functional_call, grad, vmap
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "rat_shared"


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id: flat Box observations, bounded Box or Discrete actions
    total_timesteps: int = 1_000_000  # environment steps of the whole run, all environments together
    num_envs: int = 32  # environments stepped side by side
    num_steps: int = 64  # steps of each environment in one rollout
    vectorization: Literal["sync", "async", "envpool"] = "sync"  # one process, one an environment, EnvPool's threads
    kaczmarz: Literal["paper", "release", "off"] = "release"  # what a block remembers of those before: joint_step
    jacobian: Literal["tape", "vmap"] = "tape"  # kernel from layer inputs and gradients, or all of H (most modules)
    update_epochs: int = 4  # passes over the rollout
    num_minibatches: int = 4  # blocks in a pass, each of num_envs * num_steps / num_minibatches samples
    damping: float = 0.1  # lambda of equation (1), > 0
    vf_coef: float = 1.0  # weight of the critic in the loss (8), > 0
    ent_coef: float = 0.0  # weight of the entropy bonus in the loss (8), >= 0
    learning_rate: float = 0.05  # first and largest step size; the KL adapts it below that
    max_grad_norm: float = 0.5  # l2 bound on the applied direction, nu of equation (4)
    gamma: float = 0.99  # discount, in (0, 1]
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation, in (0, 1]
    seed: int = 1  # of networks, sampling and environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_name: str = ""  # folder below output_dir; default {env_id}__rat_shared__{seed}__{unix time}
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
    obs_fits, box = (isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs_space, act_space))
    if not obs_fits or not (act_space.is_bounded() if box else isinstance(act_space, gym.spaces.Discrete)):
        fail(f"--env-id {args.env_id} maps {obs_space} to {act_space}, not flat Boxes, actions bounded or Discrete.")
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


class PolicyAndValue(NamedTuple):
    """The policy, of a Box action before its tanh (whose Jacobian cancels), and the value [B] in PopArt's units."""

    policy: Distribution
    value: Tensor

    def log_prob(self, drawn: Tensor) -> Tensor:
        """Joint log-likelihood [B] of drawn [B, act_dim + 1], action and eps; its score is grad log pi + 2 eps grad V.

        The published code's choice, kept: the value is a Gaussian of variance 1/2, but drawn with variance 1."""
        actions = drawn[:, :-1].reshape(len(drawn), *self.policy.event_shape)
        return self.policy.log_prob(actions) - (self.value - (self.value + drawn[:, -1]).detach()).square()


class Agent(nn.Module):
    """Observation statistics and one trunk with two heads: a diagonal Gaussian or a Categorical policy, a value."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.Space, hidden: int = 256):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        obs_dim, act_dim = observation_space.shape[0], int(action_space.n if self.discrete else action_space.shape[0])
        self.normalizer, self.policy, self.value = ObsNormalizer(obs_dim), nn.Linear(hidden, act_dim), PopArt(hidden)
        self.trunk = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        if self.discrete:
            self.start = int(action_space.start)
            return
        self.log_std = nn.Linear(1, act_dim, bias=False)  # state-independent log sigma is a layer with the input 1
        nn.init.zeros_(self.log_std.weight)
        self.register_buffer("low", torch.as_tensor(action_space.low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(action_space.high, dtype=torch.float32))

    def forward(self, obs: Tensor) -> PolicyAndValue:  # obs are normalised
        features = self.trunk(obs)
        mean, value = self.policy(features), self.value(features)
        if self.discrete:
            return PolicyAndValue(Categorical(logits=mean, validate_args=False), value)
        std = self.log_std(obs.new_ones(*obs.shape[:-1], 1)).exp()  # [B, act_dim]
        return PolicyAndValue(Independent(Normal(mean, std, validate_args=False), 1, validate_args=False), value)

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Raw obs [B, obs_dim] to the policy's sample (or mode) and the environment's action, [B, act_dim] or [B]."""
        policy = self(self.normalizer(obs)).policy
        action = policy.mode if deterministic else policy.sample()
        box_action = None if self.discrete else self.low + (action.tanh() + 1) / 2 * (self.high - self.low)
        return action, self.start + action if self.discrete else box_action


# The algorithm's core: scores, direction, Kaczmarz
def tape_scores(actor: nn.Module, obs: Tensor, actions: Tensor) -> list[tuple[Tensor, Tensor, list[nn.Parameter]]]:
    """H, the rows d log pi(a_i|s_i) / d theta, factored by layer, from one forward and one backward pass.

    Returns (x [B, d_in], g [B, d_out], [weight, bias]) a layer: its input and the gradient of log pi at its output.
    Row i holds g_i x_i^T for the weight and g_i for the bias. Raises TypeError for a layer where that is not known."""
    layers = {module: name for name, module in actor.named_modules() if module._parameters}
    calls = {module: [] for module in layers}  # (input, output) of each call
    owned = [p for m in layers for p in m.parameters(recurse=False)]
    hooks = [m.register_forward_hook(lambda m, inputs, output: calls[m].append((*inputs, output))) for m in layers]
    with torch.enable_grad():
        log_prob = actor(obs).log_prob(actions).sum()
    for hook in hooks:
        hook.remove()
    for m, name in layers.items():  # _version: an in-place activation has overwritten the output
        once = type(m) is nn.Linear and [(z.shape[:-1], z._version) for *_, z in calls[m]] == [(obs.shape[:1], 0)]
        if not once or sum(p.requires_grad for p in set(owned)) < len(owned):
            raise TypeError(f"the tape takes trained Linear called once on [B, d], not {name} {m}: use --jacobian vmap")
    grads = torch.autograd.grad(log_prob, [calls[m][0][1] for m in layers])
    return [(calls[m][0][0].detach(), g, list(m.parameters())) for m, g in zip(layers, grads, strict=True)]


def vmap_scores(actor: nn.Module, obs: Tensor, actions: Tensor) -> list[tuple[Tensor, Tensor, list[nn.Parameter]]]:
    """The same from materialised per-sample gradients, for most modules: each parameter is a layer with input 1."""
    score = grad(lambda named, obs, action: functional_call(actor, named, obs[None]).log_prob(action[None])[0])
    params = {n: p for n, p in actor.named_parameters() if p.requires_grad}
    rows = vmap(score, in_dims=(None, 0, 0), chunk_size=128)({n: p.detach() for n, p in params.items()}, obs, actions)
    return [(rows[n].new_ones(len(obs), 1), rows[n].flatten(1), [p]) for n, p in params.items()]


def rat_targets(
    model: nn.Module, obs: Tensor, actions: Tensor, epsilon: Tensor, advantages: Tensor, weights: Tensor,
    damping: float, previous: list[Tensor] | None = None, jacobian: Literal["tape", "vmap"] = "tape",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Transformed advantages of actor and critic, both [B]: (damping + H H^T Sigma)^-1 of y and of 1, zero where w is.

    H has the rows grad log pi(a_i|s_i) + 2 eps_i grad V(s_i) over all parameters; epsilon is eps [B], from N(0, 1).
    advantages are y [B], used as given; weights are w [B] >= 0 and Sigma = diag(w) / #(w > 0). With previous, one
    tensor a parameter, the right-hand sides are y - H previous and 1 - H previous. Raises FloatingPointError
    where scores or advantages are not finite, TypeError for a layer that only jacobian="vmap" takes."""
    drawn = torch.cat([actions.view(len(obs), -1), epsilon[:, None]], 1)  # [B, act_dim + 1]
    scores = {"tape": tape_scores, "vmap": vmap_scores}[jacobian](model, obs, drawn)
    memory = dict(zip(model.parameters(), previous, strict=True)) if previous is not None else {}
    with torch.no_grad():
        kernel, sides = 0.0, torch.stack([advantages, torch.ones_like(advantages)], 1)  # [B, 2]
        for x, g, (weight, *bias) in scores:
            kernel = kernel + (g @ g.T) * (x @ x.T + len(bias))  # H H^T, [B, B], (5)
            if memory:  # both minus H previous, [B, 2], (6)
                sides = sides - ((g @ memory[weight].view(g.shape[1], x.shape[1])) * x).sum(1, keepdim=True)
                sides = sides - sum((g @ memory[b])[:, None] for b in bias)

        root = (weights / weights.count_nonzero().clamp(min=1)).sqrt()[:, None]  # S = Sigma^1/2, [B, 1]
        system = root * kernel * root.T + damping * torch.eye(len(root), dtype=root.dtype, device=root.device)
        factor, info = torch.linalg.cholesky_ex(system)  # S H H^T S + lambda I = L L^T, [B, B]
        solution = torch.cholesky_solve(root * sides, factor)  # S times the targets, [B, 2], (2)
        if not (info == 0) & solution.isfinite().all():
            raise FloatingPointError("the kernel's Cholesky solve is not finite: bad scores or advantages, low damping")
        return tuple((solution / root).where(root > 0, 0).T)


def joint_step(args: Args, agent: nn.Module, batch: tuple, memory: list | None) -> tuple:
    """Direction to apply for the block (obs, actions, eps, R, log pi_old, y, share), its l2 norm before the clip,
    memory for the next block, mean (V - R)^2. With A, C of rat_targets and means over valid samples it is -grad L,
        L = -mean(ratio A) - ent_coef entropy + vf_coef mean((V - R)^2 C),    (8)
    which is not exactly H^T Sigma A: where H holds the sampled eps, L holds the real error V - R.

    paper:   A, C of y - H g_{j-1}, 1 - H g_{j-1}; g_j = g_{j-1} - grad L stays within a rollout, clipped when applied.
    release: A, C of y + H d_{j-1}, 1 + H d_{j-1}; d_j = clip(-grad L) stays across rollouts.
    off:     A, C of y, 1; nothing stays."""
    obs, actions, epsilon, returns, old_log_prob, y, share = batch  # share [B]: x @ share is the mean of valid x [B]
    policy, value = agent(obs)
    ratio = (policy.log_prob(actions) - old_log_prob).clamp(math.log(0.1), math.log(10)).exp()
    previous = [-d for d in memory] if memory and args.kaczmarz == "release" else memory
    weights = ratio.detach() * (share > 0)
    a, c = rat_targets(agent, obs, actions, epsilon, y, weights, args.damping, previous, args.jacobian)
    error = (value - returns).square()
    loss = (args.vf_coef * error * c - ratio * a - args.ent_coef * policy.entropy()) @ share  # (8)
    direction = [-g for g in torch.autograd.grad(loss, list(agent.parameters()))]
    if memory and args.kaczmarz == "paper":
        direction = [g + d for g, d in zip(memory, direction, strict=True)]
    norm = nn.utils.get_total_norm(direction)
    applied = [g * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1) for g in direction]  # (4)
    return applied, norm, {"paper": direction, "release": applied, "off": None}[args.kaczmarz], error.detach() @ share


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
    learning_rate, memory = saved.get("learning_rate", args.learning_rate), saved.get("kaczmarz")
    envs, obs = make_envs(args, args.seed + global_step)  # a resumed run starts new episodes
    collector = Collector(envs, obs)
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    popart = agent.value
    if saved:
        agent.load_state_dict(saved["agent"])
        collector.finished.extend(saved["episodes"])
        memory = memory and [d.to(device) for d in memory]
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
            "algorithm": ALGORITHM, "args": asdict(args), "agent": agent.state_dict(), "kaczmarz": memory,
            "learning_rate": learning_rate, "global_step": global_step, "wall_seconds": time.time() - started,
            "episodes": list(collector.finished), "rng": torch.get_rng_state(),
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
                values = agent(agent.normalizer(obs)).value * popart.std + popart.mean  # [T + 1, N]
                advantages = gae(rewards, values, terminated, done, args.gamma, args.gae_lambda)  # [T, N]
                returns, valid, used = (advantages + values[:-1]).flatten(), valid.flatten(), valid.flatten() > 0
                obs, actions, advantages = obs[:-1].flatten(0, 1), actions.flatten(0, 1), advantages.flatten()
                popart.update(returns[used])
                returns = (returns - popart.mean) / popart.std
                agent.normalizer.update(obs[used])
                obs = agent.normalizer(obs)
                old_agent = copy.deepcopy(agent)
                old_log_prob = old_agent(obs).policy.log_prob(actions)
            memory, logged = None if args.kaczmarz == "paper" else memory, []
            for _ in range(args.update_epochs):
                epsilon = torch.randn_like(advantages)  # a sample is in one block of a pass
                data = (obs, actions, epsilon, returns, old_log_prob)
                for block in torch.randperm(batch_size, device=device).split(batch_size // args.num_minibatches):
                    phase = f"update {len(logged) + 1}"
                    share = valid[block] / valid[block].sum().clamp(min=1)  # 1 / n for n valid samples
                    y = advantages[block] - advantages[block] @ share
                    rms = (y.square() @ share).sqrt() + 1e-8
                    batch = (*(x[block] for x in data), y / rms, share)
                    applied, norm, memory, value_loss = joint_step(args, agent, batch, memory)
                    torch._foreach_add_([p.data for p in agent.parameters()], applied, alpha=learning_rate)  # (4)
                    logged.append(torch.stack([norm, value_loss]))
            with torch.no_grad():  # on the last block: how far this rollout's updates moved the policy
                policy = agent(obs[block]).policy
                log_ratio = policy.log_prob(actions[block]) - old_log_prob[block]
                drawn = torch.cat([actions[block].view(len(block), -1), epsilon[block, None]], 1)
                scores = {"tape": tape_scores, "vmap": vmap_scores}[args.jacobian](agent, obs[block], drawn)
                trace = sum((g.square().sum(1) * (x.square().sum(1) + len(p) - 1)) @ share for x, g, p in scores)
                means = torch.stack(logged).mean(0)  # over all blocks
                metrics = dict(zip(("rat/direction_norm", "losses/value_loss"), means, strict=True)) | {
                    "rat/kl": kl_divergence(old_agent(obs[block]).policy, policy) @ share,
                    "losses/approx_kl": (log_ratio.exp() - 1 - log_ratio) @ share,  # sampled
                    "losses/entropy": policy.entropy() @ share,
                    "losses/explained_variance": 1 - advantages[used].var() / returns[used].var() / popart.std**2,
                    "rat/kernel_trace": trace,  # mean squared norm of a score, to hold against damping
                    "rat/ratio_max": torch.where(share > 0, log_ratio, -torch.inf).max().exp(),
                    "rat/advantage_rms": rms,
                }
            metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
            for tag in ("rat/kl", "losses/entropy", "rat/direction_norm", "losses/value_loss"):
                if not math.isfinite(metrics[tag]):
                    raise FloatingPointError(f"{tag} is not finite")
        except FloatingPointError as error:
            save(last_good)
            fail(f"iteration {global_step // batch_size}, {phase}: {error}; {checkpoint} holds the state before.", 1)
        wall_seconds = time.time() - started
        episode = np.mean(collector.finished or [(math.nan, math.nan)], 0).tolist()  # nan before the first one ends
        metrics |= {"charts/episodic_return": episode[0], "charts/episodic_length": episode[1]}
        metrics |= {"charts/learning_rate": learning_rate, "rat/damping": args.damping}
        metrics |= {"charts/SPS": global_step / wall_seconds, "charts/wall_seconds": wall_seconds}
        logger.write(global_step, metrics)
        factor = 1 / 1.5 if metrics["rat/kl"] > 0.02 else 1.5 if metrics["rat/kl"] < 0.005 else 1
        learning_rate = min(max(learning_rate * factor, 1e-4), args.learning_rate)
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
