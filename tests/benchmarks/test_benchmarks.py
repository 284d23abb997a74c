"""The benchmarks at tiny shapes: contenders agree, the rows are complete, targets and pictures come out of them."""

import dataclasses

import pytest
import torch

from benchmarks import results
from benchmarks.kernels import contenders, loss, loss_cases, targets, timing
from benchmarks.training import scaling, scaling_rows

KEYS = {
    *("bench", "contender", "T", "V", "dtype", "zero_share", "mode", "ms", "ms_p20", "ms_p80", "tbps", "peak_mib"),
    *("launches", "gpu", "torch", "triton", "commit", "date"),
}
SHAPES = (loss_cases.Shape(6, 2, length=1), loss_cases.Shape(64, 31, length=8), loss_cases.Shape(96, 17, 8, packed=2))
EAGER = ["geko", "geko-inplace", "torch", "torch-fp32", "torch-geko"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setitem(timing._SECONDS, "cpu", 1e-3)


def run(shapes, dtype, names):
    common = results.environment(torch.device("cpu"))
    return [row | common for row in loss.run(shapes, [dtype], names, torch.device("cpu"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_agree_and_rows_are_complete(dtype):
    rows = run(SHAPES, dtype, EAGER)
    assert [row["reason"] for row in rows if row["reason"]] == []
    for row in rows:
        assert row.keys() >= KEYS
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    combinations = {(row["T"], row["contender"], row["mode"], row["zero_share"]) for row in rows}
    assert len(combinations) == len(rows) == len(SHAPES) * (1 + 2 * len(EAGER) + 2 * 2 * 4)


def test_zero_share_reaches_the_weights():
    for zero_share in loss_cases.ZERO_SHARES:
        case = loss_cases.make_case(SHAPES[1], torch.float32, zero_share, torch.device("cpu"))
        assert case.zero_rows == pytest.approx(round(zero_share * 8) / 8)
        loss_of = contenders.CONTENDERS["geko"].make(case)
        logits = case.logits.view(SHAPES[1].batch).requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(logits), logits)
        assert torch.equal(grad.view(case.logits.shape).abs().sum(1) == 0, case.weight == 0)


def test_a_wrong_or_missing_peer_is_a_reason():
    halved = dataclasses.replace(
        contenders.CONTENDERS["torch"], make=lambda case: lambda x: 0.5 * x.float().logsumexp(-1).mean()
    )
    case = loss_cases.make_case(SHAPES[1], torch.float32, 0.0, torch.device("cpu"))
    rows = [*loss.attempt(halved, case, {}), *loss.attempt(contenders.CONTENDERS["quack"], case, {})]
    assert [(row["mode"], row["ms"]) for row in rows] == 2 * [("forward", None), ("full", None)]
    assert "wrong result" in rows[0]["reason"] and rows[2]["reason"]


def test_targets_and_pictures_come_from_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.kernels import plot

    for row in run(SHAPES[1:], torch.float32, EAGER):
        results.append(tmp_path / "loss.jsonl", row)
    (rows,) = results.runs(tmp_path / "loss.jsonl")
    assert [target.what for target in targets.targets(rows)] == [
        "64 x 31 float32: time of torch-geko / geko",
        "2 x 48 packed x 17 float32: time of torch-geko / geko",
    ]
    plot.draw(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "loss_time_cpu.png",
        "loss_zero_share_cpu.png",
        "loss_bandwidth_cpu.png",
    }
    predicted = [row | {"contender": "geko-hopper", "hit_rate": rate} for rate in (1.0, 0.5) for row in rows[:2]]
    first = plot.times([row for row in rows + predicted if row["T"] == rows[0]["T"]]).axes[0]
    names = [name.get_text() for name in first.get_yticklabels()]
    assert names[-2:] == ["geko-hopper, hit rate 1", "geko-hopper, hit rate 0.5"]


def test_gpu_targets_know_a_hit_from_a_miss():
    base = {"T": 8192, "V": 50257, "dtype": "bfloat16", "itemsize": 2, "packed": 0, "size": "large", "gpu": "NVIDIA X"}
    base |= {"mode": "full", "zero_share": 0.0, "peak_mib": None, "host_forward_us": None, "host_backward_us": None}
    rows = [
        base | {"contender": "geko", "ms": 1.0, "tbps": 3.5},
        base | {"contender": "geko", "ms": 0.8, "tbps": 3.4, "zero_share": 0.6667},
        base | {"contender": "copy", "ms": 0.5, "tbps": 4.0},
        base | {"contender": "liger", "ms": 1.25, "tbps": 2.8},
        base | {"contender": "quack", "ms": None, "tbps": None},
    ]
    found = {
        target.what.partition(": ")[2]: (round(target.measured, 3), target.hit) for target in targets.targets(rows)
    }
    assert found == {
        "time of geko / fastest plain loss (liger)": (0.8, True),
        "time of geko / three passes at copy speed": (1.143, True),
        "speed of geko / copy, odd V": (0.875, True),
        "time of geko at zero share 2/3 / at 0": (0.8, False),
    }


def scaling_row(gpus, kind, arm, step_ms, **more):
    steps = scaling_rows.step_row([[step_ms - 1, step_ms, step_ms + 2]], samples=4 * gpus, length=8)
    return {"model": "tiny", "gpus": gpus, "kind": kind, "arm": arm, **steps, **more}


def test_scaling_rows_and_targets():
    found = {"table": 100, "plans_equal": True, "buckets_equal": False}
    selection = {**found, "selection_seconds": [1.0, 2.0], "planned": [40, 60], "probed": [50, 0]}
    selected = scaling_rows.selection_row(selection, step_ms=1000.0, probe_step_ms=600.0, samples=8)
    # 100 samples trained in 12.5 s, 50 probed in 3.75 s, selection 3 s
    assert (selected["selection_share"], selected["probe_share"]) == pytest.approx((3 / 19.25, 3.75 / 19.25))
    rows = scaling_rows.with_ratios(
        [
            scaling_row(1, "single", "standard", 100.0),
            scaling_row(1, "single", "geko", 102.0),
            scaling_row(2, "ddp", "standard", 125.0),
            scaling_row(2, "ddp", "geko", 136.0, **selected),
            scaling_row(4, "ddp", "geko", 102.0),  # its standard arm was lost
        ]
    )
    assert rows[0]["tokens_per_second"] == pytest.approx(4 * 8 / 0.1)
    assert [row["efficiency"] for row in rows] == pytest.approx([1.0, 1.0, 0.8, 0.75, 1.0])
    assert [row["of_standard"] for row in rows] == [1.0, 1.02, 1.0, 136 / 125, None]
    measured = {target.what: (target.measured, target.hit) for target in scaling_rows.targets(rows)}
    assert measured == {
        "tiny, 2 GPUs, ddp: efficiency of geko - standard's (points)": (pytest.approx(-5.0), False),
        "tiny, 2 GPUs, ddp: share of sync and planning, 100 samples (%)": (pytest.approx(300 / 19.25), False),
        "tiny, 2 GPUs, ddp: same plans on every rank": (1.0, True),
        "tiny, 2 GPUs, ddp: same buckets on every rank": (0.0, False),
    }


def test_scaling_launches_share_the_gpus_and_fail_alone(tmp_path, monkeypatch):
    stages = list(scaling.stages(["135M", "1B"], [1, 2], ["ddp", "fsdp2"], there=2))
    assert [[str(launch) for launch in stage] for stage in stages] == [
        ["135M, 1 GPU, single", "1B, 1 GPU, single"],
        *([f"{model}, 2 GPUs, {kind}"] for model in ("135M", "1B") for kind in ("ddp", "fsdp2")),
    ]
    assert [len(stage) for stage in scaling.stages(["135M", "1B"], [1], [], there=1)] == [1, 1]
    script = tmp_path / "scaling_run.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "seen = [os.environ[name] for name in ('CUDA_VISIBLE_DEVICES', 'NCCL_NVLS_ENABLE')]\n"
        "pathlib.Path(sys.argv[3], 'rows.json').write_text(json.dumps({'geko': {'seen': seen}}))\n"
        "time.sleep(60 * (sys.argv[1] == 'slow'))\n"
        "sys.exit('wrong' if sys.argv[1] == 'bad' else 0)\n"
    )
    monkeypatch.setattr(scaling, "__file__", str(tmp_path / "scaling.py"))
    monkeypatch.setattr(scaling, "LIMIT_S", 2)
    stage = [scaling.Launch(model, 1, "single") for model in ("good", "bad", "slow")]
    good, bad, slow = scaling.run(stage, ["3", "5", "6"], cpu=False)
    assert good == (stage[0], {"geko": {"seen": ["3", "0"]}}, "")
    assert bad[1] == {"geko": {"seen": ["5", "0"]}} and bad[2] == "exit status 1\nwrong\n"
    assert slow[1] == {"geko": {"seen": ["6", "0"]}} and slow[2].startswith("longer than 2 s")
