"""Shared by all tests: the scripts under test, a runner for their command lines, the explicit score matrix."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, jacrev

ROOT = Path(__file__).parents[1]
TOYS = Path(__file__).parent / "toys"
SCRIPTS = ["rat_continuous"]  # every training script that runs on InvertedPendulum-v5
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def command(script, *arguments):
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]


def environment(*import_paths):
    paths = os.pathsep.join(map(str, (TOYS, *import_paths)))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "default"}


def run(script, *arguments, import_paths=()):
    """Run a script's command line to its end; stdout and stderr as text."""
    return subprocess.run(
        command(script, *arguments), env=environment(*import_paths), capture_output=True, text=True, timeout=300
    )


def read_csv(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def score_matrix(actor, obs, actions):
    """H [B, p] in float64 by forward-over-parameters differentiation, column order of actor.parameters()."""
    actor = functional_copy(actor)
    named = {name: p.detach() for name, p in actor.named_parameters()}
    rows = jacrev(lambda named: functional_call(actor, named, obs.double()).log_prob(actions.double()))(named)
    return torch.cat([rows[name].flatten(1) for name in named], 1)


def functional_copy(actor):
    import copy

    return copy.deepcopy(actor).double()


@pytest.fixture
def small_run():
    """Arguments of a run of 64-step iterations that takes a few milliseconds each."""
    return ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--device", "cpu"]
