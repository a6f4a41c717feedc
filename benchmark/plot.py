"""Learning curves and a Markdown table of final returns from progress.csv files.

Run: python benchmark/plot.py --out benchmark/results/kaczmarz.png benchmark/results/*.csv
A file is named ENVIRONMENT__METHOD__SEED.csv; `--thin FOLDER RUNS...` makes such files from run folders of that name.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

COLOURS = ("#0b3c8c", "#d1495b", "#5c946e", "#edae49", "#6b6b6b")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1)))


@dataclass
class Args:
    paths: tyro.conf.Positional[list[Path]]  # CSV files, or run folders with --thin
    out: Path | None = None  # picture to write
    thin: Path | None = None  # write at most 200 rows of each run folder's progress.csv here


def read(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def thin(run: Path, folder: Path) -> None:
    """Every k-th row and the last of run/progress.csv to folder/{run name}.csv, at most 200 rows."""
    header, *rows = (run / "progress.csv").read_text().splitlines()
    kept = sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(200, len(rows)))})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run.name}.csv").write_text("\n".join([header, *(rows[i] for i in kept)]) + "\n")


def main(args: Args) -> None:
    """Thin runs, or draw one panel an environment (mean and range over seeds) and print the table."""
    if args.thin:
        for run in args.paths:
            thin(run, args.thin)
        return
    curves = defaultdict(lambda: defaultdict(dict))  # environment -> method -> seed -> columns
    for path in sorted(args.paths):
        env_id, method, seed = path.stem.split("__")
        curves[env_id][method][seed] = read(path)
    methods = sorted({method for panel in curves.values() for method in panel})
    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.1), squeeze=False, layout="constrained")
    print("| final return, mean ± standard error (seeds) |" + "".join(f" {m} |" for m in methods))
    print("|---|" + "---|" * len(methods))
    for axis, (env_id, panel) in zip(axes[0], curves.items(), strict=True):
        cells = []
        for method, colour, dash in zip(methods, COLOURS, DASHES, strict=False):
            if not (runs := list(panel.get(method, {}).values())):
                cells.append("-")
                continue
            end = min(run["global_step"][-1] for run in runs)
            grid = np.linspace(0, end, 200)
            returns = np.array([np.interp(grid, r["global_step"], r["episodic_return"]) for r in runs])
            axis.plot(grid / 1e6, returns.mean(0), color=colour, linestyle=dash, label=method)
            axis.fill_between(grid / 1e6, returns.min(0), returns.max(0), color=colour, alpha=0.15, linewidth=0)
            final = np.array([run["episodic_return"][-1] for run in runs])
            error = f" ± {final.std(ddof=1) / len(final) ** 0.5:.0f}" if len(final) > 1 else ""
            cells.append(f"{final.mean():.0f}{error} ({', '.join(f'{x:.0f}' for x in final)})")
        print(f"| {env_id} |" + "".join(f" {cell} |" for cell in cells))
        axis.set(title=env_id, xlabel="million environment steps", ylabel="episodic return")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    if args.out:
        figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
