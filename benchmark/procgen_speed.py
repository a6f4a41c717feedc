"""Milliseconds and peak extra memory of one update of the IMPALA policy, tape and vmap interleaved in one run.

Run: python benchmark/procgen_speed.py           (--quick: few repeats, small networks; --device cuda: on a GPU)
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from update_speed import peak_of

import rat_procgen

METHODS = ("tape", "vmap")


@dataclass
class Args:
    samples: int = 1024  # block size B
    repeats: int = 5  # timed updates of each method, after one that is not counted
    channels: tuple[int, int, int] = (16, 32, 32)  # of the three stages
    hidden: int = 256  # units of the layer after them
    kernel_memory: int = 512  # MiB that the tape may take
    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False  # 2 repeats of blocks of 16 and 2 channels: to see that it runs


def make_update(method: str, args: Args) -> Callable[[], None]:
    """Function that performs one update of a fresh policy, with the memory of a block before."""
    torch.manual_seed(0)
    actor = rat_procgen.Actor((64, 64, 3), args.channels, args.hidden, nn.Linear(args.hidden, 15)).to(args.device)
    obs = torch.randint(256, (args.samples, 64, 64, 3), dtype=torch.uint8, device=args.device)
    actions = torch.randint(15, (args.samples,), device=args.device)
    batch = (obs, actions, torch.randn(args.samples, device=args.device), torch.ones(args.samples, device=args.device))
    memory = [torch.zeros_like(p) for p in actor.parameters()]

    def update() -> None:
        direction = rat_procgen.rat_direction(actor, *batch, 0.1, memory, method, args.kernel_memory)
        with torch.no_grad():
            torch._foreach_add_(list(actor.parameters()), direction, alpha=1e-6)
        if args.device == "cuda":
            torch.cuda.synchronize()

    return update


def peak_memory(method: str, args: Args) -> float:
    """MB of one update, to be called in a process of its own, so that nothing is reused."""
    make_update(method, Args(samples=8, channels=(2, 2, 2), hidden=8, device=args.device))()  # libraries, thread pools
    return peak_of(make_update(method, args), args.device)


def main(args: Args) -> None:
    """Print a Markdown table of medians and peaks."""
    if args.samples < 1 or args.repeats < 1:
        sys.exit(f"procgen_speed: --samples {args.samples} and --repeats {args.repeats} must be positive.")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("procgen_speed: --device cuda: PyTorch sees no CUDA device here, use --device cpu.")
    if args.quick:
        args.samples, args.repeats, args.channels, args.hidden = 16, 2, (2, 2, 2), 8
    threads = torch.get_num_threads()
    print(f"B = {args.samples}, {args.device}, {threads} threads, median of {args.repeats} interleaved updates\n")
    print(f"| one update of IMPALA {'-'.join(map(str, (*args.channels, args.hidden)))} | ms | peak extra MB |")
    print("|---|---|---|")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.starmap(peak_memory, [(method, args) for method in METHODS], chunksize=1)
    updates, times = {method: make_update(method, args) for method in METHODS}, {method: [] for method in METHODS}
    for _ in range(args.repeats + 1):
        for method, update in updates.items():
            start = time.perf_counter()
            update()
            times[method].append((time.perf_counter() - start) * 1e3)
    for method, peak in zip(METHODS, peaks, strict=True):
        print(f"| {method} | {statistics.median(times[method][1:]):.1f} | {round(peak)} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
