"""Milliseconds and peak extra memory of one update of every method, interleaved in one run.

Run: python benchmark/update_speed.py            (--quick: one repeat, small blocks; --device cuda: on a GPU)
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import acktr
import npg_cg
import npg_rank1
import rat_continuous
import rat_shared
import sophia_ppo

SIZES = {"HalfCheetah": (17, 6), "Ant": (105, 8), "Humanoid": (376, 17)}  # observation and action dimensions
PAPER = {  # milliseconds that the paper reports, on a GPU it does not name
    "RAT": (9.83, 10.04, 18.17), "RAT shared": (11.53, 11.66, 19.85), "FVP + CG": (19.86, 19.95, 19.81),
    "ACKTR": (5.60, 5.61, 6.57), "ACKTR shared": (6.92, 6.85, 7.87), "PPO": (3.12, 3.18, 3.22),
    "PPO shared": (3.70, 3.70, 3.72), "Sophia": (3.92, 3.98, 5.71), "Sophia shared": (5.97, 6.03, 7.58),
}  # fmt: skip


@dataclass
class Args:
    samples: int = 1024  # block size B
    repeats: int = 11  # timed updates of each method and size, after two that are not counted
    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False  # one repeat with blocks of 64: to see that it runs


class Block:
    """Random data of one update: obs [B, obs_dim], actions [B, act_dim]; y, returns, eps, ones and share = 1/B, [B]."""

    def __init__(self, size: str, samples: int, device: str):
        torch.manual_seed(0)
        self.obs_dim, self.act_dim = SIZES[size]
        self.device, spaces = device, (gym.spaces.Box(-1, 1, (dim,)) for dim in SIZES[size])
        self.observation_space, self.action_space = spaces
        self.obs, self.actions = (torch.randn(samples, dim, device=device) for dim in SIZES[size])
        self.y, self.returns, self.epsilon = torch.randn(3, samples, device=device)
        self.ones = torch.ones_like(self.y)
        self.share = self.ones / samples


# One function a script: (Block, option) to a function that performs one update of fresh 256-256 networks. A shared
# network updates actor and critic, any other the actor: its critic has an Adam of its own.
def rat(block: Block, jacobian: str) -> Callable[[], None]:
    actor = rat_continuous.Actor(block.obs_dim, block.act_dim).to(block.device)
    args, memory = rat_continuous.Args(jacobian=jacobian), [torch.zeros_like(p) for p in actor.parameters()]
    batch = block.obs, block.actions, block.y, block.ones
    return lambda: move(actor, rat_continuous.kaczmarz_step(args, actor, batch, memory)[0])


def rat_joint(block: Block, jacobian: str) -> Callable[[], None]:
    agent = rat_shared.Agent(block.observation_space, block.action_space).to(block.device)
    args, memory = rat_shared.Args(jacobian=jacobian), [torch.zeros_like(p) for p in agent.parameters()]
    old_log_prob = agent(block.obs).policy.log_prob(block.actions).detach()
    batch = block.obs, block.actions, block.epsilon, block.returns, old_log_prob, block.y, block.share
    return lambda: move(agent, rat_shared.joint_step(args, agent, batch, memory)[0])


def conjugate_gradients(block: Block, iterations: int) -> Callable[[], None]:
    actor = npg_cg.Actor(block.obs_dim, block.act_dim).to(block.device)
    parameters = list(actor.parameters())

    def update() -> None:
        log_prob = actor(block.obs).log_prob(block.actions)
        g = npg_cg.flatten(torch.autograd.grad(log_prob @ (block.share * block.y), parameters))
        d = npg_cg.natural_gradient(actor, block.obs, g, 0.1, iterations)
        move(actor, npg_cg.unflatten(d, parameters))

    return update


def rank1(block: Block, _: None) -> Callable[[], None]:
    actor = npg_rank1.Actor(block.obs_dim, block.act_dim).to(block.device)
    parameters = list(actor.parameters())

    def update() -> None:
        log_prob = actor(block.obs).log_prob(block.actions)
        u = npg_rank1.flatten(torch.autograd.grad(log_prob[0], parameters, retain_graph=True))
        g = npg_rank1.flatten(torch.autograd.grad(log_prob @ (block.share * block.y), parameters))
        move(actor, npg_rank1.unflatten(npg_rank1.rank1_direction(g, u, 0.1), parameters))

    return update


def first_order(block: Block, option: str) -> Callable[[], None]:
    name, shared = option.split()[0], option.endswith("shared")
    agent = sophia_ppo.Agent(block.observation_space, block.action_space, shared).to(block.device)
    parameters = [p for name, p in agent.named_parameters() if shared or not name.startswith("critic")]
    kind = {"adam": torch.optim.Adam, "sophia": sophia_ppo.Sophia, "diag": torch.optim.SGD}[name]
    optimizer, args = kind(parameters, lr=1e-6), sophia_ppo.Args(optimizer=name, shared=shared)
    policy, value = agent(block.obs)
    old = policy.log_prob(block.actions).detach(), value.detach()
    batch = block.obs, block.actions, *old, block.returns, block.y, block.share
    return lambda: sophia_ppo.policy_step(args, agent, optimizer, batch)


def kronecker(block: Block, option: str) -> Callable[[], None]:
    kind, part = option.split(", ")
    actor = acktr.Agent(block.observation_space, block.action_space, "shared" in kind).to(block.device).actor
    kfac = acktr.KFAC(actor, 1e-6, ekfac="ekfac" in kind)

    def loss() -> tuple[Tensor, Tensor]:  # log-likelihood of what is drawn [B], the policy gradient's loss
        policy, value = actor(block.obs)
        drawn, loss = policy.log_prob(policy.sample()), -policy.log_prob(block.actions) @ (block.y * block.share)
        if "shared" in kind:
            drawn, loss = drawn + block.epsilon * value, loss + (value - block.returns).square() @ block.share / 2
        return drawn, loss

    def update() -> None:
        drawn, policy_loss = loss()
        kfac.update_statistics(drawn, block.share)
        kfac.zero_grad()
        policy_loss.backward()
        kfac.step()

    def statistics() -> None:
        kfac.update_statistics(loss()[0], block.share)

    update()
    kfac.param_groups[0]["inverse_interval"] = 10 if part == "all" else 10**9  # then step() does not decompose
    return {"all": update, "statistics": statistics, "eigendecomposition": kfac.eigendecompose, "step": kfac.step}[part]


def move(model: torch.nn.Module, direction: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), direction, alpha=1e-6)


METHODS = {  # function, option, updates timed together: what a method does not do in every update is averaged
    "RAT": (rat, "tape", 1),
    "RAT, `--jacobian vmap`": (rat, "vmap", 1),
    "RAT shared": (rat_joint, "tape", 1),
    "RAT shared, `--jacobian vmap`": (rat_joint, "vmap", 1),
    "NPG, 10 CG iterations": (conjugate_gradients, 10, 1),
    "rank-1": (rank1, None, 1),
    "ACKTR": (kronecker, "kfac, all", 10),
    "— its forward pass and statistics": (kronecker, "kfac, statistics", 1),
    "— its eigendecomposition, every 10th update": (kronecker, "kfac, eigendecomposition", 1),
    "— its step without the eigendecomposition": (kronecker, "kfac, step", 1),
    "ACKTR, `--ekfac`": (kronecker, "ekfac, all", 10),
    "ACKTR shared": (kronecker, "kfac shared, all", 10),
    "ACKTR shared, `--ekfac`": (kronecker, "ekfac shared, all", 10),
    "PPO": (first_order, "adam", 1),
    "PPO shared": (first_order, "adam shared", 1),
    "Sophia": (first_order, "sophia", 10),
    "Sophia shared": (first_order, "sophia shared", 10),
    "diag": (first_order, "diag", 1),
    "diag shared": (first_order, "diag shared", 1),
}


def make_update(method: str, size: str, samples: int, device: str) -> Callable[[], None]:
    """Function that performs a method's update once, or as often as it takes to see everything it does."""
    function, option, times = METHODS[method]
    update = function(Block(size, samples, device), option)

    def timed() -> None:
        for _ in range(times):
            update()
        if device == "cuda":
            torch.cuda.synchronize()

    return timed


def peak_of(update: Callable[[], None], device: str) -> float:
    """MB that update() takes at most above what the process holds before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6

    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = status("VmRSS")
    update()
    return status("VmHWM") - before


def peak_memory(method: str, size: str, samples: int, device: str) -> float:
    """MB of one update, to be called in a process of its own, so that nothing is reused."""
    make_update(method, size, 8, device)()  # libraries and thread pools
    return peak_of(make_update(method, size, samples, device), device)


def main(args: Args) -> None:
    """Print a Markdown table of medians and peaks."""
    if args.samples < 1 or args.repeats < 1:
        sys.exit(f"update_speed: --samples {args.samples} and --repeats {args.repeats} must be positive.")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("update_speed: --device cuda: PyTorch sees no CUDA device here, use --device cpu.")
    samples, warm_up, repeats = (64, 0, 1) if args.quick else (args.samples, 2, args.repeats)
    print(f"B = {samples}, {args.device}, {torch.get_num_threads()} threads, median of {repeats} interleaved updates\n")
    print("| one update: ms (peak extra MB) |" + "".join(f" {s} {d[0]}-256-256-{d[1]} |" for s, d in SIZES.items()))
    print("|---|" + "---|" * len(SIZES))
    times = {(method, size): [] for method in METHODS for size in SIZES}
    for size in SIZES:
        updates = {method: make_update(method, size, samples, args.device) for method in METHODS}
        for _ in range(warm_up + repeats):
            for method, update in updates.items():
                start = time.perf_counter()
                update()
                times[method, size].append((time.perf_counter() - start) * 1e3 / METHODS[method][2])
    # a process for each, so that none finds memory that another has left; when quick one for all
    with get_context("spawn").Pool(1, maxtasksperchild=None if args.quick else 1) as pool:
        peaks = pool.starmap(peak_memory, [(*key, samples, args.device) for key in times], chunksize=1)
    cells = [f"{statistics.median(t[warm_up:]):.1f} ({round(p)})" for t, p in zip(times.values(), peaks, strict=True)]
    for i, method in enumerate(METHODS):
        print(f"| {method} | " + " | ".join(cells[i * len(SIZES) : (i + 1) * len(SIZES)]) + " |")
    for method, row in PAPER.items():
        print(f"| {method}, in the paper | " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args))
