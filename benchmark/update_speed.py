"""Milliseconds and peak extra memory of one update, methods interleaved in one run.

Run: python benchmark/update_speed.py            (--quick: few repeats, small blocks; --device cuda: on a GPU)
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import gymnasium as gym
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import rat_continuous
import rat_shared

SIZES = {"HalfCheetah": (17, 6), "Ant": (105, 8), "Humanoid": (376, 17)}  # observation and action dimensions
METHODS = ("rat_continuous, tape", "rat_continuous, vmap", "rat_shared, tape", "rat_shared, vmap")
PAPER = {"rat_continuous": (9.83, 10.04, 18.17), "rat_shared": (11.53, 11.66, 19.85)}  # ms on a GPU it does not name


@dataclass
class Args:
    samples: int = 1024  # block size B
    repeats: int = 11  # timed updates of each method and size, after two that are not counted
    device: str = "cpu"  # cpu or cuda
    quick: bool = False  # 3 repeats of blocks of 64: to see that it runs


def make_update(method: str, size: str, samples: int, device: str) -> Callable[[], None]:
    """Function that performs one update of fresh 256-256 networks, with the memory of a block before.

    rat_continuous updates the actor (its critic has an optimizer of its own), rat_shared actor and critic."""
    torch.manual_seed(0)
    obs_dim, act_dim = SIZES[size]
    script, jacobian = method.split(", ")
    obs, actions = torch.randn(samples, obs_dim, device=device), torch.randn(samples, act_dim, device=device)
    y, ones = torch.randn(samples, device=device), torch.ones(samples, device=device)
    if script == "rat_continuous":
        model = rat_continuous.Actor(obs_dim, act_dim).to(device)
        step, args = rat_continuous.kaczmarz_step, rat_continuous.Args(jacobian=jacobian)
        batch = (obs, actions, y, ones)
    else:
        spaces = gym.spaces.Box(-1, 1, (obs_dim,)), gym.spaces.Box(-1, 1, (act_dim,))
        model = rat_shared.Agent(*spaces).to(device)
        step, args = rat_shared.joint_step, rat_shared.Args(jacobian=jacobian)
        old_log_prob = model(obs)[0].log_prob(actions).detach()
        batch = (obs, actions, torch.randn_like(y), torch.randn_like(y), old_log_prob, y, ones / samples)
    memory = [torch.zeros_like(p) for p in model.parameters()]

    def update() -> None:
        applied = step(args, model, batch, memory)[0]
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), applied, alpha=1e-6)
        if device == "cuda":
            torch.cuda.synchronize()

    return update


def peak_memory(method: str, size: str, samples: int, device: str) -> float:
    """MB above what the process held before the update; in a process of its own, so that nothing is reused."""
    make_update(method, size, 8, device)()  # libraries and thread pools
    update = make_update(method, size, samples, device)
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


def main(args: Args) -> None:
    """Print a Markdown table of medians and peaks."""
    samples, repeats = (64, 3) if args.quick else (args.samples, args.repeats)
    print(f"B = {samples}, {args.device}, {torch.get_num_threads()} threads, median of {repeats} interleaved updates\n")
    print("| one update: ms (peak extra MB) |" + "".join(f" {s} {d[0]}-256-256-{d[1]} |" for s, d in SIZES.items()))
    print("|---|" + "---|" * len(SIZES))
    cells = {method: [] for method in METHODS}
    for size in SIZES:
        updates = {method: make_update(method, size, samples, args.device) for method in METHODS}
        times = {method: [] for method in METHODS}
        for _ in range(repeats + 2):
            for method, update in updates.items():
                start = time.perf_counter()
                update()
                times[method].append((time.perf_counter() - start) * 1e3)
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = pool.starmap(peak_memory, [(m, size, samples, args.device) for m in METHODS], chunksize=1)
        for method, peak in zip(METHODS, peaks, strict=True):
            cells[method].append(f"{statistics.median(times[method][2:]):.1f} ({peak:.0f})")
    for method, row in cells.items():
        print(f"| {method} | " + " | ".join(row) + " |")
    for script, row in PAPER.items():
        print(f"| the paper's RAT for {script} | " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args))
