"""Shared by all tests: the scripts, a runner for their command lines, the explicit score matrix."""

import copy
import csv
import importlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.func import functional_call, jacrev

ROOT = Path(__file__).parents[1]
TOYS = Path(__file__).parent / "toys"
# Those that run on InvertedPendulum-v5
SCRIPTS = ["rat_continuous", "rat_shared", "npg_cg", "npg_rank1", "sophia_ppo", "acktr"]
QUICK = {  # for a slow script, where a test says nothing else
    "npg_cg": ["--update-epochs", 1, "--cg-iterations", 2],
    "sophia_ppo": ["--update-epochs", 2, "--num-minibatches", 4],
    "acktr": ["--update-epochs", 1, "--num-minibatches", 1, "--inverse-update-period", 50],
}
sys.path[:0] = [str(ROOT), str(TOYS)]
torch.set_num_threads(1)


def command(script, *arguments):
    """The command line of a script; with --resume no more than what is given."""
    quick = [] if "--resume" in arguments else QUICK.get(script, [])
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, [*quick, *arguments])]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOYS)}


def run(script, *arguments):
    """Run a script's command line to its end; stdout and stderr as text."""
    words = command(script, *arguments)
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)


def train(script, *arguments):
    """The same without a new process."""
    module = importlib.import_module(script)
    before = sys.argv
    sys.argv = command(script, *arguments)[1:]
    try:
        args = module.parse_args()
        with module.one_sentence(args):
            module.main(args)
    finally:
        sys.argv = before


def forked(function, *arguments):
    """A new process that calls the function, without its own start of PyTorch.

    It is forked from a server without threads: of ours one may hold a lock at that moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.tensorboard", "gymnasium", "tyro"])
    process = context.Process(target=function, args=arguments)
    process.daemon = True
    process.start()
    return process


def learn(folder, script, *arguments):
    """Mean return of the last 100 training episodes, with the critic that takes least time.

    Seeds and CPUs agree on it, not on the last policy's return."""
    critic = ["--critic-epochs", 4, "--critic-minibatches", 8, "--critic-learning-rate", 1e-3]
    arguments = [*([] if script == "rat_shared" else critic), *arguments]
    train(script, "--device", "cpu", *arguments, "--output-dir", folder, "--run-name", "learn")
    return float(read_csv(folder / "learn")[-1]["episodic_return"])


def read_csv(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def score_matrix(actor, obs, actions):
    """H [B, p] in float64 by differentiating every sample's log-likelihood.

    Columns are as in actor.parameters()."""
    actor = copy.deepcopy(actor).double()
    named = {name: p.detach() for name, p in actor.named_parameters()}

    def log_prob(named):
        return functional_call(actor, named, obs.double()).log_prob(actions.double())

    rows = jacrev(log_prob)(named)
    return torch.cat([rows[name].flatten(1) for name in named], 1)


def same(a, b):
    """Whether two states, such as what a checkpoint holds, are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
