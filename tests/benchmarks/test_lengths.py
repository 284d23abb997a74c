"""The benchmark of a run's length: its table, early stopping, and D1 through the trainer, on a tiny random model."""

from __future__ import annotations

import json
import random
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.end_to_end import lengths_report, product, texts
from benchmarks.end_to_end.lengths import find_arm


def test_the_table_names_the_best_length_and_the_differences():
    tasks = lengths_report.load(lengths_report.FILE)
    assert lengths_report.best_length("D1", tasks["D1"]) == "B:budget=0.333333"
    assert lengths_report.best_length("R2-30", tasks["R2-30"]) == "B:budget=0.2"
    table, differences = "\n".join(lengths_report.table(tasks)), "\n".join(lengths_report.differences(tasks))
    assert "| D1, loss a token | 2.560 in 17.2 s (3) | 2.675 in 33.7 s (3) |" in table
    assert "| R2-30 | the best length, 2 | 5 | +0.04 [-0.28, +0.39] | 1.12 |" in differences


def test_an_arm_takes_fields_of_its_preset_and_switches_of_its_own():
    kind, budget = find_arm('auto:auto_measure="accuracy",trims=false,budget=1.25')
    assert kind.config.auto_stop and kind.config.auto_measure == "accuracy" and budget == 1.25
    assert not kind.trims and kind.answers and not find_arm("H:answers=false")[0].answers
    with pytest.raises(ValueError, match="an arm is one of A, A-restarts"):
        find_arm("A-stop:light_interval=3")


@pytest.fixture
def rows(tmp_path):
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 300) for _ in range(draw.randrange(2, 9))] for _ in range(60)]
    answers = [[draw.randrange(3, 300) for _ in range(draw.randrange(2, 9))] for _ in range(60)]
    parts = {"train": range(0, 40), "random": range(40, 44), "test": range(44, 54), "choose": range(54, 60)}
    texts.save(tmp_path / "d1.npz", prompts, answers, parts)
    return tmp_path / "d1.npz"


def test_the_trainer_runs_both_and_says_what_it_took(tmp_path, monkeypatch, rows):
    out = tmp_path / "rows.jsonl"
    command = ["product", str(rows), "--tiny", "--batch", "16", "--most", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--arms", "auto", "uniform:1"])
    product.main()
    auto, uniform = map(json.loads, out.read_text().splitlines())
    assert uniform["samples_backward"] == 44 and uniform["stopping"] == {} and auto["seconds"]["total"] > 0
    assert auto["test_loss"] == pytest.approx(8.3, abs=0.5) and "nothing to evaluate" in auto["stopping"]["why"]
