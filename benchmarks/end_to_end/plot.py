"""Pictures of the end-to-end runs: quality over time on each task."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

from benchmarks.end_to_end.rows import MEASURES, Rows
from benchmarks.end_to_end.tasks import TASKS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_COLORS = {"A": "0.45", "B": "tab:blue", "H": "tab:red", "H-spend": "tab:orange"}
_NAMES = {"A": "uniform", "B": "uniform at GEKO's budget", "H": "GEKO", "H-spend": "GEKO, saved samples spent"}


def draw(tasks: dict[str, Rows], path: Path) -> None:
    """Held-out quality (recall in R1) over seconds of training, one line a seed that had its GPU to itself; dashed:
    another GPU than the last run's, whose seconds are others."""
    gpus = {name: [row["gpu"] for runs in rows.values() for row in runs.values()][-1] for name, rows in tasks.items()}
    shown = [name for name in TASKS if tasks.get(name, {}).get("A")]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        measure = MEASURES[name]
        key = measure.key.replace("test", "train") if name.startswith("R1") else measure.key
        for arm, color in _COLORS.items():
            alone = [row for row in tasks[name].get(arm, {}).values() if row["alone"]]
            for i, row in enumerate(alone):
                seconds = [entry["seconds"] for entry in row["history"]]
                values = [entry[key] * measure.scale for entry in row["history"]]
                style = "-" if row["gpu"] == gpus[name] else "--"
                label = _NAMES[arm] if i == 0 else None
                axis.plot(seconds, values, style, color=color, alpha=0.7, marker=".", label=label)
        axis.set_title(textwrap.fill(f"{name}: {TASKS[name].what}", 60), fontsize=9)
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(
            "recall, %" if name.startswith("R1") else "accuracy, %" if measure.scale == 100 else "held-out loss"
        )
        axis.grid(alpha=0.3)
    known = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes.flat[0].legend(known.values(), known.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
