# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.3.7",
#     "numpy==1.26.4",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
# ]
# ///
"""Natural policy gradient by conjugate gradients; with --line-search TRPO (Schulman et al. 2015).

Run: python npg_cg.py --env-id HalfCheetah-v5. Symbols: docs/algorithm.md.

    for each rollout:
        step the environments with the policy                     collect
        advantages and returns                                    gae
        drop steps that only reset, renew running statistics      gather_samples
        for each pass, for each block of samples:                 minibatches
            g = H^T Sigma y                                       policy_gradient
            d = (F + lambda I)^-1 g                               natural_gradient
            s by eta and d's length, with --line-search the KL    step_size, trpo_step_size
            theta = theta + s d                                   move
        regress the critic on the returns                         fit_critic
        adapt eta to the KL divergence, not with --line-search    adapt_learning_rate
        write a row of metrics and a checkpoint                   Logger, save_checkpoint
"""

import copy
import json
import os
import shlex
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter

ALGORITHM = Path(__file__).stem  # names runs; a copy of this file under another name is a fork
Distribution.set_default_validate_args(False)  # values that are not finite are found in the solve


@dataclass
class Args:
    """Natural policy gradient by conjugate gradients; with --line-search TRPO."""

    env_id: str = "HalfCheetah-v5"  # Gymnasium id: flat Box observations, bounded Box actions
    total_timesteps: int = 1_000_000  # environment steps of all environments, in whole rollouts
    num_envs: int = 32  # environments stepped side by side
    num_steps: int = 64  # steps of each environment in one rollout
    vectorization: Literal["sync", "envpool"] = "sync"  # one after the other, or EnvPool's threads
    damping: float = 0.1  # lambda, added to the Fisher's diagonal, > 0
    cg_iterations: int | None = None  # of a solve; default 10, with line_search 15
    update_epochs: int = 4  # actor passes over the rollout
    num_minibatches: int = 4  # actor blocks in a pass
    learning_rate: float = 0.05  # first actor step size, and the largest except with normalize
    clip: Literal["normalize", "fisher", "l2", "none"] = "normalize"  # see step_size
    max_grad_norm: float = 0.5  # bound nu of fisher and l2
    line_search: bool = False  # TRPO: one step a rollout, on all of it; the 5 above have no effect
    target_kl: float = 0.01  # largest KL divergence of TRPO's step, delta
    critic_epochs: int = 10  # critic passes over the rollout
    critic_minibatches: int = 16  # critic minibatches in a pass
    critic_learning_rate: float = 3e-4  # Adam step size of the critic
    critic_max_grad_norm: float = 5.0  # l2 bound on the critic's gradient
    gamma: float = 0.99  # discount, in (0, 1]
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation, in (0, 1]
    seed: int = 1  # of networks, sampling and environments
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of the networks
    run_name: str = ""  # folder below output_dir; default {env_id}__{script}__{seed}__{time}
    output_dir: str = "runs"  # where run folders go
    resume: bool = False  # continue run_name, with that run's arguments but for those given

    def __post_init__(self):
        if self.cg_iterations is None:
            self.cg_iterations = 15 if self.line_search else 10
        if self.line_search:
            self.update_epochs = self.num_minibatches = 1
        check_args(self, ("seed", "resume", "line_search"))


# ---- Environments ----------------------------------------------------------------------------


def make_envs(args, seeds):
    """Vector environment in NEXT_STEP mode (the step after `done` only resets), first obs [N, d].

    seeds: one for each environment. Ends the program where the networks do not take its spaces."""
    gym.logger.min_level = gym.logger.ERROR  # "v4 is out of date" is the caller's choice, not news
    if args.vectorization == "envpool":
        envs = make_envpool(args, seeds)
        seeds = None  # EnvPool takes them only there
    else:
        envs = gym.make_vec(args.env_id, args.num_envs, "sync")
    check_spaces(args.env_id, envs.single_observation_space, envs.single_action_space)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)  # of the last 100 episodes
    return envs, envs.reset(seed=seeds)[0]


def make_envpool(args, seeds):
    """The same stepped by EnvPool's threads, as many as PyTorch has."""
    import envpool

    options = {"num_envs": args.num_envs, "seed": seeds, "num_threads": torch.get_num_threads()}
    if args.env_id[:-3] in ("Humanoid", "HumanoidStandup"):
        options["post_constraint"] = True  # the contact forces that Gymnasium's observations have
    return envpool.make_gymnasium(args.env_id, **options)


def check_spaces(env_id, obs_space, act_space):
    """Refuse what the networks do not take, with the way out."""
    for space in (obs_space, act_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(
                f"--env-id {env_id} has {space}, not a flat Box: use rat_shared.py for Discrete "
                "actions, wrap observations in FlattenObservation."
            )
    width = torch.tensor(act_space.high) - torch.tensor(act_space.low)
    if not width.is_floating_point() or not width.float().isfinite().all():
        fail(
            f"--env-id {env_id} takes {act_space}, not floats in finite bounds: "
            "wrap it in a TransformAction."
        )


# ---- Networks --------------------------------------------------------------------------------


class ObsNormalizer(nn.Module):
    """Running mean and variance of observations: (o - mean) / std, clipped to +-5.

    The variance counts one sample of variance 1 at the mean: what hardly varied in the first
    rollouts is not blown up."""

    def __init__(self, obs_dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("var", torch.zeros(obs_dim))
        self.register_buffer("count", torch.tensor(0.0))
        self.double()

    def forward(self, obs):
        std = (self.var + 1 / (self.count + 1) + 1e-5).sqrt()
        return ((obs - self.mean) / std).clamp(-5, 5).float()

    def update(self, obs):
        """Merge the moments of obs [n, obs_dim] (Chan et al. 1979)."""
        obs = obs.double()
        share = len(obs) / (self.count + len(obs))
        delta = obs.mean(0) - self.mean
        self.var.lerp_(obs.var(0, correction=0), share)
        self.var += delta.square() * share * (1 - share)
        self.mean += delta * share
        self.count += len(obs)


class PopArt(nn.Module):
    """Linear value head over returns normalised by running moments (van Hasselt et al. 2016)."""

    def __init__(self, in_features):
        super().__init__()
        self.linear = nn.Linear(in_features, 1)
        self.register_buffer("moments", torch.zeros(3).double())  # of 1, R, R^2
        self.register_buffer("mean", torch.tensor(0.0).double())
        self.register_buffer("std", torch.tensor(1.0).double())

    def forward(self, features):
        """Values [B] in normalised units of features [B, in_features]."""
        return self.linear(features).squeeze(-1)

    @torch.no_grad()
    def update(self, returns):
        """Move the moments towards returns [n]; rescale the head: denormalised values stay."""
        powers = returns.double() ** torch.arange(3, device=returns.device)[:, None]  # [3, n]
        self.moments.lerp_(powers.mean(1), 1e-5)  # slow: debiased, nearly the mean of all so far
        weight, first, second = self.moments
        mean = first / weight  # over the weight so far: debiased
        std = (second / weight - mean.square()).clamp(min=1e-6).sqrt()
        self.linear.weight *= self.std / std
        self.linear.bias.mul_(self.std).add_(self.mean - mean).div_(std)
        self.mean = mean
        self.std = std


def mlp(obs_dim, head, hidden):
    """Two ReLU layers and a head, in PyTorch's default initialisation."""
    return nn.Sequential(
        nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), head
    )


class Actor(nn.Module):
    """Diagonal Gaussian of the action before its tanh, whose Jacobian cancels in all ratios."""

    def __init__(self, obs_dim, act_dim, hidden=256):
        super().__init__()
        self.mean = mlp(obs_dim, nn.Linear(hidden, act_dim), hidden)
        self.log_std = nn.Linear(1, act_dim, bias=False)  # log sigma: a layer with the input 1
        nn.init.zeros_(self.log_std.weight)

    def forward(self, obs):
        std = self.log_std(obs.new_ones(len(obs), 1)).exp()  # [B, act_dim]
        return Independent(Normal(self.mean(obs), std), 1)


class Agent(nn.Module):
    """All that it takes to play: observation statistics, actor, critic, action bounds."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        (obs_dim,) = observation_space.shape
        self.normalizer = ObsNormalizer(obs_dim)
        self.popart = PopArt(256)
        self.policy = Actor(obs_dim, *action_space.shape)
        self.critic = mlp(obs_dim, self.popart, 256)
        self.register_buffer("low", torch.tensor(action_space.low))
        self.register_buffer("high", torch.tensor(action_space.high))

    def value(self, obs):
        """Values in units of reward of raw obs [..., obs_dim]."""
        return self.critic(self.normalizer(obs)) * self.popart.std + self.popart.mean

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """Raw obs [B, obs_dim] to the policy's sample (or mean) and the environment's action."""
        policy = self.policy(self.normalizer(obs))
        action = policy.mean if deterministic else policy.sample()  # [B, act_dim]
        env_action = self.low + (action.tanh() + 1) / 2 * (self.high - self.low)
        return action, env_action.minimum(self.high)  # rounding may lie above


# ---- What every script has: arguments, rollout, critic, files --------------------------------


def fail(sentence, code=2):
    """End the program with one sentence on stderr. Code 2: bad input; 1: the run broke down."""
    print(f"{ALGORITHM}: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(code)


def check_args(args, may_be_zero):
    """Name a run without a name; raise ValueError for a value that cannot work.

    tyro prints the error's sentence and exits with code 2."""
    rollout = args.num_envs * args.num_steps
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if value == 0 and name in may_be_zero:
            continue
        if isinstance(value, int | float) and not 0 < value < 2**31:
            raise ValueError(
                f"{flag} must be {'0 or ' * (name in may_be_zero)}positive and below 2^31."
            )
        if name in ("gamma", "gae_lambda", "memory") and value > 1:
            raise ValueError(f"{flag} must be at most 1.")
        if name.endswith("minibatches") and value > rollout // 4:  # a block may not be empty
            raise ValueError(f"{flag} must be at most num_envs * num_steps / 4 = {rollout // 4}.")
    if args.total_timesteps < rollout and not args.resume:
        raise ValueError(
            f"--total-timesteps {args.total_timesteps} is below a rollout's {rollout}: give more, "
            "or fewer --num-envs or --num-steps."
        )
    if args.num_steps < 2:
        raise ValueError(f"--num-steps {args.num_steps} must be at least 2.")
    if args.resume and not args.run_name:
        raise ValueError("--resume needs --run-name, the name of a folder in --output-dir.")
    args.run_name = args.run_name or (
        f"{args.env_id.replace('/', '_').replace(':', '_')}__{ALGORITHM}__{args.seed}"
        f"__{time.time():.3f}"
    )


def check_finite(what, value):
    """Raise FloatingPointError, by name, for a value that is not finite."""
    if not np.isfinite(value).all():
        raise FloatingPointError(f"{what} is not finite")


def seed_generators(args, global_step):
    """Seed PyTorch by the run's seed and its steps so far; a seed for each environment."""
    generator = np.random.default_rng((args.seed, global_step))
    first, *env_seeds = generator.integers(2**31, size=1 + args.num_envs).tolist()
    torch.manual_seed(first)
    return env_seeds


class Rollout(NamedTuple):
    """T steps of N environments."""

    obs: Tensor  # raw, [T + 1, N, obs_dim]
    actions: Tensor  # [T, N, act_dim]
    rewards: Tensor  # [T, N], as all that follow
    terminated: Tensor
    done: Tensor  # terminated or truncated
    valid: Tensor  # False where the step only reset


def collect(envs, agent, obs, done, num_steps):
    """A Rollout of num_steps steps from obs [N, obs_dim], done [N]; running statistics frozen.

    Raises FloatingPointError for an observation or a reward that is not finite."""
    observations, actions, steps = [obs], [], []
    for _ in range(num_steps):
        action, env_action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = envs.step(env_action.cpu().numpy())
        check_finite("an observation of the environment", next_obs)
        check_finite("a reward of the environment", reward)
        obs = torch.tensor(next_obs, device=obs.device)
        observations.append(obs)
        actions.append(action)
        steps.append([reward, terminated, terminated | truncated])
    steps = torch.tensor(np.float32(steps), device=obs.device)  # [T, 3, N]
    rewards, terminated, ends = steps.unbind(1)  # [T, N] each
    valid = torch.cat([done[None], ends[:-1]]) == 0  # the step after an end only resets
    return Rollout(
        torch.stack(observations), torch.stack(actions), rewards, terminated, ends, valid
    )


def gae(rollout, values, gamma, lam):
    """Advantages [T, N] from values [T + 1, N] (Schulman et al. 2016).

    A truncation bootstraps from the value of its last observation; the trace ends at done."""
    advantages = rollout.rewards + gamma * values[1:] * (1 - rollout.terminated) - values[:-1]
    for t in reversed(range(len(advantages) - 1)):  # one-step advantages so far
        advantages[t] += gamma * lam * (1 - rollout.done[t]) * advantages[t + 1]
    return advantages


class Samples(NamedTuple):
    """The n steps of a rollout that did not only reset, or a block of them."""

    obs: Tensor  # normalised, [n, obs_dim]
    actions: Tensor  # [n, act_dim]
    advantages: Tensor  # in units of reward, [n]
    returns: Tensor  # in PopArt's units, [n]
    log_prob: Tensor  # of the actions, [n], by the policy before its updates, at obs as above


def gather_samples(agent, rollout, advantages, values):
    """Drop the steps that only reset, renew the running statistics and normalise by them.

    Returns Samples and the policy at them before its updates."""
    keep = rollout.valid  # [T, N]
    obs, actions = rollout.obs[:-1][keep], rollout.actions[keep]
    returns = (advantages + values[:-1])[keep]
    agent.normalizer.update(obs)
    agent.popart.update(returns)
    obs, returns = agent.normalizer(obs), (returns - agent.popart.mean) / agent.popart.std
    policy = agent.policy(obs)
    return Samples(obs, actions, advantages[keep], returns, policy.log_prob(actions)), policy


def normalized(advantages):
    """y [B]: the advantages of a block, centred and divided by their root mean square."""
    centred = advantages - advantages.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)


def minibatches(samples, count):
    """The samples in random order, in count blocks of the same size, give or take one."""
    order = torch.randperm(len(samples.obs), device=samples.obs.device)
    for rows in order.tensor_split(count):
        yield Samples(*(column[rows] for column in samples))


def fit_critic(args, critic, optimizer, samples):
    """Regress the critic on the normalised returns; the mean squared error."""
    losses = []
    for _ in range(args.critic_epochs):
        for block in minibatches(samples, args.critic_minibatches):
            loss = (critic(block.obs) - block.returns).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(critic.parameters(), args.critic_max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean()


def adapt_learning_rate(learning_rate, kl, low, largest):
    """The next rollout's step size: keeps the KL of a rollout in [low, 4 low]; at least 1e-4."""
    if kl > 4 * low:
        return max(learning_rate / 1.5, min(learning_rate, 1e-4))
    if kl < low:
        return min(learning_rate * 1.5, largest)
    return learning_rate


@torch.no_grad()
def rollout_metrics(agent, old_policy, samples):
    """How far the updates moved the policy, how good the critic was: over all samples."""
    policy = agent.policy(samples.obs)
    variance = samples.returns.var() * agent.popart.std.square()
    return {
        "losses/kl": kl_divergence(old_policy, policy).mean(),
        "losses/entropy": policy.entropy().mean(),
        "losses/explained_variance": 1 - samples.advantages.var() / variance.clamp(min=1e-12),
        "losses/advantage_rms": samples.advantages.std(),
    }


def run_metrics(envs, global_step, started):
    """Means of the last 100 training episodes (nan before one has ended), and the speed."""
    seconds = time.time() - started
    return {
        "charts/episodic_return": np.mean(envs.return_queue or np.nan),
        "charts/episodic_length": np.mean(envs.length_queue or np.nan),
        "charts/SPS": global_step / seconds,
        "charts/wall_seconds": seconds,
    }


def run_folder(args):
    """Where checkpoint.pt, progress.csv, config.json and TensorBoard's events of the run are."""
    return Path(args.output_dir) / args.run_name


def save_checkpoint(args, **state):
    """Replace checkpoint.pt in one step: a run that is killed leaves the old file or the new."""
    partial = run_folder(args) / "checkpoint.partial"
    torch.save({"algorithm": ALGORITHM, "args": vars(args), **state}, partial)
    partial.replace(partial.with_suffix(".pt"))


def load_checkpoint(args):
    """What save_checkpoint wrote; refuse what is missing, damaged or of another script."""
    path = run_folder(args) / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location=args.device)  # runs no code: only weights
        if saved["algorithm"] != ALGORITHM:
            raise ValueError(
                f"it is of {saved['algorithm']}, this is {ALGORITHM}: "
                "resume it there or, where that is this script's old name, rename it back"
            )
        saved["args"] = Args(**saved["args"])
    except Exception as error:  # damage raises anything from EOFError to UnpicklingError
        fail(f"--resume: cannot use {path} ({type(error).__name__}): {str(error).split('. ')[0]}.")
    return saved


def parse_args():
    """The command line as Args; with --resume, what it leaves out is as the run had it."""
    args = tyro.cli(Args)
    if args.resume:
        args = tyro.cli(Args, default=load_checkpoint(args)["args"])
    return args


class Logger:
    """progress.csv, TensorBoard events and a line on stdout.

    Makes the run folder or, to resume, opens it again and cuts the rows after csv_size, which the
    checkpoint does not know. Raises FileExistsError for a folder of another run."""

    def __init__(self, args, step, csv_size):
        folder = run_folder(args)
        folder.mkdir(parents=True, exist_ok=args.resume)
        (folder / "config.json").write_text(
            json.dumps({"algorithm": ALGORITHM, **vars(args)}, indent=2)
        )
        self.csv = open(folder / "progress.csv", "a")  # noqa: SIM115
        self.csv.seek(min(csv_size, self.csv.tell()))
        self.csv.truncate()
        self.events = SummaryWriter(folder, purge_step=step + 1)

    def write(self, step, metrics):
        """A point a tag, a line and a row, whose columns are what follows the tags' slashes.

        Raises FloatingPointError for a value that is not finite, but for those of charts/."""
        row = {"global_step": step}
        for tag, value in metrics.items():
            value = float(value)
            group, column = tag.split("/")
            if group != "charts":
                check_finite(tag, value)
            row[column.lower()] = value
            self.events.add_scalar(tag, value, step)
        self.events.flush()
        if not self.csv.tell():
            print(*row, sep=",", file=self.csv)
        print(*row.values(), sep=",", file=self.csv)
        print(f"{step} steps: return {row['episodic_return']:.1f}, KL {row['kl']:.4f}", flush=True)


@contextmanager
def one_sentence(args):
    """End what breaks down within with one sentence, with the way to continue a run."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        for frame in traceback.extract_tb(error.__traceback__):
            if "/lib/python3." not in frame.filename:  # the last place outside of libraries
                place = frame
        sentence = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        if os.path.exists(run_folder(args) / "checkpoint.pt"):  # False for a name too long
            fail(
                f"{sentence}; continue with --resume --run-name {shlex.quote(args.run_name)} "
                f"--output-dir {shlex.quote(args.output_dir)}",
                code=1,
            )
        fail(f"{sentence}: check --env-id {args.env_id} and what it needs installed, see --help")


# ---- The algorithm's core: Fisher-vector products, conjugate gradients, line search -----------


def flatten(tensors):
    """All elements in one vector [p]."""
    return torch.cat([t.flatten() for t in tensors])


def unflatten(vector, like):
    """The inverse: vector [p] in tensors of the shapes of like."""
    parts = vector.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like)]


@torch.no_grad()
def move(actor, step):
    """theta = theta + step [p]."""
    parameters = list(actor.parameters())
    for p, change in zip(parameters, unflatten(step, parameters)):
        p.add_(change)


def policy_gradient(actor, block):
    """g [p] = H^T Sigma y, the gradient of mean(w log pi(a|s) y) with the ratios w held fixed."""
    y = normalized(block.advantages)
    log_prob = actor(block.obs).log_prob(block.actions)  # [B]
    ratio = (log_prob.detach() - block.log_prob).exp().clamp(0.1, 10)  # w
    return flatten(torch.autograd.grad((ratio * y * log_prob).mean(), list(actor.parameters())))


def fisher_product(actor, obs):
    """The function v [p] -> F v [p], with F the policy's Fisher matrix, mean over obs.

    F is the Hessian of KL(reference || pi) at pi = reference, so that F v = grad(grad KL . v):
    two backward passes, and F is never formed."""
    parameters = list(actor.parameters())
    with torch.no_grad():
        reference = actor(obs)
    kl = kl_divergence(reference, actor(obs)).mean()  # zero, and so is its gradient
    gradient = flatten(torch.autograd.grad(kl, parameters, create_graph=True))  # [p]
    return lambda v: flatten(torch.autograd.grad(gradient, parameters, v, retain_graph=True))


def damped_fisher(actor, obs, damping):
    """The function v [p] -> (F + damping I) v [p]."""
    product = fisher_product(actor, obs)
    return lambda v: product(v) + damping * v


def conjugate_gradients(A, b, iterations):
    """x with A(x) = b, from x = 0, ended where |b - A(x)|^2 < 1e-10 (Hestenes & Stiefel 1952)."""
    x = torch.zeros_like(b)
    r = b  # residual b - A(x)
    p = r
    rr = r @ r
    for _ in range(iterations):
        if rr < 1e-10:
            break
        Ap = A(p)
        alpha = rr / (p @ Ap)
        x = x + alpha * p
        r = r - alpha * Ap
        rr_before = rr
        rr = r @ r
        p = r + rr / rr_before * p
    return x


def natural_gradient(actor, obs, gradient, damping, iterations):
    """d [p] = (F + damping I)^-1 gradient [p], in the order of actor.parameters().

    Raises FloatingPointError where it is not finite."""
    d = conjugate_gradients(damped_fisher(actor, obs, damping), gradient, iterations)
    if not d.isfinite().all():
        raise FloatingPointError(
            "the conjugate gradients are not finite, of bad scores or advantages "
            "or for a policy that is nearly certain of its actions: raise --damping"
        )
    return d


def relative_residual(actor, obs, damping, g, d):
    """What the conjugate gradients left, |g - (F + damping I) d| / |g|."""
    left = g - damped_fisher(actor, obs, damping)(d)
    return left.norm() / g.norm().clamp(min=1e-12)


def step_size(args, g, d, learning_rate):
    """What d is multiplied by, of learning_rate eta and with c = d^T (F + lambda I) d.

    normalize: eta / sqrt(c), so that every step is equally long to the policy.
    fisher:    eta min(1, nu / c), without a root: the published code's rule.
    l2:        eta min(1, nu / |d|).
    none:      eta."""
    curvature = d @ g  # c, as d is orthogonal to what the solve leaves of g
    if args.clip == "normalize":
        return learning_rate / (curvature.sqrt() + 1e-6)
    if args.clip == "none":
        return torch.full_like(curvature, learning_rate)
    length = curvature if args.clip == "fisher" else d.norm()
    return learning_rate * (args.max_grad_norm / (length + 1e-6)).clamp(max=1)


def trpo_step_size(args, actor, block, g, d):
    """0.8^k sqrt(2 delta / d^T (F + lambda I) d): at k = 0 a quadratic KL would be delta."""
    curvature = (d @ g).clamp(min=1e-10)  # as in step_size
    full = (2 * args.target_kl / curvature).sqrt()
    return full * line_search(actor, block, full * d, args.target_kl)


@torch.no_grad()
def line_search(actor, block, step, target_kl):
    """TRPO's backtracking: the share 0.8^k of step [p] to take, with the first k < 10 that will do.

    Policy pi_k does if KL(pi || pi_k) <= target_kl and the mean of y pi_k / pi is above that of y.
    0 where none does. The actor stays as it is."""
    y = normalized(block.advantages)
    policy = actor(block.obs)
    for k in range(10):
        trial = copy.deepcopy(actor)
        move(trial, 0.8**k * step)
        moved = trial(block.obs)
        ratio = (moved.log_prob(block.actions) - policy.log_prob(block.actions)).exp()  # [B]
        kl = kl_divergence(policy, moved).mean()
        if kl <= target_kl and (ratio * y).mean() > y.mean():
            return 0.8**k
    return 0.0


# ---- Training --------------------------------------------------------------------------------


def main(args):
    """Train. A checkpoint of the last whole iteration is always on the disk."""
    saved = load_checkpoint(args) if args.resume else {}
    batch_size = args.num_envs * args.num_steps
    global_step = saved.get("global_step", 0)
    learning_rate = args.learning_rate  # eta
    started = time.time()
    envs, obs = make_envs(args, seed_generators(args, global_step))
    obs = torch.tensor(obs, device=args.device)  # [N, obs_dim]
    done = obs.new_zeros(len(obs))
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(args.device)
    actor, critic = agent.policy, agent.critic
    torch.set_flush_denormal(True)  # Adam's moments of inactive units fade to them: slow on CPUs
    optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_learning_rate, fused=True)
    if saved:
        started -= saved["wall_seconds"]
        learning_rate = saved["learning_rate"]
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.param_groups[0]["lr"] = args.critic_learning_rate  # as now given
    logger = Logger(args, global_step, saved.get("csv_size", 0))

    def save():
        """All that a resumed run needs; its environments start new episodes."""
        save_checkpoint(
            args,
            agent=agent.state_dict(),
            optimizer=optimizer.state_dict(),
            learning_rate=learning_rate,
            global_step=global_step,
            wall_seconds=time.time() - started,
            csv_size=logger.csv.tell(),
        )

    save()
    while global_step + batch_size <= args.total_timesteps:
        # Rollout, advantages, samples
        rollout = collect(envs, agent, obs, done, args.num_steps)
        obs, done = rollout.obs[-1], rollout.done[-1]
        global_step += batch_size
        with torch.no_grad():
            values = agent.value(rollout.obs)  # [T + 1, N]
            advantages = gae(rollout, values, args.gamma, args.gae_lambda)
            samples, old_policy = gather_samples(agent, rollout, advantages, values)

        # Actor
        norms, step_sizes = [], []
        for _ in range(args.update_epochs):
            for block in minibatches(samples, args.num_minibatches):
                g = policy_gradient(actor, block)  # [p]
                d = natural_gradient(actor, block.obs, g, args.damping, args.cg_iterations)  # [p]
                if not norms:  # once a rollout: it costs as much as an iteration of the solve
                    residual = relative_residual(actor, block.obs, args.damping, g, d)
                if args.line_search:
                    scale = trpo_step_size(args, actor, block, g, d)
                else:
                    scale = step_size(args, g, d, learning_rate)
                move(actor, scale * d)
                norms.append(d.norm())
                step_sizes.append(scale)

        # Critic
        value_loss = fit_critic(args, critic, optimizer, samples)

        # Metrics, step size, checkpoint
        metrics = rollout_metrics(agent, old_policy, samples)
        metrics |= run_metrics(envs, global_step, started)
        metrics["charts/learning_rate"] = learning_rate
        metrics["losses/value_loss"] = value_loss
        metrics["npg/direction_norm"] = torch.stack(norms).mean()  # |d|
        metrics["npg/step_size"] = torch.stack(step_sizes).mean()  # 0: no step was taken
        metrics["npg/cg_residual"] = residual
        logger.write(global_step, metrics)
        if not args.line_search:
            kl = float(metrics["losses/kl"])
            largest = np.inf if args.clip == "normalize" else args.learning_rate
            learning_rate = adapt_learning_rate(learning_rate, kl, 0.004, largest)
        save()


if __name__ == "__main__":
    arguments = parse_args()
    with one_sentence(arguments):
        main(arguments)
