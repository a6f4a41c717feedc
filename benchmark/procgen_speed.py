"""Milliseconds and peak extra memory of one update of the IMPALA policy.

tape: as rat_procgen.py does it; vmap: from per-sample gradients, rat_continuous.vmap_scores.

Run: python benchmark/procgen_speed.py
     --quick: few repeats, small networks; --device cuda: on a GPU
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from update_speed import peak_of

import rat_continuous
import rat_procgen

METHODS = ("tape", "vmap")
TINY = {"samples": 16, "channels": (2, 2, 2), "hidden": 8}


@dataclass
class Args:
    samples: int = 1024  # block size B
    repeats: int = 5  # timed updates of each method, after one that is not counted
    channels: tuple[int, int, int] = (16, 32, 32)  # of the three stages
    hidden: int = 256  # units of the layer after them
    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False  # 2 repeats of blocks of 16 and 2 channels: to see that it runs


def make_update(method, args):
    """Function that performs one update of a fresh policy, as after an earlier block."""
    torch.manual_seed(0)
    head = nn.Linear(args.hidden, 15)
    actor = rat_procgen.Actor((64, 64, 3), args.channels, args.hidden, head).to(args.device)
    shape = (args.samples, 64, 64, 3)
    obs = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
    actions = torch.randint(15, (args.samples,), device=args.device)
    y = torch.randn(args.samples, device=args.device)
    ratio = torch.ones_like(y)
    zeros = {p: torch.zeros_like(p) for p in actor.parameters()}

    @torch.no_grad()
    def update():
        if method == "tape":
            scores = rat_procgen.tape_scores(actor, obs, actions)
            direction = rat_procgen.kaczmarz_step(scores, y, ratio, 0.1, zeros)
        else:
            scores = rat_continuous.vmap_scores(actor, obs.float(), actions)
            direction = rat_continuous.kaczmarz_step(scores, y, ratio, 0.1, zeros)
        for p, d in direction.items():
            p.add_(d, alpha=1e-6)
        if args.device == "cuda":
            torch.cuda.synchronize()

    return update


def peak_memory(method, args):
    """MB of one update, to be called in a process of its own, so that nothing is reused."""
    make_update(method, replace(args, **TINY))()  # libraries, thread pools
    return peak_of(make_update(method, args), args.device)


def milliseconds(args):
    """Of each method, the times of updates that take turns."""
    updates = {method: make_update(method, args) for method in METHODS}
    times = {method: [] for method in METHODS}
    for _ in range(args.repeats + 1):
        for method, update in updates.items():
            start = time.perf_counter()
            update()
            times[method].append((time.perf_counter() - start) * 1e3)
    return {method: all_times[1:] for method, all_times in times.items()}


def main(args: Args):
    """Print a Markdown table of medians and peaks."""
    if args.samples < 1 or args.repeats < 1:
        sys.exit(
            f"procgen_speed: --samples {args.samples} and --repeats {args.repeats} "
            "must be positive."
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("procgen_speed: --device cuda: PyTorch sees no CUDA device, use --device cpu.")
    if args.quick:
        args = replace(args, repeats=2, **TINY)
    threads = torch.get_num_threads()
    sizes = "-".join(map(str, (*args.channels, args.hidden)))
    print(f"B = {args.samples}, {args.device}, {threads} threads, median of {args.repeats}\n")
    print(f"| one update of IMPALA {sizes} | ms | peak extra MB |")
    print("|---|---|---|")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        problems = [(method, args) for method in METHODS]
        peaks = pool.starmap(peak_memory, problems, chunksize=1)
    for (method, times), peak in zip(milliseconds(args).items(), peaks):
        print(f"| {method} | {statistics.median(times):.1f} | {round(peak)} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
