"""Whole runs from the command line: learning, checkpoints, bad input. Parametrised by script."""

import errno
import importlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    checkpoint,
    command,
    environment,
    forked,
    learn,
    read_csv,
    run,
    same,
    train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

every_script = pytest.mark.parametrize("script", SCRIPTS)
SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", 4, "--num-steps", 16, "--device", "cpu"]
SMALL += ["--critic-epochs", 2, "--critic-minibatches", 4]  # 64-step iterations
LEARNS = {  # what a script needs to learn InvertedPendulum-v5 in time
    "npg_cg": ["--cg-iterations", 10, "--update-epochs", 2, "--num-minibatches", 1],
    "sophia_ppo": ["--num-minibatches", 8, "--learning-rate", 1e-3],
    "acktr": ["--update-epochs", 2, "--num-minibatches", 4, "--inverse-update-period", 10],
}
SETTINGS = [  # that no other test has
    ("rat_continuous", ["--kaczmarz", "off", "--jacobian", "vmap"]),
    ("rat_shared", ["--kaczmarz", "paper"]),
    ("sophia_ppo", ["--shared"]),
    ("sophia_ppo", ["--optimizer", "diag", "--shared"]),
    ("acktr", ["--shared", "--ekfac", "--inverse-update-period", 3]),
    ("acktr", ["--learning-rate", 0.1, "--kl-clip", 0.01]),
]


def small(script):
    """SMALL without the options that a script does not have."""
    return SMALL[:-4] if script == "rat_shared" else SMALL


def steps_in_events(folder):
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [point.step for point in events.Scalars(tag)] for tag in tags}


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.01)


def start(script, *arguments):
    """The script in a process of its own, which Ctrl-C reaches also where pytest ignores it."""
    words = command(script, *arguments)
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(words, env=environment(), **options)


def rows_of(folder):
    return len(read_csv(folder)) if (folder / "progress.csv").exists() else 0


def sentence(text):
    """stderr without what it says at the start, nor tyro's box; on one line."""
    lines = [line for line in text.splitlines() if "tensorboard --logdir" not in line]
    return re.sub(r"[│╭╮╰╯─\s]+", " ", " ".join(lines)).strip()


@every_script
def test_learns_inverted_pendulum(script, tmp_path):
    """All such tests reached 35 to 86, without learning 5."""
    arguments = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", 12_000, "--num-envs", 8]
    assert learn(tmp_path, script, *arguments, *LEARNS.get(script, [])) >= 25


def test_learns_as_well_where_observations_have_an_offset(tmp_path):
    """1.7e9 with a spread of 6: a policy that sees float32 is blind, and gets -0.6 a step."""
    returns = {}
    for name in ("Near", "Far"):
        arguments = ["--env-id", f"toy_envs:{name}-v0", "--total-timesteps", 8_000]
        arguments += ["--num-envs", 8, "--num-steps", 32, "--learning-rate", 0.2]
        returns[name] = learn(tmp_path / name, "rat_continuous", *arguments)
    assert returns["Near"] > -4
    assert returns["Far"] > -4


@every_script
def test_trains_where_all_observations_are_the_same(script, tmp_path):
    """Denormals are flushed then: Adam's would be slow."""
    torch.set_flush_denormal(False)
    arguments = [*small(script), "--env-id", "toy_envs:Constant-v0", "--total-timesteps", 1280]
    train(script, *arguments, "--output-dir", tmp_path, "--run-name", "x")
    assert rows_of(tmp_path / "x") == 20
    assert script == "rat_shared" or torch.tensor([1e-39]).mul(1).count_nonzero() == 0


@every_script
def test_run_folder_and_clean_output(script, tmp_path):
    steps = ["--total-timesteps", 640, "--output-dir", tmp_path, "--seed", 5]
    result = run(script, *small(script), *steps)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"InvertedPendulum-v5__{script}__5__")
    names = sorted(p.name.split(".")[0] for p in folder.iterdir())
    assert names == ["checkpoint", "config", "events", "progress"]
    assert json.loads((folder / "config.json").read_text())["total_timesteps"] == 640
    rows = read_csv(folder)
    assert [int(row["global_step"]) for row in rows] == list(range(64, 641, 64))
    wanted = {"episodic_return", "episodic_length", "kl", "entropy", "explained_variance"}
    wanted |= {"learning_rate", "value_loss", "advantage_rms", "sps", "wall_seconds"}
    assert wanted <= set(rows[0])
    tags = steps_in_events(folder)
    assert {"charts/episodic_return", "charts/SPS", "losses/value_loss", "losses/kl"} <= set(tags)
    assert set(map(tuple, tags.values())) == {tuple(range(64, 641, 64))}
    last = rows[-1]
    said = f"640 steps: return {float(last['episodic_return']):.1f}, KL {float(last['kl']):.4f}"
    assert result.stdout.count("\n") == 10
    assert result.stdout.splitlines()[-1] == said
    assert result.stderr == ""


def test_the_last_line_of_a_log_says_why_a_run_broke_down(tmp_path):
    """Though stdout to a file is buffered: benchmark.sh reports that line."""
    log = tmp_path / "log"
    words = command("rat_continuous", *small("rat_continuous"), "--total-timesteps", 640)
    words += ["--env-id", "toy_envs:Boom-v0", "--output-dir", str(tmp_path)]
    variables = {k: v for k, v in environment().items() if k != "PYTHONUNBUFFERED"}
    with open(log, "w") as file:
        subprocess.run(words, env=variables, stdout=file, stderr=file, timeout=300)
    lines = log.read_text().splitlines()
    assert "steps: return" in lines[0]
    assert "simulator exploded" in lines[-1]


@every_script
def test_same_seed_same_csv(script, tmp_path):
    rows = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        where = ["--output-dir", tmp_path, "--run-name", name]
        train(script, *small(script), "--total-timesteps", 512, "--seed", seed, *where)
        rows.append([{**row, "sps": 0, "wall_seconds": 0} for row in read_csv(tmp_path / name)])
    assert rows[0] == rows[1] != rows[2]


def test_seeds_have_environments_of_their_own():
    """Also of runs with neighbouring seeds, and of a run that is resumed."""
    rat = importlib.import_module("rat_continuous")
    args = [rat.Args(seed=seed) for seed in range(20)]
    seeds = [rat.seed_generators(a, step) for a in args for step in (0, 2048)]
    assert len({s for part in seeds for s in part}) == 40 * 32
    assert all(0 <= s < 2**31 for part in seeds for s in part)
    assert seeds[0] == rat.seed_generators(args[0], 0)
    drawn = []
    for _ in range(2):
        rat.seed_generators(args[3], 0)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("vectorization", ["sync", "envpool"])
def test_environments_take_their_seeds(vectorization):
    if vectorization == "envpool":
        pytest.importorskip("envpool")
    rat = importlib.import_module("rat_continuous")
    args = rat.Args(env_id="Hopper-v4", num_envs=3, vectorization=vectorization)
    starts = [rat.make_envs(args, seeds)[1] for seeds in ([1, 2, 3], [3, 1, 2], [4, 5, 6])]
    np.testing.assert_array_equal(starts[0][[2, 0, 1]], starts[1])
    assert len(np.unique(np.concatenate(starts), axis=0)) == 6


@every_script
def test_resume_after_kill(script, tmp_path):
    """kill -9 at any moment loses at most an iteration, and no step is there twice."""
    where = ["--output-dir", tmp_path, "--run-name", "killed"]
    folder = tmp_path / "killed"
    arguments = [*small(script), "--total-timesteps", 64 * 2000, *where]
    for _ in range(3 if script == "rat_continuous" else 1):
        before = rows_of(folder)
        process = forked(train, script, *arguments)
        wait_for(lambda rows=before: rows_of(folder) > rows + 5)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before the kill"
        arguments = ["--resume", *where]
    rows = read_csv(folder)
    assert checkpoint(folder)["global_step"] >= int(rows[-1]["global_step"]) - 64
    total = 64 * (len(rows) + 10)
    with open(folder / "progress.csv", "a") as file:
        file.write(",".join(["999998", *list(rows[-1].values())[1:]]) + "\n")  # a later row
        file.write("999999,1.0,")  # and a torn one, as a crash of the machine leaves it
    time.sleep(1)  # TensorBoard reads event files in the order of the second in their names
    train(script, *arguments, "--total-timesteps", total)
    expected = list(range(64, total + 1, 64))
    rows = read_csv(folder)
    assert [int(row["global_step"]) for row in rows] == expected
    assert all(None not in row and None not in row.values() for row in rows)
    for tag, steps in steps_in_events(folder).items():
        assert steps == expected, tag
    content = (folder / "progress.csv").read_bytes()
    train(script, *arguments)  # a finished run has nothing left to do
    assert (folder / "progress.csv").read_bytes() == content


@every_script
def test_resume_restores_everything_but_the_environments(script, tmp_path):
    """The state after a resume with nothing left to train is the state before it."""
    where = ["--output-dir", tmp_path, "--run-name", "state"]
    train(script, *small(script), "--total-timesteps", 640, *where)
    before = checkpoint(tmp_path / "state")
    torch.manual_seed(99)
    train(script, "--resume", *where)
    after = checkpoint(tmp_path / "state")
    assert after.pop("args") == before.pop("args") | {"resume": True}
    assert after.pop("wall_seconds") > before.pop("wall_seconds") > 0
    assert before["global_step"] == 640
    if script.startswith("rat_"):
        assert any(g.any() for g in before["previous"])
    different = [key for key in before if not same(before[key], after[key])]
    assert not different


def test_a_stopped_run_has_a_checkpoint_of_its_last_row(tmp_path):
    """Ctrl-C, and SIGTERM, which ends it as kill -9 would."""
    where = ["--output-dir", tmp_path, "--run-name", "stopped"]
    folder = tmp_path / "stopped"
    process = start("rat_continuous", *SMALL, "--total-timesteps", 10**6, *where)
    wait_for(lambda: rows_of(folder) > 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert sentence(errors).startswith("rat_continuous: KeyboardInterrupt")
    assert "; continue with --resume --run-name stopped" in sentence(errors)
    assert int(read_csv(folder)[-1]["global_step"]) - checkpoint(folder)["global_step"] in (0, 64)
    total = checkpoint(folder)["global_step"] + 128
    train("rat_continuous", "--resume", "--total-timesteps", total, *where)
    steps = [int(row["global_step"]) for row in read_csv(folder)]
    assert steps == list(range(64, total + 1, 64))


def test_a_resumed_csv_is_cut_where_the_checkpoint_ends(tmp_path):
    """Also to nothing: the header is written again, and the size handed on is the file's."""
    rat = importlib.import_module("rat_continuous")
    path = tmp_path / "x" / "progress.csv"
    path.parent.mkdir()
    path.write_text("global_step,kl\n64,0.1\n")
    args = rat.Args(output_dir=str(tmp_path), run_name="x", resume=True)
    logger = rat.Logger(args, 0, 0)
    logger.write(64, {"losses/kl": 0.5, "charts/episodic_return": 1.0})
    assert logger.csv.tell() == path.stat().st_size
    assert path.read_text() == "global_step,kl,episodic_return\n64,0.5,1.0\n"


BROKEN = {
    "NanReward": "a reward of the environment is not finite",
    "NanObs": "an observation of the environment is not finite",
    "HugeReward": "not finite",
    "Boom": "ValueError: simulator exploded (toy_envs.py:",
}


@every_script
@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_run_down_loses_one_iteration(script, name, tmp_path, capsys):
    where = ["--output-dir", tmp_path, "--run-name", "broken"]
    arguments = [*small(script), "--env-id", f"toy_envs:{name}-v0", "--total-timesteps", 640]
    with pytest.raises(SystemExit) as stopped:
        train(script, *arguments, *where)
    assert stopped.value.code == 1
    said = sentence(capsys.readouterr().err)
    assert said.startswith(f"{script}: ")
    assert BROKEN[name] in said
    assert f"continue with --resume --run-name broken --output-dir {tmp_path}" in said
    saved = checkpoint(tmp_path / "broken")
    assert saved["global_step"] == 128 == int(read_csv(tmp_path / "broken")[-1]["global_step"])
    assert all(t.isfinite().all() for t in saved["agent"].values())


def test_a_mistake_in_a_fork_is_named_by_its_own_line(tmp_path, monkeypatch, capsys):
    """Not by that of the library which it breaks."""
    rat = importlib.import_module("rat_continuous")
    monkeypatch.setattr(rat.Actor, "forward", lambda self, obs: self.mean(obs[:, :2]))
    with pytest.raises(SystemExit):
        train("rat_continuous", *SMALL, "--output-dir", tmp_path, "--run-name", "fork")
    said = sentence(capsys.readouterr().err)
    assert "mat1 and mat2 shapes" in said
    assert "(test_runs.py:" in said


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    saves = []
    original = torch.save

    def save(state, file):
        saves.append(state["global_step"])
        if len(saves) == 3:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", save)
    where = ["--output-dir", tmp_path, "--run-name", "full"]
    with pytest.raises(SystemExit) as stopped:
        train("rat_continuous", *SMALL, "--total-timesteps", 640, *where)
    assert stopped.value.code == 1
    assert "No space left on device" in sentence(capsys.readouterr().err)
    assert checkpoint(tmp_path / "full")["global_step"] == saves[1] == 64


@every_script
def test_episodes_of_one_step(script, tmp_path):
    """Every other step only resets; blocks as small as they may be have data all the same."""
    arguments = [*small(script), "--env-id", "toy_envs:OneStep-v0", "--num-minibatches", 16]
    states = []
    for steps, name in ((64, "a"), (512, "b")):
        where = ["--output-dir", tmp_path, "--run-name", name]
        train(script, *arguments, "--total-timesteps", steps, *where)
        states.append(checkpoint(tmp_path / name)["agent"])
    short, long = states
    assert all(t.isfinite().all() for t in long.values())
    (name,) = (name for name in long if "log_std" in name)
    assert not torch.equal(short[name], long[name])


KL_LEAVES_ITS_BAND = [  # on both sides with these
    ("rat_continuous", 0.008, ["--kl-low", 0.008]),
    ("rat_continuous", 0.016, ["--kl-low", 0.016, "--kl-steps", 64 * 10]),
    ("rat_continuous", 0.004, ["--kaczmarz", "paper", "--learning-rate", 0.3, "--kl-steps", 1]),
    ("rat_shared", 0.008, ["--kl-low", 0.008]),
    ("rat_shared", 0.016, ["--kl-low", 0.016, "--kl-steps", 64 * 10]),
    ("rat_shared", 0.005, ["--kaczmarz", "release", "--learning-rate", 0.3]),
    ("npg_cg", 0.004, ["--learning-rate", 0.3]),
    ("npg_rank1", 0.004, ["--learning-rate", 0.3]),
    ("sophia_ppo", 0.004, ["--optimizer", "diag", "--learning-rate", 0.3]),
    ("sophia_ppo", 0.005, ["--optimizer", "diag", "--learning-rate", 0.3, "--shared"]),
    ("acktr", 0.004, ["--learning-rate", 0.003, "--damping", 0.001]),
    ("acktr", 0.005, ["--learning-rate", 0.003, "--damping", 0.001, "--shared"]),
]


@pytest.mark.parametrize(("script", "low", "options"), KL_LEAVES_ITS_BAND)
def test_learning_rate_follows_the_kl(script, low, options, tmp_path):
    """Lower by 1.5 above four times low, higher by 1.5 below it; in [1e-4, the first one].

    By the default rules low falls as 1/t after --kl-steps."""
    where = ["--output-dir", tmp_path, "--run-name", "x"]
    falls_after = 64 * 10 if 64 * 10 in options else np.inf
    train(script, *small(script), "--total-timesteps", 64 * 40, *options, *where)
    rows = [{n: float(v) for n, v in row.items()} for row in read_csv(tmp_path / "x")]
    factors = set()
    for row, following in itertools.pairwise(rows):
        bound = low * min(1, falls_after / row["global_step"])
        factor = 1.0
        if row["kl"] > 4 * bound:
            factor = 1 / 1.5
        elif row["kl"] < bound:
            factor = 1.5
        largest = np.inf if "--kl-low" in options else rows[0]["learning_rate"]
        expected = np.clip(row["learning_rate"] * factor, 1e-4, largest)
        assert following["learning_rate"] == pytest.approx(expected)
        factors.add(factor)
    assert factors == {1 / 1.5, 1, 1.5}


@pytest.mark.parametrize("kaczmarz", ["track", "paper"])
@pytest.mark.parametrize("script", ["rat_continuous", "rat_shared"])
def test_only_track_exceeds_its_first_step_size(script, kaczmarz, tmp_path):
    """Which is too small for any KL here."""
    where = ["--output-dir", tmp_path, "--run-name", "x", "--kaczmarz", kaczmarz]
    steps = ["--total-timesteps", 64 * 4, "--learning-rate", 1e-4, "--kl-low", 10.0]
    train(script, *small(script), *steps, *where)
    rates = [float(row["learning_rate"]) for row in read_csv(tmp_path / "x")]
    growth = 1.5 if kaczmarz == "track" else 1.0
    np.testing.assert_allclose(rates, 1e-4 * growth ** np.arange(4))


@pytest.mark.parametrize(
    ("learning_rate", "kl", "following"),
    [
        (0.03, 0.017, 0.02),
        (0.03, 0.01, 0.03),
        (0.03, 0.003, 0.045),
        (0.04, 0.003, 0.05),  # the largest
        (1.2e-4, 1.0, 1e-4),  # the least
        (5e-5, 1.0, 5e-5),  # not raised to the least
    ],
)
def test_step_size_stays_between_its_bounds(learning_rate, kl, following):
    rat = importlib.import_module("rat_continuous")
    assert rat.adapt_learning_rate(learning_rate, kl, 0.004, 0.05) == pytest.approx(following)


BAD = {
    "unknown environment": (["--env-id", "NoSuchTask-v1"], "NoSuchTask"),
    "unknown version": (["--env-id", "HalfCheetah-v99"], "version `v99`"),
    "unknown module": (["--env-id", "no_module:Task-v1"], "no_module"),
    "bad constructor": (["--env-id", "toy_envs:BadConstructor-v0"], "wrong_keyword"),
    "unbounded actions": (["--env-id", "toy_envs:UnboundedActions-v0"], "TransformAction"),
    "huge bounds": (["--env-id", "toy_envs:HugeActions-v0"], "finite bounds"),
    "wide bounds": (["--env-id", "toy_envs:WideActions-v0"], "finite bounds"),
    "integer actions": (["--env-id", "toy_envs:IntegerActions-v0"], "not floats"),
    "dictionary observations": (["--env-id", "toy_envs:DictObs-v0"], "FlattenObservation"),
    "image observations": (["--env-id", "toy_envs:ImageObs-v0"], "FlattenObservation"),
    "zero environments": (["--num-envs", "0"], "--num-envs 0"),
    "negative steps": (["--num-steps", "-5"], "--num-steps -5"),
    "one step": (["--num-steps", "1", "--num-envs", "64"], "--num-steps 1"),
    "blocks of one sample": (["--num-minibatches", "17"], "--num-minibatches 17"),
    "zero epochs": (["--update-epochs", "0"], "--update-epochs 0"),
    "zero minibatches": (["--num-minibatches", "0"], "--num-minibatches 0"),
    "no whole rollout": (["--total-timesteps", "63"], "give more, or fewer --num-envs"),
    "not an integer": (["--total-timesteps", "1e6"], "'1e6'"),
    "zero damping": (["--damping", "0"], "--damping 0"),
    "negative damping": (["--damping", "-0.1"], "--damping -0.1"),
    "nan learning rate": (["--learning-rate", "nan"], "--learning-rate nan"),
    "infinite learning rate": (["--learning-rate", "inf"], "--learning-rate inf"),
    "gamma 0": (["--gamma", "0"], "--gamma 0"),
    "gamma above 1": (["--gamma", "1.01"], "--gamma 1.01"),
    "negative seed": (["--seed", "-1"], "--seed -1"),
    "large seed": (["--seed", 2**31], "--seed 2147483648"),
    "envpool missing": (["--vectorization", "envpool"], "needs installed"),
    "resume without checkpoint": (["--resume", "--run-name", "nothing"], "nothing/checkpoint.pt"),
    "malformed id": (["--env-id", "a:b:c"], "check --env-id a:b:c"),
    "unknown choice": (["--vectorization", "sometimes"], "vectorization"),
    "long name": (["--run-name", "x" * 300], "name too long"),
}
if not torch.cuda.is_available():
    BAD["no cuda"] = (["--device", "cuda"], "CUDA")


def refused(capsys, script, *arguments):
    """The sentence with which the script refuses the arguments, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(script, *arguments)
    output = capsys.readouterr()
    assert (stopped.value.code, output.out) == (2, "")
    assert "Traceback" not in output.err
    return sentence(output.err)


@every_script
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(script, case, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)  # importing it fails as if there were none
    arguments, named = BAD[case]
    where = ["--total-timesteps", 640, "--output-dir", tmp_path / "runs"]
    assert named.lower() in refused(capsys, script, *small(script), *where, *arguments).lower()
    assert not list(tmp_path.glob("runs/*"))


def test_a_script_in_a_folder_like_a_library_names_its_own_line(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "lib" / "python"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text((ROOT / "rat_continuous.py").read_text())
    monkeypatch.syspath_prepend(folder)
    said = refused(capsys, "mine", "--env-id", "Nope-v0", "--output-dir", tmp_path / "runs")
    assert "(mine.py:" in said


@pytest.mark.parametrize("script", ["rat_continuous", "rat_shared"])
def test_more_memory_than_all_is_refused(script, tmp_path, capsys):
    said = refused(capsys, script, "--memory", 1.1, "--output-dir", tmp_path / "runs")
    assert "--memory 1.1 must be at most 1" in said


@every_script
def test_discrete_actions_run_or_are_refused(script, tmp_path, capsys):
    where = ["--total-timesteps", 2048, "--output-dir", tmp_path / "runs"]
    arguments = ["--env-id", "CartPole-v1", *where]
    if script == "rat_shared":
        train(script, *arguments, "--run-name", "discrete")
        assert rows_of(tmp_path / "runs" / "discrete") == 1
        return
    said = refused(capsys, script, *arguments)
    assert "Discrete(2)" in said
    assert "rat_shared.py" in said
    assert not (tmp_path / "runs").exists()


def test_a_network_that_the_tape_refuses_goes_on_with_vmap(tmp_path, monkeypatch, capsys):
    rat = importlib.import_module("rat_continuous")

    def normed(obs_dim, head, hidden):
        return nn.Sequential(nn.Linear(obs_dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), head)

    monkeypatch.setattr(rat, "mlp", normed)
    where = ["--total-timesteps", 64, "--output-dir", tmp_path, "--run-name", "vmap"]
    with pytest.raises(SystemExit) as stopped:
        train("rat_continuous", *SMALL, *where)
    said = sentence(capsys.readouterr().err)
    assert stopped.value.code == 1
    assert "LayerNorm" in said
    assert "--jacobian vmap" in said
    train("rat_continuous", *where, "--resume", "--jacobian", "vmap")
    assert rows_of(tmp_path / "vmap") == 1


@every_script
@pytest.mark.parametrize(
    ("env_id", "more"),
    [("HumanoidStand-v1", {}), ("Humanoid-v4", {"post_constraint": True})],
)
def test_envpool_gets_the_processs_threads_and_the_seeds(script, env_id, more, monkeypatch):
    made = []

    def make(env_id, **options):
        made.append(options)
        return gym.make_vec("InvertedPendulum-v5", options["num_envs"])

    monkeypatch.setitem(sys.modules, "envpool", types.SimpleNamespace(make_gymnasium=make))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    module = importlib.import_module(script)
    args = module.Args(env_id=env_id, num_envs=2, vectorization="envpool")
    module.make_envs(args, [7, 8])
    assert made == [{"num_envs": 2, "seed": [7, 8], "num_threads": 3} | more]


@every_script
def test_envpool_steps_like_gymnasium(script, tmp_path):
    pytest.importorskip("envpool")
    module = importlib.import_module(script)
    args = module.Args(env_id="InvertedPendulum-v5", num_envs=4, vectorization="envpool")
    envs, obs = module.make_envs(args, [1, 2, 3, 4])
    done, ends = np.zeros(4, dtype=bool), 0
    for _ in range(60):
        before = done
        obs, reward, terminated, truncated, _ = envs.step(np.full((4, 1), 3.0, np.float32))
        done, ends = terminated | truncated, ends + before.sum()
        assert (np.abs(obs[before]) <= 0.01 + 1e-9).all()  # a reset observation
        assert not done[before].any()
        assert (reward[before] == 0).all()
        assert (np.abs(obs[done, 1]) > 0.2).all()  # done comes with the true last one
    assert ends > 10
    steps = ["--total-timesteps", 128, "--vectorization", "envpool"]
    train(script, *small(script), *steps, "--output-dir", tmp_path)
    args = module.Args(env_id="Humanoid-v4", num_envs=2, vectorization="envpool")
    envs, _ = module.make_envs(args, [1, 2])
    obs = np.stack([envs.step(np.zeros((2, 17), np.float32))[0] for _ in range(30)])
    assert obs[..., 292:].any()  # contact forces, zero in EnvPool's v4 unless asked for


@pytest.fixture
def finished(tmp_path):
    """The arguments that name a run of 128 steps, and its folder."""
    where = ["--output-dir", tmp_path, "--run-name", "one"]
    train("rat_continuous", *SMALL, "--total-timesteps", 128, *where)
    return where, tmp_path / "one"


def test_a_run_folder_is_not_taken_for_another_run(finished, capsys):
    where, folder = finished
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        train("rat_continuous", *SMALL, *where)
    said = sentence(capsys.readouterr().err)
    assert stopped.value.code == 1
    assert "File exists" in said
    assert "continue with --resume --run-name one" in said
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_an_output_folder_that_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    where = ["--output-dir", tmp_path / folder, "--run-name", "x"]
    assert "Error: [Errno" in refused(capsys, "rat_continuous", *SMALL, *where)


@pytest.mark.parametrize("kind", ["half", "empty", "text", "other keys"])
def test_a_damaged_checkpoint_is_refused(kind, finished, capsys):
    where, folder = finished
    path = folder / "checkpoint.pt"
    content = path.read_bytes()
    broken = {"half": content[: len(content) // 2], "empty": b"", "text": b"not a checkpoint"}
    if kind in broken:
        path.write_bytes(broken[kind])
    else:
        torch.save({"weights": 1}, path)
    said = refused(capsys, "rat_continuous", "--resume", *where)
    assert "cannot use" in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"algorithm": "my_fork"}, "it is of my_fork, this is rat_continuous"),
        ({"args": {"old_option": 1}}, "old_option"),
    ],
)
def test_a_checkpoint_of_other_code_is_refused(change, named, finished, capsys):
    where, folder = finished
    torch.save(checkpoint(folder) | change, folder / "checkpoint.pt")
    assert named in refused(capsys, "rat_continuous", "--resume", *where)


def test_what_is_given_on_resume_changes(finished):
    where, folder = finished
    train("rat_continuous", "--resume", *where, "--total-timesteps", 256, "--gamma", 0.9)
    assert [int(row["global_step"]) for row in read_csv(folder)] == [64, 128, 192, 256]
    saved = checkpoint(folder)["args"]
    assert (saved["total_timesteps"], saved["num_envs"], saved["num_steps"]) == (256, 4, 16)
    config = json.loads((folder / "config.json").read_text())
    assert (config["total_timesteps"], config["gamma"]) == (256, 0.9)


@pytest.mark.parametrize(
    ("script", "option", "optimizer", "key"),
    [
        ("rat_continuous", "--critic-learning-rate", "optimizer", "lr"),
        ("npg_cg", "--critic-learning-rate", "optimizer", "lr"),
        ("npg_rank1", "--critic-learning-rate", "optimizer", "lr"),
        ("acktr", "--critic-learning-rate", "optimizer", "lr"),
        ("acktr", "--damping", "kfac", "damping"),
        ("acktr", "--kl-clip", "kfac", "kl_clip"),
        ("acktr", "--inverse-update-period", "kfac", "inverse_update_period"),
        ("acktr", "--ekfac", "kfac", "ekfac"),
        ("sophia_ppo", "--critic-learning-rate", "critic_optimizer", "lr"),
        ("sophia_ppo", "--learning-rate", "optimizer", "lr"),
    ],
)
def test_what_an_optimizer_is_given_on_resume_counts(script, option, optimizer, key, tmp_path):
    """Not what its saved state has, which config.json would not name."""
    where = ["--output-dir", tmp_path, "--run-name", "x"]
    train(script, *small(script), "--total-timesteps", 64, *where)
    value = ["--total-timesteps", 128] if key == "ekfac" else [7]  # its state must do for both
    train(script, "--resume", *where, option, *value)
    (group,) = checkpoint(tmp_path / "x")[optimizer]["param_groups"]
    assert group[key] == (True if key == "ekfac" else 7)


@pytest.mark.parametrize(
    ("script", "change"),
    [
        ("rat_shared", ["--kaczmarz", "release"]),
        ("rat_shared", ["--activation", "ReLU"]),
        ("sophia_ppo", ["--optimizer", "sophia"]),
    ],
)
def test_a_resume_cannot_change_the_method(script, change, tmp_path, capsys):
    """Neither its columns nor its state fit; nothing is lost."""
    where = ["--output-dir", tmp_path, "--run-name", "x"]
    train(script, *small(script), "--total-timesteps", 64, *where)
    files = {path: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    assert "give another --run-name" in refused(capsys, script, "--resume", *where, *change)
    assert {path: path.read_bytes() for path in (tmp_path / "x").iterdir()} == files


@pytest.mark.parametrize(("script", "options"), SETTINGS)
def test_settings_run(script, options, tmp_path):
    where = ["--output-dir", tmp_path, "--run-name", "x"]
    train(script, *small(script), "--total-timesteps", 256, *where, *options)
    assert rows_of(tmp_path / "x") == 4
