"""The numbers in README and docs are those of the committed CSV files."""

import csv
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark"))
import plot

RESULTS = ROOT / "benchmark" / "results"
README = (ROOT / "README.md").read_text()
TEXTS = "\n".join([README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))])


def printed(capsys, *arguments):
    """What plot.py prints of a folder below benchmark/results."""
    plot.main(tyro.cli(plot.Args, args=[*arguments]))
    return capsys.readouterr().out


def tables(head, text=TEXTS):
    """Rows of cells, the head first, of each table whose head begins with a pattern."""
    found = re.findall(rf"^\| {head}.*\n(?:\|.*\n)+", text, re.MULTILINE)
    rows = [[re.split(r" *\| *", line)[1:-1] for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in rows]  # without the line below the head


def column(folder, name, *columns):
    """Columns of a run of benchmark/results."""
    with open(RESULTS / folder / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[c]) for row in rows]) for c in columns]


def evaluations(step="999424"):
    """Return without noise after so many steps, by the run's name."""
    with open(RESULTS / "evaluation.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["global_step"] == step]
    return {row["run"]: float(row["return_mean"]) for row in rows}


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("paper", []),
        ("kaczmarz", ["--every-seed"]),
        ("track", ["--every-seed"]),
        ("ablation", ["--every-seed"]),
        ("processes", ["--every-seed"]),
    ],
)
def test_tables_of_returns(folder, options, capsys):
    out = printed(capsys, *options, str(RESULTS / folder))
    assert out.split("\n| paper's RAT")[0] in TEXTS


def test_tables_of_ppo_with_the_small_critic(capsys):
    others = (RESULTS / "track").glob("*__1[123].csv")
    runs = [str(path) for path in sorted(others) if "__rat_shared__" not in path.name]
    out = printed(capsys, "--every-seed", str(RESULTS / "critic"), *runs)
    assert out.split("\n| paper's RAT")[0] in TEXTS
    assert out.split("| interquartile mean")[1].split("\n\n")[0] in TEXTS


def test_tables_of_all_methods_by_their_defaults(capsys):
    runs = {path for name in ("track", "baselines") for path in (RESULTS / name).glob("*__11.csv")}
    others = {path for path in runs if "_critic__" in path.name}
    out = printed(capsys, *map(str, sorted(runs - others)))
    assert out.split("\n| paper's RAT")[0] in TEXTS
    assert out.split("| interquartile mean")[1].split("\n\n")[0] in TEXTS
    out = printed(capsys, *map(str, sorted(others)))
    assert out.split("\n| paper's RAT")[0] in TEXTS


def test_tables_of_one_trunk_with_both_activations(capsys):
    runs = sorted((RESULTS / "track").glob("*__rat_shared__*.csv"))
    out = printed(capsys, "--every-seed", str(RESULTS / "relu"), *map(str, runs))
    assert out.split("\n| paper's RAT")[0] in TEXTS
    assert out.split("| interquartile mean")[1].split("\n\n")[0] in TEXTS


def test_interquartile_means(capsys):
    out = printed(capsys, str(RESULTS / "paper"))
    assert out.split("| interquartile mean")[1].split("\n\n")[0] in TEXTS


@pytest.mark.parametrize("method", ["rat", "rat_shared", "ppo"])
def test_interquartile_means_of_the_default(method, capsys):
    runs = map(str, sorted((RESULTS / "track").glob(f"*__{method}__*.csv")))
    (row,) = re.findall(rf"^\| {method} \| [\d.]+ \[.*", printed(capsys, *runs), re.MULTILINE)
    assert row in TEXTS
    middle, low, high = re.search(r"(\S+) \[(\S+), (\S+)\]", row).groups()
    assert f"{middle} ({low} to {high})" in README


def test_the_number_of_runs():
    for folder in ("paper", "track", "ablation"):
        number = len(list((RESULTS / folder).iterdir()))
        assert re.search(rf"\b{number} runs\b", TEXTS), folder


def test_tables_without_noise():
    found = tables("return without noise")
    returns = evaluations()
    assert len(found) == 2
    for (title, *envs), *rows in found:
        seeds = re.findall(r"\d+", title.split("seeds")[1])
        for method, *cells in rows:
            for env, cell in zip(envs, cells, strict=True):
                runs = [f"{env}__{method}__{seed}" for seed in seeds]
                known = [f"{returns[run]:.0f}" for run in runs if run in returns]
                assert cell == (", ".join(known) or "-"), (method, env)


@pytest.mark.parametrize(
    ("folder", "head"),
    [
        ("track_3M", "training return after"),
        ("track_10M", "10M steps, return after"),
        ("long", r"\S = 0\.999 \|"),
        ("swimmer", "Swimmer-v4, `--gamma"),
    ],
)
def test_tables_beyond_1M_steps(folder, head):
    published = plot.read_published()["paper's RAT, 10M"]
    (((_, *titles), *rows),) = tables(head)
    assert len(rows) == len(list((RESULTS / folder).iterdir()))
    for name, *cells in rows:
        run = "__".join(re.match(r"(\S+), (\S+), seed (\d+)", name).groups())
        columns = column(folder, run, "global_step", "episodic_return")
        step, returns = (values[columns[1] == columns[1]] for values in columns)  # nan: a resume
        wanted = {
            "highest": f"{returns.max():.0f}",
            "lowest after 3.5M": f"{returns[step > 3.5e6].min(initial=np.inf):.0f}",
            "last": f"{returns[-1]:.0f}",
            "last over highest": f"{returns[-1] / returns.max():.2f}",
        }
        for title, cell in zip(titles, cells, strict=True):
            if title == "joints, rad":
                wanted[title] = cell  # of the checkpoint, not of a file here
            if title.endswith("M") and title not in wanted:
                at = float(title[:-1]) * 1e6
                reached = step[-1] > at - 5e4  # a row in 50,000 steps
                wanted[title] = f"{returns[step <= at][-1]:.0f}" if reached else "-"
            if title == "paper's RAT":
                wanted[title] = plot.with_error(*published[run.split("-")[0]])
            if title == "without noise":
                wanted[title] = f"{evaluations(f'{step[-1]:.0f}')[run]:.0f}"
        assert cells == [wanted[title] for title in titles], name


def test_the_table_of_falls():
    with open(RESULTS / "falls.csv", newline="") as file:
        told = {(row["run"], row["global_step"]): row for row in csv.DictReader(file)}
    (((_, *seeds), *rows),) = tables("Hopper-v4, after 1M → 3M steps")
    columns = [("discounted_return", 1, ".0f"), ("reward", 1, ".2f"), ("fall", 1000, ".2f")]
    for (_, *cells), (name, factor, form) in zip(rows, columns, strict=True):
        for seed, cell in zip(seeds, cells, strict=True):
            run = f"Hopper-v4__rat__{seed.split()[1]}"
            values = [float(told[run, step][name]) * factor for step in ("999424", "2998272")]
            assert cell == " → ".join(format(value, form) for value in values), (name, seed)


NOISE = {  # rows of the table of runs whose advantages are noise, and their files
    "paper's rule": "Hopper-v4__defaults__",
    "the same, `--update-epochs 1 --learning-rate 0.3`": "Hopper-v4__epochs1_lr__",
    "`--update-epochs 1 --num-minibatches 16`": "Hopper-v4__epochs1_b128__",
    "`--kaczmarz off`": "Hopper-v4__off__",
    "`--kaczmarz release`": "Hopper-v4__release__",
    "NPG": "Hopper-v4__npg__",
    "PPO": "Hopper-v4__ppo__",
    "paper's rule on HalfCheetah-v4 (8.52 at the start)": "HalfCheetah-v4__defaults__",
    "the default rule": "Hopper-v4__track__",
    "the default rule on HalfCheetah-v4": "HalfCheetah-v4__track__",
    "the default rule, `--memory 0`": "Hopper-v4__memory0__",
    "the default rule, `--memory 0`, on HalfCheetah-v4": "HalfCheetah-v4__memory0__",
}


def drift(x):
    """What x changes by, in standard deviations of a random walk with its differences over ten."""
    steps = np.diff(x[::10])
    return (x[-1] - x[0]) / (np.std(steps, ddof=1) * len(steps) ** 0.5)


def test_the_table_with_noise_for_advantages():
    ((_, *rows),) = tables("advantages are noise")
    assert [name.split(", seeds")[0] for name, *_ in rows] == list(NOISE)
    for name, *cells in rows:
        prefix = NOISE[name.split(", seeds")[0]]
        runs = sorted(path.stem for path in (RESULTS / "noise").glob(f"{prefix}*.csv"))
        told = [column("noise", run, "entropy", "kl") for run in runs]
        entropies = ", ".join(f"{entropy[-1]:.2f}" for entropy, _ in told)
        divergences = ", ".join(f"{np.median(kl):.4f}" for _, kl in told)
        drifts = ", ".join(f"{drift(entropy):.1f}" for entropy, _ in told)
        assert cells == [entropies, divergences, drifts], name


def test_the_table_of_the_readme():
    sources = {
        "RAT": ("track", "rat"),
        "PPO": ("track", "ppo"),
        "RAT, paper's rule": ("paper", "rat"),
        "RAT, 10M": ("track_10M", "rat"),
    }
    (((_, *envs), *rows),) = tables("return after 1M steps", README)
    returns = evaluations()
    published = plot.read_published()["paper's RAT, 10M"]
    for name, *cells in rows:
        folder, method = sources.get(name.removesuffix(", no noise"), (None, None))
        for env, cell in zip(envs, cells, strict=True):
            if name == "paper's RAT, 10M":
                assert cell == plot.with_error(*published[env.split("-")[0]])
                continue
            runs = [path.stem for path in (RESULTS / folder).glob(f"{env}__{method}__*.csv")]
            if name.endswith("no noise"):
                values = [returns[run] for run in runs if run in returns]
                assert cell == plot.number(np.mean(values)), (name, env)
                continue
            values = [column(folder, run, "episodic_return")[0][-1] for run in runs]
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
            assert cell == plot.with_error(np.mean(values), error), (name, env)


def test_the_table_from_pixels():
    ((head, *rows),) = tables("return from pixels after")
    assert len(rows) == 4
    for name, *cells in rows:
        method, game = name.lower().split(", ")
        columns = "global_step", "episodic_return", "eval_return"
        step, returns, unseen = column("procgen", f"{game}__{method}_full__1", *columns)
        steps = [float(title[:-1]) * 1e6 for title in head[1:-1]]
        wanted = [f"{returns[step <= s][-1]:.2f}" for s in steps]
        assert cells == [*wanted, f"{unseen[step <= 8.3e5][-1]:.2f}"], name


def test_the_table_of_speed_on_a_gpu():
    lines = (RESULTS / "update_speed_cuda.csv").read_text().splitlines()
    assert "NVIDIA H200" in lines[0]
    measured = {}
    for row in csv.DictReader(lines[1:]):
        measured.setdefault(row["update"], []).append(row["milliseconds"])
    (((_, *networks), *rows),) = tables("one update on an H200: ms")
    assert len(networks) == 3
    for name, *cells in rows:
        assert cells == measured[name.replace("`", "")], name


def test_the_table_of_speed():
    rows = plot.read_rows(
        RESULTS / "update_speed.csv", ["update", "network"], ["milliseconds", "megabytes"]
    )
    ((head, *cells),) = tables("one update: ms")
    assert head[1:] == list(dict.fromkeys(row["network"] for row in rows))
    written = {name.replace("`", ""): values for name, *values in cells}
    for update in dict.fromkeys(row["update"] for row in rows):
        known = [row for row in rows if row["update"] == update]
        wanted = [f"{row['milliseconds']:.1f} ({row['megabytes']:.0f})" for row in known]
        assert written[update] == wanted


def test_tables_of_the_search():
    text = (ROOT / "docs" / "tuning.md").read_text()
    seen = set()
    for (_, *titles), *rows in tables("name", text):
        for name, *cells in rows:
            for env, cell in zip(titles, cells, strict=True):
                known = set()
                for run in (RESULTS / "tuning_track").glob(f"{env}__{name}__*.csv"):
                    columns = column("tuning_track", run.stem, "global_step", "episodic_return")
                    known |= {f"{columns[1][-1]:.0f}", f"{np.interp(499712, *columns):.0f}"}
                    seen.add(run)
                if env not in ("options", "steps"):
                    assert set(re.findall(r"-?\d+", cell)) <= known, (name, env)
    assert seen == set((RESULTS / "tuning_track").iterdir())  # each run is quoted


BUDGETS = {  # rows of the table of budgets, and how the names of their runs begin
    "its discount and what it does beyond 1M steps": "gamma|constant__|kl-falls",
    "RAT, one trunk": "s-",
    "its discount": "ppo-gamma",
    "PPO": "ppo__|annealed-|constant-|stopped-",
    "NPG": "npg",
    "rank-1": "rank1",
    "diag": "diag",
    "Sophia": "sophia",
    "ACKTR": "acktr",
    "RAT, two networks": "",  # all others
}


def test_the_table_of_budgets():
    found = {row: [] for row in BUDGETS}
    for path in [*(RESULTS / "tuning").iterdir(), *(RESULTS / "tuning_track").iterdir()]:
        if "Swimmer" in path.name:  # at the paper's discount, not searched
            continue
        name = path.name.split("__", 1)[1]
        row = next(row for row, start in BUDGETS.items() if re.match(start, name))
        found[row].append(column(path.parent.name, path.stem, "global_step")[0][-1] / 1e6)
    ((_, *rows),) = tables("method \\| runs \\| million steps")
    assert {name for name, *_ in rows} == found.keys()
    for name, runs, steps in rows:
        without_rows = 6 if name == "RAT, one trunk" else 0  # stopped early
        assert int(runs) == len(found[name]) + without_rows, name
        assert float(steps) == pytest.approx(sum(found[name]), rel=0.02), name


@pytest.mark.parametrize("script", ["rat_continuous", "npg_cg", "npg_rank1", "sophia_ppo", "acktr"])
def test_all_have_the_large_critic_but_acktr(script):
    """As tuning.md says."""
    args = importlib.import_module(script).Args()
    critic = args.critic_epochs, args.critic_minibatches, args.critic_learning_rate
    assert critic == ((4, 8, 1e-3) if script == "acktr" else (10, 16, 3e-4))


@pytest.mark.parametrize(("name", "changed"), [("absolute_damping", 1), ("l2_clip", 2)])
def test_commands_that_take_a_part_out_find_it(name, changed, tmp_path):
    (command,) = re.findall(rf"^sed .*>{name}\.py$", TEXTS, re.MULTILINE)
    subprocess.run(["bash", "-c", command.replace(f">{name}", f">{tmp_path}/{name}")], cwd=ROOT)
    before = (ROOT / "rat_continuous.py").read_text().splitlines()
    after = (tmp_path / f"{name}.py").read_text().splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == changed
