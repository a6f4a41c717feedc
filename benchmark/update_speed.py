"""Milliseconds and peak extra memory of one actor update, methods interleaved in one run.

Run: python benchmark/update_speed.py            (--quick: few repeats, small blocks; --device cuda: on a GPU)
"""

import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import rat_continuous

SIZES = {"HalfCheetah": (17, 6), "Ant": (105, 8), "Humanoid": (376, 17)}  # observation and action dimensions
PAPER = {"HalfCheetah": 9.83, "Ant": 10.04, "Humanoid": 18.17}  # the paper's RAT, separate networks, GPU not named


@dataclass
class Args:
    samples: int = 1024  # block size B
    repeats: int = 15  # timed updates of each method and size, after two that are not counted
    device: str = "cpu"  # cpu or cuda
    quick: bool = False  # 3 repeats of blocks of 64: to see that it runs


def make_update(method: str, size: str, samples: int, device: str):
    """Function that performs one update of a fresh 256-256 Gaussian policy with the memory of a block before."""
    torch.manual_seed(0)
    obs_dim, act_dim = SIZES[size]
    actor = rat_continuous.Actor(obs_dim, act_dim).to(device)
    obs, actions = torch.randn(samples, obs_dim, device=device), torch.randn(samples, act_dim, device=device)
    batch = (obs, actions, torch.randn(samples, device=device), torch.ones(samples, device=device))
    args = rat_continuous.Args(jacobian=method)
    memory = [torch.zeros_like(p) for p in actor.parameters()]

    def update():
        applied, _, _ = rat_continuous.kaczmarz_step(args, actor, batch, memory)
        with torch.no_grad():
            torch._foreach_add_(list(actor.parameters()), applied, alpha=1e-6)
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
    """Print a Markdown table of medians."""
    samples, repeats = (64, 3) if args.quick else (args.samples, args.repeats)
    print(f"B = {samples}, {args.device}, {torch.get_num_threads()} threads, median of {repeats} interleaved updates\n")
    header = ("policy", "tape ms", "vmap ms", "vmap / tape", "tape MB", "vmap MB", "paper's RAT ms")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for size in SIZES:
        updates = {method: make_update(method, size, samples, args.device) for method in ("tape", "vmap")}
        times = {method: [] for method in updates}
        for _ in range(repeats + 2):
            for method, update in updates.items():
                start = time.perf_counter()
                update()
                times[method].append((time.perf_counter() - start) * 1e3)
        tape, vmap = (statistics.median(t[2:]) for t in times.values())
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = pool.starmap(peak_memory, [(m, size, samples, args.device) for m in updates], chunksize=1)
        shape = f"{size} ({SIZES[size][0]}-256-256-{SIZES[size][1]})"
        cells = f"{tape:.1f} | {vmap:.1f} | {vmap / tape:.1f} | {memory[0]:.0f} | {memory[1]:.0f} | {PAPER[size]}"
        print(f"| {shape} | {cells} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
