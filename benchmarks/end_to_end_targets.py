"""What GEKO has to show on the end-to-end tasks, and whether the rows show it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, median
from typing import NamedTuple

import end_to_end_report as report
from end_to_end_report import MARGIN_LOSS, MARGIN_POINTS, MEASURES, Rows


class Target(NamedTuple):
    what: str
    measured: str
    hit: bool


def targets(tasks: dict[str, Rows]) -> Iterator[Target]:
    """Those of the tasks that have runs of H, A and B."""
    there = {task: rows for task, rows in tasks.items() if all(rows.get(arm) for arm in "HAB")}
    if "R1" in there:
        yield _ratio("R1: time to 99.9 % of A's final recall / A's", report.time_to(there["R1"], "H", 0.999), 0.65)
        yield _better("R1: final recall above B's", there, "R1", "B", 0.0)
    if "R2-30" in there:
        rows = there["R2-30"]
        yield _better("R2, 30 % wrong: 12 points above A", there, "R2-30", "A", 12.0)
        for arm in rows:
            if rows[arm] and arm != "A" and not arm.startswith("H"):
                yield _better(f"R2, 30 % wrong: 5 points above {arm}", there, "R2-30", arm, 5.0)
        best = [
            100 * (rows["H"][s]["final"]["test_accuracy"] - max(e["test_accuracy"] for e in rows["A"][s]["history"]))
            for s in sorted(rows["H"].keys() & rows["A"].keys())
        ]
        yield Target("R2, 30 % wrong: not below A's best epoch", f"{mean(best):+.2f} points", mean(best) >= 0)
        yield _ratio("R2, 30 % wrong: time / A's", report.time_ratios(rows, "H"), 0.5)
    for task, most in (("R2-0", 0.55), ("R3", 0.65), ("R4", 0.6), ("R6", 1.02)):
        if task in there:
            yield _no_worse(there, task)
            yield _ratio(f"{task}: time / A's", report.time_ratios(there[task], "H"), most)
    if "R3" in there:
        yield _better("R3: better than B", there, "R3", "B", 0.0)
    if "R5" in there:
        rows, arm = there["R5"], "H-spend" if there["R5"].get("H-spend") else "H"
        values = {name: [100 * row["final"]["test_accuracy"] for row in rows[name].values()] for name in (arm, "A")}
        for word, of in (("median", median), ("worst", min)):
            ours, theirs = of(values[arm]), of(values["A"])
            yield Target(f"R5: {word} seed of {arm} not below A's", f"{ours:.2f} against {theirs:.2f}", ours >= theirs)
    for task in ("R1", "R2-30", "R2-0", "R3", "R4"):
        if task in there:
            yield _ratio(f"{task}: T / (T_std (1 - mean frozen share))", report.bound(there[task]), 1.10)


def _ratio(what: str, ratios: list[float | None] | list[float], most: float) -> Target:
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios) or not known:
        return Target(f"{what} at most {most}", f"{len(known)} of {len(ratios)} got there", False)
    return Target(f"{what} at most {most}", f"{median(known):.3f}", median(known) <= most)


def _better(what: str, tasks: dict[str, Rows], task: str, other: str, least: float) -> Target:
    measure = MEASURES[task]
    differences = report.paired(tasks[task], "H", other, lambda row: report.final(row, measure))
    gains = [difference if measure.higher else -difference for difference in differences]
    low, high = report.bootstrap(gains)
    return Target(what, f"{mean(gains):+.3f} [{low:+.3f}, {high:+.3f}]", mean(gains) >= least)


def _no_worse(tasks: dict[str, Rows], task: str) -> Target:
    measure, rows = MEASURES[task], tasks[task]
    differences = report.paired(rows, "H", "A", lambda row: report.final(row, measure))
    low, high = report.bootstrap(differences)
    if measure.higher:
        margin, hit = f"{MARGIN_POINTS} points", low >= -MARGIN_POINTS
    else:
        level = mean(report.final(row, measure) for row in rows["A"].values())
        margin, hit = f"{MARGIN_LOSS:.0%}", high <= MARGIN_LOSS * level
    what = f"{task}: no worse than A, margin {margin}"
    return Target(what, f"{mean(differences):+.3f} [{low:+.3f}, {high:+.3f}]", hit)
