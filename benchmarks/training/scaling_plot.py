"""`python -m benchmarks.training.scaling_plot [DIR]`: DIR/scaling.png of the newest rows in DIR/scaling.jsonl."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.results import RESULTS, Row, read

NAMES = {"standard": "Trainer", "geko": "GEKOTrainer"}


def draw(rows: list[Row], path: Path) -> None:
    """One panel a model: tokens a second over GPUs, a line for each arm and kind."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.2 * len(models), 3.8), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for kind, style in (("ddp", "o-"), ("fsdp2", "s--")):
            for arm, color in (("standard", "#9aa5b1"), ("geko", "#0b7a75")):
                line = [row for row in rows if (row["model"], row["arm"]) == (model, arm)]
                line = [row for row in line if row["kind"] in ("single", kind)]
                line.sort(key=lambda row: row["gpus"])
                values = [row["tokens_per_second"] / 1e3 for row in line]
                label = f"{NAMES[arm]}, {kind.upper()}"
                axes.plot([row["gpus"] for row in line], values, style, color=color, label=label)
        counts = sorted({row["gpus"] for row in rows})
        axes.set(title=model, xlabel="GPUs", ylabel="thousand tokens a second", xticks=counts, ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    newest = {(row["model"], row["gpus"], row["kind"], row["arm"]): row for row in read(directory / "scaling.jsonl")}
    draw(list(newest.values()), directory / "scaling.png")
