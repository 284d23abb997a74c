"""float16 gradients of `weighted_linear_loss`: finite and as near as PyTorch's wherever those are finite."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels.losses.linear_gradients import multiply_
from geko_kernels.losses.linear_head import Budget

ROWS, LENGTH, VOCAB, COLUMNS = 4, 24, 17, 24


def data(device, valid=None, large=1.0):
    """hidden (B, S, H) with one large column, weight, bias and labels, of which the first `valid` of a row count."""
    hidden, weight = torch.randn(ROWS, LENGTH, COLUMNS), torch.randn(VOCAB, COLUMNS)
    hidden[..., 0] *= large
    weight[:, 0] /= large
    labels = torch.randint(VOCAB, (ROWS, LENGTH))
    if valid is not None:
        labels[:, valid:] = -100
    return *(tensor.to(device) for tensor in (hidden, weight, torch.randn(VOCAB))), labels.to(device)


def compare(device, values, labels, upstream, autocast):
    """Gradients of the mean over tokens: exact, PyTorch's, ours."""
    leaves = [tensor.to(torch.float32 if autocast else torch.float16) for tensor in values]
    wide = [tensor.double().requires_grad_() for tensor in leaves]
    loss = F.cross_entropy(F.linear(*wide).flatten(0, 1), labels.flatten())
    yield torch.autograd.grad(loss * upstream, wide)
    for linear in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in leaves]
        with torch.autocast(device, torch.float16, enabled=autocast):
            if linear:
                loss = gk.weighted_linear_loss(*inputs[:2], labels, bias=inputs[2], reduction="token_mean")
            else:
                loss = F.cross_entropy(F.linear(*inputs).flatten(0, 1), labels.flatten())
        grads = torch.autograd.grad(loss * upstream, inputs)
        assert all(grad.dtype == tensor.dtype for grad, tensor in zip(grads, inputs, strict=True))
        yield [grad.double() for grad in grads]


@pytest.mark.parametrize(("autocast", "rows_held"), [(False, 50), (True, 50), (False, 1000)])
@pytest.mark.parametrize(("large", "upstream"), [(1.0, 1.0), (5000.0, 1.0), (1.0, 4096.0), (15000.0, 0.1)])
def test_no_gradient_overflows_before_its_division(backend, device, monkeypatch, large, upstream, autocast, rows_held):
    """Summed first, dW of the large column is beyond 65504; divided by the number of tokens it is not."""
    monkeypatch.setattr(Budget, "rows", lambda *_: rows_held)
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)
    *values, labels = data(device, large=large)
    exact, peer, ours = compare(device, values, labels, upstream, autocast)
    for want, theirs, mine in zip(exact, peer, ours, strict=True):
        assert theirs.isfinite().all() and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-6 * want.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("valid", [1, 2, LENGTH])
def test_short_samples_in_long_rows(backend, device, reduction, valid):
    """A row of one valid token has a coefficient as large as the row is long."""
    hidden, weight, bias, labels = data(device, large=900.0)
    labels[1:, valid:] = -100
    found = []
    for dtype in (torch.float64, torch.float16):
        inputs = [tensor.half().to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
        options = {"bias": inputs[2], "reduction": reduction}
        found.append(torch.autograd.grad(gk.weighted_linear_loss(*inputs[:2], labels, **options).sum(), inputs))
    for want, ours in zip(*found, strict=True):
        assert ours.isfinite().all() and (ours.double() - want).norm() <= 4e-3 * want.norm()


def test_a_retained_graph_and_a_large_upstream_gradient(backend, device):
    """GradScaler's 65536 lifts what float16 would have lost; a factor of the loss may be as small."""
    hidden, weight, _, labels = (tensor.half() if tensor.is_floating_point() else tensor for tensor in data(device))
    inputs = [hidden.requires_grad_(), weight.mul_(1e-2).requires_grad_()]
    loss = gk.weighted_linear_loss(*inputs, labels) * 1e-5
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(gk.weighted_linear_loss(*wide, labels) * 1e-5 * 65536, wide)
    for keep in (True, False):
        for want, ours in zip(exact, torch.autograd.grad(loss * 65536, inputs, retain_graph=keep), strict=True):
            assert (ours.double() - want).norm() <= 2e-3 * want.norm()


def test_rows_without_a_label_may_hold_anything(backend, device):
    hidden, weight, _, labels = (t.half() if t.is_floating_point() else t for t in data(device, valid=8))
    hidden[:, 8:] = torch.inf
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    for grad in torch.autograd.grad(gk.weighted_linear_loss(*inputs, labels), inputs):
        assert grad.isfinite().all() and grad.any()


def test_a_product_of_float16_on_the_cpu_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr("geko_kernels.losses.linear_gradients._COPIED", 7)
    a, b = torch.full((5, 3), 300.0).half(), torch.full((3, 4), 300.0).half()
    out = torch.ones(5, 4)
    multiply_(out, a, b)
    assert (out == 270000).all()
    multiply_(out, a, b, add=True)
    assert (out == 540000).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_of_the_bias_is_a_mean_and_not_a_sum(reference, autocast):
    """180,000 tokens that are half wrong: -90,000 of them in all."""
    kept = torch.float32 if autocast else torch.float16
    hidden, weight, bias = (torch.zeros(shape, dtype=kept) for shape in ((3, 60000, 1), (2, 1), (2,)))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = gk.weighted_linear_loss(
            hidden, weight, torch.zeros(3, 60000, dtype=torch.long), bias=bias.requires_grad_(), reduction="token_mean"
        )
    torch.testing.assert_close(torch.autograd.grad(loss, bias)[0].float(), torch.tensor([-0.5, 0.5]))
