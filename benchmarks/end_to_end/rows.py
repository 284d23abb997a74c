"""The rows of the end-to-end runs and what is computed of them: differences paired by seed, ratios of times."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from benchmarks.end_to_end.tasks import TASKS, best_lr
from benchmarks.results import read

Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]  # of one task: arm -> seed -> row
MARGIN_POINTS, MARGIN_LOSS = 0.5, 0.01  # what counts as no worse, fixed before the runs


# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


class Measure(NamedTuple):
    """What a task is judged by."""

    key: str
    higher: bool
    scale: float = 100.0


MEASURES = {
    name: Measure(task.measure, task.higher, 100.0 if task.measure.endswith("accuracy") else 1.0)
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


def t_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; one value says nothing. Beyond 20 values that of 20, a little wide."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = _T[min(len(values), len(_T) + 1) - 2] * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


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
    prefix = "train" if task.startswith("R1") else "test"
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
