"""Learning curves, final returns, KL and entropy, interquartile means and profiles of runs.

Run: python benchmark/plot.py --out curves.png --wall-clock time.png --profile profile.png runs
A run is a folder with config.json and progress.csv, or a CSV file ENVIRONMENT__METHOD__SEED.csv
that --thin made of it; a folder of runs stands for all of them. A run folder named
ENVIRONMENT__METHOD__... has this method, any other that of its script. Intervals are 95 %
percentile bootstrap intervals over seeds, stratified by environment where there are several, as
rliable's (Agarwal et al. 2021).
"""

import csv
import itertools
import json
import math
import re
import signal
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.stats import bootstrap, trim_mean


class Look(NamedTuple):
    """How the pictures show a method: colour, dashes and marker each suffice to know it by."""

    label: str
    color: str
    linestyle: str
    marker: str


REFERENCE = Path(__file__).parent / "reference"
PUBLISHED = [REFERENCE / "paper.csv", REFERENCE / "procgen.csv"]
LOOKS = {  # one colour a method in every picture; tables and legends are in this order
    "rat": Look("RAT", "#000000", "-", "o"),
    "rat_shared": Look("RAT shared", "#d55e00", "--", "s"),
    "npg": Look("NPG", "#0072b2", "-", "^"),
    "trpo": Look("TRPO", "#56b4e9", "--", "v"),
    "rank1": Look("rank-1", "#009e73", ":", "D"),
    "acktr": Look("ACKTR", "#cc79a7", "-", "P"),
    "acktr_shared": Look("ACKTR shared", "#8c510a", "-.", "X"),
    "ppo": Look("PPO", "#e69f00", "-", "*"),
    "sophia": Look("Sophia", "#6a3d9a", ":", "<"),
    "diag": Look("diag", "#7f7f7f", "-.", ">"),
    "off": Look("off", "#b30000", "--", "p"),  # settings of --kaczmarz
    "track": Look("track", "#000000", "-", "o"),  # RAT's default
    "paper": Look("paper", "#005f5f", "-.", "d"),
    "rat_paper": Look("RAT, paper's rule", "#005f5f", "-.", "d"),
    "release": Look("release", "#808000", ":", "h"),
    "release_separate": Look("RAT, authors' code", "#808000", ":", "h"),
    "release_shared": Look("RAT shared, authors' code", "#808000", "-.", "H"),
    "rat_continuous": Look("RAT", "#000000", "-", "o"),  # the scripts' names, in default run names
    "rat_procgen": Look("RAT", "#000000", "-", "o"),
    "npg_cg": Look("NPG", "#0072b2", "-", "^"),
    "npg_rank1": Look("rank-1", "#009e73", ":", "D"),
    "sophia_ppo": Look("PPO", "#e69f00", "-", "*"),
}
SPARE_COLORS = ["#17becf", "#e377c2", "#393b79", "#637939"]  # of methods that LOOKS does not name
SPARE_DASHES = ["-", "--", ":", "-."]
SPARE_MARKERS = ["d", "8", "1", "2"]
NEEDED = ["global_step", "episodic_return", "wall_seconds"]
KEPT = [  # columns of a thinned run
    *NEEDED,
    "kl",
    "entropy",
    "explained_variance",
    "value_loss",
    "advantage_rms",
    "damping",
    "relative_damping",
    "fisher_norm",
    "direction_norm",
    "cg_residual",
    "eval_return",
    "learning_rate",
]
AXES = {  # of pictures over a column: its unit and what the axis is called
    "global_step": (1e6, "million environment steps"),
    "wall_seconds": (60, "minutes"),
}


@dataclass
class Args:
    paths: tyro.conf.Positional[list[Path]]  # runs, or folders of them (--speed: its CSV file)
    out: Path | None = None  # picture to write: returns against environment steps
    wall_clock: Path | None = None  # picture to write: returns against minutes
    profile: Path | None = None  # picture to write: interquartile means, performance profiles
    speed: Path | None = None  # picture to write, of update_speed.csv: milliseconds of an update
    thin: Path | None = None  # folder for a CSV file of each run, at most 200 rows; no more is done
    partial: bool = False  # take unfinished runs too, seeds compared where the shortest one stands
    every_seed: bool = False  # list the seeds' final returns in the table
    titles: tuple[str, ...] = ()  # of the panels, in their order; default: the environments
    lines: tuple[str, ...] = ()  # draw the published rows with one of these words as lines


@dataclass
class Run:
    name: str
    env_id: str
    method: str
    seed: str
    columns: dict[str, np.ndarray]  # of progress.csv
    total: int  # a run that has done so many steps has ended, 0 where unknown
    step: int  # the last step so far

    @property
    def ended(self) -> bool:
        """Whether the run did all its steps."""
        return self.step >= self.total

    @property
    def drawable(self) -> bool:
        """Whether there is a return at all."""
        return bool(np.isfinite(self.columns["episodic_return"]).any())


Groups = dict[str, dict[str, list[Run]]]  # environment -> method -> its runs, one a seed
Published = dict[str, dict[str, tuple[float, float]]]  # source -> task -> mean, error or nan


def fail(sentence: str) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"plot: {sentence}", file=sys.stderr)
    raise SystemExit(2)


# ---- Reading ---------------------------------------------------------------------------------


def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders and CSV files that the paths name, themselves or as the folder of them."""
    found = []
    skipped = []
    for path in paths:
        if not path.exists():
            fail(f"{path} does not exist: name run folders, CSV files or a folder of them.")
        if path.is_file() or is_run(path):
            found.append(path)
            continue
        inside = [child for child in path.iterdir() if is_run(child)]
        others = {child for child in path.iterdir() if child.is_dir()} - {*inside, path / "log"}
        found += inside
        skipped += others if inside else [path, *others]
    if skipped:
        names = ", ".join(map(str, sorted(skipped)))
        print(f"No run (progress.csv with config.json), left out: {names}.\n")
    return sorted(found)


def is_run(path: Path) -> bool:
    """A run folder has both files; of the files in a folder, those named like a run are one."""
    if path.is_dir():
        return (path / "progress.csv").exists() and (path / "config.json").exists()
    return path.suffix == ".csv" and path.name.count("__") >= 2


def read_run(path: Path) -> Run:
    """A run folder, or a CSV file made of one."""
    name = path.absolute().name.removesuffix(".csv")
    parts = name.split("__")
    total = 0
    file = path
    if path.is_dir():
        parts, timesteps = read_config(path / "config.json", parts)
        file = path / "progress.csv"
    elif len(parts) < 3:
        fail(f"{path} is not named ENVIRONMENT__METHOD__SEED.csv, rename it.")
    try:
        columns = read_columns(file)
    except (OSError, ValueError, TypeError) as error:
        fail(f"{file} cannot be read ({error!r}), it must be the progress.csv of a run.")
    steps = columns["global_step"]
    if path.is_dir():
        rollout = np.diff(steps, prepend=0)[-1:].sum()  # of as many processes as there were
        total = timesteps - rollout + 1  # no further one fits
    return Run(name, *parts[:3], columns, total, int(max(steps, default=0)))


def read_config(file: Path, parts: list[str]) -> tuple[list[str], int]:
    """Environment, method and seed of a run, and its --total-timesteps.

    One script makes several methods, so the method in a folder's name counts, if there is one."""
    try:
        config = json.loads(file.read_text())
        env_id = re.sub("[/:]", "_", config["env_id"])  # as in the names of folders
        named = len(parts) >= 3 and parts[0].replace(":", "_") == env_id
        method = parts[1] if named else config["algorithm"]
        return [env_id, method, str(config["seed"])], int(config["total_timesteps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{file} cannot be read ({error!r}), it must be the config.json of a run.")


def read_columns(file: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file."""
    lines = [line for line in file.read_text().splitlines(True) if line.endswith("\n")]
    rows = list(csv.DictReader(lines))  # a crash may have torn the last line
    columns = {}
    for name in rows[0] if rows else NEEDED:
        columns[name] = np.array([float(row[name]) for row in rows])
    if not set(NEEDED) <= columns.keys():
        raise ValueError(f"no column {' or '.join(NEEDED)}")
    return columns


def read_rows(file: Path, texts: list[str], numbers: list[str]) -> list[dict]:
    """Rows of a CSV file with comments, which must have the named columns."""
    try:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        rows = list(csv.DictReader(lines))
        if not rows or not {*texts, *numbers} <= rows[0].keys():
            raise ValueError("a column is missing")
        for row in rows:
            for name in numbers:
                row[name] = float(row[name] or math.nan)
    except (OSError, ValueError) as error:
        names = ", ".join([*texts, *numbers])
        fail(f"{file} cannot be read ({error}), its columns must be {names}.")
    return rows


def read_published() -> Published:
    """Published results; tasks have no version there."""
    found = defaultdict(dict)
    for file in PUBLISHED:
        for row in read_rows(file, ["env", "source"], ["mean", "error"]):
            found[row["source"]][row["env"]] = row["mean"], row["error"]
    return found


# ---- Which runs count ------------------------------------------------------------------------


def choose(runs: list[Run], partial: bool) -> list[Run]:
    """The runs to count; prints which do not."""
    refuse_twins(runs)
    estimate_totals(runs)
    silent = [run for run in runs if not run.drawable]
    unfinished = [run for run in runs if run.drawable and not run.ended]
    if unfinished:
        what = "counted all the same" if partial else "left out (--partial counts them)"
        print(f"Not ended, {what}: {listed(unfinished)}.\n")
    if silent:
        print(f"No episode has ended, left out: {listed(silent)}.\n")
    kept = [run for run in runs if run.drawable and (run.ended or partial)]
    if not kept and unfinished:
        fail("no run has ended, --partial shows them as they stand.")
    if not kept:
        fail("there is no run to show: name run folders, CSV files or a folder of them.")
    return kept


def refuse_twins(runs: list[Run]) -> None:
    """Two runs of one seed would count it twice."""
    seen = {}
    for run in runs:
        key = run.env_id, run.method, run.seed
        if key in seen:
            twins = f"{seen[key]} and {run.name} are the same seed of the same method"
            fail(f"{twins}: name one, or rename one {run.env_id}__ANOTHER__{run.seed}.")
        seen[key] = run.name


def estimate_totals(runs: list[Run]) -> None:
    """A CSV file does not say where its run should have ended: its other seeds do, nearly."""
    longest = defaultdict(int)
    for run in runs:
        key = run.env_id, run.method
        longest[key] = max(longest[key], run.step)
    for run in runs:
        run.total = run.total or round(0.98 * longest[run.env_id, run.method])


def listed(runs: list[Run]) -> str:
    """Names and steps of runs."""
    return ", ".join(f"{run.name} ({short(run.step)} steps)" for run in runs)


def short(step: float) -> str:
    """Millions, below 100,000 every digit."""
    return f"{step / 1e6:.2f}M" if step >= 1e5 else f"{step:,.0f}"


def group_runs(runs: list[Run], published: Published) -> Groups:
    """Environments as the published tables have them, methods as LOOKS has, then by name."""
    tasks = dict.fromkeys(name for source in published.values() for name in source)
    place = {name: i for i, name in enumerate(tasks)}
    found = {run.method for run in runs}
    methods = [method for method in LOOKS if method in found] + sorted(found - LOOKS.keys())
    groups = {}
    env_ids = sorted({run.env_id for run in runs})
    for env_id in sorted(env_ids, key=lambda env_id: place.get(task(env_id), len(place))):
        here = [run for run in runs if run.env_id == env_id]
        groups[env_id] = {m: [run for run in here if run.method == m] for m in methods}
    return groups


def task(env_id: str) -> str:
    """Name of an environment without its version, as the published tables have it."""
    return re.sub(r"-v\d+$", "", env_id)


# ---- Statistics ------------------------------------------------------------------------------


def align(runs: list[Run], by: str) -> tuple[np.ndarray, np.ndarray] | None:
    """200 values of the column `by` at which all runs have a return, and these [runs, 200].

    None where one run ends before another has its first return: nothing is made up there."""
    curves = []
    for run in runs:
        seen = np.isfinite(run.columns["episodic_return"])  # nan before the first episode ends
        curves.append((run.columns[by][seen], run.columns["episodic_return"][seen]))
    first = max(x[0] for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    if first > last:
        return None
    grid = np.linspace(first, last, 200)
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def interval(samples: list[np.ndarray], statistic) -> tuple[np.ndarray, np.ndarray] | None:
    """95 % bootstrap interval of statistic(*samples, axis) over axis 0, by sample."""
    if min(map(len, samples)) < 2:
        return None
    options = {"n_resamples": 2000, "method": "percentile", "rng": 0}
    return bootstrap(samples, statistic, axis=0, **options).confidence_interval


def interquartile_mean(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the middle half of the runs of all tasks together."""
    return trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def mean(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the runs of all tasks together."""
    return np.concatenate(tasks, axis).mean(axis)


class Final(NamedTuple):
    """The last returns that all seeds of a method have, and the step they are of."""

    step: float
    returns: np.ndarray  # [seeds]


def final_returns(groups: Groups) -> dict[tuple[str, str], Final]:
    """Of each environment and method; prints where there is no common step."""
    finals = {}
    apart = []
    for env_id, group in groups.items():
        for method, runs in group.items():
            if not runs:
                continue
            aligned = align(runs, "global_step")
            if aligned is None:
                apart.append(f"{env_id} {method}")
                continue
            grid, returns = aligned
            finals[env_id, method] = Final(grid[-1], returns[:, -1])
    if apart:
        print(f"Not compared, a seed ends before another's first return: {', '.join(apart)}.\n")
    return finals


class Scores(NamedTuple):
    """Final returns in units of the first published row, of the seeds that every method has."""

    seeds: dict[str, list[str]]  # environment -> the seeds
    returns: dict[str, list[np.ndarray]]  # method -> [seeds] of each environment
    middles: dict[str, tuple]  # method -> interquartile mean, its interval or None
    unit: str  # the published rows that are 1


def score(groups: Groups, finals: dict, published: Published) -> Scores:
    """More seeds of one task would shift a method's weight there, so only common ones count."""
    seeds = {}
    returns = defaultdict(list)
    units = []
    for env_id, group in groups.items():
        sources = [source for source in published if task(env_id) in published[source]]
        common = set.intersection(*({run.seed for run in runs} for runs in group.values()))
        if not sources or not common or not all((env_id, method) in finals for method in group):
            continue
        seeds[env_id] = sorted(common)
        units.append(sources[0])
        unit, _ = published[sources[0]][task(env_id)]
        for method, runs in group.items():
            counted = [run.seed in common for run in runs]
            returns[method].append(finals[env_id, method].returns[counted] / unit)
    middles = {
        method: (interquartile_mean(*tasks, axis=0), interval(tasks, interquartile_mean))
        for method, tasks in returns.items()
    }
    return Scores(seeds, returns, middles, " or ".join(dict.fromkeys(units)))


# ---- Tables ----------------------------------------------------------------------------------


def number(x: float) -> str:
    """Three digits or more, one decimal below 100."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}"


def with_error(x: float, error: float) -> str:
    """Both with the decimals of the first."""
    if math.isnan(error):
        return number(x)
    return f"{x:.0f} ± {error:.0f}" if abs(x) >= 100 else f"{x:.1f} ± {error:.1f}"


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    """A Markdown table with one line a row."""
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *row] for name, row in rows.items()]
    for cells in lines:
        print("| " + " | ".join(cells) + " |")
    print()


def print_returns(groups: Groups, finals: dict, published: Published, every_seed: bool) -> None:
    """Final returns of each method, then the published ones."""
    rows = defaultdict(list)
    for env_id, group in groups.items():
        longest = max(run.step for runs in group.values() for run in runs)
        for method in group:
            final = finals.get((env_id, method))
            rows[method].append(return_cell(final, longest, every_seed) if final else "-")
    for source, returns in published.items():
        if any(task(env_id) in returns for env_id in groups):
            known = [returns.get(task(env_id)) for env_id in groups]
            rows[source] = [with_error(*cell) if cell else "-" for cell in known]
    seeds = "seeds" if every_seed else "number of seeds"
    print_table(f"final return, mean ± standard error ({seeds})", list(groups), rows)
    if any(len(final.returns) == 1 for final in finals.values()):
        print("No error and no band where there is one seed.\n")
    if any(" at " in cell for cells in rows.values() for cell in cells):
        print("`at`: steps where the shortest run ends, if others go on.\n")


def return_cell(final: Final, longest: int, every_seed: bool) -> str:
    """Mean, error and seeds, and the step where it is not the last one."""
    count = len(final.returns)
    error = final.returns.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    seeds = ", ".join(map(number, final.returns)) if every_seed else count
    at = f" at {short(final.step)}" if final.step < 0.98 * longest else ""
    return f"{with_error(final.returns.mean(), error)} ({seeds}){at}"


def print_states(groups: Groups) -> None:
    """Where runs tell it: how far a rollout moves the policy, and the noise that is left."""
    rows = defaultdict(list)
    for group in groups.values():
        for method, runs in group.items():
            told = [run.columns for run in runs if {"kl", "entropy"} <= run.columns.keys()]
            cells = [f"{np.nanmedian(c['kl']):.4f}, {c['entropy'][-1]:.1f}" for c in told]
            rows[method].append("; ".join(cells) or "-")
    print_table("median KL, entropy at the end [nats]; by seed", list(groups), rows)


def print_middles(groups: Groups, scores: Scores) -> None:
    """Interquartile means, and what they are of."""
    rows = {}
    for method, (middle, bounds) in scores.middles.items():
        text = f"{middle:.3f}"
        if bounds is not None:
            text += f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
        rows[method] = [text, str(sum(map(len, scores.returns[method])))]
    if rows:
        columns = ["[95 % interval] of final return / reference", "runs"]
        print_table("interquartile mean", columns, rows)
        counted = [f"{env} (seeds {', '.join(seeds)})" for env, seeds in scores.seeds.items()]
        print(f"Reference: {scores.unit}.", end=" ")
        print(f"Counted, the seeds that every method has: {', '.join(counted)}.")
    missing = [env_id for env_id in groups if env_id not in scores.seeds]
    if missing:
        print(f"No interquartile mean for {', '.join(missing)}:", end=" ")
        print("it needs a published return and a seed that every method has.")


# ---- Pictures --------------------------------------------------------------------------------


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture; with a palette a PNG takes a third of the bytes."""
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:  # of a format that matplotlib does not know
        fail(f"{path} cannot be written: {error}.")
    plt.close(figure)
    if path.suffix == ".png":
        picture = Image.open(path).convert("RGB")
        picture.quantize(dither=Image.Dither.NONE).save(path, optimize=True)


def choose_looks(methods: list[str]) -> dict[str, Look]:
    """A known method's own look, others one that no known method has."""
    spare = list(itertools.product(SPARE_DASHES, SPARE_COLORS))
    others = [method for method in methods if method not in LOOKS]
    if len(others) > len(spare):
        fail(f"{len(others)} methods without a look of their own, there are {len(spare)} for such.")
    chosen = {method: LOOKS[method] for method in methods if method in LOOKS}
    for i, (method, (dashes, color)) in enumerate(zip(others, spare, strict=False)):
        chosen[method] = Look(method, color, dashes, SPARE_MARKERS[i % len(SPARE_MARKERS)])
    return chosen


def line_style(look: Look) -> dict:
    """What matplotlib's plot takes of a look."""
    return {
        "color": look.color,
        "linestyle": look.linestyle,
        "marker": look.marker,
        "markersize": 4,
        "linewidth": 1.2,
    }


def draw(
    axis: Axes, x: np.ndarray, y: np.ndarray, band: tuple | None, place: int, look: Look
) -> None:
    """A line with its band; `place` keeps its markers apart from those of other methods."""
    axis.plot(x, y, **line_style(look), markevery=(place * 4 % 40, 40))
    if band is not None:
        axis.fill_between(x, *band, color=look.color, alpha=0.15, linewidth=0)
    axis.grid(alpha=0.3)


class PublishedLine(NamedTuple):
    """A published row as a horizontal line in each panel."""

    source: str
    returns: dict[str, tuple[float, float]]  # task -> mean, error
    style: dict


def published_lines(
    words: tuple[str, ...], groups: Groups, published: Published
) -> list[PublishedLine]:
    """Published rows of these tasks with one of the words, in the colour of their method."""
    tasks = {task(env_id) for env_id in groups}
    here = {source: returns for source, returns in published.items() if tasks & returns.keys()}
    lines = []
    for source, returns in here.items():
        if any(word in source for word in words):
            colors = [look.color for look in LOOKS.values() if look.label in source]
            color = colors[0] if colors else "#7f7f7f"
            style = {"color": color, "linestyle": (0, (1, 1)), "linewidth": 1.5}
            lines.append(PublishedLine(source, returns, style))
    if words and not lines:
        known = ", ".join(here) or "none"
        fail(f"--lines {' '.join(words)} is in no published row of these tasks: {known}.")
    return lines


def legend(figure: plt.Figure, looks: dict[str, Look], lines: list[PublishedLine]) -> None:
    """A name for each line style, below the panels."""
    styles = {look.label: line_style(look) for look in looks.values()}
    styles |= {line.source: line.style for line in lines}
    handles = [plt.Line2D([], [], **style, label=label) for label, style in styles.items()]
    columns = min(len(handles), int(figure.get_figwidth() / 2))  # two inches a name
    place = {"loc": "outside lower center", "ncols": columns, "handlelength": 4}
    figure.legend(handles=handles, **place, frameon=False)


def draw_panel(
    axis: Axes, by: str, env_id: str, group: dict, looks: dict[str, Look], lines: list
) -> None:
    """A method's mean and band over seeds, up to where its shortest run ends."""
    unit, _ = AXES[by]
    for place, (method, look) in enumerate(looks.items()):
        if not group[method]:
            continue
        aligned = align(group[method], by)
        if aligned is None:
            print(f"Not drawn, a seed ends before another's first return: {env_id} {method}.")
            continue
        x, returns = aligned
        draw(axis, x / unit, returns.mean(0), interval([returns], mean), place, look)
    for line in lines:
        if task(env_id) in line.returns:
            axis.axhline(line.returns[task(env_id)][0], **line.style)
    axis.set_title(env_id, fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(5))


def draw_middles(axis: Axes, scores: Scores, looks: dict[str, Look]) -> None:
    """Interquartile means with their intervals, a line a method."""
    for method, (middle, bounds) in scores.middles.items():
        look = looks[method]
        if bounds is not None:
            axis.plot(bounds, [look.label] * 2, color=look.color, linewidth=6, alpha=0.35)
        axis.plot([middle], [look.label], color=look.color, marker=look.marker, markersize=6)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.set_title("All tasks", fontsize=10)
    axis.set_xlabel(f"interquartile mean of final return / {scores.unit}")


def picture_of_curves(
    path: Path,
    by: str,
    groups: Groups,
    lines: list[PublishedLine],
    titles: tuple[str, ...] = (),
    scores: Scores | None = None,
) -> None:
    """One panel an environment, and the interquartile means where panels are left over."""
    looks = choose_looks(list(next(iter(groups.values()))))
    count = len(groups)
    columns = min(count, 2 if count in (2, 4) else 3)
    rows = math.ceil(count / columns)
    width = min(10, 2.1 + 4.2 * columns)
    height = 2.6 * rows + 0.4 + 0.2 * math.ceil(len([*looks, *lines]) / int(width / 2))
    figure = plt.figure(figsize=(width, height), layout="constrained")
    for i, (env_id, group) in enumerate(groups.items()):
        axis = figure.add_subplot(rows, columns, i + 1)
        draw_panel(axis, by, env_id, group, looks, lines)
        if titles:
            axis.set_title(titles[i], fontsize=10)
        if i >= count - columns:  # the lowest panel of its column
            axis.set_xlabel(AXES[by][1])
        if i % columns == 0:
            axis.set_ylabel("episodic return")
    if scores and scores.seeds.keys() == groups.keys() and count < rows * columns:
        axis = figure.add_subplot(rows, columns, (count + 1, rows * columns))
        draw_middles(axis, scores, looks)
    legend(figure, looks, lines)
    save(figure, path)


def picture_of_profiles(path: Path, scores: Scores) -> None:
    """Interquartile means with intervals, and the fraction of runs above a score."""
    looks = choose_looks(list(scores.returns))
    highest = max(np.concatenate(tasks).max() for tasks in scores.returns.values())
    thresholds = np.linspace(0, 1.02 * highest, 200)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    draw_middles(left, scores, looks)
    for place, (method, tasks) in enumerate(scores.returns.items()):
        above = [returns[:, None] > thresholds for returns in tasks]  # [seeds, 200] a task
        band = interval(above, mean)
        draw(right, thresholds, mean(*above, axis=0), band, place, looks[method])
    right.set(xlabel=f"final return / {scores.unit}, τ", ylabel="fraction of runs above τ")
    legend(figure, looks, [])
    save(figure, path)


def picture_of_speed(path: Path, file: Path) -> None:
    """Milliseconds of one update, a panel a network, a bar a method."""
    rows = read_rows(file, ["method", "update", "network"], ["milliseconds"])
    networks = list(dict.fromkeys(row["network"] for row in rows))
    size = (10, 0.5 + 0.22 * len(rows) / len(networks))
    figure, axes = plt.subplots(
        1, len(networks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, network in zip(axes[0], networks, strict=True):
        here = [row for row in rows if row["network"] == network]
        names = [row["update"] for row in here]
        times = [row["milliseconds"] for row in here]
        looks = choose_looks([row["method"] for row in here])
        colors = [looks[row["method"]].color for row in here]
        bars = axis.barh(names, times, color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.set_xscale("log")
        axis.set_xlim(1, 4 * max(times))  # room for the numbers
        axis.set_title(network, fontsize=10)
        axis.set_xlabel("milliseconds")
    axes[0, 0].invert_yaxis()
    save(figure, path)


# ---- Program ---------------------------------------------------------------------------------


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


def show(args: Args, runs: list[Run]) -> None:
    """Write the pictures, then print the tables: nothing is shown where one cannot be written."""
    published = read_published()
    groups = group_runs(runs, published)
    lines = published_lines(args.lines, groups, published)
    if args.titles and len(args.titles) != len(groups):
        fail(f"--titles are {len(args.titles)}, the panels {len(groups)}: {', '.join(groups)}.")
    finals = final_returns(groups)
    scores = score(groups, finals, published)
    if args.out:
        picture_of_curves(args.out, "global_step", groups, lines, args.titles, scores)
    if args.wall_clock:
        picture_of_curves(args.wall_clock, "wall_seconds", groups, lines, args.titles)
    if args.profile and not scores.seeds:
        fail("--profile needs a published return and a seed that every method has.")
    if args.profile:
        picture_of_profiles(args.profile, scores)
    print_returns(groups, finals, published, args.every_seed)
    print_states(groups)
    print_middles(groups, scores)


def main(args: Args) -> None:
    """Thin runs, or draw them and print the tables."""
    plt.rcParams.update({"font.size": 8, "legend.fontsize": 9})
    if args.speed and len(args.paths) != 1:
        fail("--speed takes one CSV file, such as benchmark/results/update_speed.csv.")
    try:
        if args.speed:
            picture_of_speed(args.speed, args.paths[0])
            return
        runs = choose([read_run(path) for path in find_runs(args.paths)], args.partial)
        if not args.thin:
            show(args, runs)
            return
        for run in runs:
            thin(run, args.thin)
    except OSError as error:
        what = error.filename or "standard output"
        fail(f"{what} cannot be written ({error.strerror}), name a place that can.")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # where `| head` has read enough, end quietly
    main(tyro.cli(Args))
