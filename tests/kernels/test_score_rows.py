"""When the linear loss's rows are scored by the CUDA kernel for Hopper; its launch is emulated by the reference."""

from __future__ import annotations

import pytest
import torch

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.losses import linear_chunks
from geko_kernels.reference import rows as reference_rows

score_hopper = pytest.importorskip("geko_kernels.kernels.rows.score_hopper", exc_type=ImportError)

if torch.cuda.is_available():
    pytest.skip("with a GPU the kernel is launched: see test_score_rows_gpu.py", allow_module_level=True)
pytestmark = pytest.mark.no_cover

VOCAB, STRIDE = 70, 128


class EmulatedScore:
    """`score_hopper.ScoreLaunch` in plain PyTorch."""

    calls = 0

    def __init__(self, device, dtype, row_stride, vocab) -> None:
        self.vocab = vocab

    def __call__(self, logits, rows, targets, statistics, slot, start, count) -> None:
        type(self).calls += 1
        reference_rows.score_rows_(logits, rows, targets, statistics, True, slot, start, count, self.vocab, 0.0)


@pytest.fixture
def emulated(monkeypatch):
    """The Triton backend takes calls on the CPU, as on a Hopper GPU, and 4 rows of 128 float32 are enough."""
    monkeypatch.setattr(ops, "_override", "")
    monkeypatch.setattr(ops, "backend_name", lambda *_: "triton")
    monkeypatch.setattr(score_hopper.hopper, "missing", lambda _device: None)
    monkeypatch.setattr(score_hopper, "launch_of", EmulatedScore)
    monkeypatch.setattr(score_hopper, "SMALLEST_ROW", STRIDE * 4)
    monkeypatch.setattr(score_hopper, "SMALLEST", 4 * STRIDE * 4)
    monkeypatch.setattr(EmulatedScore, "calls", 0)


def score(dtype=torch.float32, stride=STRIDE, fused=True, count=4, softcap=0.0, entropy=None):
    logits = torch.randn(6, stride).to(dtype)
    rows, targets = torch.arange(6), torch.arange(6) + 5
    ops.direct.score_rows_(logits, rows, targets, torch.zeros(5, 6), fused, 1, 2, count, VOCAB, softcap, entropy)
    return EmulatedScore.calls


def test_large_rows_are_read_once(emulated):
    assert score() == 1
    assert score(dtype=torch.bfloat16, stride=2 * STRIDE) == 2


@pytest.mark.parametrize(
    "call",
    [
        {"fused": False},
        {"count": 3},
        {"stride": STRIDE - 4},
        {"softcap": 3.0},
        {"entropy": torch.zeros(6)},
        {"dtype": torch.bfloat16},
    ],
)
def test_other_rows_are_scored_by_triton(emulated, call):
    assert score(**call) == 0


def test_a_backend_asked_for_by_name_scores_all_rows(emulated, monkeypatch):
    monkeypatch.setattr(ops, "_override", "triton")
    assert score() == 0


def test_so_does_triton_where_the_kernel_is_missing_or_holds_no_such_row(emulated, monkeypatch):
    monkeypatch.setattr(score_hopper.hopper, "tiling_of", lambda *_: None)
    assert score() == 0
    monkeypatch.undo()
    monkeypatch.setattr(ops, "backend_name", lambda *_: "triton")
    monkeypatch.setattr(score_hopper, "launch_of", EmulatedScore)
    monkeypatch.setattr(score_hopper, "SMALLEST_ROW", 0)
    monkeypatch.setattr(score_hopper, "SMALLEST", 0)
    monkeypatch.setattr(ops, "_override", "")
    assert score() == 0, "no CUDA device"


@pytest.mark.parametrize("vocab", [70, 128])
def test_the_linear_loss_is_the_same(emulated, monkeypatch, vocab):
    monkeypatch.setattr(linear_chunks, "AHEAD", 0)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 4)  # they are all kept, so the other rows get their gradients at once
    hidden, weight = torch.randn(4, 5, 16, requires_grad=True), torch.randn(vocab, 16, requires_grad=True)
    labels, ids = torch.randint(vocab, (4, 5)), torch.arange(4)
    labels[1] = -100
    results = []
    for override in ("", "reference"):
        monkeypatch.setattr(ops, "_override", override)
        state = gk.SampleState(4)
        if override:
            monkeypatch.setattr(ops, "backend_name", lambda *_: "reference")
        loss, stats = gk.weighted_linear_loss(hidden, weight, labels, ids, state, return_stats=True)
        results.append((loss, *stats, *torch.autograd.grad(loss, (hidden, weight)), *state.state_dict().values()))
    assert EmulatedScore.calls == 1
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, equal_nan=True)
