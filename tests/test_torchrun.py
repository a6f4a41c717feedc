"""Several processes under torchrun: the same run on all, averaged as equations say."""

import contextlib
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment, flat, forked, read_csv, score_matrix, train
from test_direction import kaczmarz_block, nothing, primal, relative

import rat_continuous as rat
import rat_procgen

SMALL = {
    "rat_continuous": [
        *("--env-id", "Hopper-v5", "--num-envs", 4, "--num-steps", 16, "--critic-epochs", 1),
    ],
    "rat_procgen": [
        *("--num-envs", 2, "--num-steps", 16, "--channels", 4, 4, 4, "--hidden", 16),
        *("--num-minibatches", 2, "--critic-minibatches", 2, "--eval-levels", 0),
    ],
}


def torchrun(processes, *words):
    """The command line of a program in several processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc-per-node", *map(str, [processes, *words])]


def in_rank(rank, port, function, *arguments):
    """Call the function as the process of that rank, of two."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    for script in (rat, rat_procgen):
        script.RANK = rank
        script.WORLD_SIZE = 2
    function(rank, *arguments)


def in_both(function, folder, *arguments):
    """What function(rank, folder, ...) saves as RANK.pt in the folder, in two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        _, port = free.getsockname()
    processes = [forked(in_rank, rank, port, function, folder, *arguments) for rank in range(2)]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def equal(a, b):
    """Whether two nested structures of tensors are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def average_pieces(rank, folder):
    """The run's name, directions of a block, statistics; each process has rows of its own."""
    args = rat.Args(device="cpu")
    rat.connect(args)
    actor, block, data = kaczmarz_block(seed=3)  # the same actor
    rows = torch.arange(rank, 120, 2 + rank)  # 60 and 40 rows
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
    torch.manual_seed(rank)
    found["rows"] = 10 * torch.rand(100 + 50 * rank, 4).double() + rank
    for part in found["rows"].split(30 + 15 * rank):
        normalizer.update(rat.all_rows(part))
        popart.update(rat.all_rows(part[:, 0]))
    found["normalizer"], found["popart"] = normalizer.state_dict(), popart.state_dict()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return in_both(average_pieces, tmp_path_factory.mktemp("pieces"))


def test_a_run_without_a_name_has_one(pieces):
    """The default has the time in it, which differs by process."""
    assert pieces[0]["run_name"] == pieces[1]["run_name"]


@pytest.mark.parametrize("rule", ["track", "paper", "release", "off"])
def test_a_direction_is_the_mean_of_the_processes_directions(pieces, rule):
    """By the float64 formulas of test_direction.py, each process with rows of its own."""
    args = rat.Args(kaczmarz=rule)
    actor = rat.Actor(4, 2, 16)
    actor.load_state_dict(pieces[0]["actor"])
    previous = flat(pieces[0]["previous"]).double() * (rule != "off")
    blocks = []
    for piece in pieces:
        obs, actions, y, weights = piece["block"]
        scores = score_matrix(actor, obs, actions)
        y = (y - y.mean()) / y.std(correction=0)
        blocks.append((scores, y, weights, (weights * scores.square().sum(1)).mean()))
    assert len(blocks[0][0]) != len(blocks[1][0])
    trace = sum(trace for *_, trace in blocks) / 2
    damping = args.damping * (trace if rule == "track" else 1)
    g = sum(primal(h, y, w, damping, previous) for h, y, w, _ in blocks) / 2
    if rule == "release":
        g = g - previous
    norm = sum((w * (h @ g).square()).mean().sqrt() for h, _, w, _ in blocks) / 2
    factor = 1 / norm if rule == "track" else (0.5 / g.norm()).clamp(max=1)
    applied, remembered, metrics = pieces[0][rule]
    assert relative(flat(applied), factor * g) < 1e-4
    share = {"track": 1, "paper": 1, "release": -factor, "off": 0}[rule]
    assert (flat(remembered).double() - share * g).norm() < 1e-4 * g.norm()
    assert float(metrics["rat/damping"]) == pytest.approx(float(damping), rel=1e-4)
    assert float(metrics["rat/fisher_norm"]) == pytest.approx(float(norm), rel=1e-4)
    assert equal(pieces[0][rule][:2], pieces[1][rule][:2])


def test_statistics_are_those_of_all_samples_in_one_process(pieces):
    normalizer, popart = rat.ObsNormalizer(4), rat.PopArt(8)
    parts = [piece["rows"].split(30 + 15 * rank) for rank, piece in enumerate(pieces)]
    for rows in map(torch.cat, zip(*parts)):
        normalizer.update(rows)
        popart.update(rows[:, 0])
    assert equal(pieces[0]["normalizer"], pieces[1]["normalizer"])
    for name, value in normalizer.state_dict().items():
        torch.testing.assert_close(pieces[1]["normalizer"][name], value, rtol=1e-12, atol=0)
    for name in ("moments", "mean", "std"):
        torch.testing.assert_close(
            pieces[1]["popart"][name], getattr(popart, name), rtol=1e-12, atol=0
        )


def watched(module, name, keep):
    """Hand every result of the module's function to keep."""
    real = getattr(module, name)

    def watch(*arguments, **options):
        result = real(*arguments, **options)
        keep(result)
        return result

    setattr(module, name, watch)


def train_and_save(rank, folder, script, *arguments):
    """The command line's run; networks with their statistics, step sizes and g at its end."""
    module = importlib.import_module(script)
    found = {"agents": [], "rates": [], "directions": [], "seeds": []}
    watched(module, "Agent", found["agents"].append)
    watched(module, "adapt_learning_rate", found["rates"].append)
    watched(module, "seed_generators", found["seeds"].append)
    if "ppo" not in arguments:
        watched(module, "kaczmarz_direction", found["directions"].append)
    train(script, *arguments)
    _, previous, _ = (found.pop("directions") or [({}, {}, {})])[-1]
    (agent,) = found.pop("agents")
    found |= {"agent": agent.state_dict(), "previous": list(previous.values())}
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize(
    "script, rule",
    [
        ("rat_continuous", "track"),
        ("rat_procgen", "track"),
        ("rat_procgen", "ppo"),
    ],
)
def test_processes_stay_the_same_and_a_run_goes_on_with_fewer_or_more(script, rule, tmp_path):
    """Networks, statistics, step size, g; only the first writes; a run of 2, 1, 2 processes."""
    batch = {"rat_continuous": 64, "rat_procgen": 32}[script]
    where = ["--output-dir", tmp_path, "--run-name", "run"]
    arguments = [*SMALL[script], "--device", "cpu", *where, "--kaczmarz", rule]
    total = ["--total-timesteps", 6 * batch]
    first, second = in_both(train_and_save, tmp_path, script, *arguments, *total)
    assert first.pop("seeds") != second.pop("seeds")
    assert len(first["rates"]) == (0 if rule == "ppo" else 3)  # ppo has Adam's
    assert equal(first, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt", "run"]
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert equal(dict(saved["agent"]), dict(first["agent"]))

    train(script, "--resume", *where, "--total-timesteps", 8 * batch)
    steps = [2, 4, 6, 7, 8]
    if script == "rat_continuous":
        total = ["--total-timesteps", 12 * batch]
        first, second = in_both(train_and_save, tmp_path, script, "--resume", *where, *total)
        del first["seeds"], second["seeds"]
        assert equal(first, second)
        steps += [10, 12]
    assert [int(row["global_step"]) // batch for row in read_csv(tmp_path / "run")] == steps


def test_one_process_under_torchrun_is_a_plain_run(tmp_path):
    arguments = [*SMALL["rat_continuous"], "--device", "cpu", "--output-dir", tmp_path]
    arguments += ["--total-timesteps", 192]
    words = torchrun(1, ROOT / "rat_continuous.py", *arguments, "--run-name", "torchrun")
    subprocess.run(words, env=environment(), check=True, timeout=300)
    train("rat_continuous", *arguments, "--run-name", "plain")
    runs = []
    for name in ("torchrun", "plain"):
        rows = read_csv(tmp_path / name)
        runs.append([row | {"sps": 0, "wall_seconds": 0} for row in rows])
    assert runs[0] == runs[1]


def other_arguments(rank, folder):
    """A run with a seed of its own, which does not begin."""
    arguments = [*SMALL["rat_continuous"], "--device", "cpu", "--output-dir", folder]
    arguments += ["--total-timesteps", 128]
    said = io.StringIO()
    with pytest.raises(SystemExit) as refusal, contextlib.redirect_stderr(said):
        train("rat_continuous", *arguments, "--seed", 5 + rank)
    torch.save((refusal.value.code, said.getvalue()), folder / f"{rank}.pt")


def test_processes_with_different_arguments_are_refused(tmp_path):
    for code, said in in_both(other_arguments, tmp_path):
        assert code == 2
        assert said.startswith("rat_continuous: torchrun's processes have different arguments")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]


@pytest.mark.parametrize("script", ["rat_continuous", "rat_procgen"])
def test_a_process_takes_the_gpu_of_its_local_rank(script, monkeypatch):
    module = importlib.import_module(script)
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(module, "WORLD_SIZE", 2)
    monkeypatch.setattr(module, "gathered", lambda value: [value, value])
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(module.dist, "init_process_group", asked.append)
    module.connect(module.Args(device="cuda"))
    module.connect(module.Args(device="cpu"))
    assert asked == [1, "nccl", "gloo"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_process_ends_the_others(rank, tmp_path):
    """Within a minute, with its reason; the checkpoint can be read and the run goes on."""
    where = ["--output-dir", tmp_path, "--run-name", "run"]
    arguments = [*SMALL["rat_continuous"], "--device", "cpu", *where, "--total-timesteps", 100_000]
    # The process writes its id, so that the one to kill is known
    line = f"echo $BASHPID > {tmp_path}/$RANK; exec {sys.executable} {ROOT / 'rat_continuous.py'} "
    line += " ".join(map(str, arguments))
    job = subprocess.Popen(
        torchrun(2, "--no-python", "bash", "-c", line),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while job.poll() is None and not (tmp_path / "run" / "checkpoint.pt").exists():
            time.sleep(0.1)
        os.kill(int((tmp_path / str(rank)).read_text()), signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 1
    assert "SIGKILL" in errors
    step = torch.load(tmp_path / "run" / "checkpoint.pt")["global_step"]
    train("rat_continuous", "--resume", *where, "--total-timesteps", step + 64)
    assert int(read_csv(tmp_path / "run")[-1]["global_step"]) == step + 64
