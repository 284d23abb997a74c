"""Every backend against the reference on random batches: values, gradients, statistics, state."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases
from comparing import TINY, assert_close_stats, assert_same_state
from hypothesis import given
from torch import Tensor
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels import ops


def run(case: Case, backend: str, device: str, dtype: torch.dtype | None = None):
    """loss, statistics, gradient of the logits and state after one call and its backward."""
    before, ops._override = ops._override, backend
    try:
        logits = case.logits.to(device, dtype or case.logits.dtype)  # keeps the strides
        logits = logits.detach().requires_grad_()
        ids = None if case.sample_ids is None else case.sample_ids.to(device)
        state = case.new_state(device)
        loss, stats = gk.weighted_loss(logits, case.labels.to(device), ids, state, return_stats=True, **case.options)
        upstream = torch.linspace(-1, 2, loss.numel(), device=device).view(loss.shape) if loss.dim() else 1.0
        (loss * upstream * case.upstream).sum().backward()
    finally:
        ops._override = before
    return loss.detach().cpu(), gk.SampleStats(*(x.cpu() for x in stats)), logits.grad.cpu(), state


def own_error(logits: Tensor, exact_grad: Tensor) -> Tensor:
    """The largest error of PyTorch's own gradient in the logits' dtype, as a share of the largest gradient."""
    flat = logits.detach().flatten(0, 1)
    target = flat.float().argmin(1) if logits.shape[-1] < 5 else torch.zeros(len(flat), dtype=torch.long)
    low, high = flat.clone().requires_grad_(), flat.double().requires_grad_()
    F.cross_entropy(low, target, reduction="sum").backward()
    F.cross_entropy(high, target, reduction="sum").backward()
    error = (low.grad.double() - high.grad).nan_to_num().abs().max()
    return error * exact_grad.abs().max()


@given(case=cases())
def test_a_call_equals_the_reference(backend, device, case):
    if backend == "reference":
        pytest.skip("is the reference")
    loss, stats, grad, state = run(case, backend, device)
    want_loss, want_stats, _, want_state = run(case, "reference", "cpu")
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=TINY)
    assert_close_stats(stats, want_stats)
    assert_same_state(state, want_state)
    _, _, exact, _ = run(case, "reference", "cpu", torch.float64)
    rounding = exact.abs() * torch.finfo(case.logits.dtype).eps
    allowed = torch.maximum(2 * own_error(case.logits, exact), rounding) + TINY * abs(case.upstream)
    assert grad.dtype == case.logits.dtype and grad.shape == case.logits.shape
    assert ((grad.double() - exact).abs() <= allowed).all()


@given(case=cases(dtypes=(torch.float16, torch.bfloat16)))
def test_low_precision_values_are_within_twice_pytorchs_own_error(backend, device, case):
    loss, stats, _, _ = run(case, backend, device)
    exact_loss, exact, _, _ = run(case, "reference", "cpu", torch.float64)
    assert loss.dtype == torch.float32
    used = exact.num_tokens > 0
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    for name in ("loss", "confidence", "accuracy"):
        ours, want = getattr(stats, name).double()[used], getattr(exact, name)[used]
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1000, 4099, 9001])
def test_a_larger_vocabulary(backend, device, dtype, vocab):
    logits = (torch.randn(3, 4, vocab) * 3).to(dtype)
    labels = torch.randint(vocab, (3, 4))
    case = Case(logits, labels, torch.arange(3), gk.SampleState(3))
    loss, stats, grad, state = run(case, backend, device)
    want_loss, want_stats, exact, want_state = run(case, "reference", "cpu", torch.float64)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-5)
    assert stats.bucket.equal(want_stats.bucket) and state.times_seen.cpu().equal(want_state.times_seen)
    allowed = torch.maximum(2 * own_error(logits, exact), exact.abs() * torch.finfo(dtype).eps) + 1e-7
    assert ((grad.double() - exact).abs() <= allowed).all()


def test_many_calls_in_a_row_keep_the_state_equal(backend, device):
    if backend == "reference":
        pytest.skip("is the reference")
    config = gk.GEKOConfig(correct_loss=1.0, freeze_confidence=0.7)
    ours, reference = gk.SampleState(12, config, device=device), gk.SampleState(12, config)
    for _ in range(6):
        labels, ids = torch.randint(9, (4, 3)), torch.randint(-1, 12, (4, 3)).sort(1).values
        logits = torch.randn(4, 3, 9)
        logits.scatter_add_(2, labels[..., None], 7 * torch.rand(4, 1, 1).expand(4, 3, 1))
        for name, state, where in ((backend, ours, device), ("reference", reference, "cpu")):
            before, ops._override = ops._override, name
            gk.weighted_loss(logits.to(where), labels.to(where), ids.to(where), state)
            ops._override = before
    assert_same_state(ours, reference)
    assert len(reference.bucket.unique()) > 2, "the sequence reaches several buckets"


def test_an_unwritten_output_would_be_seen():
    assert torch.empty(1000).isnan().all() and torch.ones(9).new_empty(100).isnan().all()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_entry_is_written(backend, device, reduction):
    labels = torch.full((2, 5), -100, device=device)
    labels[0, 1] = 3
    ids = torch.tensor([[1, 1, -1, -1, 0], [-1, -1, -1, 2, 2]], device=device)
    logits = torch.randn(2, 5, 7, device=device, requires_grad=True)
    loss, stats = gk.weighted_loss(
        logits, labels, ids, gk.SampleState(3, device=device), reduction=reduction, return_stats=True
    )
    loss.sum().backward()
    assert logits.grad.isfinite().all() and loss.isfinite().all()
    assert all(x.isfinite().all() for x in stats if x.is_floating_point())
    assert stats.sample_ids.tolist() == [1, 0, 2] + [-1] * 7
    assert stats.num_tokens.tolist() == [1] + [0] * 9


@given(case=cases())
def test_tokens_of_weight_zero_get_exact_zeros(backend, device, case):
    _, stats, grad, _ = run(case, backend, device)
    labels, ids = case.labels, case.sample_ids
    if ids is None or ids.dim() == 1:
        skipped = (stats.weight == 0)[:, None].expand_as(labels)
    else:
        skipped = ids == -1
    if not case.options["shift"]:
        skipped = skipped | (labels == case.options["ignore_index"])
    assert not grad[skipped].any()
