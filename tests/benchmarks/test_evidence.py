"""The tables of README.md, docs/ and the log hold what the recorded rows say, and the links lead somewhere."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("matplotlib")

from benchmarks.end_to_end import lengths_plot, real_report
from benchmarks.end_to_end.arms import WHAT
from benchmarks.end_to_end.lengths_report import FILE, best_length, epochs, load, seconds
from benchmarks.end_to_end.rows import MEASURES, Measure, Rows, final, paired, t_interval
from benchmarks.results import read

ROOT = Path(__file__).parents[2]
PAGES = ("docs/evidence.md", "docs/length.md", "benchmarks/end_to_end/LOG.md")
REAL = [FILE.with_name(f"{name}_2026-11-28.jsonl.gz") for name in ("real", "real_lora")]
TASKS = {
    "40,000 packages -> descriptions": "D1",
    "20,000 glosses -> class": "R2-0",
    "the same, 10 %": "R2-10",
    "the same, 30 % wrong |": "R2-30",
    "the same, 30 % wrong, by the likeliest": "R2-pairs",
    "75,000 glosses -> class": "R4",
    "made-up facts": "R1",
    "instructions with near-duplicates": "R3",
}


def rows_of(page: str) -> dict[str, list[str]]:
    """{task: its four cells}."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found = {}
    for start, task in TASKS.items():
        line = next((line for line in lines if line.startswith(f"| {start}")), None)
        if line:
            found[task] = [cell.strip() for cell in line.strip("|").split("|")[1:]]
    return found


def check(cell: str, task: str, runs: list) -> None:
    value, taken = re.match(r"([\d.]+) in ([\d.]+) s", cell).groups()  # type: ignore[union-attr]
    printed = round(mean(map(seconds, runs)), 1)  # by lengths_report; a page may round it once more
    for shown, exact in ((value, mean(final(row, MEASURES[task]) for row in runs)), (taken, printed)):
        assert abs(float(shown) - exact) <= 0.5001 * 10 ** -len(shown.partition(".")[2]), (task, cell, exact)


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md"])
def test_the_table_is_that_of_the_rows(page):
    tasks, shown = load(FILE), rows_of(page)
    assert set(shown) >= {"D1", "R2-0", "R2-10", "R2-30", "R2-pairs", "R4"}
    for task, (three, best, stopped, auto) in shown.items():
        by_length = {epochs(arm, task): runs for arm, runs in tasks[task].items()}
        length = epochs(best_length(task, tasks[task]), task)
        assert f"({length:g}" in best
        for cell, runs in (
            (three, by_length.get(3.0)),
            (best, by_length[length]),
            (stopped, tasks[task].get("A-stop")),
            (auto, tasks[task]["auto"]),
        ):
            if runs:
                check(cell, task, list(runs.values()))
            else:
                assert cell == "not run"


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md"])
def test_the_table_of_the_real_tasks_is_that_of_the_rows(page):
    tasks = {name: rows for path in REAL for name, rows in load(path).items()}
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for task, words in {"D1": "LoRA, loss", "D2": "sections, ", "V1": "rating", "G1": "2,000 sums"}.items():
        line = next(line for line in lines if line.startswith("| ") and words in line and " s | " in line)
        three, best, *rest = [cell.strip() for cell in line.strip("|").split("|")[1:]]
        stopped, chosen, auto = rest if len(rest) == 3 else (None, *rest)
        rows, length = tasks[task], best_length(task, tasks[task])
        usual = next(arm for arm in rows if epochs(arm, task) == 3)
        assert f"({epochs(length, task):g}" in best
        for cell, arm in ((three, usual), (best, length), (stopped, "A-stop"), (chosen, "H"), (auto, "auto")):
            if cell is not None and arm in rows:
                check(cell, task, list(rows[arm].values()))
            else:
                assert cell in (None, "not run")


def test_the_log_has_the_tables_of_the_real_tasks():
    lines = (ROOT / "benchmarks/end_to_end/LOG.md").read_text(encoding="utf-8").splitlines()
    for path in REAL:
        tasks = real_report.load([path])
        for line in [*real_report.table(tasks), *real_report.differences(tasks)]:
            assert line in lines


def test_the_differences_on_real_tasks_are_those_of_the_rows():
    tasks = {name: rows for path in REAL for name, rows in real_report.load([path]).items()}
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    for task, words in {"D1": "descriptions with", "D2": "sections,", "V1": "ratings,", "G1": "sums,"}.items():
        for arm, method in (("auto", "`auto()`"), ("H", "`recommended()`")):
            if arm not in tasks[task]:
                continue
            cells = re.search(rf"^\| {words} [^|]*\| {re.escape(method)} \|(.*)\|$", page, re.MULTILINE)[1].split("|")  # type: ignore[index]
            beside = [other for _, other in real_report.others(task, tasks[task], arm)]
            assert [cell.strip() for cell in cells[len(beside) :]] == ["not run"] * (3 - len(beside))
            for cell, other in zip(cells, beside, strict=False):
                found = paired(tasks[task], arm, other, lambda row, task=task: final(row, MEASURES[task]))
                low, high = t_interval(found)
                for shown, exact in zip(re.findall(r"[-+][\d.]+", cell), (mean(found), low, high), strict=True):
                    assert abs(float(shown) - exact) <= 0.5001 * 10 ** -len(shown.partition(".")[2]), (task, arm, cell)
                assert ("**" in cell) == (low > 0 if MEASURES[task].higher else high < 0), (task, arm, cell)


def test_the_restarts_on_r3_are_those_of_the_rows():
    rows: Rows = defaultdict(dict)
    for row in read(FILE.with_name("r3_restarts_2026-11-28.jsonl.gz")):
        rows[row["arm"]][row["seed"]] = row
    measures = ((MEASURES["R3"], 4), (Measure("test_accuracy", True), 2))
    lines = (ROOT / "benchmarks/end_to_end/LOG.md").read_text(encoding="utf-8").splitlines()
    loss = {}
    for arm, runs in rows.items():
        loss[arm], accuracy = (mean(final(row, measure) for row in runs.values()) for measure, _ in measures)
        cells = f"{len(runs)} | {loss[arm]:.4f} | {accuracy:.1f} | {mean(map(seconds, runs.values())):.1f}"
        assert f"| {arm}: {WHAT[arm]} | {cells} |" in lines
    for arm, other in [*((arm, "A") for arm in rows if arm != "A"), ("G", "A-restarts"), ("G", "A-phases")]:
        cells = f"| {arm} | {other} | {len(rows[arm].keys() & rows[other].keys())} |"
        for measure, digits in measures:
            found = paired(rows, arm, other, lambda row, measure=measure: final(row, measure))
            low, high = t_interval(found)
            cells += f" {mean(found):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] |"
        assert cells in lines
    page = " ".join((ROOT / "docs/evidence.md").read_text(encoding="utf-8").split())
    epoch, phase = (f"{100 * (loss[arm] / loss['A'] - 1):.0f} %" for arm in ("A-restarts", "A-phases"))
    assert f"starts over in each epoch ended with {epoch} more loss" in page
    assert f"in each phase of gekolib's plan, the loss is {phase} more" in page


def test_the_runs_through_the_trainer_are_those_of_the_rows():
    file = FILE.with_name("lengths_trainer_2026-11-28.jsonl")
    rows = {row["arm"]: row for row in map(json.loads, file.read_text().splitlines())}
    page = (ROOT / "docs/length.md").read_text(encoding="utf-8")
    for arm, words in {"auto": "`auto()`, a limit", "uniform:3": "uniform, three", "uniform:1": "uniform, one"}.items():
        row = rows[arm]
        cells = f"{row['test_loss']:.3f} | {row['samples_backward']:,} | {row['seconds']['total']:.0f} |"
        assert re.search(rf"^\| {re.escape(words)}[^|]*\| {re.escape(cells)}$", page, re.MULTILINE), cells
    auto, three, one = rows["auto"], rows["uniform:3"], rows["uniform:1"]
    assert f"met: {auto['test_loss'] / one['test_loss'] - 1:.2%} above".replace("%", " %") in page
    assert f"met: {auto['seconds']['total'] / three['seconds']['total']:.2f} of the seconds" in page
    assert f"; {auto['samples_backward'] / three['samples_backward']:.2f} of the samples" in page


def test_the_picture_comes_from_the_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lengths_plot", "--out", str(tmp_path / "lengths.png")])
    lengths_plot.main()
    assert (tmp_path / "lengths.png").stat().st_size > 50_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        path = (folder / file).resolve() if file else ROOT / page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target
