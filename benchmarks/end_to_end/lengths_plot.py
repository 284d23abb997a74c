"""The pictures of docs/evidence.md: final quality over training time, of uniform runs, early stopping and GEKO.

python -m benchmarks.end_to_end.lengths_plot [results/lengths_2026-11-27.jsonl.gz ...] [--out results/lengths.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

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
    "D2": "package descriptions to sections",
    "V1": "texts to ratings",
    "G1": "sums to their steps",
}
UNITS = {"test_macro_accuracy": "macro accuracy, %", "test_spearman": "correlation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", type=Path, default=[FILE])
    parser.add_argument("--out", type=Path, default=RESULTS / "lengths.png")
    given = parser.parse_args()
    found = {name: rows for path in given.rows for name, rows in load(path).items()}
    tasks = {name: found[name] for name in TITLES if name in found}
    across = 3 if len(tasks) > 4 else 2
    figure, panels = plt.subplots(-(-len(tasks) // across), across, figsize=(3.7 * across, 6), layout="constrained")
    labels: dict[str, Any] = {}
    for axes, (task, rows) in zip(panels.flat, tasks.items(), strict=True):
        panel(axes, task, rows)
        adapters = next(iter(rows["auto"].values())).get("lora")
        axes.set_title(TITLES[task] + (", LoRA" if adapters else ""), fontsize=10)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels))
    figure.savefig(given.out, dpi=130)


def panel(axes: Axes, task: str, rows: Rows) -> None:
    """One task: means over the seeds; the numbers beside the line are epochs."""
    measure = MEASURES[task]

    def point(runs: list[Row]) -> tuple[float, float]:
        return mean(map(seconds, runs)), mean(final(row, measure) for row in runs)

    uniform = {each: point(list(rows[arm].values())) for arm in rows if (each := epochs(arm, task))}
    line = [uniform[each] for each in sorted(uniform)]
    axes.plot(*zip(*line, strict=True), "o-", color="#8C8C8C", label="uniform, by number of epochs")
    for each, at in uniform.items():
        axes.annotate(f"{each:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    for arm, label, color, marker in (
        ("A-stop", "early stopping", "#E69F00", "s"),
        ("H", "recommended()", "#009E73", "D"),
        ("auto", "auto()", "#0072B2", "*"),
    ):
        if not rows.get(arm):
            continue
        at = point(list(rows[arm].values()))
        axes.plot(*at, marker, color=color, markersize=12 if marker == "*" else 7, label=label)
    axes.set_xlabel("seconds of training")
    other = "accuracy, %" if measure.scale == 100 else "loss a token (lower is better)"
    axes.set_ylabel(UNITS.get(measure.key, other))
    axes.grid(alpha=0.3)
    axes.margins(0.1)  # room for the numbers


if __name__ == "__main__":
    main()
