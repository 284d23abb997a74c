"""The picture of docs/evidence.md: final quality over training time, for uniform runs, early stopping and `auto()`.

python -m benchmarks.end_to_end.lengths_plot [results/lengths_2026-11-27.jsonl.gz] [--out results/lengths.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.end_to_end.lengths_report import FILE, epochs, load, seconds
from benchmarks.end_to_end.rows import MEASURES, Row, Rows, final
from benchmarks.results import RESULTS

TITLES = {
    "D1": "packages to descriptions",
    "R2-0": "glosses to classes, right labels",
    "R2-10": "10 % of the labels wrong",
    "R2-30": "30 % wrong",
    "R2-pairs": "30 % wrong, by the likeliest other class",
    "R4": "75,000 glosses to classes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="?", type=Path, default=FILE)
    parser.add_argument("--out", type=Path, default=RESULTS / "lengths.png")
    given = parser.parse_args()
    tasks = load(given.rows)
    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axes, (task, title) in zip(panels.flat, TITLES.items(), strict=True):
        panel(axes, task, tasks[task])
        axes.set_title(title, fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(given.out, dpi=130)


def panel(axes: Axes, task: str, rows: Rows) -> None:
    """One task: means over the seeds; the numbers beside the line are epochs."""
    measure = MEASURES[task]

    def point(runs: list[Row]) -> tuple[float, float]:
        return mean(map(seconds, runs)), mean(final(row, measure) for row in runs)

    uniform = {each: point(list(rows[arm].values())) for arm in rows if (each := epochs(arm, task))}
    line = [uniform[each] for each in sorted(uniform)]
    axes.plot(*zip(*line, strict=True), "o-", color="#8C8C8C", label="uniform training, by number of epochs")
    for each, at in uniform.items():
        axes.annotate(f"{each:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    for arm, label, color, marker in (
        ("A-stop", "early stopping", "#E69F00", "s"),
        ("auto", "GEKOConfig.auto()", "#0072B2", "*"),
    ):
        at = point(list(rows[arm].values()))
        axes.plot(*at, marker, color=color, markersize=12 if marker == "*" else 7, label=label)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("accuracy, %" if measure.scale == 100 else "loss a token (lower is better)")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
