"""Tables, targets and pictures of the end-to-end runs, made from their rows.

    python -m benchmarks.end_to_end.report [results/end_to_end.jsonl.gz]

Prints the targets; writes end_to_end.md and, where times count, end_to_end.png beside the rows; without an argument
of both files of rows, and the tables in LOG.md. Differences are paired by seed; their intervals are 95 %
bootstrap intervals of the mean over seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, median

from benchmarks.end_to_end.arms import WHAT
from benchmarks.end_to_end.lengths import find_arm
from benchmarks.end_to_end.plot import draw
from benchmarks.end_to_end.rows import MEASURES, Row, Rows, bootstrap, final, load, paired, time_ratios, time_to
from benchmarks.end_to_end.targets import targets
from benchmarks.end_to_end.tasks import TASKS
from benchmarks.results import RESULTS

LARGE, SMALL = RESULTS / "end_to_end.jsonl.gz", RESULTS / "end_to_end_small.jsonl.gz"
EVIDENCE = Path(__file__).with_name("LOG.md")
DECIDING = ("A", "B", "H")
MARGIN_1 = "H:noise_guard_margin=1"  # for labels known to be unreliable
METHODS = [arm for arm in WHAT if not arm.startswith("H") or arm in ("H", "H-spend")]


def grid(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown, with an empty line at its end."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return [lines[0], "| --- " * len(heads) + "|", *lines[1:], ""]


def summary(tasks: dict[str, Rows]) -> list[str]:
    """Markdown: one line a task, for A, B and H (R5: H-spend)."""
    lines = []
    for name, rows in tasks.items():
        arms = ("A", "B", "H-spend" if "H-spend" in TASKS[name].deciding else "H")
        measure = MEASURES[name]
        unit, digits = ("accuracy, %", 1) if measure.scale == 100 else ("held-out loss", 3)
        values = [mean(final(row, measure) for row in rows[arm].values()) if rows.get(arm) else None for arm in arms]
        ratios = time_ratios(rows, arms[2]) if values[0] is not None and values[2] is not None else []
        cells = [
            f"{name}: {TASKS[name].what}, {unit}" + (" (H: the samples saved spent)" if arms[2] == "H-spend" else ""),
            ", ".join(str(len(rows.get(arm, ()))) for arm in arms),
            *("" if value is None else f"{value:.{digits}f}" for value in values),
            f"{median(ratios):.2f}" if ratios else "",
        ]
        lines.append(cells)
    return grid(["task", "seeds A, B, H", "A", "B", "H", "H's time / A's"], lines)


def matrix(tasks: dict[str, Rows], arms: list[str], timed: bool = True) -> list[str]:
    """Markdown: one line an arm, one column a task; a cell holds the final value, time over A's and (seeds).

    Where that is not known (or not `timed`) the work, rows trained and a third of those looked at, stands in: "~0.46".
    """
    tasks = {name: rows for name, rows in tasks.items() if any(rows.get(arm) for arm in arms if arm not in DECIDING)}
    lines = [[_label(arm), *(_cell(name, rows, arm, timed) for name, rows in tasks.items())] for arm in arms]
    return grid(["arm", *map(_heading, tasks)], [cells for cells in lines if any(cells[1:])])


def parts(tasks: dict[str, Rows]) -> list[str]:
    """GEKO and its variants: those with a name, then those named by their settings."""
    there = {arm for rows in tasks.values() for arm in rows if arm.startswith("H")}
    return [*(arm for arm in WHAT if arm in there), *sorted(arm for arm in there - WHAT.keys() if not _budget(arm))]


def _label(arm: str) -> str:
    return f"{arm}: {WHAT[arm]}" if arm in WHAT else arm


def _heading(task: str) -> str:
    return f"{task}, {'%' if MEASURES[task].scale == 100 else 'loss'}"


def _cell(task: str, rows: Rows, arm: str, timed: bool) -> str:
    if not rows.get(arm):
        return ""
    measure = MEASURES[task]
    value = mean(final(row, measure) for row in rows[arm].values())
    ratios = time_ratios(rows, arm) if rows.get("A") and timed else []
    took = f"{median(ratios):.2f}" if ratios else f"~{mean(row['cost'] for row in rows[arm].values()):.2f}"
    return f"{value:.{1 if measure.scale == 100 else 3}f} in {took} ({len(rows[arm])})"


def budgets(tasks: dict[str, Rows]) -> list[str]:
    """Markdown: uniform training and GEKO at several numbers of epochs, each with a schedule of that length."""
    there = {name: rows for name, rows in tasks.items() if any(map(_budget, rows))}
    shares = sorted({share for rows in there.values() for share in map(_budget, rows) if share is not None})
    (whole,) = {TASKS[name].epochs for name in there}
    lines = []
    for name, rows in there.items():
        for short, full in (("B:", "A"), ("H:", "H"), (f"{MARGIN_1},", MARGIN_1)):
            cells = [_cell(name, rows, at, True) for at in [*(f"{short}budget={share:g}" for share in shares), full]]
            lines.append([_heading(name), WHAT.get(full, full), *cells])
    return grid(["task", "arm", *(f"{share * whole:g} epochs" for share in [*shares, 1.0])], lines)


def losses(tasks: dict[str, Rows], arms: list[str]) -> list[str]:
    """Markdown: held-out loss and (seeds) where the table of arms has accuracy; R1 has no held-out samples."""
    tasks = {name: rows for name, rows in tasks.items() if MEASURES[name].scale == 100 and TASKS[name].test}
    lines = []
    for arm in arms:
        found = [[row["final"]["test_loss"] for row in rows.get(arm, {}).values()] for rows in tasks.values()]
        lines.append([_label(arm), *(f"{mean(values):.2f} ({len(values)})" if values else "" for values in found)])
    return grid(["arm", *tasks], [cells for cells in lines if any(cells[1:])])


def _budget(arm: str) -> float | None:
    """The budget in an arm's name; such runs are shorter than the task's."""
    return find_arm(arm)[1]


def evidence_tables() -> dict[str, list[str]]:
    """The tables of LOG.md that come from the rows."""
    tasks, small = load(LARGE), load(SMALL)
    return {
        "summary": summary(tasks),
        "arms": matrix(tasks, METHODS),
        "budgets": budgets(tasks),
        "losses": losses(tasks, [*METHODS, MARGIN_1, "B:budget=0.2", "H:budget=0.2"]),
        "parts": matrix(tasks, parts(tasks)),
        "small": matrix(small, list(dict.fromkeys([*METHODS, *parts(small)])), timed=False),
    }


def fill(text: str, tables: dict[str, list[str]]) -> str:
    """`text` with what stands between `<!-- table: name -->` and `<!-- end -->` replaced by that table."""
    for name, lines in tables.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        old, closed, rest = rest.partition(end)
        if not found or not closed or "<!-- table:" in old:
            raise ValueError(f"no {begin.strip()} with its {end} in the text")
        text = before + begin + "\n".join(lines).rstrip() + "\n" + end + rest
    return text


def table(task: str, rows: Rows) -> list[str]:
    """Markdown: one line an arm."""
    measure = MEASURES[task]
    unit, digits = ("accuracy, %", 2) if measure.scale == 100 else ("loss", 4)
    heads = ["arm", "seeds", f"final {unit}", "worst seed", "against A [95 %]", "worst group"]
    heads += ["all training samples: loss", "rows forward / A's", "rows trained / A's", "cost / A's", "time / A's"]
    heads += ["of it selection and looks", "time to A's final value / A's", "frozen and forgotten"]
    heads += ["quarantined (precision, recall)"]
    lines = []
    for arm in [*(arm for arm in WHAT if rows.get(arm)), *(arm for arm in rows if arm not in WHAT)]:
        seeds = list(rows[arm].values())
        values = [final(row, measure) for row in seeds]
        worst = min(values) if measure.higher else max(values)
        against = ""
        if arm != "A" and (differences := paired(rows, arm, "A", lambda row: final(row, measure))):
            low, high = bootstrap(differences)
            against = f"{mean(differences):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        group = mean(row["final"][measure.key.replace("test_", "test_worst_")] * measure.scale for row in seeds)
        ratios = time_ratios(rows, arm) if rows.get("A") else []
        forward, trained = (
            mean(row[key] / (row["samples"] * row["epochs"]) for row in seeds)
            for key in ("rows_forward", "rows_trained")
        )
        own = [
            (row["seconds"]["selection"] + row["seconds"]["probes"]) / row["seconds"]["total"]
            for row in seeds
            if row["alone"]
        ]
        held = mean(row["quarantined_share"] for row in seeds)
        guard = f"{held:.1%} ({_mean(seeds, 'quarantine_precision')}, {_mean(seeds, 'quarantine_recall')})"
        cells = [
            _label(arm),
            str(len(seeds)),
            f"{mean(values):.{digits}f}",
            f"{worst:.{digits}f}",
            against,
            f"{group:.{digits}f}",
            f"{mean(row['final']['train_loss'] for row in seeds):.3f}",
            f"{forward:.2f}",
            f"{trained:.2f}",
            f"{mean(row['cost'] for row in seeds):.2f}",
            f"{median(ratios):.2f}" if ratios else "",
            f"{median(own):.1%}" if own and max(own) > 0 else "",
            _reached(time_to(rows, arm)) if rows.get("A") else "",
            f"{mean(row['frozen_forgotten'] for row in seeds):.1%}" if arm.startswith("H") else "",
            guard if held else "",
        ]
        lines.append(cells)
    return [f"### {task}: {TASKS[task].what}", "", *grid(heads, lines)]


def _reached(ratios: list[float | None]) -> str:
    """The median of those that got there, and how many of how many did."""
    there = [ratio for ratio in ratios if ratio is not None]
    if not ratios:
        return ""
    return (f"{median(there):.2f} " if there else "") + f"({len(there)} of {len(ratios)})"


def _mean(rows: list[Row], key: str) -> str:
    return f"{mean(row[key] for row in rows):.2f}"


def write(path: Path) -> None:
    """The tables, and the picture where times count, beside the rows; prints the targets."""
    tasks = load(path)
    found = [[t.what, t.measured, "hit" if t.hit else "missed"] for t in targets(tasks)]
    lines = ["# End-to-end runs", "", f"Made by `benchmarks/end_to_end/report.py` from `{path.name}`.", ""]
    lines += summary(tasks)
    if found:
        lines += ["## Targets", "", *grid(["target", "measured", ""], found)]
    lines += ["## Arms", ""]
    for task, rows in tasks.items():
        lines += table(task, rows)
    stem = path.name.split(".")[0]
    path.with_name(f"{stem}.md").write_text("\n".join(lines).rstrip() + "\n")
    if any(row["alone"] for rows in tasks.values() for runs in rows.values() for row in runs.values()):
        draw(tasks, path.with_name(f"{stem}.png"))
    for cells in found:
        print(" | ".join(cells))


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or [LARGE, SMALL]:
        write(path)
    if len(sys.argv) == 1:
        EVIDENCE.write_text(fill(EVIDENCE.read_text(), evidence_tables()))


if __name__ == "__main__":
    main()
