"""What `auto()` gives beside uniform training of every length and early stopping: values, differences, times.

    python -m benchmarks.end_to_end.lengths_report [results/lengths_2026-11-27.jsonl.gz]

Uniform runs of n epochs each have a schedule of their own. The best length is the shortest within 0.3 points (0.3 % of
the loss) of the best mean. Differences are paired by seed, with 95 % bootstrap intervals of their mean. Times are
those of training, looks and the preparation of held-back samples.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from benchmarks.end_to_end.lengths import find_arm
from benchmarks.end_to_end.report import grid
from benchmarks.end_to_end.rows import MEASURES, Row, Rows, bootstrap, final, paired
from benchmarks.end_to_end.tasks import TASKS
from benchmarks.results import RESULTS, read

FILE = RESULTS / "lengths_2026-11-27.jsonl.gz"
_WATCHED = ("auto", "A-stop")
_BESIDE = {"A-stop": "early stopping", "H-spend": "`spend_saved`"}
_EQUAL = 0.3  # points, or per cent of the loss


def load(path: Path) -> dict[str, Rows]:
    tasks: dict[str, Rows] = defaultdict(lambda: defaultdict(dict))
    for row in read(path):
        tasks[row["task"]][row["arm"]][row["seed"]] = row
    return {name: tasks[name] for name in TASKS if "auto" in tasks[name]}


def epochs(arm: str, task: str) -> float | None:
    """Length of a uniform run."""
    if arm == "A":
        return TASKS[task].epochs
    return round(TASKS[task].epochs * (find_arm(arm)[1] or 1.0), 2) if arm.startswith("B:") else None


def seconds(row: Row) -> float:
    before = row["seconds"].get("setup", row["seconds"]["selection"]) if row["arm"] in _WATCHED else 0.0
    return row["seconds"]["total"] + before


def best_length(task: str, rows: Rows) -> str | None:
    """The arm with the shortest uniform run that is as good as the best."""
    measure = MEASURES[task]
    of = {arm: mean(final(row, measure) for row in rows[arm].values()) for arm in rows if epochs(arm, task)}
    if not of:
        return None
    best = max(of.values()) if measure.higher else min(of.values())
    margin = _EQUAL if measure.scale == 100 else _EQUAL / 100 * best
    return min((arm for arm in of if abs(of[arm] - best) <= margin), key=lambda arm: epochs(arm, task) or 0.0)


def table(tasks: dict[str, Rows]) -> list[str]:
    """Markdown: final value and seconds of each arm, with (seeds)."""
    lengths = sorted({each for name, rows in tasks.items() for arm in rows if (each := epochs(arm, name))})
    lines = []
    for name, rows in tasks.items():
        by_length = {epochs(arm, name): arm for arm in rows}
        arms = [by_length.get(each, "") for each in lengths] + ["A-stop", "auto"]
        what = {"test_token_loss": "loss a token", "test_loss": "loss"}.get(MEASURES[name].key, "accuracy, %")
        lines.append([f"{name}, {what}", *(_cell(name, rows, arm) for arm in arms)])
    heads = [f"uniform, {each:g}" for each in lengths]
    return grid(["task", *heads, "early stopping", "`auto()`"], lines)


def _cell(task: str, rows: Rows, arm: str) -> str:
    if not rows.get(arm):
        return ""
    measure, runs = MEASURES[task], rows[arm].values()
    digits = 1 if measure.scale == 100 else 3
    value = mean(final(row, measure) for row in runs)
    return f"{value:.{digits}f} in {mean(map(seconds, runs)):.1f} s ({len(rows[arm])})"


def differences(tasks: dict[str, Rows]) -> list[str]:
    """Markdown: `auto()` minus the best length, early stopping, `spend_saved`, and the ratios of their times."""
    lines = []
    for name, rows in tasks.items():
        for other in (best_length(name, rows), *_BESIDE):
            if other is None or not rows.get(other):
                continue
            found = paired(rows, "auto", other, lambda row, name=name: final(row, MEASURES[name]))
            low, high = bootstrap(found)
            digits = 2 if MEASURES[name].scale == 100 else 4
            both = [seed for seed in rows["auto"] if seed in rows[other]]
            ratio = mean(seconds(rows["auto"][s]) for s in both) / mean(seconds(rows[other][s]) for s in both)
            length = epochs(other, name)
            what = f"the best length, {length:g}" if length else _BESIDE[other]
            value = f"{mean(found):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            lines.append([name, what, str(len(found)), value, f"{ratio:.2f}"])
    return grid(["task", "beside", "seeds", "`auto()` minus that", "time"], lines)


def main() -> None:
    tasks = load(Path(sys.argv[1]) if sys.argv[1:] else FILE)
    print("\n".join([*table(tasks), *differences(tasks)]))


if __name__ == "__main__":
    main()
