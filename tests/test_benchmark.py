"""The benchmark programs run and print what they promise."""

import contextlib
import csv
import importlib
import importlib.util
import json
import math
import os
import re
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
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cosine_similarity

import rat_gaussian

sys.path.append(str(ROOT / "benchmark"))
import plot
import update_speed

CURVES = Path(__file__).parent / "curves"  # small runs whose numbers are easy to check
PAPER = ["Swimmer-v4", "Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v5", "Humanoid-v4", "HumanoidStandup-v4"]
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


def program(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmark" / name), *map(str, arguments)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_update_speed_prints_every_row():
    table = program("update_speed.py", "--quick").splitlines()[4:]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table}
    ours = {name: cells for name, cells in rows.items() if not name.endswith("in the paper")}
    assert set(ours) == set(update_speed.METHODS)
    assert len(rows) == len(table) > len(ours)
    for cells in ours.values():
        assert len(cells) == 3
        for cell in cells:
            milliseconds, megabytes = cell.strip(" |)").split(" (")
            assert float(milliseconds) > 0
            assert float(megabytes) >= 0 and not megabytes.startswith("-")


@pytest.mark.parametrize("name", ["update_speed", "procgen_speed"])
@pytest.mark.parametrize("bad", [{"repeats": 0}, {"samples": 0}, {"device": "cuda"}])
def test_speed_programs_refuse_with_one_sentence(name, bad, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        module.main(module.Args(**bad))
    assert str(error.value).startswith(f"{name}: ") and f"--{next(iter(bad))} {next(iter(bad.values()))}" in str(
        error.value
    )


# benchmark.sh
def benchmark(*arguments, script=ROOT / "benchmark.sh", wait=True, **variables):
    """Run benchmark.sh with these variables and no others; wait=False gives the process."""
    names = ["SUITE", "SEEDS", "WORKERS", "METHODS", "ENVS", "EXTRA", "RUNS", "PYTHON", "VECTORIZATION"]
    inherited = {k: v for k, v in environment().items() if k not in names and not k.startswith("SLURM_")}
    env = {**inherited, "PYTHON": sys.executable, "VECTORIZATION": "sync", **{k: str(v) for k, v in variables.items()}}
    options = {
        "env": env,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, **options, timeout=300) if wait else subprocess.Popen(command, **options)


def dry_run(**variables):
    result = benchmark("--dry-run", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    "suite, envs, methods, seeds, steps",
    [
        ("quick", ["InvertedPendulum-v5"], METHODS, [1], " --total-timesteps 60000"),
        ("mujoco", ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Humanoid-v4"], METHODS, [1, 2, 3], ""),
        ("paper", PAPER, METHODS, [1, 2, 3], ""),
        ("procgen", ["starpilot", "bossfight", "bigfish"], {"rat": "rat_procgen.py"}, [1, 2, 3], ""),
    ],
)
def test_dry_run_lists_every_run_once_seed_by_seed(suite, envs, methods, seeds, steps):
    vectorization = "" if suite == "procgen" else " --vectorization sync"
    expected = [
        f"OMP_NUM_THREADS=1 {sys.executable} {script} --env-id {env} --seed {seed}{steps}{vectorization}"
        f" --output-dir runs --run-name {env}__{method}__{seed}"
        for seed in seeds
        for env in envs
        for method, script in methods.items()
    ]
    assert dry_run(SUITE=suite) == expected


def test_dry_run_takes_choices():
    lines = dry_run(
        SUITE="paper", SEEDS="4 5", METHODS="trpo", ENVS="Ant-v5", EXTRA="--gamma 0.9  --damping 1", RUNS="x"
    )
    assert [line.split("npg_cg.py ")[1] for line in lines] == [
        f"--line-search --env-id Ant-v5 --seed {seed} --vectorization sync --gamma 0.9 --damping 1"
        f" --output-dir x --run-name Ant-v5__trpo__{seed}"
        for seed in (4, 5)
    ]
    assert dry_run(METHODS="rat", ENVS="module/Task-v0")[0].endswith("--run-name module_Task-v0__rat__1")
    installed = importlib.util.find_spec("envpool") is not None
    assert ("--vectorization envpool" in dry_run(METHODS="rat", VECTORIZATION="")[0]) == installed


def test_command_lines_are_the_scripts_own():
    read = 0
    for line in dry_run(SUITE="paper", SEEDS=3):
        script, *arguments = line.split()[2:]
        if (name := script.removesuffix(".py")) in SCRIPTS:
            args = tyro.cli(importlib.import_module(name).Args, args=arguments)
            assert args.run_name == f"{args.env_id}__{args.run_name.split('__')[1]}__3"
            read += 1
    assert read >= 5 * len(PAPER)


@pytest.mark.parametrize(
    "variables, word",
    [({"SUITE": "all"}, "SUITE=all"), ({"METHODS": "rat nope"}, "nope"), ({"WORKERS": "0"}, "WORKERS=0"),
     ({"PYTHON": "/nope"}, "PYTHON=/nope"), ({"SLURM_ARRAY_TASK_ID": "10"}, "task 10")],
)  # fmt: skip
def test_bad_variables_are_one_sentence(variables, word, tmp_path):
    result = benchmark(RUNS=tmp_path, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith("benchmark.sh: ") and result.stderr.count("\n") == 1 and word in result.stderr


def test_the_interpreter_is_sought_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(line.startswith("OMP_NUM_THREADS=1 ./benchmark.sh ") for line in dry_run(PYTHON="./benchmark.sh"))


def interpreter(path, script):
    """A program to take for PYTHON."""
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def test_finishes_reports_a_failure_and_skips(tmp_path):
    planted = f'[[ $* == *Planted* ]] && {{ echo "it broke" >&2; exit 3; }}; exec {sys.executable} "$@"'
    small = {"EXTRA": "--total-timesteps 128 --num-envs 4 --num-steps 16", "METHODS": "rat rank1"}
    small |= {"RUNS": tmp_path / "runs", "PYTHON": interpreter(tmp_path / "python", planted)}
    result = benchmark(**small, WORKERS=2, ENVS="Planted-v0 InvertedPendulum-v5")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "2 finished, 0 skipped, 2 failed, of 4 runs"
    for method in ("rat", "rank1"):
        log = tmp_path / "runs" / "log" / f"Planted-v0__{method}__1.log"
        assert f"FAILED: Planted-v0__{method}__1: exit code 3, {log}: it broke\n" in result.stderr
        rows = read_csv(tmp_path / "runs" / f"InvertedPendulum-v5__{method}__1")
        assert [row["global_step"] for row in rows] == ["64", "128"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = benchmark(**small)
    assert (result.returncode, result.stdout) == (0, "0 finished, 2 skipped, 0 failed, of 2 runs\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    copy = shutil.copy(ROOT / "benchmark.sh", tmp_path / "slurm_script")  # as sbatch does
    result = benchmark(script=copy, **small, SLURM_ARRAY_TASK_ID=1, SLURM_SUBMIT_DIR=ROOT)
    assert (result.returncode, result.stdout) == (0, "0 finished, 1 skipped, 0 failed, of 1 runs\n")


def test_workers_run_side_by_side_with_one_thread(tmp_path):
    log, folder = tmp_path / "log", '"${@: -3:1}/${@: -1}"'  # --output-dir FOLDER --run-name NAME
    fake = f'echo "start $OMP_NUM_THREADS" >>{log}; sleep 1; echo end >>{log}; mkdir -p {folder}'
    python = interpreter(tmp_path / "python", fake)
    result = benchmark(WORKERS=3, METHODS="rat npg ppo diag", RUNS=tmp_path / "runs", PYTHON=python)
    assert (result.returncode, result.stderr) == (0, "")
    lines = log.read_text().splitlines()
    assert lines[:3] == ["start 1"] * 3 and sorted(lines) == ["end"] * 4 + ["start 1"] * 4
    assert lines.index("end") < [i for i, line in enumerate(lines) if line == "start 1"][3]


def test_runs_where_files_cannot_be_locked(tmp_path):
    interpreter(tmp_path / "flock", "exit 65")  # as on file systems without locks
    python = interpreter(tmp_path / "python", 'mkdir -p "${@: -3:1}/${@: -1}"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = benchmark(METHODS="rat", RUNS=tmp_path / "runs", PYTHON=python, PATH=path)
    assert result.returncode == 0 and "1 finished, 0 skipped, 0 failed" in result.stdout


def test_resumes_after_a_kill(tmp_path):
    small = {"METHODS": "rat", "RUNS": tmp_path}
    folder = tmp_path / "InvertedPendulum-v5__rat__1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")  # a crash before the first checkpoint leaves this
    extra = "--num-envs 4 --num-steps 16 --total-timesteps"
    process = benchmark(**small, EXTRA=f"{extra} 100000000", wait=False)
    try:
        deadline = time.time() + 120
        while not (folder / "progress.csv").exists() or len(read_csv(folder)) < 3:
            assert time.time() < deadline and process.poll() is None, "the run did not start"
            time.sleep(0.05)
        (folder / "checkpoint.pt").unlink()  # a run that has not written its first one looks the same
        result = benchmark(**small, EXTRA=f"{extra} 64")
        assert (result.returncode, result.stdout.splitlines()[0]) == (0, f"busy: {folder.name} runs in another process")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and f"stopped: {folder.name}\n" in out
    rows = len(read_csv(folder))
    total = 64 * (rows + 2)
    result = benchmark(**small, EXTRA=f"{extra} {total}")
    assert result.returncode == 0 and f"started: {folder.name} (1 of 1, resumed)" in result.stdout, result.stderr
    assert [int(row["global_step"]) for row in read_csv(folder)] == list(range(64, total + 1, 64))


@pytest.mark.parametrize("left", ["progress.csv", "finished"])
def test_results_without_a_checkpoint_are_kept(left, tmp_path):
    result = benchmark(METHODS="rat", RUNS=tmp_path, EXTRA="--num-envs 4 --num-steps 16 --total-timesteps 64")
    folder = tmp_path / "InvertedPendulum-v5__rat__1"
    assert result.returncode == 0 and (folder / left).stat().st_size
    for path in folder.iterdir():
        if path.name in ({"progress.csv", "finished"} - {left}) | {"checkpoint.pt"}:
            path.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    result = benchmark(METHODS="rat", RUNS=tmp_path)  # another command line
    assert result.returncode == 1 and "no checkpoint.pt" in result.stderr and result.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# plot.py
def show(capsys, *arguments):
    plot.main(tyro.cli(plot.Args, args=[*map(str, arguments)]))
    return capsys.readouterr().out


def test_plot_counts_and_draws(tmp_path, capsys):
    pictures = [tmp_path / name for name in ("curves.png", "time.png", "profile.png")]
    arguments = ["--out", pictures[0], "--wall-clock", pictures[1], "--profile", pictures[2]]
    lines = show(capsys, *arguments, *CURVES.iterdir()).splitlines()
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert lines[0] == "Not ended, left out: HalfCheetah-v4__ppo__3 (0.50M steps)."
    # Hopper: 2000 and 3000, error sqrt(500000 / 2); HalfCheetah: 4629.2 and 9258.4; 1157.3 and 3471.9
    assert "| rat | 2500 ± 500 (2) | 6944 ± 2315 (2) |" in lines
    assert "| ppo | 1167 (1) | 2315 ± 1157 (2) |" in lines
    assert "| paper's RAT, 10M | 2335 ± 525 | 4629 ± 287 |" in lines
    # over 2334.6 and 4629.2: 0.857, 1, 2 and 0.5, 0.25, 0.75; seed 2 of Hopper is rat's alone and does not count
    assert "| rat | 1.286 | 3 |" in lines and "| ppo | 0.500 | 3 |" in lines
    assert lines[-1].endswith("the seeds that every method has: Hopper-v4 (seeds 1), HalfCheetah-v4 (seeds 1, 2).")
    lines = show(capsys, *CURVES.glob("HalfCheetah*")).splitlines()  # resamples of two seeds: 1, 1.5, 2
    assert "| rat | 1.500 [1.000, 2.000] | 2 |" in lines and "| ppo | 0.500 [0.250, 0.750] | 2 |" in lines


def test_the_lowest_panel_of_each_column_has_a_label(tmp_path):
    columns = {"global_step": np.array([0.0, 10, 20]), "episodic_return": np.array([1.0, 2, 3])}
    groups = {f"T{i}-v0": {"rat": [plot.Run("", f"T{i}-v0", "rat", "1", columns, 20, 20)]} for i in range(5)}
    plot.picture_of_curves(tmp_path / "five.png", groups, plot.styles(["rat"]), "global_step", 1e6)
    assert [bool(axis.get_xlabel()) for axis in plot.plt.gcf().axes] == [False, False, True, True, True, False]
    plot.plt.close()


@pytest.mark.parametrize("width", [4.2, 8.4, 10])
def test_the_legend_of_all_methods_lies_inside_the_picture(width):
    figure, _ = plot.plt.subplots(figsize=(width, 3.2), layout="constrained")
    plot.legend(figure, plot.styles([*plot.METHODS, "release_separate"]))
    figure.draw_without_rendering()
    drawn, whole = figure.legends[0].get_window_extent(), figure.bbox
    plot.plt.close(figure)
    assert whole.x0 <= drawn.x0 and drawn.x1 <= whole.x1 and whole.y0 <= drawn.y0


def test_plot_compares_partial_runs_where_the_shortest_stands(capsys):
    lines = show(capsys, "--partial", "--every-seed", *CURVES.iterdir()).splitlines()
    assert lines[0] == "Not ended, counted all the same: HalfCheetah-v4__ppo__3 (0.50M steps)."
    # mean of 500, 1000 and 300; variance 130000, error sqrt(130000 / 3)
    assert "| ppo | 1167 (1167) | 600 ± 208 (500, 1000, 300) at 0.50M |" in lines


def test_plot_reads_run_folders_and_thins_them(tmp_path, capsys):
    header, row = "global_step,episodic_return,kl,advantage_rms,kernel_trace,sps", "{step},{value},0.123456789,2,3,1\n"
    for seed, last in ((1, 5000), (2, 4000)):
        folder = tmp_path / f"Task-v0__a__{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"num_envs": 2, "num_steps": 5, "total_timesteps": 5009}))
        rows = [row.format(step=s, value="nan" if s < 30 else s / 4) for s in range(10, last + 1, 10)]
        (folder / "progress.csv").write_text(f"{header}\n{''.join(rows)}6000,1")  # torn by a crash
    folders = sorted(tmp_path.glob("Task*"))
    thin = tmp_path / "thin"
    assert "left out: Task-v0__a__2 (0.00M steps)" in show(capsys, "--thin", thin, *folders)
    (path,) = thin.iterdir()
    rows = path.read_text().splitlines()
    assert (len(rows), rows[0], rows[-1]) == (
        201,
        "global_step,episodic_return,kl,advantage_rms,kernel_trace",
        "5000,1250,0.123457,2,3",
    )
    assert "| a | 1250 (1) |" in show(capsys, path)
    assert "| a | 1000 ± 0 (2) at 0.00M |" in show(capsys, "--partial", *folders)


def test_plot_intervals():
    returns = np.array([[0.0, 5.0], [1.0, 5.0]])  # [seeds, points]: a quarter of the resamples has either seed twice
    assert np.allclose(plot.interval([returns], plot.mean), [[0, 5], [1, 5]])
    assert plot.interval([returns[:1]], plot.mean) is None
    assert np.allclose(plot.interval([np.array([0.0, 1.0]), np.array([3.0, 3.0])], plot.mean), [1.5, 2])


def test_the_tables_of_returns_are_those_of_the_committed_runs(capsys):
    """What plot.py prints of benchmark/results stands in the README, evaluation.csv in the results' own."""
    results, readme = ROOT / "benchmark" / "results", (ROOT / "README.md").read_text()
    for folder, options in (("paper", []), ("kaczmarz", ["--every-seed"])):
        table, *_ = show(capsys, *options, *(results / folder).glob("*.csv")).split("\n| paper's RAT")
        assert table in readme
    assert f"These are the {len(list((results / 'paper').iterdir()))} runs of" in readme
    head, *table = re.findall(r"^\|.*\|$", (results / "README.md").read_text(), re.M)[: 2 + len(METHODS)]
    with open(results / "evaluation.csv", newline="") as file:
        returns = {row["run"]: float(row["return_mean"]) for row in csv.DictReader(file)}
    for method, line in zip(METHODS, table[1:], strict=True):
        runs = [[f"{env}__{method}__{seed}" for seed in (1, 2, 3)] for env in head[2:-2].split(" | ")[1:]]
        cells = [", ".join(f"{returns[run]:.0f}" for run in row if run in returns) or "-" for row in runs]
        assert line == f"| {method} | {' | '.join(cells)} |"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["README.md"], "README.md is not named ENVIRONMENT__METHOD__SEED"),
        (["nope/A-v0__a__1"], "cannot be read"),
        ([CURVES / "Hopper-v4__rat__1.csv"] * 2, "are the same seed"),
        (["--out", "x.nonsense", CURVES / "Hopper-v4__rat__1.csv"], "--out x.nonsense"),
        (["--out", "/nope/x.png", CURVES / "Hopper-v4__rat__1.csv"], "/nope/x.png cannot be written"),
        (["--reference", ROOT / "README.md", "--", CURVES / "Hopper-v4__rat__1.csv"], "its columns must be"),
        ([], "there is no run"),
    ],
)
def test_plot_refuses_with_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        show(capsys, *arguments)
    errors = capsys.readouterr().err
    assert error.value.code == 2 and message in errors and errors.count("\n") == 1


# rat_gaussian.py
def test_gaussian_closed_forms():
    """Gradient of J and inverse Hessian of the KL divergence, by automatic differentiation."""
    args = rat_gaussian.Args(optimum=0.7, entropy=0.4)
    theta = torch.tensor([-0.3, 0.2], dtype=torch.float64)

    def objective(theta):
        mu, log_sigma = theta
        return -((mu - args.optimum) ** 2 + (2 * log_sigma).exp()) / 2 + args.entropy * log_sigma

    def divergence(other):
        return kl_divergence(Normal(theta[0], theta[1].exp()), Normal(other[0], other[1].exp()))

    gradient = torch.autograd.functional.jacobian(objective, theta)
    fisher = torch.autograd.functional.hessian(divergence, theta)
    mu, sigma = theta[0], theta[1].exp()
    assert torch.allclose(rat_gaussian.vanilla_gradient(args, mu, sigma), gradient)
    assert torch.allclose(rat_gaussian.exact_natural_gradient(args, mu, sigma), torch.linalg.solve(fisher, gradient))
    torch.manual_seed(0)
    args.samples = 400_000
    scores, y = rat_gaussian.sampled_scores(args, mu, sigma)
    assert torch.allclose(scores.T @ y / len(y), gradient, atol=0.02)
    assert torch.allclose(scores.T @ scores / len(y), fisher, atol=0.02)


def test_gaussian_similarities():
    def similarities(to, **options):
        _, gradients = rat_gaussian.fields(rat_gaussian.Args(points=4, samples=128, **options))
        return {name: cosine_similarity(gradient, gradients[to]) for name, gradient in gradients.items()}

    assert similarities("empirical natural")["RAT"].min() >= 0.99
    # quadratic returns without noise are linear in the scores: a sample determines the exact natural gradient
    assert similarities("exact natural", noise=0.0, damping=1e-6)["RAT"].min() > 0.999
    assert similarities("exact natural")["RAT"].mean() > similarities("exact natural")["vanilla"].mean() + 0.05
    assert similarities("vanilla", noise=0.0, damping=1e4)["RAT"].mean() > 0.95


def test_gaussian_prints_and_draws(tmp_path, capsys):
    rat_gaussian.main(rat_gaussian.Args(points=4, samples=64, out=tmp_path / "g.png"))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| vanilla", "| exact natural", "| empirical natural", "| RAT"]
    assert [row[3] for row in rows][2:] == ["1.0000", "1.0000"]
    assert (tmp_path / "g.png").stat().st_size > 10_000
    broken = [("damping", 0.0), ("points", 3), ("entropy", math.nan), ("optimum", math.nan), ("samples", 1)]
    broken += [("seed", 2**64), ("out", tmp_path / "no" / "g.png"), ("out", tmp_path / "g.nonsense")]
    for bad in ({name: value} for name, value in broken):
        with pytest.raises(SystemExit) as error:
            rat_gaussian.main(rat_gaussian.Args(**bad))
        assert error.value.code == 2 and f"--{next(iter(bad))} " in capsys.readouterr().err
