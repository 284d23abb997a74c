"""The report of D1, D2, V1 and G1: what GEKO is compared with, intervals, targets."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.end_to_end import lengths_report, real_report
from benchmarks.end_to_end.rows import t_interval


def row(task, arm, seed, took, lr=1e-4, cost=1.0, choosing=False, **final):
    seconds = {"total": took, "setup": 0.5, "selection": 0.0}
    about = {"task": task, "arm": arm, "seed": seed, "lr": lr, "cost": cost, "epochs": 6, "choosing": choosing}
    return {**about, "seconds": seconds, "final": {f"test_{name}": value for name, value in final.items()}}


def sections(arm, took, macro, **more):
    return [
        row("D2", arm, s, took, macro_accuracy=macro + s / 1000, accuracy=0.8, worst_tenth_accuracy=0.2, **more)
        for s in range(3)
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def d2(tmp_path):
    rows = [*sections("auto", 4.5, 0.64), *sections("H", 8.0, 0.60), *sections("A", 12.0, 0.61)]
    rows += [*sections("B-auto", 5.0, 0.62), *sections("B", 8.0, 0.63)]
    rows += [*sections("B:budget=0.5", 6.0, 0.629), *sections("B:budget=0.166667", 2.0, 0.55)]
    return written(tmp_path / "d2.jsonl", rows)


def test_geko_is_beside_three_epochs_the_best_length_and_its_own_budget(d2, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_report", str(d2)])
    real_report.main()
    text = capsys.readouterr().out
    best = "63.0 in 6.0 s"
    assert f"its section, macro accuracy, % | 3 | {best} | {best} (3) | not run | 60.1 in 8.0 s | 64.1 in " in text
    assert "| A: uniform, 6 | 3 | 61.1 | 80.0 | 20.0 | 12.0 | 6.00 |" in text
    assert "| auto | (a) 3 epochs: B:budget=0.5 | 3 | +1.10 [+1.10, +1.10] | +0.00 [+0.00, +0.00] |" in text
    assert "| auto | (b) the best length, 3: B:budget=0.5 |" in text and "| 0.83 |" in text
    assert "| auto | (c) its own budget: B-auto | 3 | +2.00 [+2.00, +2.00] |" in text
    assert "| H | (c) its own budget: B | 3 | -3.00 [-3.00, -3.00] |" in text
    assert "met: D2 auto: macro accuracy above uniform at its own budget: +2.00" in text
    assert "missed: D2 H: macro accuracy above uniform at its own budget: -3.00" in text
    assert "met: D2 auto: accuracy not below that, margin 0.5 points: +0.00" in text


def test_rows_to_choose_by_are_left_out_and_mixed_runs_are_refused(tmp_path):
    chosen = sections("A", 1.0, 0.9, lr=4e-4, choosing=True)
    path = written(tmp_path / "rows.jsonl", [*chosen, *sections("A", 1.0, 0.5)])
    assert [each["lr"] for each in real_report.load([path])["D2"]["A"].values()] == [1e-4] * 3
    with pytest.raises(ValueError, match="D2 A has seed 0 twice"):
        real_report.load([path, path])
    other = written(tmp_path / "other.jsonl", sections("H", 1.0, 0.5, lr=2e-4))
    with pytest.raises(ValueError, match=r"D2 has runs at the rates \[0.0001, 0.0002\]: one rate for all arms"):
        real_report.load([path, other])


def test_targets_of_ratings_and_of_repetition(tmp_path):
    rows = [row("V1", arm, s, 1.0, spearman=v, accuracy=0.4) for s in (0, 1) for arm, v in (("auto", 0.81), ("A", 0.8))]
    rows += [row("G1", "H", s, 5.0, accuracy=0.70, token_loss=0.1) for s in (0, 1)]
    rows += [row("G1", "A", s, 10.0, accuracy=0.705, token_loss=0.1) for s in (0, 1)]
    tasks = real_report.load([written(tmp_path / "rows.jsonl", rows)])
    found = {target.what: target for target in real_report.targets(tasks)}
    assert found["V1 auto: correlation above uniform of the best length"].hit
    assert found["V1 auto: correlation above uniform of the best length"].measured == "+0.0100 [+0.0100, +0.0100]"
    assert found["G1 H: accuracy of full repetition, margin 1 point"].hit
    assert found["G1 H: at most 0.6 of the time of A"] == ("G1 H: at most 0.6 of the time of A", "0.50", True)
    assert len(found) == 3


def test_the_report_reads_the_rows_of_d1():
    tasks = real_report.load([lengths_report.FILE])
    assert [target.hit for target in real_report.targets(tasks)] == [True] * 3
    assert "| auto | (a) 3 epochs: A | 3 | -0.3486 [-0.3685, -0.3287] | 0.54 |" in "\n".join(
        real_report.differences(tasks)
    )


def test_an_interval_by_student_s_t():
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert t_interval([0.4]) == (-float("inf"), float("inf"))  # one seed proves nothing
    low, high = t_interval([0.0, 1.0] * 20)
    assert (low, high) == pytest.approx((0.5 - 2.093 * 0.5064 / 40**0.5, 0.5 + 2.093 * 0.5064 / 40**0.5), abs=1e-4)
