"""The linear benchmark at tiny shapes: contenders agree, the rows are complete, targets come out of them."""

import pytest
import torch

from benchmarks.kernels import linear_cases, linear_frontier, linear_loss, linear_targets, timing

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
    assert len(rows) == len(SHAPES) * (2 + len(NAMES) + 9)
    assert all(row.keys() >= KEYS and row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in rows)
    names = [target.what.split(": ")[1] for target in linear_targets.linear_targets(rows)]
    assert "geko keeping 1.00 / its floor" in names and "geko keeping 0.00 / its floor" in names
    assert "geko / the same at V = 256" in names
    assert "weight_error of geko / torch's" in names and "geko, 0.5 masked / its share of the time" in names


def test_the_floor_counts_what_kept_rows_need():
    where = {"T": 1, "H": 2, "V": 64, "dtype": "bfloat16", "itemsize": 2, "peak_mib": None, "masked_share": 0.0}
    where |= {"hidden_error": 0.0, "weight_error": 0.0, "gemms_ms": 6.0}

    def row(name, ms, kept=1.0):
        return {"contender": name, "ms": ms, "keep_share": kept, "kept_rows": kept, **where}

    rows = [row("copy", 2.0), row("geko", 8.0), row("geko", 4.5, 0.25), row("geko", 6.0, 0.0)]
    found = {target.what: (target.measured, target.bar) for target in linear_targets.linear_targets(rows)}
    assert found == {
        "1 x 2 x 64: geko keeping 1.00 / its floor": (8 / (6 + 2), 1.05),
        "1 x 2 x 64: geko keeping 0.25 / its floor": (4.5 / (3 + 1.25), 1.15),
        "1 x 2 x 64: geko keeping 0.00 / its floor": (6 / (2 + 1), 1.15),
    }


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


def test_the_frontier_has_rows_targets_and_a_picture(tmp_path):
    shape, names = linear_cases.Shape(256, 32, 4096), ["torch", "geko", "geko-1"]
    rows = list(linear_frontier.run([shape], [torch.bfloat16], names, torch.device("cpu")))
    assert [(row["contender"], row["reason"]) for row in rows] == [(name, None) for name in ("gemms", *names)]
    assert rows[1]["model_mib"] is None and rows[1]["peak_mib"] > rows[2]["peak_mib"] > rows[3]["peak_mib"]
    assert rows[3]["model_mib"] == linear_frontier.linear_memory.predicted_mib(shape, 1)
    rows = [row | {"gpu": "cpu: any", "torch": "2", "date": "2026-01-01"} for row in rows]
    targets = {target.what: target.measured for target in linear_frontier.frontier_targets(rows)}
    (against,) = (value for what, value in targets.items() if "geko at no more memory / torch" in what)
    assert against == min(row["ms"] for row in rows[2:]) / rows[1]["ms"]
    linear_frontier.draw(rows, tmp_path)
    assert (tmp_path / "linear_frontier_cpu.png").stat().st_size > 1000


def test_a_peer_counts_only_if_it_is_exact_and_within_our_memory():
    def row(name, ms, mib, error):
        where = {"T": 1, "H": 2, "V": 3, "gpu": "cpu: any", "model_mib": mib}
        return {"contender": name, "ms": ms, "peak_mib": mib, "weight_error": error, **where}

    rows = [row("torch", 3.0, 900.0, 2e-3), row("geko", 2.0, 800.0, 2e-3), row("geko-512", 2.4, 500.0, 2e-3)]
    rows += [row("rough", 1.0, 600.0, 3e-3), row("small", 1.0, 400.0, 2e-3), row("peer", 2.0, 600.0, 2.1e-3)]
    found = {target.what: (target.measured, target.bar) for target in linear_frontier.frontier_targets(rows)}
    assert found == {
        "1 x 2 x 3: geko at no more memory / torch (900 MiB)": (2 / 3, 1.0),
        "1 x 2 x 3: geko at no more memory / peer (600 MiB)": (1.2, 1.0),
        "1 x 2 x 3: time with 512 MiB / by default": (pytest.approx(1.2), 1.1),
    }
