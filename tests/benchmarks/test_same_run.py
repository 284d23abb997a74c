"""same_run.py on one process: what a row holds, and that a resumed run is the whole one."""

from __future__ import annotations

import json
import random
import sys

import pytest

pytest.importorskip("transformers")

from benchmarks.end_to_end import texts
from benchmarks.training import same_run


def test_a_resumed_run_has_the_digests_of_the_whole_one(tmp_path, monkeypatch):
    draw = random.Random(0)
    prompts, answers = ([[draw.randrange(3, 300) for _ in range(5)] for _ in range(60)] for _ in range(2))
    texts.save(tmp_path / "d2.npz", prompts, answers, {"train": range(48), "test": range(48, 60)})
    common = ["same_run", str(tmp_path / "d2.npz"), "--arm", "recommended", "--out", str(tmp_path / "rows.jsonl")]
    common += ["--tiny", "--rows", "48", "--epochs", "2", "--batch", "8"]
    for folder, more in (("whole", ["--save-at", "7"]), ("again", ["--resume", str(tmp_path / "whole/checkpoint-7")])):
        monkeypatch.setattr(sys, "argv", [*common, "--folder", str(tmp_path / folder), *more])
        same_run.main()
    whole, again = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert whole["digests"] == again["digests"] and whole["test_loss"] == again["test_loss"]
    assert whole["steps"] == 12 and [step for step, _ in whole["losses"]] == [10]
    assert whole["same_on_every_rank"] == {"weights": True, "plan": True, "state": True}
    assert sum(whole["buckets"]) == 48 and (tmp_path / "again" / "state.pt").is_file()


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path, monkeypatch, capsys):
    given = ["same_run", "d2.npz", "--arm", "auto", "--folder", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(same_run, "WORLD", 3)
    with pytest.raises(SystemExit):
        same_run.main()
    assert "--batch 128 is not divisible by 3 processes" in capsys.readouterr().err
