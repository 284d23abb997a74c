"""What GEKO gives on D1, D2, V1 and G1 beside uniform training: of three epochs, of the best length, of its own budget.

    python -m benchmarks.end_to_end.real_report d2.jsonl v1.jsonl g1.jsonl

Prints the table of docs/evidence.md, one of all arms, one of differences, and the targets of TASKS.md. Differences are
paired by seed, with 95 % t-intervals of their mean; times are those of training, looks and the preparation of
held-back samples.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks.end_to_end.arms import Geko
from benchmarks.end_to_end.lengths import find_arm
from benchmarks.end_to_end.lengths_report import best_length, epochs, seconds
from benchmarks.end_to_end.report import grid
from benchmarks.end_to_end.rows import MEASURES, Measure, Rows, final, paired, t_interval
from benchmarks.end_to_end.targets import Target
from benchmarks.end_to_end.tasks import TASKS
from benchmarks.results import read

USUAL = 3  # epochs that people train for by default
OWN_BUDGET = {"H": "B", "auto": "B-auto"}
_ACCURACY = Measure("test_accuracy", True)
REPORTED = {
    "D1": (MEASURES["D1"],),
    "D2": (MEASURES["D2"], _ACCURACY, Measure("test_worst_tenth_accuracy", True)),
    "V1": (MEASURES["V1"], _ACCURACY),
    "G1": (MEASURES["G1"], Measure("test_token_loss", False, 1.0)),
}
_NAMES = {
    "test_accuracy": "accuracy, %",
    "test_macro_accuracy": "macro accuracy, %",
    "test_worst_tenth_accuracy": "worst tenth of the classes, %",
    "test_spearman": "Spearman's correlation",
    "test_token_loss": "loss a token",
}


def load(paths: list[Path]) -> dict[str, Rows]:
    """The rows of the four tasks but those of `--choosing`.

    Raises:
        ValueError: an arm of a task has a seed twice, or the arms have different rates.
    """
    tasks: dict[str, Rows] = defaultdict(lambda: defaultdict(dict))
    for row in (row for path in paths for row in read(path)):
        if row["task"] not in REPORTED or row.get("choosing"):
            continue
        of_arm = tasks[row["task"]][row["arm"]]
        if row["seed"] in of_arm:
            raise ValueError(f"{row['task']} {row['arm']} has seed {row['seed']} twice")
        of_arm[row["seed"]] = row
    for name, arms in tasks.items():
        if len(rates := {row["lr"] for rows in arms.values() for row in rows.values()}) > 1:
            raise ValueError(f"{name} has runs at the rates {sorted(rates)}: one rate for all arms")
    return {name: tasks[name] for name in REPORTED if name in tasks}


def is_geko(arm: str) -> bool:
    return issubclass(find_arm(arm)[0], Geko)


def others(task: str, rows: Rows, arm: str) -> Iterator[tuple[str, str]]:
    """What a GEKO arm is beside, and the uniform arm that it is."""
    usual = [other for other in rows if epochs(other, task) == USUAL]
    if usual:
        yield f"(a) {USUAL} epochs", usual[0]
    best = best_length(task, rows)
    yield f"(b) the best length, {epochs(best, task):g}", best
    if rows.get(OWN_BUDGET.get(arm, "")):
        yield "(c) its own budget", OWN_BUDGET[arm]


def summary(tasks: dict[str, Rows]) -> list[str]:
    """Markdown, a line a task: value and seconds of what people run, of the best length and of what finds its own."""
    lines = []
    for name, rows in tasks.items():
        usual = [arm for arm in rows if epochs(arm, name) == USUAL]
        best = best_length(name, rows)
        cells = [_cell(name, rows, arm) for arm in (*usual[:1], best, "A-stop", "H", "auto")]
        cells[-4] += f" ({epochs(best, name):g})"
        lora = " with LoRA" if next(iter(rows[best].values())).get("lora") else ""
        what = f"{TASKS[name].what}{lora}, {_NAMES[MEASURES[name].key]}"
        lines.append([what, str(min(len(rows[arm]) for arm in ("auto", best))), *cells])
    heads = ["uniform, 3 epochs", "uniform, its best number of epochs (not known before)", "early stopping"]
    return grid(["task", "seeds", *heads, "`recommended()`", "`auto()`"], lines)


def _cell(task: str, rows: Rows, arm: str) -> str:
    if not rows.get(arm):
        return "not run"
    runs, measure = rows[arm].values(), MEASURES[task]
    value = mean(final(row, measure) for row in runs)
    return f"{value:.{1 if measure.scale == 100 else 3}f} in {mean(map(seconds, runs)):.1f} s"


def table(tasks: dict[str, Rows]) -> list[str]:
    """Markdown, one table a task: each arm's mean of each measure, seconds and work."""
    lines = []
    for name, rows in tasks.items():
        cells = []
        for arm, runs in rows.items():
            length = epochs(arm, name)
            values = [_number(m, mean(final(row, m) for row in runs.values())) for m in REPORTED[name]]
            took = f"{mean(map(seconds, runs.values())):.1f}"
            work = f"{mean(row['cost'] * row['epochs'] for row in runs.values()):.2f}"
            what = arm if length is None else f"{arm}: uniform, {length:g}"
            cells.append([what, str(len(runs)), *values, took, work])
        heads = ["seeds", *(_NAMES[m.key] for m in REPORTED[name]), "seconds", "work in epochs"]
        lines += grid([f"{name}, arm", *heads], cells)
    return lines


def differences(tasks: dict[str, Rows]) -> list[str]:
    """Markdown, one table a task: each GEKO arm minus (a), (b) and (c)."""
    lines = []
    for name, rows in tasks.items():
        cells = []
        for arm in filter(is_geko, rows):
            for what, other in others(name, rows, arm):
                found = [_difference(rows, arm, other, measure) for measure in REPORTED[name]]
                seeds = len(rows[arm].keys() & rows[other].keys())
                cells.append([arm, f"{what}: {other}", str(seeds), *found, f"{time_ratio(rows, arm, other):.2f}"])
        heads = ["beside", "seeds", *(_NAMES[m.key] for m in REPORTED[name]), "time"]
        lines += grid([f"{name}, arm", *heads], cells)
    return lines


def time_ratio(rows: Rows, arm: str, other: str) -> float:
    both = rows[arm].keys() & rows[other].keys()
    return mean(seconds(rows[arm][s]) for s in both) / mean(seconds(rows[other][s]) for s in both)


def targets(tasks: dict[str, Rows]) -> Iterator[Target]:
    """Those of TASKS.md, for `auto()` and `recommended()` where they ran."""
    for name, rows in tasks.items():
        for arm in ("auto", "H"):
            if rows.get(arm):
                yield from {"D1": _d1, "D2": _d2, "V1": _v1, "G1": _g1}[name](rows, arm)


def _d1(rows: Rows, arm: str) -> Iterator[Target]:
    if arm == "H":
        return
    best = best_length("D1", rows)
    level = mean(final(row, MEASURES["D1"]) for row in rows[best].values())
    yield _bounded("D1", rows, arm, best, MEASURES["D1"], 0.005 * level, "at most 0.5 % above the best length")
    yield _bounded("D1", rows, arm, "A", MEASURES["D1"], 0.0, "below three epochs")
    yield _in_time("D1", rows, arm, "A", 0.6)


def _d2(rows: Rows, arm: str) -> Iterator[Target]:
    if rows.get(other := OWN_BUDGET[arm]):
        yield _above("D2", rows, arm, other, MEASURES["D2"], 0.0, "macro accuracy above uniform at its own budget")
        yield _above("D2", rows, arm, other, _ACCURACY, -0.5, "accuracy not below that, margin 0.5 points")


def _v1(rows: Rows, arm: str) -> Iterator[Target]:
    best = best_length("V1", rows)
    yield _above("V1", rows, arm, best, MEASURES["V1"], 0.0, "correlation above uniform of the best length")


def _g1(rows: Rows, arm: str) -> Iterator[Target]:
    if rows.get("A"):
        yield _above("G1", rows, arm, "A", MEASURES["G1"], -1.0, "accuracy of full repetition, margin 1 point")
        yield _in_time("G1", rows, arm, "A", 0.6)


def _above(task: str, rows: Rows, arm: str, other: str, measure: Measure, least: float, what: str) -> Target:
    low, _ = t_interval(paired(rows, arm, other, lambda row: final(row, measure)))
    return Target(f"{task} {arm}: {what}", _difference(rows, arm, other, measure), low > least)


def _bounded(task: str, rows: Rows, arm: str, other: str, measure: Measure, most: float, what: str) -> Target:
    _, high = t_interval(paired(rows, arm, other, lambda row: final(row, measure)))
    return Target(f"{task} {arm}: {what}", _difference(rows, arm, other, measure), high < most)


def _in_time(task: str, rows: Rows, arm: str, other: str, most: float) -> Target:
    ratio = time_ratio(rows, arm, other)
    return Target(f"{task} {arm}: at most {most:g} of the time of {other}", f"{ratio:.2f}", ratio <= most)


def _number(measure: Measure, value: float, sign: str = "") -> str:
    return f"{value:{sign}.{1 if measure.scale == 100 else 4}f}"


def _difference(rows: Rows, arm: str, other: str, measure: Measure) -> str:
    found = paired(rows, arm, other, lambda row: final(row, measure))
    low, high = t_interval(found)
    digits = 2 if measure.scale == 100 else 4
    return f"{mean(found):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    tasks = load([Path(path) for path in sys.argv[1:]])
    print("\n".join([*summary(tasks), *table(tasks), *differences(tasks)]))
    for target in targets(tasks):
        print(f"{'met' if target.hit else 'missed'}: {target.what}: {target.measured}")


if __name__ == "__main__":
    main()
