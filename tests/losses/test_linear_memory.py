"""The memory that `weighted_linear_loss` takes within a budget is what `benchmarks/kernels/linear_memory.py` says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import geko_kernels as gk
from benchmarks.kernels.linear_cases import Shape
from benchmarks.kernels.linear_memory import plan_of, predicted_mib
from benchmarks.kernels.live_memory import LiveMemory
from geko_kernels import ops
from geko_kernels.losses import linear_chunks, linear_gradients
from geko_kernels.losses.linear_gradients import HeadGradients

SHAPE = Shape(1024, 64, 16384)
MIB = 2**20


@pytest.fixture
def gpu_memory(monkeypatch):
    """GEMMs that make no tensor, as on a GPU, and pieces and limits that suit small calls."""
    monkeypatch.setattr(gk.ops, "_override", "cpp")
    for module in (linear_gradients, linear_chunks.add_blocks.__globals__):
        where = module if isinstance(module, dict) else vars(module)
        monkeypatch.setitem(where, "multiply_", lambda out, a, b, add=False: out.zero_())
    monkeypatch.setattr(HeadGradients, "wide", lambda self, tile: torch.float32)
    for name, size in (("HIDDEN_BYTES", MIB // 8), ("LEAST_ROWS", 200)):
        for module in ("linear_gradients", "linear_head"):
            monkeypatch.setattr(f"geko_kernels.losses.{module}.{name}", size, raising=False)
    monkeypatch.setattr("benchmarks.kernels.linear_memory.HIDDEN_BYTES", MIB // 8)


@pytest.mark.parametrize("budget", [None, 2, 4, 6, 12, 20, 31])
@pytest.mark.parametrize("masked", [0, 64])
def test_memory_is_what_the_model_says(gpu_memory, budget, masked):
    """Of the tensors that a call makes."""
    hidden = torch.randn(8, 128, SHAPE.hidden).bfloat16().requires_grad_()
    weight = torch.randn(SHAPE.vocab, SHAPE.hidden).bfloat16().requires_grad_()
    labels = torch.randint(SHAPE.vocab, (8, 128))
    labels[:, :masked] = -100
    scored = 8 * (128 - masked)
    with LiveMemory() as memory:
        loss = gk.weighted_linear_loss(hidden, weight, labels, chunk_mib=budget)
        grads = torch.autograd.grad(loss, (hidden, weight))
    del grads
    model = predicted_mib(SHAPE, budget, scored=scored)
    assert 0.9 * model <= memory.peak / MIB <= 1.02 * model, plan_of(SHAPE, budget, 2, scored)
    assert budget is None or memory.peak <= (hidden.numel() + 2 * weight.numel()) * 2 + (budget + 0.2) * MIB


@pytest.mark.parametrize("budget", [4, 12, 28])
def test_a_call_that_begins_before_the_count_is_known_takes_no_more(gpu_memory, monkeypatch, budget):
    """By blocks, in fills, and in fills until it turns out that all rows of the second call fit at once."""
    score = ops.direct.score_rows_
    monkeypatch.setattr(
        ops.direct, "score_rows_", lambda *args: score(*args[:4], False, *args[5:])
    )  # no float32 copies
    as_triton = SimpleNamespace(direct=ops.direct, backend_name=lambda *_: "triton")
    monkeypatch.setattr(linear_chunks, "ops", as_triton)
    monkeypatch.setattr(linear_chunks.HostCopy, "arrived", lambda self: False)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 128)
    hidden = torch.randn(8, 128, SHAPE.hidden).bfloat16().requires_grad_()
    weight = torch.randn(SHAPE.vocab, SHAPE.hidden).bfloat16().requires_grad_()
    labels = torch.randint(SHAPE.vocab, (8, 128))
    state, begun, begins = gk.SampleState(8), [], linear_chunks.Chunks._begins
    monkeypatch.setattr(linear_chunks.Chunks, "_begins", lambda *args: (begun.append(begins(*args)), begun[-1])[1])
    for masked in (0, 12):
        labels[:, :masked] = -100
        with LiveMemory() as memory:
            loss = gk.weighted_linear_loss(hidden, weight, labels, torch.arange(8), state, chunk_mib=budget)
            grads = torch.autograd.grad(loss, (hidden, weight))
        del loss, grads
        model = predicted_mib(SHAPE, budget, scored=8 * (128 - masked))
        assert 0.9 * model <= memory.peak / MIB <= 1.02 * model, plan_of(SHAPE, budget, 2, 8 * (128 - masked))
    assert begun == [True, True]


@pytest.mark.parametrize("budget", [6, 4, 2])
@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_memory_of_gradients_that_nobody_asks_for_is_not_lent_to_the_logits(gpu_memory, frozen, budget):
    """A call by blocks first scores in the memory that dX and dW take later, so only in that of those that come."""
    hidden, weight = torch.randn(8, 128, SHAPE.hidden).bfloat16(), torch.randn(SHAPE.vocab, SHAPE.hidden).bfloat16()
    wanted = [tensor for name, tensor in (("hidden", hidden), ("weight", weight)) if frozen not in (name, "both")]
    for tensor in wanted:
        tensor.requires_grad_()
    labels = torch.randint(SHAPE.vocab, (8, 128))
    with LiveMemory() as memory:
        loss = gk.weighted_linear_loss(hidden, weight, labels, chunk_mib=budget)
        grads = torch.autograd.grad(loss, wanted) if wanted else ()
    later = sum(grad.nbytes for grad in grads) * (2 if frozen == "hidden" else 1)  # dW may be summed in float32
    assert memory.peak <= later + (budget + 0.2) * MIB


def test_the_model_explains_what_was_measured():
    """MiB on an H200, 2026-11-22, when the product of dX took 16 MiB of its own where all rows were held at once."""
    a, b, c = Shape(8192, 4096, 32000), Shape(8192, 2048, 151936), Shape(16384, 576, 49152)
    for shape, measured in ((a, 830.5), (b, 3016.0), (c, 1624.9)):
        assert predicted_mib(shape, None) == pytest.approx(measured - 16, rel=0.001)
    for shape, measured in ((b, 1459.0), (c, 365.3)):
        assert predicted_mib(shape, 256) == pytest.approx(measured, rel=0.005)
