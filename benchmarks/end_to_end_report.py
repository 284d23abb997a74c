"""Tables, targets and pictures of the end-to-end runs, made from their rows.

    python benchmarks/end_to_end_report.py [results/end_to_end.jsonl]

Differences are paired by seed; their intervals are 95 % bootstrap intervals of the mean over seeds.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
from end_to_end_arms import WHAT
from end_to_end_tasks import TASKS, best_lr
from results import RESULTS, read

Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]  # of one task: arm -> seed -> row
MARGIN_POINTS, MARGIN_LOSS = 0.5, 0.01  # what counts as no worse, fixed before the runs


class Measure(NamedTuple):
    """What a task is judged by."""

    key: str
    higher: bool
    scale: float = 100.0


MEASURES = {
    name: Measure(task.measure, True) if task.measure == "test_accuracy" else Measure(task.measure, False, 1.0)
    for name, task in TASKS.items()
}


def load(path: Path) -> dict[str, Rows]:
    """The rows at each task's best learning rate; of a run done twice the newest."""
    rows = read(path)
    tasks: dict[str, Rows] = defaultdict(lambda: defaultdict(dict))
    for name, task in TASKS.items():
        of_task = [row for row in rows if row["task"] == name]
        lr = best_lr(task, of_task)
        for row in of_task:
            if row["lr"] == lr:
                tasks[name][row["arm"]][row["seed"]] = row
    return tasks


def final(row: Row, measure: Measure) -> float:
    return row["final"][measure.key] * measure.scale


def bootstrap(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean; with one value that value."""
    draws = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def paired(rows: Rows, arm: str, other: str, value: Callable[[Row], float]) -> list[float]:
    """`value` of `arm` minus that of `other`, for each seed that both have."""
    return [value(rows[arm][s]) - value(rows[other][s]) for s in sorted(rows[arm].keys() & rows[other].keys())]


def time_ratios(rows: Rows, arm: str, other: str = "A") -> list[float]:
    """Seconds of `arm` over those of `other`, for seeds at which both had a GPU of the same kind to themselves."""
    seeds = timed(rows, arm, other)
    return [rows[arm][s]["seconds"]["total"] / rows[other][s]["seconds"]["total"] for s in seeds]


def timed(rows: Rows, arm: str, other: str) -> list[int]:
    """The seeds whose times can be compared."""
    both = ((s, rows[arm][s], rows[other][s]) for s in sorted(rows[arm].keys() & rows[other].keys()))
    return [s for s, a, b in both if a["alone"] and b["alone"] and a["gpu"] == b["gpu"]]


def time_to(rows: Rows, arm: str, share: float = 1.0) -> list[float | None]:
    """Seconds until `arm` first has `share` of A's final value, over A's seconds until then; None if it never does."""
    task = next(iter(rows["A"].values()))["task"]
    measure, found = MEASURES[task], []
    prefix = "train" if task == "R1" else "test"
    key = measure.key.replace("test", prefix)
    for seed in timed(rows, arm, "A"):
        goal = rows["A"][seed]["history"][-1][key] * share
        times = [_first(rows[name][seed], key, goal, measure.higher) for name in (arm, "A")]
        found.append(None if times[0] is None or times[1] is None else times[0] / times[1])
    return found


def _first(row: Row, key: str, goal: float, higher: bool) -> float | None:
    """When `goal` was first crossed, on straight lines between the ends of epochs."""
    before = None
    for entry in row["history"]:
        if entry[key] >= goal if higher else entry[key] <= goal:
            if before is None:
                return entry["seconds"]
            part = (goal - before[key]) / (entry[key] - before[key])
            return before["seconds"] + part * (entry["seconds"] - before["seconds"])
        before = entry
    return None


def bound(rows: Rows) -> list[float]:
    """Measured T / (T_standard (1 - mean frozen share)) of GEKO; a share counts from the epoch after."""
    ratios = time_ratios(rows, "H")
    frozen = [mean([0.0, *rows["H"][s]["frozen_share"][:-1]]) for s in timed(rows, "H", "A")]
    return [ratio / (1 - share) for ratio, share in zip(ratios, frozen, strict=True)]


def table(task: str, rows: Rows) -> list[str]:
    """Markdown: one line an arm."""
    measure = MEASURES[task]
    unit = "accuracy, %" if measure.scale == 100 else "loss"
    lines = [
        f"### {task}: {TASKS[task].what}",
        "",
        f"| arm | seeds | final {unit} | worst seed | against A [95 %] | worst group | all training samples: loss | "
        "rows trained / A's | cost / A's | time / A's | frozen and forgotten | quarantined (precision, recall) |",
        "| --- | " + "--- | " * 11,
    ]
    for arm in [*(arm for arm in WHAT if rows.get(arm)), *(arm for arm in rows if arm not in WHAT)]:
        seeds = list(rows[arm].values())
        values = [final(row, measure) for row in seeds]
        worst = min(values) if measure.higher else max(values)
        against = ""
        if arm != "A" and (differences := paired(rows, arm, "A", lambda row: final(row, measure))):
            low, high = bootstrap(differences)
            against = f"{mean(differences):+.2f} [{low:+.2f}, {high:+.2f}]"
        group = mean(row["final"][measure.key.replace("test_", "test_worst_")] * measure.scale for row in seeds)
        ratios = time_ratios(rows, arm) if rows.get("A") else []
        trained = mean(row["rows_trained"] / (row["samples"] * row["epochs"]) for row in seeds)
        held = mean(row["quarantined_share"] for row in seeds)
        guard = f"{held:.1%} ({_mean(seeds, 'quarantine_precision')}, {_mean(seeds, 'quarantine_recall')})"
        cells = [
            f"{arm}: {WHAT[arm]}" if arm in WHAT else arm,
            str(len(seeds)),
            f"{mean(values):.2f}",
            f"{worst:.2f}",
            against,
            f"{group:.2f}",
            f"{mean(row['final']['train_loss'] for row in seeds):.3f}",
            f"{trained:.2f}",
            f"{mean(row['cost'] for row in seeds):.2f}",
            f"{median(ratios):.2f}" if ratios else "",
            f"{mean(row['frozen_forgotten'] for row in seeds):.1%}" if arm.startswith("H") else "",
            guard if held else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _mean(rows: list[Row], key: str) -> str:
    return f"{mean(row[key] for row in rows):.2f}"


def main() -> None:
    from end_to_end_plot import draw
    from end_to_end_targets import targets

    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "end_to_end.jsonl"
    tasks = load(path)
    for task in TASKS:
        if task in tasks:
            print("\n".join(table(task, tasks[task])))
    print("| target | measured | |\n| --- | --- | --- |")
    for target in targets(tasks):
        print(f"| {target.what} | {target.measured} | {'hit' if target.hit else 'missed'} |")
    draw(tasks, path.parent)


if __name__ == "__main__":
    main()
