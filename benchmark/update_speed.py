"""Milliseconds and peak extra memory of one update of every method, interleaved in one run.

Run: python benchmark/update_speed.py --csv benchmark/results/update_speed.csv
     --quick: one repeat, small blocks, one network; --device cuda: on a GPU
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import acktr
import npg_cg
import npg_rank1
import rat_continuous
import rat_shared
import sophia_ppo

STEP = 1e-6  # step size of all updates: the networks stay what they are
NETWORKS = {  # of two hidden layers: dimensions of observations and actions
    "HalfCheetah 17-256-256-6": (17, 6),
    "Ant 105-256-256-8": (105, 8),
    "Humanoid 376-256-256-17": (376, 17),
}
PAPER = {  # milliseconds that the paper reports, on a GPU it does not name
    "RAT": (9.83, 10.04, 18.17),
    "RAT shared": (11.53, 11.66, 19.85),
    "FVP + CG": (19.86, 19.95, 19.81),
    "ACKTR": (5.60, 5.61, 6.57),
    "ACKTR shared": (6.92, 6.85, 7.87),
    "PPO": (3.12, 3.18, 3.22),
    "PPO shared": (3.70, 3.70, 3.72),
    "Sophia": (3.92, 3.98, 5.71),
    "Sophia shared": (5.97, 6.03, 7.58),
}


@dataclass
class Args:
    samples: int = 1024  # block size B
    repeats: int = 11  # timed updates of each method and network, after two that are not counted
    device: Literal["cpu", "cuda"] = "cpu"  # of the networks
    csv: Path | None = None  # file to write, which plot.py --speed draws
    quick: bool = False  # one repeat, blocks of 64, the smallest network: to see that it runs


class Problem(NamedTuple):
    """What a method updates networks of one size with."""

    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    block: rat_continuous.Samples  # random; every script's Samples have these columns
    device: str

    @property
    def spaces(self):
        return self.observation_space, self.action_space

    @property
    def sizes(self):
        """obs_dim and act_dim."""
        return *self.observation_space.shape, *self.action_space.shape

    @torch.no_grad()
    def block_of(self, policy):
        """The block with the log-probabilities of a new network's policy: ratios are 1."""
        log_prob = policy(self.block.obs).log_prob(self.block.actions)
        return self.block._replace(log_prob=log_prob)


def random_problem(network, samples, device):
    """A Problem with a block of that many samples, always the same one."""
    torch.manual_seed(0)
    sizes = NETWORKS[network]
    spaces = [gym.spaces.Box(-1, 1, (size,)) for size in sizes]
    obs, actions = (torch.randn(samples, size, device=device) for size in sizes)
    advantages, returns, log_prob = torch.randn(3, samples, device=device)
    block = rat_continuous.Samples(obs, actions, advantages, returns, log_prob)
    return Problem(*spaces, block, device)


# ---- One function a script: (problem, option) to a function that performs one update ---------
# A shared network updates actor and critic, any other the actor: its critic has its own Adam.


@torch.no_grad()
def move(direction):
    """theta = theta + STEP direction, which maps parameters to tensors."""
    for p, d in direction.items():
        p.add_(d, alpha=STEP)


def rat(problem, jacobian):
    actor = rat_continuous.Actor(*problem.sizes).to(problem.device)
    args = rat_continuous.Args(jacobian=jacobian)
    block = problem.block_of(actor)
    previous = {p: torch.zeros_like(p) for p in actor.parameters()}

    @torch.no_grad()
    def update():
        direction, _, _ = rat_continuous.kaczmarz_direction(args, actor, block, previous)
        move(direction)

    return update


def rat_joint(problem, kaczmarz):
    args = rat_shared.Args(kaczmarz=kaczmarz)
    agent = rat_shared.Agent(*problem.spaces, args.activation).to(problem.device)
    block = problem.block_of(agent.policy)
    previous = {p: torch.zeros_like(p) for p in agent.parameters()}
    step = rat_shared.sampled_step
    if kaczmarz == "track":
        step = partial(rat_shared.joint_step, low=args.kl_low)

    def update():
        direction, _, _ = step(args, agent, block, previous, STEP)
        move(direction)

    return update


def conjugate_gradients(problem, iterations):
    actor = npg_cg.Actor(*problem.sizes).to(problem.device)
    block = problem.block_of(actor)

    def update():
        g = npg_cg.policy_gradient(actor, block)
        d = npg_cg.natural_gradient(actor, block.obs, g, 0.1, iterations)
        npg_cg.move(actor, STEP * d)

    return update


def rank1(problem, score):
    actor = npg_rank1.Actor(*problem.sizes).to(problem.device)
    block = problem.block_of(actor)

    def update():
        g = npg_rank1.policy_gradient(actor, block)
        u = npg_rank1.block_score(actor, block, score)
        npg_rank1.move(actor, STEP * npg_rank1.rank1_direction(g, u, 0.1))

    return update


def first_order(problem, option):
    name, *shared = option.split()
    args = sophia_ppo.Args(optimizer=name, shared=bool(shared))
    agent = sophia_ppo.Agent(*problem.spaces, args.shared).to(problem.device)
    optimizer = sophia_ppo.OPTIMIZERS[name](agent.actor.parameters(), lr=STEP)
    block = problem.block_of(agent.policy)
    return lambda: sophia_ppo.policy_step(args, agent.actor, optimizer, block)


def kronecker(problem, option):
    kind, part = option.split(", ")
    agent = acktr.Agent(*problem.spaces, "shared" in kind).to(problem.device)
    actor = agent.actor
    kfac = acktr.KFAC(actor, STEP, ekfac="ekfac" in kind)
    block = problem.block_of(agent.policy)

    def statistics():
        policy, value = actor(block.obs)
        kfac.update_statistics(acktr.sampled_log_likelihood(policy, value))
        return policy, value

    def update():
        policy, value = statistics()
        kfac.zero_grad()
        acktr.actor_critic_loss(policy, value, block).backward()
        kfac.step()

    update()
    if part == "step":  # without the eigendecomposition
        kfac.param_groups[0]["inverse_update_period"] = 10**9
    parts = {
        "all": update,
        "statistics": statistics,
        "eigendecomposition": kfac.eigendecompose,
        "step": kfac.step,
    }
    return parts[part]


class Update(NamedTuple):
    """A row of the table."""

    method: str  # its colour in plot.py; "" for a part of an update, which the CSV file has not
    make: Callable
    option: Any = None
    times: int = 1  # updates timed together: what a method does not do in every one is averaged


METHODS = {
    "RAT": Update("rat", rat, "tape"),
    "RAT, `--jacobian vmap`": Update("rat", rat, "vmap"),
    "RAT shared": Update("rat_shared", rat_joint, "track"),
    "RAT shared, `--kaczmarz release`": Update("rat_shared", rat_joint, "release"),
    "NPG, 10 CG iterations": Update("npg", conjugate_gradients, 10),
    "rank-1": Update("rank1", rank1, "sample"),
    "ACKTR": Update("acktr", kronecker, "kfac, all", 10),
    "— its forward pass and statistics": Update("", kronecker, "kfac, statistics"),
    "— its eigendecomposition, every 10th update": Update(
        "", kronecker, "kfac, eigendecomposition"
    ),
    "— its step without the eigendecomposition": Update("", kronecker, "kfac, step"),
    "ACKTR, `--ekfac`": Update("acktr", kronecker, "ekfac, all", 10),
    "ACKTR shared": Update("acktr_shared", kronecker, "kfac shared, all", 10),
    "ACKTR shared, `--ekfac`": Update("acktr_shared", kronecker, "ekfac shared, all", 10),
    "PPO": Update("ppo", first_order, "adam"),
    "PPO shared": Update("ppo", first_order, "adam shared"),
    "Sophia": Update("sophia", first_order, "sophia", 10),
    "Sophia shared": Update("sophia", first_order, "sophia shared", 10),
    "diag": Update("diag", first_order, "diag"),
    "diag shared": Update("diag", first_order, "diag shared"),
}


# ---- Time and memory -------------------------------------------------------------------------


def make_update(name, network, samples, device):
    """Function that performs a method's update as often as it takes to see all that it does."""
    row = METHODS[name]
    update = row.make(random_problem(network, samples, device), row.option)

    def timed():
        for _ in range(row.times):
            update()
        if device == "cuda":
            torch.cuda.synchronize()

    return timed


def milliseconds(networks, samples, device, warm_up, repeats):
    """(name, network) to the median time of its updates; methods take turns."""
    medians = {}
    for network in networks:
        updates = {name: make_update(name, network, samples, device) for name in METHODS}
        times = {name: [] for name in METHODS}
        for _ in range(warm_up + repeats):
            for name, update in updates.items():
                start = time.perf_counter()
                update()
                times[name].append((time.perf_counter() - start) * 1e3 / METHODS[name].times)
        for name in METHODS:
            medians[name, network] = statistics.median(times[name][warm_up:])
    return medians


def status(field):
    """MB of a field of Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")


def peak_of(update, device):
    """MB that update() takes at most above what the process holds before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = status("VmRSS")
    update()
    return status("VmHWM") - before


def peak_memory(name, network, samples, device):
    """MB of one update, to be called in a process of its own, so that nothing is reused."""
    make_update(name, network, 8, device)()  # libraries and thread pools
    return peak_of(make_update(name, network, samples, device), device)


def megabytes(networks, samples, device, tasks_a_process):
    """(name, network) to the peak extra memory of its update."""
    keys = [(name, network) for network in networks for name in METHODS]
    problems = [(*key, samples, device) for key in keys]
    with get_context("spawn").Pool(1, maxtasksperchild=tasks_a_process) as pool:
        return dict(zip(keys, pool.starmap(peak_memory, problems, chunksize=1)))


# ---- Program ---------------------------------------------------------------------------------


def write_csv(path, title, networks, times, peaks):
    """What plot.py --speed reads, a row a method and network."""
    with open(path, "w", newline="") as file:
        print(f"# {title}, by benchmark/update_speed.py", file=file)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "update", "network", "milliseconds", "megabytes"])
        for name, row in METHODS.items():
            for network in networks:
                key = name, network
                cells = [f"{times[key]:.1f}", round(peaks[key])]
                if row.method:
                    writer.writerow([row.method, name.replace("`", ""), network, *cells])


def check_args(args):
    """End the program with one sentence for a value that cannot work."""
    if args.samples < 1 or args.repeats < 1:
        numbers = f"--samples {args.samples} and --repeats {args.repeats}"
        sys.exit(f"update_speed: {numbers} must be positive.")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("update_speed: --device cuda: PyTorch sees no CUDA device, use --device cpu.")
    if args.csv and not args.csv.absolute().parent.is_dir():
        sys.exit(f"update_speed: --csv {args.csv}: there is no such folder.")


def main(args: Args):
    """Print a Markdown table of medians and peaks, write the same as CSV."""
    check_args(args)
    networks = list(NETWORKS)
    samples, warm_up, repeats = args.samples, 2, args.repeats
    where = f"{torch.get_num_threads()} threads"
    tasks_a_process = 1  # so that none finds memory that another has left
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    if args.quick:
        networks = networks[:1]
        samples, warm_up, repeats = 64, 0, 1
    if args.quick or args.device == "cuda":  # a GPU's memory is counted by PyTorch
        tasks_a_process = None  # one process for all
    times = milliseconds(networks, samples, args.device, warm_up, repeats)
    peaks = megabytes(networks, samples, args.device, tasks_a_process)
    title = (
        f"One update, B = {samples}, {args.device}, {where}: "
        f"median of {repeats} interleaved ones, and peak extra memory"
    )
    print(f"{title}\n")
    print(f"| one update: ms (peak extra MB) | {' | '.join(networks)} |")
    print("|---|" + "---|" * len(networks))
    for name in METHODS:
        cells = []
        for network in networks:
            key = name, network
            cells.append(f"{times[key]:.1f} ({round(peaks[key])})")
        print(f"| {name} | {' | '.join(cells)} |")
    for name, row in PAPER.items():
        cells = [str(published) for _, published in zip(networks, row)]
        print(f"| {name}, in the paper | {' | '.join(cells)} |")
    if args.csv:
        write_csv(args.csv, title, networks, times, peaks)


if __name__ == "__main__":
    main(tyro.cli(Args))
