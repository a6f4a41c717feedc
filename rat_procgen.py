# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "numpy==1.26.4",
#     "procgen-mirror==0.10.7; python_version >= '3.11' and python_version < '3.13'",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
# ]
# ///
"""RAT (Randomized Advantage Transformation, Sun, ICML 2026, arXiv:2605.18591) from pixels: Procgen.

Run: python rat_procgen.py --env-id starpilot. Equation numbers: docs/algorithm.md.

    for each rollout:
        step the games with the policy                                   collect
        advantages and returns                                           gae
        renew the statistics of returns                                  gather_samples
        g = mu g                                                         main
        for each pass, for each block of samples:                        minibatches
            g = g + H^T Sigma (lambda I + H H^T Sigma)^-1 (y - H g)      kaczmarz_step, (3)
            theta = theta + eta g / |g|_F                                kaczmarz_direction, (4b)
        regress the critic on the returns                                fit_critic
        now and then, play unseen levels                                 evaluate
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
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.wrappers.vector import ClipReward, NormalizeReward, RecordEpisodeStatistics
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, kl_divergence
from torch.utils.tensorboard import SummaryWriter

ALGORITHM = Path(__file__).stem  # names runs; a copy of this file under another name is a fork
RANK = int(os.getenv("RANK", 0))  # of this process; torchrun sets both
WORLD_SIZE = int(os.getenv("WORLD_SIZE", 1))  # processes
Distribution.set_default_validate_args(False)  # values that are not finite are found in the solve
torch.backends.cudnn.allow_tf32 = False  # by default cuDNN would round scores to 10 bits


@dataclass
class Args:
    """RAT from pixels, on Procgen's games."""

    env_id: str = "starpilot"  # one of Procgen's 16 games
    total_timesteps: int = 25_000_000  # environment steps of all environments, in whole rollouts
    num_envs: int = 64  # environments stepped side by side, by each process
    num_steps: int = 256  # steps of each environment in one rollout
    distribution_mode: Literal["easy", "hard"] = "easy"  # the difficulties that every game has
    num_levels: int = 200  # training levels, 0: all there are
    start_level: int = 0  # first training level, unless all are
    eval_levels: int = 1000  # unseen levels after the training levels, for the evaluation; 0: none
    eval_interval: int = 25  # iterations between evaluations of num_envs episodes each
    channels: tuple[int, int, int] = (16, 32, 32)  # of the three stages, actor and critic
    hidden: int = 256  # units of the layer after them
    kaczmarz: Literal["track", "paper", "release", "off", "ppo"] = "track"  # the update, see RULES
    update_epochs: int | None = None  # actor passes over the rollout
    num_minibatches: int = 16  # actor blocks in a pass
    damping: float | None = None  # lambda of (3), > 0; track: relative to the mean squared score
    memory: float | None = None  # the share of g that the next rollout starts from, in [0, 1]
    kl_low: float | None = None  # nats; the KL of a rollout is kept between it and four times it
    learning_rate: float | None = None  # first of the actor; paper to off: the largest; ppo: Adam's
    max_grad_norm: float = 0.5  # l2 bound nu of (4); track has none
    critic_epochs: int = 3  # critic passes over the rollout
    critic_minibatches: int = 16  # critic minibatches in a pass
    critic_learning_rate: float = 5e-4  # Adam step size of the critic, as CleanRL's PPO on Procgen
    critic_max_grad_norm: float = 5.0  # l2 bound on the critic's gradient
    gamma: float = 0.999  # discount, in (0, 1]
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
        may_be_zero = ("seed", "resume", "memory", "num_levels", "start_level", "eval_levels")
        check_args(self, may_be_zero)
        if self.eval_levels and not self.num_levels:
            raise ValueError("--num-levels 0 trains on all: none is unseen, use --eval-levels 0.")


RULES = {  # --kaczmarz: the defaults of what depends on it
    "set": ("update_epochs", "learning_rate", "damping", "memory", "kl_low"),
    "track": (1, 0.05, 0.03, 0.9, 0.008),
    "paper": (4, 0.05, 0.1, 0.0, 0.004),
    "release": (4, 0.05, 0.1, 1.0, 0.004),
    "off": (4, 0.05, 0.1, 0.0, 0.004),
    "ppo": (3, 5e-4, 0.1, 0.0, 0.004),  # PPO's step instead, to compare: only the first two count
}


# ---- Environments ----------------------------------------------------------------------------


class Procgen(gym.vector.VectorEnv):
    """A Procgen game, reset within the step: with `terminated` comes a new episode's first image.

    Timeouts count as terminations: Procgen does not tell them apart. Ends the program where it
    cannot be imported or has no such game."""

    single_observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    single_action_space = gym.spaces.Discrete(15)

    def __init__(self, args, seed, unseen=False, render_mode=None):
        sys.modules.setdefault("gym_notices", None)  # gym, which it imports, would print them
        try:
            from procgen.env import ENV_NAMES, ProcgenGym3Env
        except ImportError:
            fail("Procgen needs Python 3.11 or 3.12: there, pip install -r requirements.txt.")
        if args.env_id not in ENV_NAMES:
            fail(f"--env-id {args.env_id} is none of Procgen's games: {ENV_NAMES}.")
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        self.num_envs = args.num_envs
        self.env = ProcgenGym3Env(
            args.num_envs,
            args.env_id,
            distribution_mode=args.distribution_mode,
            num_levels=args.eval_levels if unseen else args.num_levels,
            start_level=args.start_level + unseen * args.num_levels,
            rand_seed=seed % 2**31,
            num_threads=torch.get_num_threads(),
            render_mode=render_mode,
        )

    def reset(self, **ignored):
        """The images now, [N, 64, 64, 3]. Episodes begin in the constructor, with its seed."""
        return self.env.observe()[1]["rgb"], {}

    def step(self, actions):
        """Actions [N] to images [N, 64, 64, 3], rewards, terminated, truncated: never, info."""
        self.env.act(actions)
        rewards, obs, first = self.env.observe()
        return obs["rgb"], rewards, first, np.zeros_like(first), {}


# ---- Networks --------------------------------------------------------------------------------


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


def conv(inputs, outputs):
    """A 3x3 convolution that keeps the image's size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Residual(nn.Sequential):
    """x plus what two convolutions make of it."""

    def __init__(self, channels):
        super().__init__(nn.ReLU(), conv(channels, channels), nn.ReLU(), conv(channels, channels))

    def forward(self, x):
        return x + super().forward(x)


class Impala(nn.Module):
    """Three stages, a hidden layer and a head (Espeholt et al. 2018): [B, h, w, 3] to the head's.

    A stage is a convolution, a pooling that halves the image and two residual blocks. Glorot
    initialisation up to the head: PyTorch's leaves a new policy's scores far below the published
    damping. Without gradients it takes 512 images at a time: a rollout's would take gigabytes."""

    def __init__(self, shape, channels, hidden, head):
        super().__init__()
        height, width, planes = shape
        layers = []
        for inputs, outputs in zip((planes, *channels), channels):
            layers += [
                conv(inputs, outputs),
                nn.MaxPool2d(3, stride=2, padding=1),
                Residual(outputs),
                Residual(outputs),
            ]
        features = channels[-1] * (height // 8) * (width // 8)
        layers += [nn.ReLU(), nn.Flatten(), nn.Linear(features, hidden), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        for p in self.body.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
            else:
                nn.init.zeros_(p)
        self.head = head

    def forward(self, obs):
        parts = [obs] if torch.is_grad_enabled() else obs.split(512)
        # permuted, channels stay last in memory: twice as fast on a CPU
        return torch.cat([self.head(self.body(part.permute(0, 3, 1, 2) / 255)) for part in parts])


class Actor(Impala):
    """Categorical policy: obs [B, h, w, 3] to a distribution whose log_prob(a) is [B]."""

    def forward(self, obs):
        return Categorical(logits=super().forward(obs))


class Agent(nn.Module):
    """All that it takes to play: actor, critic."""

    def __init__(self, observation_space, action_space, channels, hidden):
        super().__init__()
        shape = observation_space.shape
        self.popart = PopArt(hidden)
        self.policy = Actor(shape, channels, hidden, nn.Linear(hidden, int(action_space.n)))
        self.critic = Impala(shape, channels, hidden, self.popart)

    def value(self, obs):
        """Values in units of the scaled reward of obs [..., h, w, 3]."""
        values = self.critic(obs.flatten(0, -4)) * self.popart.std + self.popart.mean
        return values.view(obs.shape[:-3])

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """Obs [B, h, w, 3] to the policy's sample (or mode) and the game's action, the same [B]."""
        policy = self.policy(obs)
        action = policy.mode if deterministic else policy.sample()
        return action, action


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


def connect(args):
    """Join the processes that torchrun started: one run name for all, a GPU for each.

    Ends the program where their arguments differ."""
    if WORLD_SIZE == 1:
        return
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if gathered(sys.argv) != [sys.argv] * WORLD_SIZE:
        fail("torchrun's processes have different arguments: give all nodes the same.")
    args.run_name = gathered(args.run_name)[0]


def gathered(value):
    """The values of all torchrun's processes, by rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def all_rows(tensor):
    """The rows of the tensors of all processes."""
    return torch.cat(gathered(tensor.cpu())).to(tensor.device)


def average(tensors):
    """Replace tensors by their means over the processes."""
    if WORLD_SIZE > 1:
        flat = nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / WORLD_SIZE, tensors)


class Rollout(NamedTuple):
    """T steps of N environments, all of them data: Procgen resets within the step."""

    obs: Tensor  # uint8, [T + 1, N, 64, 64, 3]
    actions: Tensor  # [T, N], as all that follow
    rewards: Tensor  # scaled
    terminated: Tensor
    done: Tensor  # the same


def collect(envs, agent, obs, num_steps):
    """A Rollout of num_steps steps from obs [N, 64, 64, 3]."""
    observations, actions, steps = [obs], [], []
    for _ in range(num_steps):
        action, env_action = agent.act(obs)
        next_obs, reward, terminated, _, _ = envs.step(env_action.cpu().numpy())
        obs = torch.tensor(next_obs, device=obs.device)
        observations.append(obs)
        actions.append(action)
        steps.append([reward, terminated])
    steps = torch.tensor(np.float32(steps), device=obs.device)  # [T, 2, N]
    rewards, terminated = steps.unbind(1)  # [T, N] each
    return Rollout(torch.stack(observations), torch.stack(actions), rewards, terminated, terminated)


def gae(rollout, values, gamma, lam):
    """Advantages [T, N] from values [T + 1, N] (Schulman et al. 2016).

    A truncation bootstraps from the value of its last observation; the trace ends at done."""
    advantages = rollout.rewards + gamma * values[1:] * (1 - rollout.terminated) - values[:-1]
    for t in reversed(range(len(advantages) - 1)):  # one-step advantages so far
        advantages[t] += gamma * lam * (1 - rollout.done[t]) * advantages[t + 1]
    return advantages


class Samples(NamedTuple):
    """The n steps of a rollout, or a block of them."""

    obs: Tensor  # uint8, [n, 64, 64, 3]
    actions: Tensor  # [n]
    advantages: Tensor  # in units of the scaled reward, [n]
    returns: Tensor  # in PopArt's units, [n]
    log_prob: Tensor  # of the actions, [n], by the policy before its updates, at obs as above


def gather_samples(agent, rollout, advantages, values):
    """Renew PopArt's statistics; Samples, and the policy at them before its updates."""
    obs = rollout.obs[:-1].flatten(0, 1)
    actions = rollout.actions.flatten()
    advantages = advantages.flatten()
    returns = advantages + values[:-1].flatten()
    agent.popart.update(all_rows(returns))
    returns = (returns - agent.popart.mean) / agent.popart.std
    policy = agent.policy(obs)
    return Samples(obs, actions, advantages, returns, policy.log_prob(actions)), policy


def evaluate(args, agent, seed):
    """Mean raw return on unseen levels: of num_envs new games a process, the first episodes."""
    envs = Procgen(args, seed, unseen=True)
    obs, _ = envs.reset()
    returns = np.zeros(args.num_envs)
    live = np.ones(args.num_envs, bool)
    while live.any():
        _, action = agent.act(torch.tensor(obs, device=args.device))
        obs, rewards, terminated, _, _ = envs.step(action.cpu().numpy())
        returns += rewards * live
        live &= ~terminated
    return np.mean(gathered(returns)).item()


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
            average([p.grad for p in critic.parameters()])
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


# ---- The algorithm's core: scores, transformed advantages, block Kaczmarz --------------------


class LayerScores(NamedTuple):
    """A linear layer's columns of H: row i is the outer product of grad_out's row i and x's."""

    param: Tensor  # weight [d_out, d_in] or bias [d_out]
    x: Tensor  # the layer's inputs [B, d_in], of a bias 1
    grad_out: Tensor  # gradients of log pi(a_i|s_i) at its outputs, [B, d_out]


def check_tape(layers, calls, batch):
    """Raise TypeError for a layer of which (5) to (7) and (12) do not hold."""
    owned = [p for m in layers for p in m.parameters(recurse=False)]
    trained = sum(p.requires_grad for p in set(owned)) == len(owned)  # none frozen or shared
    for m, name in layers.items():
        outputs = [(len(output), output._version) for layer, _, output in calls if layer is m]
        plain = (1, (1, 1), "zeros")
        conv = type(m) is nn.Conv2d and (m.groups, m.dilation, m.padding_mode) == plain
        known = conv or type(m) is nn.Linear
        if not known or outputs != [(batch, 0)] or not trained:
            raise TypeError(
                f"layer {name} {m} must be Linear or a plain Conv2d, called once with a row a "
                "sample and not changed in place, no parameter frozen or shared: "
                "rat_continuous.py has vmap_scores for all else"
            )


def patches(conv, x):
    """x_{i,t} of (12): what the weight meets at each of T positions, [B, T, rows * columns * c_in].

    x [B, c_in, h, w]. Channels stay last, as in memory: half the time of nn.functional.unfold."""
    windows = nn.functional.pad(x, conv._reversed_padding_repeated_twice)
    for axis in range(2):
        windows = windows.unfold(2 + axis, conv.kernel_size[axis], conv.stride[axis])
    return windows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def conv_scores(conv, x, grad_out):
    """P of (12): row i is P_i = sum_t g_{i,t} x_{i,t}^T, in the order of the weight.

    grad_out is g, [B, c_out, T]."""
    gradients = grad_out @ patches(conv, x)  # [B, c_out, rows * columns * c_in]
    gradients = gradients.unflatten(2, (*conv.kernel_size, -1))
    return gradients.permute(0, 1, 4, 2, 3).flatten(1)


def layer_scores(m, x, grad_out):
    """The columns of H that belong to a layer with inputs x and output gradients grad_out.

    Row i of a bias is grad_out_i, of a convolution P_i: these are layers with the input 1."""
    one = x.new_ones(len(x), 1)
    if type(m) is nn.Conv2d:
        grad_out = grad_out.flatten(2)  # g_{i,t}, [B, c_out, T]
        weight = LayerScores(m.weight, one, conv_scores(m, x, grad_out))
        grad_out = grad_out.sum(2)  # [B, c_out]
    else:
        weight = LayerScores(m.weight, x, grad_out)
    if m.bias is None:
        return [weight]
    return [weight, LayerScores(m.bias, one, grad_out)]


def tape_chunk(actor, obs, actions):
    """H, the rows d log pi(a_i|s_i) / d theta, by layer: one forward and one backward pass.

    Raises TypeError as check_tape."""
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
        scores += layer_scores(m, x.detach(), grad_out)
    return scores


def tape_scores(actor, obs, actions):
    """H by layer, some samples at a time: a CPU is faster with few (docs/speed.md).

    Raises TypeError as check_tape."""
    chunk = 32 if obs.is_cpu else 512
    count = len(obs)
    scores = [  # room for all samples
        LayerScores(s.param, s.x.repeat(count, 1), s.grad_out.repeat(count, 1))
        for s in tape_chunk(actor, obs[:1], actions[:1])
    ]
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        for s, part in zip(scores, tape_chunk(actor, obs[rows], actions[rows])):
            s.x[rows] = part.x
            s.grad_out[rows] = part.grad_out
    return scores


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
        matrix = v[s.param].view(s.grad_out.shape[1], -1)  # [d_out, d_in]
        total += ((s.grad_out @ matrix) * s.x).sum(1)
    return total


def scale(v, factor):
    """factor v; v as in product."""
    return {p: factor * g for p, g in v.items()}


def transposed_product(scores, u):
    """H^T u, (7), of u [B]: maps parameters to tensors of their shapes."""
    result = {}
    for s in scores:
        matrix = (u[:, None] * s.grad_out).T @ s.x  # [d_out, d_in]
        result[s.param] = matrix.view_as(s.param)
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


def block_scores(args, actor, block):
    """H of a block of samples, by layer."""
    return tape_scores(actor, block.obs, block.actions)


@torch.no_grad()
def kaczmarz_direction(args, actor, block, previous):
    """What to apply for a block of samples, what the next block gets as previous, metrics.

    track:   g_j of (3), the damping relative to the mean squared score, in units of the policy:
             over its Fisher norm, (4b). Remembered across rollouts, in part.
    paper:   g_j of (3), clipped only when applied, (4); remembered within a rollout.
    release: d_j = clip(increment for y + H d_{j-1}), remembered across rollouts: the published
             code's rule. Against (3) the sign of H d is flipped, increments do not accumulate.
    off:     the increment for y, (1) on every block; nothing is remembered."""
    y = normalized(block.advantages)
    log_ratio = actor(block.obs).log_prob(block.actions) - block.log_prob
    ratio = log_ratio.exp().clamp(0.1, 10)  # w
    scores = block_scores(args, actor, block)
    trace = (ratio * score_norm_sq(scores)).mean()  # of S H H^T S
    average([trace])
    track = args.kaczmarz == "track"
    damping = args.damping * (trace if track else 1)
    direction = kaczmarz_step(scores, y - product(scores, previous), ratio, damping, previous)
    average(direction.values())  # averaged block Kaczmarz (Necoara 2019, arXiv:1902.09946)
    if args.kaczmarz == "release":
        direction = {p: g - previous[p] for p, g in direction.items()}  # the increment
    fisher_norm = (ratio * product(scores, direction).square()).mean().sqrt()
    average([fisher_norm])
    if track:
        factor = 1 / (fisher_norm + 1e-6)  # (4b)
    else:
        length = nn.utils.get_total_norm(direction.values())
        factor = (args.max_grad_norm / (length + 1e-6)).clamp(max=1)  # (4)
    # release remembers -d_j, for which y - H previous is y + H d_{j-1}
    share = {"track": 1, "paper": 1, "release": -factor, "off": 0}[args.kaczmarz]
    metrics = {
        "rat/damping": damping,
        "rat/relative_damping": damping / trace,
        "rat/fisher_norm": fisher_norm,
    }
    return scale(direction, factor), scale(direction, share), metrics


def ppo_step(actor, optimizer, block):
    """PPO's step on a block (Schulman et al. 2017), metrics: no gain beyond a ratio of 1 +- 0.2."""
    policy = actor(block.obs)
    ratio = (policy.log_prob(block.actions) - block.log_prob).exp()
    y = normalized(block.advantages)
    gain = torch.min(ratio * y, ratio.clamp(0.8, 1.2) * y)
    loss = -(gain + 0.01 * policy.entropy()).mean()
    optimizer.zero_grad()
    loss.backward()
    average([p.grad for p in actor.parameters()])
    norm = nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
    optimizer.step()
    return {"ppo/gradient_norm": norm}


# ---- Training --------------------------------------------------------------------------------


def main(args):
    """Train. A checkpoint of the last whole iteration is always on the disk."""
    connect(args)
    saved = load_checkpoint(args) if args.resume else {}
    batch_size = args.num_envs * args.num_steps * WORLD_SIZE
    global_step = saved.get("global_step", 0)
    learning_rate = args.learning_rate  # eta
    eval_return = np.nan
    started = time.time()
    seeds = seed_generators(args, global_step + RANK)
    games = RecordEpisodeStatistics(Procgen(args, seeds[0]))  # raw rewards
    scaled = NormalizeReward(games, args.gamma)  # by the deviation of returns
    envs = ClipReward(scaled, -10, 10)
    obs = torch.tensor(envs.reset()[0], device=args.device)  # [N, 64, 64, 3]
    agent = Agent(
        envs.single_observation_space, envs.single_action_space, args.channels, args.hidden
    )
    agent.load_state_dict(gathered(agent.state_dict())[0])  # those of the first process
    agent.to(args.device)
    actor = agent.policy
    torch.set_flush_denormal(True)  # Adam's moments of inactive units fade to them: slow on CPUs
    optimizer = torch.optim.Adam(
        agent.critic.parameters(), lr=args.critic_learning_rate, fused=True
    )
    ppo = args.kaczmarz == "ppo"
    # No gradient of the actor is ever left for it but ppo's
    optimizer.add_param_group({"params": actor.parameters(), "lr": args.learning_rate})
    previous = {p: torch.zeros_like(p) for p in actor.parameters()}  # g_{j-1}
    if saved:
        if ppo != (saved["args"].kaczmarz == "ppo"):
            fail("--resume cannot change a run to or from --kaczmarz ppo: give another --run-name.")
        started -= saved["wall_seconds"]
        learning_rate = args.learning_rate if ppo else saved["learning_rate"]
        eval_return = saved["eval_return"]
        agent.load_state_dict(saved["agent"])
        previous = dict(zip(previous, saved["previous"]))
        rates = {"param_groups": optimizer.state_dict()["param_groups"]}  # as now given
        optimizer.load_state_dict(saved["optimizer"] | rates)
        vars(scaled.return_rms).update(saved["reward_statistics"])

    def save():
        """All that a resumed run needs; its environments start new episodes."""
        save_checkpoint(
            args,
            agent=agent.state_dict(),
            optimizer=optimizer.state_dict(),
            learning_rate=learning_rate,
            previous=list(previous.values()),
            reward_statistics={k: float(v) for k, v in vars(scaled.return_rms).items()},
            eval_return=eval_return,
            global_step=global_step,
            wall_seconds=time.time() - started,
            csv_size=logger.csv.tell(),
        )

    if RANK == 0:
        logger = Logger(args, global_step, saved.get("csv_size", 0))
        save()
    while global_step + batch_size <= args.total_timesteps:
        # Rollout, advantages, samples
        rollout = collect(envs, agent, obs, args.num_steps)
        obs = rollout.obs[-1]
        global_step += batch_size
        with torch.no_grad():
            values = agent.value(rollout.obs)  # [T + 1, N]
            advantages = gae(rollout, values, args.gamma, args.gae_lambda)
            samples, old_policy = gather_samples(agent, rollout, advantages, values)

        # Actor
        measurements = []
        previous = scale(previous, args.memory)  # g_0
        for _ in range(args.update_epochs):
            for block in minibatches(samples, args.num_minibatches):
                if ppo:
                    measured = ppo_step(actor, optimizer, block)
                else:
                    direction, previous, measured = kaczmarz_direction(args, actor, block, previous)
                    for p, g in direction.items():
                        p.data.add_(g, alpha=learning_rate)
                measurements.append(list(map(float, measured.values())))

        # Critic
        value_loss = fit_critic(args, agent.critic, optimizer, samples)

        # Evaluation
        if args.eval_levels and global_step // batch_size % args.eval_interval == 0:
            eval_return = evaluate(args, agent, args.seed + global_step + RANK)

        # Metrics, step size, checkpoint
        metrics = rollout_metrics(agent, old_policy, samples)
        metrics |= run_metrics(games, global_step, started)
        metrics |= {
            "charts/eval_return": eval_return,  # the last one's, nan before the first
            "charts/learning_rate": learning_rate,
            "losses/value_loss": value_loss,
        }
        metrics |= zip(measured, np.mean(measurements, 0))  # over the blocks
        metrics = {tag: np.mean(gathered(float(value))) for tag, value in metrics.items()}
        largest = np.inf if args.kaczmarz == "track" else args.learning_rate
        learning_rate = (
            learning_rate
            if ppo
            else adapt_learning_rate(learning_rate, metrics["losses/kl"], args.kl_low, largest)
        )
        if RANK == 0:
            logger.write(global_step, metrics)
            save()


if __name__ == "__main__":
    arguments = parse_args()
    with one_sentence(arguments):
        main(arguments)
