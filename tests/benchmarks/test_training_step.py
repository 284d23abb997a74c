"""The training-step benchmark on a tiny model: every contender trains the same rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training.training_step import Point, measure, points, table

CPU = torch.device("cpu")


@pytest.mark.parametrize("form", ["full", "padded"])
def test_contenders_train_the_same_rows(form):
    names = ["trainer", "geko", *(["sft", "geko-sft"] if _has_trl() else [])]
    found = {name: measure(name, Point("tiny", 16, form, False, False), 64, CPU) for name in names}
    losses = [row["loss"] for row in found.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-3), "the order of the rows differs, no more"
    assert all(row["tokens_per_second"] > 0 and row["peak_share"] is None for row in found.values())


def test_packed_rows_are_trained_by_both_sft_trainers():
    pytest.importorskip("trl")
    for name in ("sft", "geko-sft"):
        row = measure(name, Point("tiny", 16, "packed", False, False), 64, CPU)
        assert row.get("ms", 0) > 0, row


def test_a_missing_package_and_an_error_are_rows():
    row = measure("trainer-liger", Point("tiny", 16, "full", False, False), 64, CPU)
    assert "left_out" in row or "error" in row or "ms" in row
    shown = [
        {"contender": name, "point": Point("tiny", 16, "full", False, False)._asdict(), "ms": 2.0, "peak_gib": None}
        | {"tokens_per_second": speed, "peak_share": None}
        for name, speed in (("trainer", 100.0), ("sft", 200.0), ("geko", 210.0))
    ]
    assert "geko: 2.0 ms, 210 tokens/s, 1.05 of the best other" in table(shown)
    assert points(["135m"], [256], ["full"])[0] == Point("135m", 256, "full", True, False)


def _has_trl() -> bool:
    try:
        import trl  # noqa: F401
    except ImportError:
        return False
    return True
