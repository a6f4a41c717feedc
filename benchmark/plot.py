"""Learning curves, a table of final returns, KL and entropy, interquartile means and performance profiles of runs.

Run: python benchmark/plot.py --out curves.png --wall-clock time.png --profile profile.png runs/*__*__*
A run is a folder, or a CSV file that --thin made of it, named ENVIRONMENT__METHOD__SEED. Intervals are 95 % percentile
bootstrap intervals over seeds, stratified by environment where there are several, as rliable's (Agarwal et al. 2021).
"""

import csv
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.ticker import MaxNLocator
from scipy.stats import bootstrap, trim_mean

REFERENCE = Path(__file__).parent / "reference"
METHODS = ["rat", "rat_shared", "npg", "trpo", "rank1", "acktr", "acktr_shared", "ppo", "sophia", "diag"]
STYLES = [  # of METHODS and two more; colour, dashes and marker each suffice to tell them apart
    ("#000000", "-", "o"), ("#d55e00", "--", "s"), ("#0072b2", "-", "^"), ("#56b4e9", "--", "v"), ("#009e73", ":", "D"),
    ("#cc79a7", "-", "P"), ("#8c510a", "-.", "X"), ("#e69f00", "-", "*"), ("#6a3d9a", ":", "<"), ("#7f7f7f", "-.", ">"),
    ("#b30000", "--", "p"), ("#808000", ":", "h"),
]  # fmt: skip
KEPT = ["global_step", "episodic_return", "kl", "entropy", "explained_variance", "value_loss", "advantage_rms"]
KEPT += ["kernel_trace", "direction_norm", "cg_residual", "eval_return", "learning_rate", "wall_seconds"]


@dataclass
class Args:
    paths: tyro.conf.Positional[list[Path]]  # run folders or CSV files, named ENVIRONMENT__METHOD__SEED
    out: Path | None = None  # picture to write: returns against environment steps
    wall_clock: Path | None = None  # picture to write: returns against minutes
    profile: Path | None = None  # picture to write: interquartile means and performance profiles
    thin: Path | None = None  # folder to write each run to as a CSV file of at most 200 rows and few columns, no more
    partial: bool = False  # take runs that have not ended too; seeds are compared where the shortest one stands
    every_seed: bool = False  # list the seeds' final returns in the table
    reference: tuple[Path, ...] = (REFERENCE / "paper.csv", REFERENCE / "procgen.csv")  # published returns beside ours


@dataclass
class Run:
    name: str
    env_id: str
    method: str
    seed: str
    columns: dict[str, np.ndarray]  # of progress.csv
    total: int  # the last step of the whole run, where known
    step: int  # the last step so far

    @property
    def ended(self) -> bool:
        return self.step >= self.total


def fail(sentence: str) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"plot: {sentence}", file=sys.stderr)
    raise SystemExit(2)


# Reading runs
def read(path: Path) -> Run:
    """A run folder, or a CSV file made of one."""
    name = path.name.removesuffix(".csv")
    parts = name.split("__")
    if len(parts) < 3:
        fail(f"{path} is not named ENVIRONMENT__METHOD__SEED.")
    file = path / "progress.csv" if path.is_dir() else path
    try:
        lines = file.read_text().splitlines(keepends=True)
        config = json.loads((path / "config.json").read_text()) if path.is_dir() else {}
        rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))  # a crash may have torn the last
        columns = {key: np.array([float(row[key]) for row in rows]) for key in (rows[0] if rows else KEPT[:2])}
        steps, _ = columns["global_step"], columns["episodic_return"]
        rollout = config["num_envs"] * config["num_steps"] if config else 0
        total = config["total_timesteps"] // rollout * rollout if config else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{file} cannot be read ({error!r}), it must be the progress.csv of a run.")
    return Run(name, *parts[:3], columns, total, int(steps[-1]) if rows else 0)


def choose(runs: list[Run], partial: bool) -> list[Run]:
    """The runs to count; prints the names of those that have not ended. Refuses two runs of the same seed."""
    longest = defaultdict(int)
    seen = {}
    for run in runs:
        if other := seen.get(key := (run.env_id, run.method, run.seed)):
            fail(f"{other} and {run.name} are the same seed of the same method, name one of them.")
        seen[key] = run.name
        longest[run.env_id, run.method] = max(longest[run.env_id, run.method], run.step)
    for run in runs:  # a CSV file does not say where the run should have ended; its other seeds do, up to thinning
        run.total = run.total or round(0.98 * longest[run.env_id, run.method])
    drawable = [run for run in runs if np.isfinite(run.columns["episodic_return"]).any()]
    kept = [run for run in drawable if run.ended or partial]
    for title, names in (
        ("Not ended" + (", counted all the same" if partial else ", left out"), [r for r in drawable if not r.ended]),
        ("No episode has ended, left out", [r for r in runs if r not in drawable]),
    ):
        if names:
            print(f"{title}: " + ", ".join(f"{r.name} ({r.step / 1e6:.2f}M steps)" for r in names) + ".\n")
    return kept


def thin(run: Run, folder: Path) -> None:
    """Every k-th row and the last to folder/NAME.csv, at most 200 rows."""
    length = len(run.columns["global_step"])
    rows = sorted({round(i) for i in np.linspace(0, length - 1, min(200, length))})
    names = [name for name in KEPT if name in run.columns]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{run.env_id}__{run.method}__{run.seed}.csv", "w") as file:
        print(*names, sep=",", file=file)
        for i in rows:
            step, *values = (run.columns[name][i] for name in names)
            print(int(step), *(f"{value:.6g}" for value in values), sep=",", file=file)


def read_reference(paths: tuple[Path, ...]) -> dict[str, dict[str, tuple[float, float]]]:
    """Published results: source -> environment without its version -> (mean, error or nan)."""
    found = defaultdict(dict)
    for path in paths:
        try:
            lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
            for row in csv.DictReader(lines):
                found[row["source"]][row["env"]] = float(row["mean"]), float(row["error"] or math.nan)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--reference {path} cannot be read ({error!r}), its columns must be env, source, mean and error.")
    return found


# Statistics
def align(runs: list[Run], by: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns [seeds, 200] of runs of one method at 200 common values of the column `by`, and these values."""
    curves = []
    for run in runs:
        seen = np.isfinite(run.columns["episodic_return"])  # nan before the first episode ends
        curves.append((run.columns[by][seen], run.columns["episodic_return"][seen]))
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def interval(samples: list[np.ndarray], statistic) -> tuple[np.ndarray, np.ndarray] | None:
    """95 % bootstrap interval of statistic(*samples, axis) over axis 0, each sample resampled on its own."""
    if min(map(len, samples)) < 2:
        return None
    return bootstrap(samples, statistic, axis=0, n_resamples=2000, method="percentile", rng=0).confidence_interval


def interquartile_mean(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the middle half of the runs of all tasks together."""
    return trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def mean(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the runs of all tasks together."""
    return np.concatenate(tasks, axis).mean(axis)


# Tables
def number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}"


def with_error(mean: float, error: float) -> str:
    return number(mean) + ("" if math.isnan(error) else f" ± {f'{error:.0f}' if abs(mean) >= 100 else f'{error:.1f}'}")


def task(env_id: str) -> str:
    """Name of an environment without its version, as the published tables have it."""
    return re.sub(r"-v\d+$", "", env_id)


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    """A Markdown table with one line a row."""
    for cells in ([title, *columns], ["---"] * (len(columns) + 1), *([name, *row] for name, row in rows.items())):
        print("| " + " | ".join(cells) + " |")
    print()


# Pictures
def styles(methods: list[str]) -> dict[str, dict]:
    """Line style of each method: a known method's own, else one that is free."""
    free = [style for i, style in enumerate(STYLES) if i >= len(METHODS) or METHODS[i] not in methods]
    others = [method for method in methods if method not in METHODS]
    if len(others) > len(free):
        fail(f"{len(methods)} methods are more than the {len(STYLES)} line styles, draw fewer at a time.")
    own = {method: STYLES[METHODS.index(method)] for method in methods if method in METHODS}
    own |= dict(zip(others, free, strict=False))
    return {m: {"color": c, "linestyle": d, "marker": k, "markersize": 4} for m, (c, d, k) in own.items()}


def draw(axis: Axes, x: np.ndarray, y: np.ndarray, band: tuple | None, number: int, style: dict) -> None:
    """A line with markers, apart from those of the other methods, and its band."""
    axis.plot(x, y, **style, linewidth=1.2, markevery=(number * 4 % 40, 40))
    if band is not None:
        axis.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)
    axis.grid(alpha=0.3)


def legend_columns(width: float) -> int:
    return int(width / 2)  # two inches a name


def legend(figure: plt.Figure, look: dict[str, dict]) -> None:
    """A name for each line style, below the panels."""
    lines = [plt.Line2D([], [], **style, label=method) for method, style in look.items()]
    columns = min(len(lines), legend_columns(figure.get_figwidth()))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, handlelength=4)


def picture_of_curves(path: Path, groups: dict[str, dict[str, list[Run]]], look: dict, by: str, unit: float) -> None:
    """One panel an environment; a method's mean and band over seeds, up to where its shortest run ends."""
    columns = min(len(groups), 2 if len(groups) in (2, 4) else 3)
    rows = math.ceil(len(groups) / columns)
    width = min(10, 2.1 + 4.2 * columns)
    size = (width, 2.6 * rows + 0.4 + 0.2 * math.ceil(len(look) / legend_columns(width)))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (env_id, group) in zip(axes.flat, groups.items(), strict=False):
        for i, (method, style) in enumerate(look.items()):
            if runs := [run for run in group.get(method, []) if by in run.columns]:
                x, returns = align(runs, by)
                draw(axis, x / unit, returns.mean(0), interval([returns], mean), i, style)
        axis.set_title(env_id, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    for axis in axes.flat[len(groups) - columns : len(groups)]:  # the lowest panel of each column
        axis.set_xlabel("million environment steps" if by == "global_step" else "minutes")
    for axis in axes[:, 0]:
        axis.set_ylabel("episodic return")
    legend(figure, look)
    figure.savefig(path, dpi=110)


def picture_of_profiles(path: Path, scores: dict[str, list[np.ndarray]], iqm: dict, look: dict) -> None:
    """Interquartile means with intervals, and the fraction of runs above a score."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    thresholds = np.linspace(0, max(np.concatenate(tasks).max() for tasks in scores.values()) * 1.02, 200)
    for i, (method, tasks) in enumerate(scores.items()):
        middle, bounds = iqm[method]
        if bounds is not None:
            left.plot(bounds, [method] * 2, color=look[method]["color"], linewidth=6, alpha=0.35)
        left.plot([middle], [method], **look[method] | {"linestyle": "none", "markersize": 6})
        above = [task[:, None] > thresholds for task in tasks]  # [seeds, 200] a task
        draw(right, thresholds, mean(*above, axis=0), interval(above, mean), i, look[method])
    left.invert_yaxis()
    left.grid(alpha=0.3)
    left.set_xlabel("interquartile mean of final return / reference")
    right.set(xlabel="final return / reference, τ", ylabel="fraction of runs above τ")
    legend(figure, {method: look[method] for method in scores})
    figure.savefig(path, dpi=110)


def show(args: Args, runs: list[Run]) -> None:
    """Print the tables, write the pictures."""
    published = read_reference(args.reference)
    tasks_in_order = [*dict.fromkeys(env for source in published.values() for env in source)]
    known = {env: i for i, env in enumerate(tasks_in_order)}
    envs = sorted({run.env_id for run in runs}, key=lambda env: (known.get(task(env), len(known)), env))
    found = {run.method for run in runs}
    methods = [m for m in METHODS if m in found] + sorted(found - set(METHODS))
    groups = {env: {m: [r for r in runs if (r.env_id, r.method) == (env, m)] for m in methods} for env in envs}

    finals, rows = {}, {method: [] for method in methods}  # (environment, method) -> last return [seeds]
    for env, group in groups.items():
        longest = max(run.step for run in runs if run.env_id == env)
        for method, seeds in group.items():
            if not seeds:
                rows[method].append("-")
                continue
            grid, returns = align(seeds, "global_step")
            finals[env, method] = final = returns[:, -1]
            error = final.std(ddof=1) / math.sqrt(len(final)) if len(final) > 1 else math.nan
            listed = ", ".join(map(number, final)) if args.every_seed else len(final)
            at = f" at {grid[-1] / 1e6:.2f}M" if grid[-1] < 0.98 * longest else ""
            rows[method].append(f"{with_error(final.mean(), error)} ({listed}){at}")
    for source, returns in published.items():
        if any(task(env) in returns for env in envs):
            rows[source] = [with_error(*returns[task(env)]) if task(env) in returns else "-" for env in envs]
    what = "seeds" if args.every_seed else "number of seeds"
    print_table(f"final return, mean ± standard error ({what})", envs, rows)
    print("No error and no band where there is one seed. `at`: steps where the shortest run ends, if others go on.\n")

    states = {method: [] for method in methods}  # where runs tell: how far a rollout moved the policy, its noise
    for method, cells in states.items():
        for group in groups.values():
            told = [run.columns for run in group[method] if {"kl", "entropy"} <= run.columns.keys()]
            cells.append("; ".join(f"{np.nanmedian(c['kl']):.4f}, {c['entropy'][-1]:.1f}" for c in told) or "-")
    print_table("median KL, entropy at the end [nats]; by seed", envs, states)

    unit = {env: next((r[task(env)][0] for r in published.values() if task(env) in r), None) for env in envs}
    shared = {env: set.intersection(*({r.seed for r in g[m]} for m in methods)) for env, g in groups.items()}
    common = [env for env in envs if unit[env] and shared[env]]
    scores = {m: [] for m in methods} if common else {}  # more seeds on one task would shift a method's weight there
    for m, tasks in scores.items():
        for env in common:
            kept = [run.seed in shared[env] for run in groups[env][m]]
            tasks.append(finals[env, m][kept] / unit[env])
    iqm = {m: (interquartile_mean(*t, axis=0), interval(t, interquartile_mean)) for m, t in scores.items()}
    if common:
        cells = {
            m: [f"{x:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else ""), str(sum(map(len, scores[m])))]
            for m, (x, ci) in iqm.items()
        }
        print_table("interquartile mean", ["[95 % interval] of final return / reference", "runs"], cells)
        counted = ", ".join(f"{env} (seeds {', '.join(sorted(shared[env]))})" for env in common)
        print(f"Reference 1: the first published row. Counted, the seeds that every method has: {counted}.")
    if missing := [env for env in envs if env not in common]:
        print(f"No interquartile mean, for want of a seed of every method or a reference: {', '.join(missing)}.")
    if args.profile and not common:
        fail("--profile needs an environment that has a published return and a seed that every method has.")

    look = styles(methods) if args.out or args.wall_clock or args.profile else {}
    if args.out:
        picture_of_curves(args.out, groups, look, "global_step", 1e6)
    if args.wall_clock:
        if untimed := [run.name for run in runs if "wall_seconds" not in run.columns]:
            print(f"No wall_seconds, not in {args.wall_clock}: {', '.join(untimed)}.")
        picture_of_curves(args.wall_clock, groups, look, "wall_seconds", 60)
    if args.profile:
        picture_of_profiles(args.profile, scores, iqm, look)


def main(args: Args) -> None:
    """Thin runs, or draw them and print the tables."""
    plt.rcParams.update({"font.size": 8, "legend.fontsize": 9})
    formats = FigureCanvasBase.get_supported_filetypes()
    for name in ("out", "wall_clock", "profile"):
        path = getattr(args, name)
        if path and path.suffix[1:] not in formats:
            fail(f"--{name.replace('_', '-')} {path} must end in one of .{', .'.join(formats)}.")
    runs = choose([read(path) for path in sorted(args.paths)], args.partial)
    if not runs:
        fail("there is no run to show, name run folders or CSV files.")
    try:
        if args.thin:
            for run in runs:
                thin(run, args.thin)
        else:
            show(args, runs)
    except OSError as error:
        advice = "name a folder that exists" if error.filename else "read all of it"
        fail(f"{error.filename or 'standard output'} cannot be written ({error.strerror}), {advice}.")


if __name__ == "__main__":
    main(tyro.cli(Args))
