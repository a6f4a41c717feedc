"""The benchmark programs run and print what they promise."""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, environment, read_csv
from PIL import Image
from torch.distributions import Normal, kl_divergence

import rat_gaussian

sys.path.append(str(ROOT / "benchmark"))
import plot
import update_speed

CURVES = Path(__file__).parent / "curves"  # small runs whose numbers are easy to check
RESULTS = ROOT / "benchmark" / "results"
MUJOCO = ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Humanoid-v4"]
PAPER = ["Swimmer-v4", *MUJOCO[:3], "Ant-v5", "Humanoid-v4", "HumanoidStandup-v4"]
PROCGEN = ["starpilot", "bossfight", "bigfish"]
METHODS = {
    "rat": "rat_continuous.py",
    "rat_shared": "rat_shared.py",
    "npg": "npg_cg.py",
    "trpo": "npg_cg.py --line-search",
    "rank1": "npg_rank1.py",
    "acktr": "acktr.py",
    "acktr_shared": "acktr.py --shared",
    "ppo": "sophia_ppo.py",
    "sophia": "sophia_ppo.py --optimizer sophia",
    "diag": "sophia_ppo.py --optimizer diag",
}
SMALL = "--num-envs 4 --num-steps 16 --total-timesteps"  # 64 steps an iteration
PENDULUM = "InvertedPendulum-v5__rat__1"


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- update_speed.py, procgen_speed.py -------------------------------------------------------


def test_update_speed_prints_and_writes_every_row(tmp_path):
    program, file = str(ROOT / "benchmark" / "update_speed.py"), tmp_path / "speed.csv"
    command = [sys.executable, program, "--quick", "--csv", str(file)]
    options = {"capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, env=environment(), **options)
    assert result.returncode == 0, result.stderr
    table = result.stdout.splitlines()[4:]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table}
    ours = {name: cells for name, cells in rows.items() if not name.endswith("in the paper")}
    assert set(ours) == set(update_speed.METHODS)
    assert len(rows) == len(table) > len(ours)
    for (cell,) in ours.values():
        milliseconds, megabytes = cell.strip(" |)").split(" (")
        assert float(milliseconds) > 0
        assert float(megabytes) >= 0 and not megabytes.startswith("-")
    written = plot.read_rows(file, ["method", "update", "network"], ["milliseconds", "megabytes"])
    assert {row["method"] for row in written} < set(plot.LOOKS)
    cells = {}
    for row in written:
        cell = f"{row['milliseconds']:.1f} ({row['megabytes']:.0f})"
        cells.setdefault(row["update"], {})[row["network"]] = cell
    whole = [name for name in ours if not name.startswith("—")]  # not a part of an update
    assert list(cells) == [name.replace("`", "") for name in whole]
    for name in whole:
        row = cells[name.replace("`", "")]
        assert list(row) == list(update_speed.NETWORKS)[:1]
        assert list(row.values()) == [cell.strip(" |") for cell in ours[name]]


@pytest.mark.parametrize("name", ["update_speed", "procgen_speed"])
@pytest.mark.parametrize("option, value", [("repeats", 0), ("samples", 0), ("device", "cuda")])
def test_speed_programs_refuse_with_one_sentence(name, option, value, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        module.main(module.Args(**{option: value}))
    assert str(error.value).startswith(f"{name}: ")
    assert f"--{option} {value}" in str(error.value)


def test_update_speed_does_not_measure_for_a_file_that_it_cannot_write():
    with pytest.raises(SystemExit, match="there is no such folder"):
        update_speed.main(update_speed.Args(csv=Path("nope/x.csv")))


# ---- benchmark.sh ----------------------------------------------------------------------------


def start_benchmark(*arguments, script=ROOT / "benchmark.sh", **variables):
    """The process of benchmark.sh with these variables and no others."""
    names = ["SUITE", "SEEDS", "WORKERS", "METHODS", "ENVS", "EXTRA", "RUNS"]
    env = {"PYTHON": sys.executable, "VECTORIZATION": "sync"}
    for name, value in environment().items():
        if name not in [*names, *env] and not name.startswith("SLURM_"):
            env[name] = value
    for name, value in variables.items():
        env[name] = str(value)
    return subprocess.Popen(
        ["bash", str(script), *arguments],
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # Ctrl-C works
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def benchmark(*arguments, **variables):
    """Run benchmark.sh to its end."""
    process = start_benchmark(*arguments, **variables)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def dry_run(**variables):
    result = benchmark("--dry-run", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def interpreter(path, script):
    """A program to take for PYTHON; its last arguments are --output-dir FOLDER --run-name NAME."""
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


PIXELS = {"rat": "rat_procgen.py", "ppo": "rat_procgen.py --kaczmarz ppo"}


@pytest.mark.parametrize(
    "suite, envs, methods, seeds, options",
    [
        ("quick", [PENDULUM[:-8]], METHODS, [1], " --total-timesteps 60000 --vectorization sync"),
        ("mujoco", MUJOCO, METHODS, [11, 12, 13, 14, 15], " --vectorization sync"),
        ("paper", PAPER, METHODS, [11, 12, 13, 14, 15], " --vectorization sync"),
        ("procgen", PROCGEN, PIXELS, [11, 12, 13], ""),
    ],
)
def test_dry_run_lists_every_run_once_seed_by_seed(suite, envs, methods, seeds, options):
    expected = [
        f"OMP_NUM_THREADS=1 {sys.executable} {script} --env-id {env} --seed {seed}{options}"
        f" --output-dir runs --run-name {env}__{method}__{seed}"
        for seed in seeds
        for env in envs
        for method, script in methods.items()
        if seed < 14 or method in ("rat", "rat_shared", "trpo", "ppo")
    ]
    assert dry_run(SUITE=suite) == expected
    assert suite != "paper" or len(expected) == 266


def test_dry_run_takes_choices():
    choices = {"SEEDS": "4 5", "METHODS": "trpo", "ENVS": "Ant-v5", "RUNS": "x"}
    lines = dry_run(SUITE="paper", EXTRA="--gamma 0.9  --damping 1", **choices)
    assert [line.split("npg_cg.py ")[1] for line in lines] == [
        f"--line-search --env-id Ant-v5 --seed {seed} --vectorization sync --gamma 0.9 --damping 1"
        f" --output-dir x --run-name Ant-v5__trpo__{seed}"
        for seed in (4, 5)
    ]
    line = dry_run(METHODS="rat", ENVS="module/Task-v0")[0]
    assert line.endswith("--run-name module_Task-v0__rat__1")
    installed = importlib.util.find_spec("envpool") is not None
    line = dry_run(METHODS="rat", VECTORIZATION="")[0]
    assert ("--vectorization envpool" in line) == installed


def test_command_lines_are_the_scripts_own():
    read = 0
    for line in dry_run(SUITE="paper", SEEDS=3):
        script, *arguments = line.split()[2:]
        name = script.removesuffix(".py")
        if name in SCRIPTS:
            args = tyro.cli(importlib.import_module(name).Args, args=arguments)
            assert args.run_name == f"{args.env_id}__{args.run_name.split('__')[1]}__3"
            read += 1
    assert read >= 5 * len(PAPER)


@pytest.mark.parametrize(
    "variables, word",
    [
        ({"SUITE": "all"}, "SUITE=all"),
        ({"METHODS": "rat nope"}, "nope"),
        ({"WORKERS": "0"}, "WORKERS=0"),
        ({"PYTHON": "/nope"}, "PYTHON=/nope"),
        ({"SLURM_ARRAY_TASK_ID": "10"}, "task 10"),
    ],
)
def test_bad_variables_are_one_sentence(variables, word, tmp_path):
    result = benchmark(RUNS=tmp_path, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith("benchmark.sh: ") and result.stderr.count("\n") == 1
    assert word in result.stderr


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_the_comment_at_the_top(option):
    result = benchmark(option, SUITE="nonsense")
    assert (result.returncode, result.stderr) == (0, "")
    lines = (ROOT / "benchmark.sh").read_text().split("\nset ")[0].splitlines()[1:]
    assert result.stdout.splitlines() == [line[2:] for line in lines]
    assert result.stdout.startswith("The benchmark: ") and "  PYTHON  " in result.stdout


def test_other_arguments_are_refused():
    result = benchmark("--nonsense")
    assert result.returncode == 2
    assert "--nonsense is not understood, the arguments are --dry-run and --help" in result.stderr


def test_git_ignores_what_the_commands_of_the_readme_write():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    written = ["curves.png", "out.mp4", "runs/a/progress.csv", "benchmark/__pycache__/plot.pyc"]
    kept = ["benchmark/results/new.png", "docs/new.png"]
    command = ["git", "check-ignore", "--no-index", *written, *kept]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == written


def test_the_interpreter_is_sought_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in dry_run(PYTHON="./benchmark.sh"):
        assert line.startswith("OMP_NUM_THREADS=1 ./benchmark.sh ")


def test_finishes_reports_a_failure_and_skips(tmp_path):
    """Paths with spaces, as every path of a user may have."""
    planted = '[[ $* == *Planted* ]] && { echo "it broke" >&2; exit 3; }'
    python = interpreter(tmp_path / "my python", f'{planted}; exec {sys.executable} "$@"')
    runs = tmp_path / "my runs"
    small = {"EXTRA": f"{SMALL} 128", "METHODS": "rank1", "RUNS": runs, "PYTHON": python}
    small["ENVS"] = "Planted-v0 InvertedPendulum-v5"
    result = benchmark(**small, WORKERS=2)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "1 finished, 0 skipped, 1 failed, of 2 runs"
    log = runs / "log" / "Planted-v0__rank1__1.log"
    assert result.stderr == f"FAILED: {log.stem}: exit code 3, {log}: it broke\n"
    rows = read_csv(runs / "InvertedPendulum-v5__rank1__1")
    assert [row["global_step"] for row in rows] == ["64", "128"]

    before = modification_times(tmp_path)
    result = benchmark(**small | {"ENVS": "InvertedPendulum-v5"})
    last = "0 finished, 1 skipped, 0 failed, of 1 runs"
    assert (result.returncode, result.stdout.splitlines()) == (0, [last])
    assert modification_times(tmp_path) == before

    copy = shutil.copy(ROOT / "benchmark.sh", tmp_path / "slurm_script")  # as sbatch does
    result = benchmark(script=copy, **small, SLURM_ARRAY_TASK_ID=1, SLURM_SUBMIT_DIR=ROOT)
    assert (result.returncode, result.stdout.splitlines()) == (0, [last])


def test_a_dry_run_can_be_pasted_where_paths_have_spaces():
    line = dry_run(METHODS="rat", RUNS="my runs")[0]
    words = subprocess.check_output(["bash", "-c", f"{line.replace(sys.executable, 'echo')}"])
    assert b"--output-dir my runs --run-name" in words
    assert "--output-dir my\\ runs --run-name" in line


@pytest.mark.parametrize(
    "output, reason",
    [
        ("a line\nthe last one", "the last one"),
        (
            "╭─ Value error ───────╮\n"
            "│ Error parsing Args: --n 5 │\n"
            "│ must be at most 3.  │\n"
            "│ ─────────────────── │\n"
            "│ Argument helptext:  │\n"
            "│ ─────────────────── │\n"
            "│ For help, --help    │\n"
            "╰─────────────────────╯\n",
            "Error parsing Args: --n 5 must be at most 3.",
        ),
        ("╭──╮\n│ old │\n╰──╯\nrat: what broke later.", "rat: what broke later."),
    ],
)
def test_the_reason_of_a_failure_is_the_sentence(output, reason, tmp_path):
    text = tmp_path / "output"
    text.write_text(output)
    python = interpreter(tmp_path / "python", f"cat '{text}'; exit 2")
    result = benchmark(METHODS="rat", RUNS=tmp_path / "runs", PYTHON=python)
    log = tmp_path / "runs" / "log" / f"{PENDULUM}.log"
    assert result.stderr == f"FAILED: {PENDULUM}: exit code 2, {log}: {reason}\n"


def test_tyros_own_refusal_is_shown(tmp_path):
    result = benchmark(METHODS="rat", RUNS=tmp_path, EXTRA="--no-such-option 1")
    assert result.stderr.endswith(": Unrecognized options: --no-such-option, 1\n")


def test_workers_run_side_by_side_with_one_thread(tmp_path):
    log = tmp_path / "log"
    folder = '"${@: -3:1}/${@: -1}"'
    fake = f'echo "start $OMP_NUM_THREADS" >>{log}; sleep 1; echo end >>{log}; mkdir -p {folder}'
    python = interpreter(tmp_path / "python", fake)
    runs = tmp_path / "runs"
    result = benchmark(WORKERS=3, METHODS="rat npg ppo diag", RUNS=runs, PYTHON=python)
    assert (result.returncode, result.stderr) == (0, "")
    lines = log.read_text().splitlines()
    assert lines[:3] == ["start 1"] * 3
    assert sorted(lines) == ["end"] * 4 + ["start 1"] * 4
    starts = [i for i, line in enumerate(lines) if line == "start 1"]
    assert lines.index("end") < starts[3]


def test_runs_where_files_cannot_be_locked(tmp_path):
    interpreter(tmp_path / "flock", "exit 65")  # as on file systems without locks
    python = interpreter(tmp_path / "python", 'mkdir -p "${@: -3:1}/${@: -1}"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = benchmark(METHODS="rat", RUNS=tmp_path / "runs", PYTHON=python, PATH=path)
    assert result.returncode == 0 and "1 finished, 0 skipped, 0 failed" in result.stdout


def test_resumes_after_a_kill(tmp_path):
    small = {"METHODS": "rat", "RUNS": tmp_path}
    folder = tmp_path / PENDULUM
    folder.mkdir()
    (folder / "config.json").write_text("{}")  # a crash before the first checkpoint leaves this
    process = start_benchmark(**small, EXTRA=f"{SMALL} 100000000")
    try:
        deadline = time.time() + 120
        while not (folder / "progress.csv").exists() or len(read_csv(folder)) < 3:
            assert time.time() < deadline and process.poll() is None, "the run did not start"
            time.sleep(0.05)
        result = benchmark(**small, EXTRA=f"{SMALL} 64")
        assert result.returncode == 0
        assert result.stdout.splitlines()[0] == f"busy: {folder.name} runs in another process"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and f"stopped: {folder.name}\n" in out
    total = 64 * (len(read_csv(folder)) + 2)
    result = benchmark(**small, EXTRA=f"{SMALL} {total}")
    assert result.returncode == 0, result.stderr
    assert f"started: {folder.name} (1 of 1, resumed)" in result.stdout
    steps = [int(row["global_step"]) for row in read_csv(folder)]
    assert steps == list(range(64, total + 1, 64))


@pytest.mark.parametrize("left", ["progress.csv", "finished"])
def test_results_without_a_checkpoint_are_kept(left, tmp_path):
    folder = tmp_path / PENDULUM
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / left).write_text("of a run that has ended")
    before = modification_times(folder)
    result = benchmark(METHODS="rat", RUNS=tmp_path)
    assert result.returncode == 1
    assert str(folder) in result.stderr and result.stderr.count("\n") == 1
    assert modification_times(folder) == before


@pytest.mark.parametrize(
    ("changed", "last"),
    [
        ({"EXTRA": "--total-timesteps 200"}, "1 finished, 0 skipped, 0 failed, of 1 runs"),
        ({"EXTRA": "--gamma 0.9"}, "0 finished, 0 skipped, 1 failed, of 1 runs"),
        ({}, "0 finished, 1 skipped, 0 failed, of 1 runs"),
    ],
)
def test_an_ended_run_goes_on_with_more_steps_but_not_with_other_options(changed, last, tmp_path):
    """Else its rows would stand under options that they were not made with."""
    python = interpreter(tmp_path / "my python", 'mkdir -p "${@: -3:1}/${@: -1}"')
    variables = {"METHODS": "rat", "RUNS": tmp_path / "runs", "PYTHON": python}
    assert benchmark(**variables).returncode == 0
    before = (tmp_path / "runs" / PENDULUM / "finished").read_text()
    result = benchmark(**variables | changed)
    assert result.stdout.splitlines()[-1] == last
    if "1 failed" in last:
        assert f"{PENDULUM} is of another command, take another RUNS: {before}" in result.stderr
        assert (tmp_path / "runs" / PENDULUM / "finished").read_text() == before


# ---- plot.py ---------------------------------------------------------------------------------


def show(capsys, *arguments):
    """What plot.py prints."""
    plot.main(tyro.cli(plot.Args, args=[*map(str, arguments)]))
    return capsys.readouterr().out


def refusal(capsys, *arguments):
    """The one sentence with which plot.py ends."""
    with pytest.raises(SystemExit) as error:
        show(capsys, *arguments)
    errors = capsys.readouterr().err
    assert error.value.code == 2
    assert errors.startswith("plot: ") and errors.count("\n") == 1
    return errors


def write_run(folder, steps, returns, total, **known):
    """A run folder as the scripts leave it, steps of ten."""
    folder.mkdir(parents=True)
    env_id, method, seed = [*folder.name.split("__"), "", ""][:3]
    config = {"algorithm": method, "env_id": env_id, "seed": seed}
    config |= {"num_envs": 2, "num_steps": 5, "total_timesteps": total} | known
    (folder / "config.json").write_text(json.dumps(config))
    rows = ["global_step,episodic_return,wall_seconds,kl\n"]
    for step, value in zip(steps, returns, strict=True):
        rows.append(f"{step},{value},{step},0.123456789\n")
    (folder / "progress.csv").write_text("".join(rows))
    return folder


def one_run(method="rat", env_id="Task-v0", seed="1", steps=(0, 10, 20), returns=(1, 2, 3)):
    """A run in memory."""
    columns = {"global_step": np.array(steps, float), "episodic_return": np.array(returns, float)}
    return plot.Run("", env_id, method, seed, columns, 20, 20)


def drawn_panels(monkeypatch, draw):
    """The axes of the picture that draw() writes."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, _: figures.append(figure))
    draw()
    plot.plt.close("all")
    return figures[0].axes


def test_plot_counts_and_draws(tmp_path, capsys):
    pictures = [tmp_path / name for name in ("curves.png", "time.png", "profile.png")]
    options = ["--out", pictures[0], "--wall-clock", pictures[1], "--profile", pictures[2]]
    lines = show(capsys, *options, *CURVES.iterdir()).splitlines()
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert lines[0] == (
        "Not ended, left out (--partial counts them): HalfCheetah-v4__ppo__3 (0.50M steps)."
    )
    # Hopper: 2000 and 3000, error sqrt(500000 / 2)
    # HalfCheetah: 4629.2 and 9258.4; 1157.3 and 3471.9
    assert "| rat | 2500 ± 500 (2) | 6944 ± 2315 (2) |" in lines
    assert "| ppo | 1167 (1) | 2315 ± 1157 (2) |" in lines
    assert "| paper's RAT, 10M | 2335 ± 525 | 4629 ± 287 |" in lines
    # over 2334.6 and 4629.2: 0.857, 1, 2 and 0.5, 0.25, 0.75; seed 2 of Hopper is rat's alone
    assert "| rat | 1.286 | 3 |" in lines and "| ppo | 0.500 | 3 |" in lines
    counted = "the seeds that every method has: Hopper-v4 (seeds 1), HalfCheetah-v4 (seeds 1, 2)."
    assert lines[-1] == f"Reference: paper's RAT, 10M. Counted, {counted}"
    lines = show(capsys, *CURVES.glob("HalfCheetah*")).splitlines()
    assert "| rat | 1.500 [1.000, 2.000] | 2 |" in lines  # resamples of two seeds: 1, 1.5, 2
    assert "| ppo | 0.500 [0.250, 0.750] | 2 |" in lines


def test_plot_compares_partial_runs_where_the_shortest_stands(capsys):
    lines = show(capsys, "--partial", "--every-seed", *CURVES.iterdir()).splitlines()
    assert lines[0] == "Not ended, counted all the same: HalfCheetah-v4__ppo__3 (0.50M steps)."
    # mean of 500, 1000 and 300; variance 130000, error sqrt(130000 / 3)
    assert "| ppo | 1167 (1167) | 600 ± 208 (500, 1000, 300) at 0.50M |" in lines


def test_no_return_is_made_up_where_a_seed_had_none_yet(tmp_path, capsys):
    """Seed 2 has its first return after the last row of seed 1."""
    steps = range(10, 101, 10)
    first = write_run(tmp_path / "Task-v0__a__1", steps[:5], range(5), 100)
    late = [math.nan] * 7 + [70, 80, 90]
    second = write_run(tmp_path / "Task-v0__a__2", steps, late, 100)
    other = write_run(tmp_path / "Task-v0__b__1", steps, range(10), 100)
    out = show(capsys, "--partial", "--out", tmp_path / "x.png", first, second, other)
    assert "Not compared, a seed ends before another's first return: Task-v0 a.\n" in out
    assert "| a | - |" in out and "| b | 9.0 (1) |" in out
    assert "Not drawn, a seed ends before another's first return: Task-v0 a.\n" in out
    assert plot.align([plot.read_run(first), plot.read_run(second)], "global_step") is None


def test_seeds_are_compared_from_where_all_have_a_return():
    late = one_run(returns=(math.nan, 4, 6))
    grid, returns = plot.align([one_run(), late], "global_step")
    assert (grid[0], grid[-1]) == (10, 20)
    assert np.allclose(returns[:, [0, -1]], [[2, 3], [4, 6]])


@pytest.mark.parametrize("folder", ["runs", "runs/*"])
def test_plot_takes_a_folder_of_runs(folder, tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"Task-v0__a__{seed}", [10, 20], [1, 3], 20)
    (tmp_path / "runs" / "log").mkdir()  # benchmark.sh's
    (tmp_path / "runs" / "log" / "Task-v0__a__1.log").write_text("finished\n")
    for name, file in (("Task-v0__b__1", "config.json"), ("mine", "progress.csv")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / file).write_text("")  # killed at its very start, torn
    out = show(capsys, *tmp_path.glob(folder))
    assert "| a | 3.0 ± 0.0 (2) |" in out
    left_out = [str(tmp_path / "runs" / name) for name in ("Task-v0__b__1", "mine")]
    if folder != "runs":
        left_out.insert(1, str(tmp_path / "runs" / "log"))  # asked for by its name
    sentence = "No run (progress.csv with config.json), left out"
    assert out.splitlines()[0] == f"{sentence}: {', '.join(left_out)}."


def test_a_run_of_several_processes_has_ended_where_no_rollout_of_all_fits(tmp_path):
    for last in (80, 160):
        run = plot.read_run(write_run(tmp_path / f"Task-v0__a__{last}", [80, last], [1, 2], 239))
        assert run.ended == (last == 160)


@pytest.mark.parametrize(
    "name, algorithm, method",
    [
        ("fork", "rank1", "rank1"),
        ("my__free__name", "npg_cg", "npg_cg"),
        ("pkg_Task-v0__trpo__7", "npg_cg", "trpo"),
        ("pkg_Task-v0__npg_cg__3__1700.5", "npg_cg", "npg_cg"),
        ("pkg:Task-v0__trpo__3", "npg_cg", "trpo"),
    ],
)
@pytest.mark.parametrize("env_id", ["pkg/Task-v0", "pkg:Task-v0"])
def test_a_run_is_what_its_config_says(name, algorithm, method, env_id, tmp_path, capsys):
    """All but the method in the name of a folder: one script makes several methods."""
    known = {"env_id": env_id, "algorithm": algorithm, "seed": 3}
    run = write_run(tmp_path / "runs" / name, [10, 20], [1, 2], 20, **known)
    for path in (run, tmp_path / "runs"):
        out = show(capsys, path)
        assert "(number of seeds) | pkg_Task-v0 |" in out and f"| {method} | 2.0 (1) |" in out
    show(capsys, "--thin", tmp_path / "thin", run)
    (path,) = (tmp_path / "thin").iterdir()
    assert path.name == f"pkg_Task-v0__{method}__3.csv"


def test_a_run_folder_may_be_the_current_one(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "Task-v0__trpo__1", [10, 20], [1, 2], 20, algorithm="npg_cg")
    monkeypatch.chdir(run)
    assert "| trpo | 2.0 (1) |" in show(capsys, ".")


def test_two_runs_of_one_seed_are_refused_until_one_is_renamed(tmp_path, capsys):
    known = {"algorithm": "rat_continuous", "env_id": "Task-v0", "seed": 1}
    for name in ("first", "second"):
        write_run(tmp_path / name, [10, 20], [1, 2], 20, **known)
    sentence = refusal(capsys, tmp_path)
    twins = "first and second are the same seed of the same method"
    assert sentence == f"plot: {twins}: name one, or rename one Task-v0__ANOTHER__1.\n"
    assert "| rat_continuous | 2.0 (1) |" in show(capsys, tmp_path / "first")
    (tmp_path / "second").rename(tmp_path / "Task-v0__ANOTHER__1")
    out = show(capsys, tmp_path)
    assert "| rat_continuous | 2.0 (1) |" in out and "| ANOTHER | 2.0 (1) |" in out


def test_a_config_that_is_none_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "mine", [10, 20], [1, 2], 20)
    (run / "config.json").write_text("{}")
    assert f"{run / 'config.json'} cannot be read (KeyError('env_id'))" in refusal(capsys, run)


def test_a_sentence_below_the_tables_only_where_it_says_something(tmp_path, capsys):
    folders = [write_run(tmp_path / f"Task-v0__a__{i}", [10, 20], [1, 2], 20) for i in (1, 2)]
    out = show(capsys, *folders)
    assert "`at`" not in out and "one seed" not in out
    needs = "it needs a published return and a seed that every method has."
    assert out.splitlines()[-1] == f"No interquartile mean for Task-v0: {needs}"
    write_run(tmp_path / "Task-v0__b__1", range(10, 60, 10), range(5), 50)
    out = show(capsys, tmp_path)
    assert "`at`: steps where" in out and "No error and no band where there is one seed." in out


@pytest.mark.parametrize(
    "step, text", [(960, "960"), (99999, "99,999"), (100000, "0.10M"), (7.62e6, "7.62M")]
)
def test_steps_have_digits_enough(step, text):
    assert plot.short(step) == text


def test_no_table_where_a_picture_cannot_be_written(tmp_path, capsys):
    run = CURVES / "Hopper-v4__rat__1.csv"
    for option in ("--out", "--wall-clock", "--profile"):
        with pytest.raises(SystemExit):
            show(capsys, option, tmp_path / "nope" / "x.png", run)
        assert capsys.readouterr().out == ""


def test_plot_ends_quietly_where_its_reader_has_ended():
    """As in `plot.py runs | head`: by the signal, as head's other writers do."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "benchmark" / "plot.py", CURVES]
    options = {"stdout": writer, "stderr": subprocess.PIPE, "env": environment(), "timeout": 300}
    result = subprocess.run(command, **options)
    os.close(writer)
    assert (result.returncode, result.stderr) == (-signal.SIGPIPE, b"")


def test_plot_takes_a_folder_of_csv_files(tmp_path, capsys):
    for path in CURVES.glob("Hopper*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "README.md").write_text("what these are")
    (tmp_path / "evaluation.csv").write_text("run,return\n")
    assert "| rat | 2500 ± 500 (2) |" in show(capsys, tmp_path)


def test_plot_thins_run_folders(tmp_path, capsys):
    folders = []
    for seed, last in ((1, 5000), (2, 4000)):
        steps = range(10, last + 1, 10)
        returns = [step / 4 if step >= 30 else math.nan for step in steps]
        folder = tmp_path / f"Task-v0__a__{seed}"
        folders.append(write_run(folder, steps, returns, 5009))
        with open(folder / "progress.csv", "a") as file:
            file.write("6000,1")  # torn by a crash
    thin = tmp_path / "thin"
    assert "Task-v0__a__2 (4,000 steps)" in show(capsys, "--thin", thin, *folders)
    (path,) = thin.iterdir()
    rows = path.read_text().splitlines()
    assert len(rows) == 201
    assert rows[0] == "global_step,episodic_return,wall_seconds,kl"
    assert rows[-1] == "5000,1250,5000,0.123457"
    assert "| a | 1250 (1) |" in show(capsys, path)
    assert "| a | 1000 ± 0 (2) at 4,000 |" in show(capsys, "--partial", *folders)


def test_plot_intervals():
    returns = np.array([[0.0, 5.0], [1.0, 5.0]])  # [seeds, points]
    # a quarter of the resamples has either seed twice
    assert np.allclose(plot.interval([returns], plot.mean), [[0, 5], [1, 5]])
    assert plot.interval([returns[:1]], plot.mean) is None
    tasks = [np.array([0.0, 1.0]), np.array([3.0, 3.0])]
    assert np.allclose(plot.interval(tasks, plot.mean), [1.5, 2])


def test_the_lowest_panel_of_each_column_has_a_label(monkeypatch):
    groups = {f"T{i}-v0": {"rat": [one_run(env_id=f"T{i}-v0")]} for i in range(5)}
    axes = drawn_panels(
        monkeypatch, lambda: plot.picture_of_curves(Path("x.png"), "global_step", groups, [])
    )
    assert [bool(axis.get_xlabel()) for axis in axes] == [False, False, True, True, True]


@pytest.mark.parametrize("width", [4.2, 8.4, 10])
def test_the_legend_of_all_methods_lies_inside_the_picture(width):
    figure, _ = plot.plt.subplots(figsize=(width, 3.2), layout="constrained")
    looks = plot.choose_looks([*METHODS, "release_separate"])
    plot.legend(figure, looks, [])
    figure.draw_without_rendering()
    drawn = figure.legends[0].get_window_extent()
    whole = figure.bbox
    plot.plt.close(figure)
    assert whole.x0 <= drawn.x0 and drawn.x1 <= whole.x1 and whole.y0 <= drawn.y0


def test_a_method_has_one_colour_in_every_picture():
    assert list(plot.LOOKS)[: len(METHODS)] == list(METHODS)
    together = plot.choose_looks([*plot.LOOKS, "mine"])
    for method, look in plot.LOOKS.items():
        assert plot.choose_looks(["mine", method])[method] == together[method] == look
    assert together["track"][1:] == together["rat"][1:]
    assert together["rat_paper"][1:] == together["paper"][1:]
    assert together["release_separate"].color == together["release"].color
    assert together["rat_continuous"] == together["rat"]
    own = [*METHODS, "paper", "off", "release", "mine"]
    assert len({together[method].color for method in own}) == len(own)


def test_unknown_methods_have_looks_of_their_own():
    looks = plot.choose_looks([f"mine{i}" for i in range(16)])
    assert len({look[1:3] for look in looks.values()}) == 16
    known = {look.color for look in plot.LOOKS.values()}
    assert not known & {look.color for look in looks.values()}
    with pytest.raises(SystemExit):
        plot.choose_looks([f"mine{i}" for i in range(17)])


def test_published_values_are_lines_in_the_panels_of_their_tasks(monkeypatch, capsys):
    arguments = ["--lines", "RAT", "PPO", "--out", "x.png", *CURVES.glob("*__rat__*")]
    axes = drawn_panels(monkeypatch, lambda: show(capsys, *arguments))
    values = []
    for axis in axes[:2]:
        flat = [line for line in axis.lines if len(set(line.get_ydata())) == 1]
        values.append({line.get_color(): line.get_ydata()[0] for line in flat})
    rat = plot.LOOKS["rat"].color
    ppo = plot.LOOKS["ppo"].color
    assert values == [{rat: 2334.6, ppo: 2346.8}, {rat: 4629.2, ppo: 4146.0}]


def test_interquartile_means_fill_the_empty_panels(monkeypatch, tmp_path, capsys):
    tasks = ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Swimmer-v4", "Ant-v5"]
    for task in tasks:
        write_run(tmp_path / f"{task}__rat__1", [10, 20], [1, 2334.6], 20)
    for names, panels in ((tasks, 6), (tasks[:3], 3)):
        paths = [tmp_path / f"{name}__rat__1" for name in names]
        axes = drawn_panels(monkeypatch, lambda p=paths: show(capsys, "--out", "x.png", *p))
        assert len(axes) == panels
    axes = drawn_panels(monkeypatch, lambda: show(capsys, "--out", "x.png", tmp_path))
    # 2334.6 over 271.6, 2334.6, 4629.2, 3156.0 and 2926.6: the middle three of five
    middle = np.mean(np.divide(2334.6, [2334.6, 3156.0, 2926.6]))
    assert np.allclose(axes[-1].lines[0].get_xdata(), middle)
    assert axes[-1].get_xlabel().endswith("final return / paper's RAT, 10M")
    write_run(tmp_path / "Unknown-v0__rat__1", [10, 20], [1, 2], 20)  # no reference: no mean of all
    (tmp_path / "Ant-v5__rat__1" / "progress.csv").unlink()
    axes = drawn_panels(monkeypatch, lambda: show(capsys, "--out", "x.png", tmp_path))
    assert len(axes) == 5


def test_titles_are_those_given(monkeypatch, capsys):
    paths = list(CURVES.glob("*__rat__*"))
    arguments = ["--titles", "ahead", "level", "--out", "x.png", *paths]
    axes = drawn_panels(monkeypatch, lambda: show(capsys, *arguments))
    assert [axis.get_title() for axis in axes] == ["ahead", "level"]
    sentence = refusal(capsys, "--titles", "ahead", "--out", "x.png", *paths)
    assert "--titles are 1, the panels 2: Hopper-v4, HalfCheetah-v4" in sentence


def test_update_speed_is_drawn(monkeypatch, capsys):
    file = RESULTS / "update_speed.csv"
    axes = drawn_panels(monkeypatch, lambda: show(capsys, "--speed", "x.png", file))
    rows = plot.read_rows(file, ["update", "network"], ["milliseconds", "megabytes"])
    assert [axis.get_title() for axis in axes] == list(dict.fromkeys(r["network"] for r in rows))
    for i, update in enumerate(dict.fromkeys(row["update"] for row in rows)):
        widths = [axis.patches[i].get_width() for axis in axes]
        assert widths == [row["milliseconds"] for row in rows if row["update"] == update]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["README.md"], "README.md is not named ENVIRONMENT__METHOD__SEED.csv, rename it"),
        (["nope/A-v0__a__1"], "nope/A-v0__a__1 does not exist"),
        (["runs/nope*"], "runs/nope* does not exist: name run folders, CSV files or a folder"),
        ([CURVES / "Hopper-v4__rat__1.csv"] * 2, "are the same seed"),
        (["--out", "x.nonsense", CURVES / "Hopper-v4__rat__1.csv"], "x.nonsense cannot be written"),
        (["--out", "/nope/x.png", CURVES / "Hopper-v4__rat__1.csv"], "/nope/x.png cannot be"),
        (["--lines", "nonsense", "--", CURVES], "--lines nonsense is in no published row"),
        (["--speed", "x.png", CURVES / "Hopper-v4__rat__1.csv"], "its columns must be"),
        (["--speed", "x.png", "a.csv", "b.csv"], "--speed takes one CSV file"),
        ([], "there is no run"),
        ([ROOT / "tests" / "toys"], "there is no run"),
    ],
)
def test_plot_refuses_with_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in refusal(capsys, *arguments)


def test_plot_hints_at_partial_where_no_run_has_ended(tmp_path, capsys):
    write_run(tmp_path / "Task-v0__a__1", [10, 20], [1, 2], 30)
    assert "no run has ended, --partial shows them" in refusal(capsys, tmp_path)
    assert "| a | 2.0 (1) |" in show(capsys, "--partial", tmp_path)


def test_a_table_with_text_for_a_number_is_named(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text("update,network,method,milliseconds\na,b,c,x\n")
    sentence = refusal(capsys, "--speed", "x.png", path)
    assert f"{path} cannot be read (could not convert string to float: 'x')" in sentence


HEAD = "global_step,episodic_return,wall_seconds\n"


@pytest.mark.parametrize("text", ["global_step,x\n1,2\n", f"{HEAD}1,a,1\n", f"{HEAD}1,1\n"])
def test_a_file_that_is_no_run_is_named(text, tmp_path, capsys):
    path = tmp_path / "Task-v0__a__1.csv"
    path.write_text(text)
    assert f"{path} cannot be read" in refusal(capsys, path)


# ---- rat_gaussian.py -------------------------------------------------------------------------


def test_gaussian_closed_forms():
    """Gradient of J and inverse Hessian of the KL divergence, by automatic differentiation."""
    args = rat_gaussian.Args(optimum=0.7, entropy=0.4)
    theta = torch.tensor([-0.3, 0.2], dtype=torch.float64)

    def objective(theta):
        mu, log_sigma = theta
        reward = -((mu - args.optimum) ** 2 + (2 * log_sigma).exp()) / 2
        return reward + args.entropy * log_sigma

    def divergence(other):
        policy = Normal(theta[0], theta[1].exp())
        return kl_divergence(policy, Normal(other[0], other[1].exp()))

    gradient = torch.autograd.functional.jacobian(objective, theta)
    fisher = torch.autograd.functional.hessian(divergence, theta)
    mu, sigma = theta[0], theta[1].exp()
    assert torch.allclose(rat_gaussian.vanilla_gradient(args, mu, sigma), gradient)
    natural = rat_gaussian.exact_natural_gradient(args, mu, sigma)
    assert torch.allclose(natural, torch.linalg.solve(fisher, gradient))
    torch.manual_seed(0)
    args.samples = 400_000
    scores, y = rat_gaussian.sampled_scores(args, mu, sigma)
    assert torch.allclose(scores.T @ y / len(y), gradient, atol=0.02)
    assert torch.allclose(scores.T @ scores / len(y), fisher, atol=0.02)


def similarities(to, **options):
    """Cosine of each field to one of them, point by point."""
    _, gradients = rat_gaussian.fields(rat_gaussian.Args(points=4, samples=128, **options))
    return rat_gaussian.cosines(gradients, to)


def test_gaussian_similarities():
    assert similarities("empirical natural")["RAT"].min() >= 0.99
    # quadratic returns without noise are linear in the scores: a sample determines the gradient
    assert similarities("exact natural", noise=0.0, damping=1e-6)["RAT"].min() > 0.999
    exact = similarities("exact natural")
    assert exact["RAT"].mean() > exact["vanilla"].mean() + 0.05
    assert similarities("vanilla", noise=0.0, damping=1e4)["RAT"].mean() > 0.95


def test_gaussian_prints_and_draws(tmp_path, capsys):
    rat_gaussian.main(rat_gaussian.Args(points=4, samples=64, out=tmp_path / "g.png"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    rows = [line.split(" | ") for line in lines]
    names = ["| vanilla", "| exact natural", "| empirical natural", "| RAT"]
    assert [row[0] for row in rows] == names
    assert [row[3] for row in rows][2:] == ["1.0000", "1.0000"]
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.mode == "P" and len(picture.getcolors()) > 50  # a palette, colours


@pytest.mark.parametrize(
    "option, value",
    [
        ("damping", 0.0),
        ("points", 3),
        ("entropy", "nan"),
        ("optimum", "nan"),
        ("samples", 1),
        ("seed", 2**64),
        ("out", "/nope/g.png"),
        ("out", "g.nonsense"),
    ],
)
def test_gaussian_refuses_with_one_sentence(option, value, capsys):
    with pytest.raises(SystemExit) as error:
        rat_gaussian.main(tyro.cli(rat_gaussian.Args, args=[f"--{option}", str(value)]))
    assert error.value.code == 2
    assert f"--{option} {value} " in capsys.readouterr().err
