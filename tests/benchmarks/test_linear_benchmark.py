"""The linear benchmark at tiny shapes: contenders agree, the rows are complete, targets come out of them."""

import pytest
import torch

from benchmarks.kernels import linear_cases, linear_loss, linear_targets, timing

KEYS = {
    *("bench", "contender", "T", "H", "V", "dtype", "keep_share", "masked_share", "mode", "ms", "ms_p20", "ms_p80"),
    *("tflops", "peak_mib", "launches"),
}
SHAPES = (linear_cases.Shape(1280, 32, 250), linear_cases.Shape(1280, 32, 256))
NAMES = ["geko", "geko-256", "torch"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setitem(timing._SECONDS, "cpu", 1e-3)


def test_contenders_agree_and_targets_come_out():
    rows = list(linear_loss.run(SHAPES, [torch.bfloat16], NAMES, torch.device("cpu")))
    assert [row["reason"] for row in rows if row["reason"]] == []
    assert len(rows) == len(SHAPES) * (1 + len(NAMES) + 9)
    assert all(row.keys() >= KEYS and row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in rows)
    names = [target.what.split(": ")[1] for target in linear_targets.linear_targets(rows)]
    assert "geko / three GEMMs" in names and "geko / the same at V = 256" in names
    assert "weight_error of geko / torch's" in names and "geko, 0.5 masked / its share of the time" in names


def test_shares_reach_the_loss():
    for keep_share in linear_cases.KEEP_SHARES:
        case = linear_cases.make_case(SHAPES[0], torch.float32, keep_share, 0.5, torch.device("cpu"))
        assert case.kept_rows == pytest.approx(round(keep_share * 10) / 10)
        loss_of = linear_loss.CONTENDERS["geko"].make(case)
        hidden = case.hidden.requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(hidden, case.weight), hidden)
        assert torch.equal(grad.any(1), (case.kept > 0) & (case.labels != linear_cases.IGNORED))


def test_a_missing_peer_is_a_reason():
    case = linear_cases.make_case(SHAPES[0], torch.bfloat16, 1.0, 0.0, torch.device("cpu"))
    row = linear_loss.attempt(linear_loss.CONTENDERS["quack"], case, linear_cases.truth(case), {})
    assert row["ms"] is None and row["reason"]
