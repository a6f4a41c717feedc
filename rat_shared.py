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
"""RAT (Randomized Advantage Transformation, Sun, ICML 2026, arXiv:2605.18591), one trunk.

Run: python rat_shared.py --env-id HalfCheetah-v5. Equation numbers: docs/algorithm.md.

    for each rollout:
        step the environments with the policy                            collect
        advantages and returns                                           gae
        drop the steps that only reset, renew the running statistics     gather_samples
        D = mu D                                                         main
        for each block of samples, t = (eta y, beta (R - V)):            minibatches
            D = D + H^T Sigma (lambda I + H H^T Sigma)^-1 (t - H D)      kaczmarz_step, (3)
            theta = theta + D                                            joint_step, (8b)
        adapt eta to the KL divergence                                   adapt_learning_rate
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
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter

ALGORITHM = Path(__file__).stem  # names runs; a copy of this file under another name is a fork
Distribution.set_default_validate_args(False)  # values that are not finite are found in the solve


@dataclass
class Args:
    """RAT with one trunk for actor and critic, for continuous and discrete actions."""

    env_id: str = "HalfCheetah-v5"  # Gymnasium id: flat Box observations, Box or Discrete actions
    total_timesteps: int = 1_000_000  # environment steps of all environments, in whole rollouts
    num_envs: int = 32  # environments stepped side by side
    num_steps: int = 64  # steps of each environment in one rollout
    vectorization: Literal["sync", "envpool"] = "sync"  # one after the other, or EnvPool's threads
    kaczmarz: Literal["track", "paper", "release", "off"] = "track"  # the update, see RULES
    update_epochs: int | None = None  # passes over the rollout
    num_minibatches: int = 4  # blocks in a pass
    damping: float | None = None  # lambda of (3), > 0; track: relative to the mean squared score
    memory: float | None = None  # the share of g that the next rollout starts from, in [0, 1]
    kl_low: float | None = None  # nats: a rollout's least KL, 4 times it its most; track: a block's
    kl_steps: int = 1_000_000  # track: environment steps after which kl_low falls as 1/t
    activation: Literal["Tanh", "ReLU"] | None = None  # of the trunk
    vf_coef: float = 1.0  # weight of the critic in (8) and (8b), > 0
    critic_step: float = 1.0  # share of its error that a block corrects, beta of (8b); track only
    learning_rate: float = 0.05  # first step size, and the largest except with track
    max_grad_norm: float = 0.5  # l2 bound nu of (4); track has none
    gamma: float = 0.99  # discount, in (0, 1]
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation, in (0, 1]
    seed: int = 1  # of networks, sampling and environments
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of the networks
    run_name: str = ""  # folder below output_dir; default {env_id}__{script}__{seed}__{time}
    output_dir: str = "runs"  # where run folders go
    resume: bool = False  # continue run_name, with that run's arguments but for those given

    def __post_init__(self):
        for name, value in zip(RULES["set"], RULES[self.kaczmarz]):
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_args(self, may_be_zero=("seed", "resume", "memory"))


RULES = {  # --kaczmarz: the defaults of what depends on it
    "set": ("update_epochs", "damping", "memory", "kl_low", "activation"),
    "track": (1, 0.03, 0.9, 0.008, "Tanh"),
    "paper": (4, 0.1, 0.0, 0.005, "ReLU"),
    "release": (4, 0.1, 1.0, 0.005, "ReLU"),
    "off": (4, 0.1, 0.0, 0.005, "ReLU"),
}


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
    discrete = isinstance(act_space, gym.spaces.Discrete)
    for space in (obs_space,) if discrete else (obs_space, act_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(
                f"--env-id {env_id} has {space}, not a flat Box (actions may be Discrete): "
                "wrap it in FlattenObservation or TransformAction."
            )
    if discrete:
        return
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


class PolicyAndValue(NamedTuple):
    """What the network says of B observations, as a likelihood of which H holds the gradients."""

    policy: Distribution
    value: Tensor  # in PopArt's units, [B]

    def log_prob(self, drawn):
        """[B] for drawn (a, eps): its gradients are grad log pi(a_i|s_i) + 2 eps_i grad V(s_i).

        The published code's choice: a Gaussian of variance 1/2 around V, drawn with variance 1.
        For eps None log pi(a_i|s_i) of the batch's first half and V(s_i) of its second."""
        actions, epsilon = drawn
        log_prob = self.policy.log_prob(actions)
        if epsilon is None:
            return torch.cat([log_prob.chunk(2)[0], self.value.chunk(2)[1]])
        return log_prob - (self.value - (self.value + epsilon).detach()).square()


class Agent(nn.Module):
    """All that it takes to play: observation statistics, one trunk, heads of policy and value.

    Box actions: a diagonal Gaussian of the action before its tanh, whose Jacobian cancels in all
    ratios. Discrete actions: their probabilities, counted from 0."""

    def __init__(self, observation_space, action_space, activation="Tanh", hidden=256):
        super().__init__()
        (obs_dim,) = observation_space.shape
        unit = getattr(nn, activation)
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.normalizer = ObsNormalizer(obs_dim)
        self.trunk = nn.Sequential(
            nn.Linear(obs_dim, hidden), unit(), nn.Linear(hidden, hidden), unit()
        )
        self.popart = PopArt(hidden)
        if self.discrete:
            self.start = int(action_space.start)
            self.head = nn.Linear(hidden, int(action_space.n))
        else:
            (act_dim,) = action_space.shape
            self.head = nn.Linear(hidden, act_dim)
            self.log_std = nn.Linear(1, act_dim, bias=False)  # log sigma: the input is 1
            nn.init.zeros_(self.log_std.weight)
            self.register_buffer("low", torch.tensor(action_space.low))
            self.register_buffer("high", torch.tensor(action_space.high))

    def forward(self, obs):
        """PolicyAndValue of normalised obs [B, obs_dim]."""
        features = self.trunk(obs)
        outputs = self.head(features)  # [B, act_dim] or [B, actions]
        if self.discrete:
            policy = Categorical(logits=outputs)
        else:
            std = self.log_std(obs.new_ones(len(obs), 1)).exp()  # [B, act_dim]
            policy = Independent(Normal(outputs, std), 1)
        return PolicyAndValue(policy, self.popart(features))

    def policy(self, obs):
        """Distribution of the actions at normalised obs [B, obs_dim]."""
        return self(obs).policy

    def value(self, obs):
        """Values in units of reward of raw obs [..., obs_dim]."""
        value = self.popart(self.trunk(self.normalizer(obs)))
        return value * self.popart.std + self.popart.mean

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """Raw obs [B, obs_dim] to the policy's sample (or mode) and the environment's action."""
        policy = self.policy(self.normalizer(obs))
        action = policy.mode if deterministic else policy.sample()  # [B, act_dim] or [B]
        if self.discrete:
            return action, action + self.start
        env_action = self.low + (action.tanh() + 1) / 2 * (self.high - self.low)
        return action, env_action.minimum(self.high)  # rounding may lie above


# ---- What every script has: arguments, rollout, files ----------------------------------------


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


# ---- The algorithm's core: scores, block Kaczmarz, actor and critic in one --------------------


class LayerScores(NamedTuple):
    """A linear layer's columns of H: row i is the outer product of grad_out's row i and x's."""

    params: list  # weight [d_out, d_in] and, if there is one, bias [d_out]
    x: Tensor  # the layer's inputs, a 1 appended for the bias, [B, d_in (+ 1)]
    grad_out: Tensor  # gradients of log pi(a_i|s_i) at its outputs, [B, d_out]


def tape_scores(actor, obs, actions):
    """H, the rows d log pi(a_i|s_i) / d theta, by layer: one forward and one backward pass.

    Raises TypeError, by name, for a layer whose scores do not have that form."""
    layers = {m: name for name, m in actor.named_modules() if m._parameters}
    calls = []  # (layer, inputs, output)
    hooks = [m.register_forward_hook(lambda *call: calls.append(call)) for m in layers]
    with torch.enable_grad():
        log_prob = actor(obs).log_prob(actions).sum()
    for hook in hooks:
        hook.remove()
    check_tape(layers, calls, len(obs))
    grads = torch.autograd.grad(log_prob, [output for _, _, output in calls])
    scores = []
    for (m, (x,), _), grad_out in zip(calls, grads):
        if m.bias is not None:
            x = nn.functional.pad(x, (0, 1), value=1.0)
        scores.append(LayerScores(list(m.parameters()), x.detach(), grad_out))
    return scores


def check_tape(layers, calls, batch):
    """Raise TypeError for a layer of which (5) to (7) do not hold."""
    owned = [p for m in layers for p in m.parameters(recurse=False)]
    trained = sum(p.requires_grad for p in set(owned)) == len(owned)  # none frozen or shared
    for m, name in layers.items():
        outputs = [(len(output), output._version) for layer, _, output in calls if layer is m]
        if type(m) is not nn.Linear or outputs != [(batch, 0)] or not trained:
            raise TypeError(
                f"layer {name} {m} must be Linear, called once with a row a sample and not changed "
                "in place, no parameter frozen or shared: rat_continuous.py has --jacobian vmap"
            )


def kernel(scores):
    """H H^T [B, B], (5). With TF32, off by default, its products would have 10 bits."""
    return sum((s.grad_out @ s.grad_out.T) * (s.x @ s.x.T) for s in scores)


def score_norm_sq(scores):
    """The diagonal of (5), the squared norms of the rows of H, [B]."""
    return sum(s.grad_out.square().sum(1) * s.x.square().sum(1) for s in scores)


def product(scores, v):
    """H v [B], (6); v maps parameters to tensors of their shapes."""
    total = 0.0
    for s in scores:
        columns = [v[p].view(s.grad_out.shape[1], -1) for p in s.params]
        total += ((s.grad_out @ torch.cat(columns, 1)) * s.x).sum(1)
    return total


def scale(v, factor):
    """factor v; v as in product."""
    return {p: factor * g for p, g in v.items()}


def transposed_product(scores, u):
    """H^T u, (7), of u [B]: maps parameters to tensors of their shapes."""
    result = {}
    for s in scores:
        matrix = (u[:, None] * s.grad_out).T @ s.x  # [d_out, d_in (+ 1)]
        widths = [p.numel() // len(matrix) for p in s.params]
        for p, columns in zip(s.params, matrix.split(widths, 1)):
            result[p] = columns.reshape_as(p)
    return result


def solve(scores, rhs, ratio, damping):
    """Sigma (damping I + H H^T Sigma)^-1 rhs [..., B], (2), Sigma = diag(ratio) / #(ratio > 0).

    Raises FloatingPointError where the solution is not finite."""
    sigma = ratio / ratio.count_nonzero().clamp(min=1)
    if 6e-8 * (sigma @ score_norm_sq(scores)) > 0.01 * damping:  # float32 would round damping off
        # a generator: one layer after the other, since copies of all can be large
        scores = (s._replace(x=s.x.double(), grad_out=s.grad_out.double()) for s in scores)
    sqrt_sigma = sigma.sqrt()  # S, [B]
    damped_kernel = sqrt_sigma[:, None] * kernel(scores) * sqrt_sigma  # S H H^T S, [B, B]
    damped_kernel.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped_kernel)
    scaled = (sqrt_sigma * rhs).to(factor.dtype)[..., None]
    solution = sqrt_sigma * torch.cholesky_solve(scaled, factor)[..., 0]
    if info or not solution.isfinite().all():
        raise FloatingPointError(
            "the actor update's Cholesky solve is not finite, of bad scores or advantages or for "
            "a policy that is certain of all actions: raise --damping or lower --kl-low"
        )
    return solution.to(rhs.dtype)


def kaczmarz_step(scores, residual, ratio, damping, previous):
    """g_j of (3): minimiser of |y - H g|^2_Sigma + damping |g - previous|^2, (1) for previous 0.

    residual is y - H previous [B]; previous, g_{j-1}, and the result map parameters to tensors of
    their shapes."""
    increment = transposed_product(scores, solve(scores, residual, ratio, damping))
    return {p: g + increment.get(p, 0) for p, g in previous.items()}  # 0 where p is frozen


@torch.no_grad()
def joint_step(args, agent, block, previous, learning_rate, low):
    """--kaczmarz track: what to add to theta for a block, the next block's previous, metrics.

    D of (8b): the policy's rows h_i and the critic's v_i = grad V(s_i) in one least squares, the
    policy's to follow eta y, the critic's to correct the share beta of its error. It is shortened,
    and remembered so, where it would move the policy by more than low nats: kl_low or, late, less,
    and beta with it."""
    y = normalized(block.advantages)
    policy, value = agent(block.obs)
    ratio = (policy.log_prob(block.actions) - block.log_prob).exp().clamp(0.1, 10)  # w
    actions = torch.cat([block.actions] * 2)  # [2B, act_dim], or [2B] where discrete
    # H = (h; v): without an epsilon B rows grad log pi, then B rows grad V
    scores = tape_scores(agent, block.obs.repeat(2, 1), (actions, None))
    policy_norms, value_norms = score_norm_sq(scores).chunk(2)  # |h_i|^2, |v_i|^2
    trace = (ratio * policy_norms).mean()
    value_weight = args.vf_coef * trace / value_norms.mean()  # c^2
    weights = torch.cat([ratio, value_weight.expand(len(y))])
    damping = args.damping * (1 + args.vf_coef) / 2 * trace  # relative to the mean over all rows
    beta = args.critic_step * (low / args.kl_low) ** 0.5  # as a step: the root of its KL
    targets = torch.cat([learning_rate * y, beta * (block.returns - value)])
    residual = targets - product(scores, previous)
    step = kaczmarz_step(scores, residual, weights, damping, previous)
    change = (ratio * product(scores, step)[: len(y)].square()).mean().sqrt()  # of log pi
    for p, d in step.items():  # try it, measure its KL divergence and take it back
        p.add_(d)
    kl = kl_divergence(policy, agent.policy(block.obs)).mean()
    factor = (low / kl.abs()).sqrt().clamp(max=1)  # less where (8b) is a bad approximation
    for p, d in step.items():
        p.sub_(d)
        d.mul_(factor)
    return step, step, {"rat/damping": damping, "rat/fisher_norm": change}


def sampled_step(args, agent, block, previous, learning_rate):
    """The other rules, whose critic is drawn into the scores: as joint_step.

    paper:   g_j = g_{j-1} - grad L, clipped only when applied; remembered within a rollout.
    release: d_j = clip(-grad L) for y + H d_{j-1} and 1 + H d_{j-1}, remembered across rollouts:
             the published code's rule.
    off:     -grad L for y and 1 on every block; nothing is remembered.

    L is (8). -grad L is not exactly H^T Sigma A: H holds the drawn eps, L the error V - R."""
    policy, value = agent(block.obs)
    log_ratio = policy.log_prob(block.actions) - block.log_prob
    # clamped before exp(), whose overflow would make the gradient of (8) nan
    ratio = log_ratio.clamp(np.log(0.1), np.log(10)).exp()
    y = normalized(block.advantages)
    scores = tape_scores(agent, block.obs, (block.actions, torch.randn_like(y)))
    rhs = torch.stack([y, torch.ones_like(y)]) - product(scores, previous)  # [2, B]
    weights = ratio.detach()
    # the actor's A~ and the critic's C~, [B] each: solve gives Sigma times them, (2)
    a, c = solve(scores, rhs, weights, args.damping) * len(y) / weights
    gain = (a * ratio - args.vf_coef * c * (value - block.returns).square()).mean()  # -L, (8)
    direction = dict(zip(previous, torch.autograd.grad(gain, list(previous))))
    if args.kaczmarz == "paper":
        direction = {p: previous[p] + d for p, d in direction.items()}
    norm = nn.utils.get_total_norm(direction.values())
    factor = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # (4)
    # release remembers -d_j, for which y - H previous is y + H d_{j-1}
    share = {"paper": 1, "release": -factor, "off": 0}[args.kaczmarz]
    step = scale(direction, learning_rate * factor)
    return step, scale(direction, share), {"rat/direction_norm": norm}  # before the clip


# ---- Training --------------------------------------------------------------------------------


def main(args):
    """Train. A checkpoint of the last whole iteration is always on the disk."""
    saved = load_checkpoint(args) if args.resume else {}
    batch_size = args.num_envs * args.num_steps
    global_step = saved.get("global_step", 0)
    track = args.kaczmarz == "track"
    learning_rate = args.learning_rate  # eta
    started = time.time()
    envs, obs = make_envs(args, seed_generators(args, global_step))
    obs = torch.tensor(obs, device=args.device)  # [N, obs_dim]
    done = obs.new_zeros(len(obs))
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.activation)
    agent = agent.to(args.device)
    previous = {p: torch.zeros_like(p) for p in agent.parameters()}  # of the block before
    if saved:
        if track != (saved["args"].kaczmarz == "track"):
            fail(
                "--resume cannot change a run to or from --kaczmarz track: give another --run-name."
            )
        if args.activation != saved["args"].activation:
            fail("--resume cannot change --activation: give another --run-name.")
        started -= saved["wall_seconds"]
        learning_rate = saved["learning_rate"]
        agent.load_state_dict(saved["agent"])
        previous = dict(zip(previous, saved["previous"]))
    logger = Logger(args, global_step, saved.get("csv_size", 0))

    def save():
        """All that a resumed run needs; its environments start new episodes."""
        save_checkpoint(
            args,
            agent=agent.state_dict(),
            learning_rate=learning_rate,
            previous=list(previous.values()),
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

        # Actor and critic
        measurements = []
        previous = scale(previous, args.memory)
        low = args.kl_low
        update = sampled_step
        if track:
            low *= min(1, args.kl_steps / global_step)
            update = partial(joint_step, low=low)
        for _ in range(args.update_epochs):
            for block in minibatches(samples, args.num_minibatches):
                step, previous, measured = update(args, agent, block, previous, learning_rate)
                with torch.no_grad():
                    for p, d in step.items():
                        p.add_(d)
                measurements.append(list(map(float, measured.values())))

        # Metrics, step size, checkpoint
        metrics = rollout_metrics(agent, old_policy, samples)
        metrics |= run_metrics(envs, global_step, started)
        metrics["charts/learning_rate"] = learning_rate
        fitted = agent(samples.obs).value.detach()
        metrics["losses/value_loss"] = (fitted - samples.returns).square().mean()
        metrics |= zip(measured, np.mean(measurements, 0))  # over the blocks
        logger.write(global_step, metrics)
        kl = float(metrics["losses/kl"])
        largest = np.inf if track else args.learning_rate
        learning_rate = adapt_learning_rate(learning_rate, kl, low, largest)
        save()


if __name__ == "__main__":
    arguments = parse_args()
    with one_sentence(arguments):
        main(arguments)
