"""What GEKO has to show on the end-to-end tasks, and whether the rows show it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, median
from typing import NamedTuple

from benchmarks.end_to_end.rows import (
    MARGIN_LOSS,
    MARGIN_POINTS,
    MEASURES,
    Rows,
    bootstrap,
    bound,
    final,
    paired,
    time_ratios,
    time_to,
)


class Target(NamedTuple):
    what: str
    measured: str
    hit: bool


def targets(tasks: dict[str, Rows]) -> Iterator[Target]:
    """Those of the tasks that have runs of H and A, and of B where it is asked for.

    So many points ahead is judged by the mean, no worse and better at all by the interval.
    """
    there = {task: rows for task, rows in tasks.items() if rows.get("H") and rows.get("A")}
    if "R1" in there:
        yield _ratio("R1: time to 99.9 % of A's final recall / A's", time_to(there["R1"], "H", 0.999), 0.65)
        yield from _better("R1: final recall above B's", there, "R1", "B", 0.0)
    if "R2-30" in there:
        rows = there["R2-30"]
        yield from _better("R2, 30 % wrong: 12 points above A", there, "R2-30", "A", 12.0)
        for arm in rows:
            if rows[arm] and len(arm) == 1 and arm not in "AH":
                yield from _better(f"R2, 30 % wrong: 5 points above {arm}", there, "R2-30", arm, 5.0)
        best = [
            100 * (rows["H"][s]["final"]["test_accuracy"] - max(e["test_accuracy"] for e in rows["A"][s]["history"]))
            for s in sorted(rows["H"].keys() & rows["A"].keys())
        ]
        yield Target("R2, 30 % wrong: not below A's best epoch", f"{mean(best):+.2f} points", mean(best) >= 0)
        yield _ratio("R2, 30 % wrong: time / A's", time_ratios(rows, "H"), 0.5)
    for task, most in (("R2-0", 0.55), ("R3", 0.65), ("R4", 0.6), ("R6", 1.02)):
        if task in there:
            yield _no_worse(there, task)
            yield _ratio(f"{task}: time / A's", time_ratios(there[task], "H"), most)
    if "R3" in there:
        yield from _better("R3: better than B", there, "R3", "B", 0.0)
    spend, uniform = (tasks.get("R5", {}).get(arm) for arm in ("H-spend", "A"))
    if spend and uniform:
        values = [[100 * row["final"]["test_accuracy"] for row in rows.values()] for rows in (spend, uniform)]
        for word, of in (("median", median), ("worst", min)):
            ours, theirs = map(of, values)
            yield Target(
                f"R5: {word} seed of H-spend not below A's", f"{ours:.2f} against {theirs:.2f}", ours >= theirs
            )
    for task in ("R1", "R2-30", "R2-0", "R3", "R4"):
        if task in there:
            yield _ratio(f"{task}: T / (T_std (1 - mean frozen share))", bound(there[task]), 1.10)


def _ratio(what: str, ratios: list[float | None] | list[float], most: float) -> Target:
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios) or not known:
        return Target(f"{what} at most {most}", f"{len(known)} of {len(ratios)} got there", False)
    return Target(f"{what} at most {most}", f"{median(known):.3f}", median(known) <= most)


def _better(what: str, tasks: dict[str, Rows], task: str, other: str, least: float) -> Iterator[Target]:
    measure = MEASURES[task]
    if not tasks[task].get(other):
        return
    differences = paired(tasks[task], "H", other, lambda row: final(row, measure))
    gains = [difference if measure.higher else -difference for difference in differences]
    low, high = bootstrap(gains)
    yield Target(what, f"{mean(gains):+.3f} [{low:+.3f}, {high:+.3f}]", mean(gains) >= least if least else low > 0)


def _no_worse(tasks: dict[str, Rows], task: str) -> Target:
    measure, rows = MEASURES[task], tasks[task]
    differences = paired(rows, "H", "A", lambda row: final(row, measure))
    low, high = bootstrap(differences)
    if measure.higher:
        margin, hit = f"{MARGIN_POINTS} points", low >= -MARGIN_POINTS
    else:
        level = mean(final(row, measure) for row in rows["A"].values())
        margin, hit = f"{MARGIN_LOSS:.0%}", high <= MARGIN_LOSS * level
    what = f"{task}: no worse than A, margin {margin}"
    return Target(what, f"{mean(differences):+.3f} [{low:+.3f}, {high:+.3f}]", hit)
