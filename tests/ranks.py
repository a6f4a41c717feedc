"""What a process of torchrun does in test_torchrun.py; RANK.pt in the folder is what it found.

torchrun ... ranks.py pieces FOLDER                  the averaged pieces, on data of its own
torchrun ... ranks.py SCRIPT ARGUMENTS               a run of rat_continuous.py or rat_procgen.py
"""

import importlib
import os
import sys
from pathlib import Path

import torch
from test_direction import kaczmarz_block, nothing

RANK = int(os.environ["RANK"])


def pieces(rat, folder):
    """The run's name, directions of a block, statistics; each process has rows of its own."""
    args = rat.Args(device="cpu")
    rat.connect(args)
    actor, block, data = kaczmarz_block(seed=3)  # the same actor
    rows = torch.arange(RANK, 120, 2 + RANK)  # 60 and 40 rows
    block = rat.Samples(*(column[rows] for column in block))
    found = {"actor": actor.state_dict(), "block": [column[rows] for column in data]}
    found["run_name"] = args.run_name
    found["previous"] = {p: torch.ones_like(p) / 50 for p in actor.parameters()}
    for rule in ("track", "paper", "release", "off"):
        args = rat.Args(kaczmarz=rule)
        previous = nothing(actor) if rule == "off" else found["previous"]
        applied, remembered, metrics = rat.kaczmarz_direction(args, actor, block, previous)
        found[rule] = list(applied.values()), list(remembered.values()), metrics
    found["previous"] = list(found["previous"].values())
    normalizer, popart = rat.ObsNormalizer(4), rat.PopArt(8)
    torch.manual_seed(RANK)
    found["rows"] = 10 * torch.rand(100 + 50 * RANK, 4).double() + RANK
    for part in found["rows"].split(30 + 15 * RANK):
        normalizer.update(rat.all_rows(part))
        popart.update(rat.all_rows(part[:, 0]))
    found["normalizer"], found["popart"] = normalizer.state_dict(), popart.state_dict()
    torch.save(found, Path(folder) / f"{RANK}.pt")


def watched(module, name, keep):
    """Hand every result of the module's function to keep."""
    real = getattr(module, name)

    def watch(*arguments, **options):
        result = real(*arguments, **options)
        keep(result)
        return result

    setattr(module, name, watch)


def train(script):
    """The command line's run; networks with their statistics, step sizes and g at its end."""
    module = importlib.import_module(script)
    found = {"agents": [], "rates": [], "directions": [], "seeds": []}
    watched(module, "Agent", found["agents"].append)
    watched(module, "adapt_learning_rate", found["rates"].append)
    watched(module, "seed_generators", found["seeds"].append)
    if "ppo" not in sys.argv:
        watched(module, "kaczmarz_direction", found["directions"].append)
    args = module.parse_args()
    module.main(args)
    _, previous, _ = (found.pop("directions") or [({}, {}, {})])[-1]
    (agent,) = found.pop("agents")
    found |= {"agent": agent.state_dict(), "previous": list(previous.values())}
    torch.save(found, Path(args.output_dir) / f"{RANK}.pt")


if __name__ == "__main__":
    if sys.argv[1] == "pieces":
        pieces(importlib.import_module("rat_continuous"), sys.argv[2])
    else:
        script = sys.argv.pop(1)
        train(script)
