"""The training-step benchmark on a tiny model: every contender trains the same rows."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.training import training_step
from benchmarks.training.models import MODELS
from benchmarks.training.training_step import Point, measure, points, table
from benchmarks.training.training_step_data import flops_per_token, packs_of, rows_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Four steps are timed after two, where the benchmark times 16 after 8."""
    for name, value in (("WARMUP", 2), ("STEPS", 6)):
        monkeypatch.setattr(f"benchmarks.training.training_step_run.{name}", value)


def test_what_runs_apart_is_another_process_whose_end_is_a_row():
    assert training_step.apart(os.getpid) != os.getpid()
    assert training_step.apart(os._exit, 3) == {"error": "its process ended with 3"}


@pytest.mark.parametrize("form", ["full", "padded", "padding-free"])
def test_contenders_train_the_same_rows(form):
    names = ["loop", "trainer", "geko", "geko-uniform", *(["sft", "geko-sft"] if _has_trl() else [])]
    found = {name: measure(name, Point("tiny", 16, form, False, False), 64, CPU) for name in names}
    losses = [row["loss"] for row in found.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6), "the same batches in the same order"
    assert all(row["tokens_per_second"] > 0 and row["peak_share"] is None for row in found.values())


def test_packed_rows_are_trained_by_both_sft_trainers():
    pytest.importorskip("trl")
    for name in ("sft", "geko-sft"):
        row = measure(name, Point("tiny", 16, "packed", False, False), 64, CPU)
        assert row.get("ms", 0) > 0, row


def test_packs_are_the_same_batches_for_all_but_sft():
    point = Point("tiny", 16, "packed", False, False)
    found = [measure(name, point, 64, CPU) for name in ("loop", "trainer", "geko", "geko-uniform")]
    assert [row["loss"] for row in found] == pytest.approx([found[0]["loss"]] * 4, rel=1e-6)
    speeds = [row["tokens_per_second"] * row["ms"] for row in found]  # 1000 * tokens a step
    assert speeds == pytest.approx([speeds[0]] * 4)
    packs = packs_of(rows_of(point, 128, 50), 64)
    assert sum(packs, []) == rows_of(point, 128, 50)
    assert all(sum(len(row["input_ids"]) for row in pack) <= 64 for pack in packs)


def test_lora_trains_adapters_alone_or_says_that_peft_is_missing():
    row = measure("geko", Point("tiny-lora", 16, "padded", False, False), 64, CPU)
    try:
        import peft  # noqa: F401
    except ImportError:
        assert row["left_out"] == "No module named 'peft'"
    else:
        assert row["ms"] > 0, row


def test_flops_are_those_of_palm():
    point = Point("135m", 512, "full", False, False)
    with torch.device("meta"):
        weights = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**MODELS["135m"])).parameters())
    assert weights == 134_515_008
    assert flops_per_token(point, weights, weights, 512) == 6 * weights + 12 * 30 * 576 * 512
    assert flops_per_token(point, weights, 0, 512) == 4 * weights + 12 * 30 * 576 * 512


def test_out_of_memory_and_a_budget_that_ended_are_rows(monkeypatch):
    point = Point("tiny", 16, "full", False, False)
    assert measure("loop", point, 64, CPU, deadline=0.0)["left_out"] == "not reached: the budget ended while it ran"

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("benchmarks.training.training_step_run.loop", full)
    assert measure("loop", point, 64, CPU) == {"tokens": 64, "error": "out of memory: CUDA out of memory."}


def test_command_writes_rows_and_profiles(tmp_path, monkeypatch, capsys):
    def run(*given):
        command = ["x", "--tiny", "--contenders", "loop", "--forms", "full", "--results", str(tmp_path), *given]
        monkeypatch.setattr("sys.argv", command)
        training_step.main()
        return [json.loads(line) for line in (tmp_path / "training_step.jsonl").read_text().splitlines()]

    row = run()[0]
    assert row["contender"] == "loop" and row["point"]["form"] == "full" and row["ms"] > 0
    assert {"gpu", "torch", "triton", "transformers", "trl", "date", "command", "commit"} <= row.keys()
    assert run("--budget-seconds", "0")[1]["left_out"] == "not reached"
    assert len(run("--profile", str(tmp_path))) == 2, "a profiled step is not timed"
    assert "aten::" in next(tmp_path.glob("loop_tiny_*.txt")).read_text()


def test_a_missing_package_and_an_error_are_rows():
    row = measure("trainer-liger", Point("tiny", 16, "full", False, False), 64, CPU)
    assert "left_out" in row or "error" in row or "ms" in row
    shown = [
        {"contender": name, "point": Point("tiny", 16, "full", False, False)._asdict(), "ms": 2.0, "peak_gib": None}
        | {"tokens_per_second": speed, "peak_share": None}
        for name, speed in (("trainer", 100.0), ("sft", 200.0), ("geko", 210.0))
    ]
    assert "geko: 2.0 ms, 210 tokens/s, 1.05 of the best other" in table(shown)
    assert "geko 210, sft 200 tokens/s: 1.05" in table(shown)
    assert points(["135m"], [256], ["full"])[0] == Point("135m", 256, "full", True, False)


def _has_trl() -> bool:
    try:
        import trl  # noqa: F401
    except ImportError:
        return False
    return True
