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
"""PPO by Adam (Schulman et al. 2017) or by Sophia-G (Liu et al. 2023), and RAT's diagonal baseline.

Run: python sophia_ppo.py --env-id HalfCheetah-v5. The formulas together: docs/algorithm.md.

    for each rollout:
        step the environments with the policy                            collect
        advantages and returns                                           gae
        drop the steps that only reset, renew the running statistics     gather_samples
        for each pass while KL < target_kl, for each block of samples:   fit_actor, minibatches
            gradient of the clipped surrogate, diag: of w y log pi       policy_loss
            diag: divide it by (diag F + lambda)                         fisher_diagonal
            move theta by Adam, by Sophia or, diag, by plain descent     policy_step
            sophia, every tenth time: renew h, the curvature             hessian_estimate
        regress the critic on the returns                                fit_critic
        diag: adapt the step size to the KL divergence                   adapt_learning_rate
        write a row of metrics and a checkpoint                          Logger, save_checkpoint
"""

import json
import os
import shlex
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
Distribution.set_default_validate_args(False)  # values that are not finite are found by the Logger
TUNED = ("learning_rate", "update_epochs", "num_minibatches")
DEFAULTS = {"adam": (3e-4, 10, 16), "sophia": (1e-4, 10, 16), "diag": (0.05, 4, 4)}  # of TUNED


@dataclass
class Args:
    """PPO by Adam or Sophia-G, and the diagonal natural gradient."""

    env_id: str = "HalfCheetah-v5"  # Gymnasium id: flat Box observations, bounded Box actions
    total_timesteps: int = 1_000_000  # environment steps of all environments, in whole rollouts
    num_envs: int = 32  # environments stepped side by side
    num_steps: int = 64  # steps of each environment in one rollout
    vectorization: Literal["sync", "envpool"] = "sync"  # one after the other, or EnvPool's threads
    optimizer: Literal["adam", "sophia", "diag"] = "adam"  # diag: gradient over Fisher's diagonal
    shared: bool = False  # one trunk for actor and critic, one step for both: no critic_ argument
    learning_rate: float | None = None  # None: adam 3e-4, sophia 1e-4, diag 0.05 (its largest)
    anneal_lr: bool = False  # adam, sophia: lower it linearly to zero over total_timesteps
    update_epochs: int | None = None  # actor passes over the rollout; None: 10, diag 4
    num_minibatches: int | None = None  # actor blocks in a pass; None: 16, diag 4
    clip_coef: float = 0.2  # adam, sophia: no gain from a ratio that leaves 1 +- clip_coef
    target_kl: float | None = 0.02  # adam, sophia: the last pass is the first with a KL above
    ent_coef: float = 0.0  # weight of the entropy bonus, >= 0
    vf_coef: float = 0.5  # shared: weight of the critic's loss
    damping: float = 0.1  # diag: lambda, added to Fisher's diagonal
    max_grad_norm: float = 0.5  # l2 bound on the gradient, diag: on the direction
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
        for name, value in zip(TUNED, DEFAULTS[self.optimizer]):
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_args(self, may_be_zero=("seed", "resume", "shared", "anneal_lr", "ent_coef"))
        if self.anneal_lr and self.optimizer == "diag":
            raise ValueError("--anneal-lr: with --optimizer diag the KL adapts the step size.")


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
    """Diagonal Gaussian of the action before its tanh; with a value head, values on its trunk."""

    def __init__(self, obs_dim, act_dim, value_head=None, hidden=256):
        super().__init__()
        self.trunk = mlp(obs_dim, nn.Identity(), hidden)
        self.mean = nn.Linear(hidden, act_dim)
        self.value_head = value_head
        self.log_std = nn.Linear(1, act_dim, bias=False)  # log sigma: a layer with the input 1
        nn.init.zeros_(self.log_std.weight)

    def forward(self, obs):
        """The policy at normalised obs and values [B] in PopArt's units, None without a head."""
        features = self.trunk(obs)  # [B, hidden]
        std = self.log_std(obs.new_ones(len(obs), 1)).exp()  # [B, act_dim]
        policy = Independent(Normal(self.mean(features), std), 1)
        value = self.value_head(features) if self.value_head else None
        return policy, value


class Agent(nn.Module):
    """All that it takes to play: observation statistics, actor, critic, action bounds."""

    def __init__(self, observation_space, action_space, shared=False):
        super().__init__()
        (obs_dim,) = observation_space.shape
        (act_dim,) = action_space.shape
        self.normalizer = ObsNormalizer(obs_dim)
        self.popart = PopArt(256)
        self.actor = Actor(obs_dim, act_dim, self.popart if shared else None)
        trunk = self.actor.trunk if shared else mlp(obs_dim, nn.Identity(), 256)
        self.critic = nn.Sequential(trunk, self.popart)
        self.register_buffer("low", torch.tensor(action_space.low))
        self.register_buffer("high", torch.tensor(action_space.high))

    def policy(self, obs):
        """Distribution of actions at normalised obs [B, obs_dim]."""
        return self.actor(obs)[0]

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


# ---- The algorithm's core: surrogates, Sophia, the Fisher matrix's diagonal, one step --------


def clipped_surrogate(log_ratio, y, clip_coef):
    """PPO's objective [B] (Schulman et al. 2017): no gain once the ratio leaves 1 +- clip_coef."""
    ratio = log_ratio.exp()
    return torch.min(ratio * y, ratio.clamp(1 - clip_coef, 1 + clip_coef) * y)


def weighted_surrogate(log_ratio, y):
    """diag's objective [B], whose gradient is w y grad log pi, as in RAT: w is held constant."""
    w = log_ratio.detach().exp().clamp(0.1, 10)
    return w * y * log_ratio


def policy_loss(args, actor, block):
    """Loss of a block, with a value head the critic's too; the log ratios [B] of its samples."""
    policy, value = actor(block.obs)
    log_ratio = policy.log_prob(block.actions) - block.log_prob
    y = normalized(block.advantages)
    if args.optimizer == "diag":
        gain = weighted_surrogate(log_ratio, y)
    else:
        gain = clipped_surrogate(log_ratio, y, args.clip_coef)
    loss = -(gain + args.ent_coef * policy.entropy()).mean()
    if value is not None:
        loss = loss + args.vf_coef * (value - block.returns).square().mean()
    return loss, log_ratio.detach()


class Sophia(torch.optim.Optimizer):
    """Sophia-G without weight decay: theta -= lr clip(m / max(rho h, 1e-12), +-1) in every element.

    m averages p.grad, h an estimate of the Hessian's diagonal, which is handed in now and then."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "updates": 0})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"m": torch.zeros_like(p), "h": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        """One update from p.grad; where h is 0, as before its first estimate, a move by lr."""
        for group in self.param_groups:
            group["updates"] += 1
            for p in group["params"]:
                m, h = self.state[p]["m"], self.state[p]["h"]
                m.lerp_(p.grad, 1 - group["betas"][0])
                newton = m / (group["rho"] * h).clamp(min=1e-12)
                p.sub_(newton.clamp(-1, 1), alpha=group["lr"])

    @torch.no_grad()
    def update_hessian(self, estimate):
        """Average an estimate, which maps parameters to tensors of their shapes, into h."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["h"].lerp_(estimate[p], 1 - group["betas"][1])


def log_likelihood(actor, obs, actions=None):
    """log pi(a_i|s_i) [B] of actions, by default drawn anew; if shared, plus that of drawn values.

    Those add the score 2 epsilon grad V, epsilon ~ N(0, 1), as in rat_shared.py."""
    policy, value = actor(obs)
    if actions is None:
        actions = policy.rsample().detach()  # sample() raises where the policy is not finite
    log_prob = policy.log_prob(actions)
    if value is not None:
        drawn = (value + torch.randn_like(value)).detach()
        log_prob = log_prob - (value - drawn).square()
    return log_prob


def hessian_estimate(actor, obs):
    """Sophia's B g * g (Gauss-Newton-Bartlett): g is the gradient of the mean log-likelihood of
    B samples drawn from the model. Its expectation is the diagonal of the Fisher matrix."""
    params = list(actor.parameters())
    gradient = torch.autograd.grad(log_likelihood(actor, obs).mean(), params)
    return {p: len(obs) * g.square() for p, g in zip(params, gradient)}


def fisher_diagonal(actor, obs, actions):
    """diag F, the mean squared scores: maps each parameter to a tensor of its shape.

    A linear layer with the inputs x_i has the scores g_i x_i^T, their mean square is
    (G * G)^T (X * X) / B: no score is stored. Raises TypeError for other layers."""
    calls = []  # (layer, inputs, output)
    layers = [m for m in actor.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda *call: calls.append(call)) for m in layers]
    total = log_likelihood(actor, obs, actions).sum()
    for hook in hooks:
        hook.remove()
    grads = torch.autograd.grad(total, [output for _, _, output in calls])
    diagonal = {}
    for (m, (x,), _), grad_out in zip(calls, grads):
        squares = grad_out.square() / len(obs)  # [B, d_out]
        weight_and_bias = squares.T @ x.detach().square(), squares.sum(0)
        diagonal |= zip(m.parameters(), weight_and_bias)  # log sigma has no bias
    changed = any(output._version for _, _, output in calls)
    if changed or len(calls) != len(layers) or diagonal.keys() != set(actor.parameters()):
        raise TypeError(
            "--optimizer diag takes Linear layers, each called once, no output changed in place: "
            "use --optimizer adam"
        )
    return diagonal


def policy_step(args, actor, optimizer, block):
    """One step on a block; [2]: the gradient's norm before its clip, the KL by the old samples."""
    loss, log_ratio = policy_loss(args, actor, block)
    optimizer.zero_grad()
    loss.backward()
    if args.optimizer == "diag":
        diagonal = fisher_diagonal(actor, block.obs, block.actions)
        for p in actor.parameters():
            p.grad.div_(diagonal[p] + args.damping)  # (diag F + lambda)^-1 g
    norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
    optimizer.step()
    if args.optimizer == "sophia" and optimizer.param_groups[0]["updates"] % 10 == 0:
        optimizer.update_hessian(hessian_estimate(actor, block.obs))
    approx_kl = (log_ratio.expm1() - log_ratio).mean()  # E_old[ratio - 1 - log ratio]
    return torch.stack([norm, approx_kl])


def fit_actor(args, actor, optimizer, samples):
    """Passes over the samples, none after one with a KL above target_kl; the last one's metrics."""
    for _ in range(args.update_epochs):
        blocks = minibatches(samples, args.num_minibatches)
        steps = [policy_step(args, actor, optimizer, block) for block in blocks]
        norm, approx_kl = torch.stack(steps).mean(0)
        bounded = args.optimizer != "diag" and args.target_kl is not None
        if bounded and approx_kl > args.target_kl:
            break
    return {"ppo/gradient_norm": norm, "ppo/approx_kl": approx_kl}


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, eps=1e-5, fused=True),
    "sophia": Sophia,
    "diag": torch.optim.SGD,
}


# ---- Training --------------------------------------------------------------------------------


def main(args):
    """Train. A checkpoint of the last whole iteration is always on the disk."""
    saved = load_checkpoint(args) if args.resume else {}
    batch_size = args.num_envs * args.num_steps
    global_step = saved.get("global_step", 0)
    started = time.time()
    envs, obs = make_envs(args, seed_generators(args, global_step))
    obs = torch.tensor(obs, device=args.device)  # [N, obs_dim]
    done = obs.new_zeros(len(obs))
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.shared)
    agent.to(args.device)
    actor, critic = agent.actor, agent.critic
    optimizer = OPTIMIZERS[args.optimizer](actor.parameters(), lr=args.learning_rate)
    torch.set_flush_denormal(True)  # Adam's moments of inactive units fade to them: slow on CPUs
    critic_optimizer = torch.optim.Adam(
        critic.parameters(), lr=args.critic_learning_rate, fused=True
    )
    if saved:
        if args.optimizer != saved["args"].optimizer:
            fail("--resume cannot change a run's --optimizer: give another --run-name.")
        started -= saved["wall_seconds"]
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        critic_optimizer.load_state_dict(saved["critic_optimizer"])
        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate  # as now given
        if args.optimizer != "diag":
            optimizer.param_groups[0]["lr"] = args.learning_rate
    group = optimizer.param_groups[0]  # holds the step size
    logger = Logger(args, global_step, saved.get("csv_size", 0))

    def save():
        """All that a resumed run needs; its environments start new episodes."""
        save_checkpoint(
            args,
            agent=agent.state_dict(),
            optimizer=optimizer.state_dict(),
            critic_optimizer=critic_optimizer.state_dict(),
            global_step=global_step,
            wall_seconds=time.time() - started,
            csv_size=logger.csv.tell(),
        )

    save()
    while global_step + batch_size <= args.total_timesteps:
        # Rollout, advantages, samples
        if args.anneal_lr:
            group["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)
        rollout = collect(envs, agent, obs, done, args.num_steps)
        obs, done = rollout.obs[-1], rollout.done[-1]
        global_step += batch_size
        with torch.no_grad():
            values = agent.value(rollout.obs)  # [T + 1, N]
            advantages = gae(rollout, values, args.gamma, args.gae_lambda)
            samples, old_policy = gather_samples(agent, rollout, advantages, values)

        # Actor, if shared with the critic
        metrics = fit_actor(args, actor, optimizer, samples)

        # Critic
        if args.shared:
            with torch.no_grad():
                value_loss = (critic(samples.obs) - samples.returns).square().mean()
        else:
            value_loss = fit_critic(args, critic, critic_optimizer, samples)

        # Metrics, step size, checkpoint
        metrics |= rollout_metrics(agent, old_policy, samples)
        metrics |= run_metrics(envs, global_step, started)
        metrics["charts/learning_rate"] = group["lr"]
        metrics["losses/value_loss"] = value_loss
        logger.write(global_step, metrics)
        if args.optimizer == "diag":
            kl = float(metrics["losses/kl"])
            low = 0.005 if args.shared else 0.004
            group["lr"] = adapt_learning_rate(group["lr"], kl, low, args.learning_rate)
        save()


if __name__ == "__main__":
    arguments = parse_args()
    with one_sentence(arguments):
        main(arguments)
