"""The benchmark programs run and print what they promise."""

import subprocess
import sys

from conftest import ROOT, environment


def program(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmark" / name), *map(str, arguments)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_update_speed_prints_every_row():
    rows = [
        line.split(" | ") for line in program("update_speed.py", "--quick").splitlines() if line.startswith("| rat")
    ]
    assert [row[0] for row in rows] == [
        f"| {s}, {j}" for s in ("rat_continuous", "rat_shared") for j in ("tape", "vmap")
    ]
    for row in rows:
        for cell in row[1:]:
            milliseconds, megabytes = cell.strip(" |)").split(" (")
            assert float(milliseconds) > 0
            assert float(megabytes) >= 0


def test_plot_draws_and_counts(tmp_path):
    for method, seed, final in (("a", 1, 10.0), ("a", 2, 20.0), ("b", 1, 5.0)):
        (tmp_path / f"Task-v0__{method}__{seed}").mkdir()
        rows = [f"{step},{'nan' if step < 3 else final * step / 500}" for step in range(1, 501)]
        text = "\n".join(["global_step,episodic_return", *rows]) + "\n"
        (tmp_path / f"Task-v0__{method}__{seed}" / "progress.csv").write_text(text)
    program("plot.py", "--thin", tmp_path / "thin", *tmp_path.glob("Task*"))
    thinned = sorted((tmp_path / "thin").iterdir())
    assert len(thinned) == 3
    assert all(len(path.read_text().splitlines()) == 201 for path in thinned)
    table = program("plot.py", "--out", tmp_path / "x.png", *thinned)
    # mean of 10 and 20, standard error sqrt(50 / 2)
    assert "| Task-v0 | 15 ± 5 (10, 20) | 5 (5) |" in table
    assert (tmp_path / "x.png").stat().st_size > 10_000
