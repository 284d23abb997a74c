"""`weighted_linear_loss` within autograd: nothing to learn, repeated, accumulated, autocast, checkpointed, compiled."""

from __future__ import annotations

import pytest
import torch
from test_linear_loss import batch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import geko_kernels as gk

REDUCTIONS = ["mean", "token_mean", "sum", "none"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("why", ["labels", "weights", "empty"])
def test_pitfall_05_nothing_to_learn_gives_zero_not_nan(backend, device, reduction, why):
    hidden, weight, labels, ids = batch(device, rows=0 if why == "empty" else 4)
    state = gk.SampleState(4, device=device)
    if why == "labels":
        labels[:] = -100
    if why == "weights":
        state.bucket_weights = (0, 0, 0)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = gk.weighted_linear_loss(hidden, weight, labels, ids, state, reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pitfall_04_backward_twice(backend, device, reduction):
    hidden, weight, labels, ids = batch(device)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    loss = gk.weighted_linear_loss(*inputs, labels, ids, gk.SampleState(4, device=device), reduction=reduction).sum()
    first = torch.autograd.grad(loss * 2, inputs, retain_graph=True)
    second = torch.autograd.grad(loss * 6, inputs)
    for one, three in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, three)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, inputs)


def test_a_second_derivative_is_refused(reference):
    hidden, weight, labels, ids = batch()
    loss = gk.weighted_linear_loss(hidden.requires_grad_(), weight, labels, ids, gk.SampleState(4))
    grad = torch.autograd.grad(loss * loss, hidden, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), hidden)


def test_tied_and_accumulated_weights(backend, device):
    hidden, weight, labels, ids = batch(device)
    grads = []
    for linear in (False, True):
        tied = weight.clone().requires_grad_()
        for _ in range(2):
            looked_up = hidden + F.embedding(labels, tied)
            args = (labels, ids, gk.SampleState(4, device=device))
            loss = (
                gk.weighted_linear_loss(looked_up, tied, *args)
                if linear
                else gk.weighted_loss(F.linear(looked_up, tied), *args)
            )
            loss.backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_autocast(backend, device):
    hidden, weight, labels, ids = batch(device)
    results = []
    for linear in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        state = gk.SampleState(4, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = (
                gk.weighted_linear_loss(*inputs, labels, ids, state)
                if linear
                else gk.weighted_loss(F.linear(*inputs), labels, ids, state)
            )
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for want, ours in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, want, rtol=0.05, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_pitfall_12_checkpointing_counts_a_visit_once(backend, device, reentrant, reduction):
    hidden, weight, labels, ids = batch(device, learnt=[1])
    results = []
    for checkpointed in (False, True):
        state = gk.SampleState(4, device=device)
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]

        def loss_of(hidden, weight, state=state):
            return gk.weighted_linear_loss(hidden, weight, labels, ids, state, reduction=reduction).sum()

        loss = checkpoint(loss_of, *inputs, use_reentrant=reentrant) if checkpointed else loss_of(*inputs)
        loss.backward()
        results.append((loss.detach(), *(tensor.grad for tensor in inputs), state.times_seen, state.q_value))
    for plain, repeated in zip(*results, strict=True):
        torch.testing.assert_close(repeated, plain)


def test_a_graph_break_under_compile(backend, device):
    hidden, weight, labels, ids = batch(device)
    state = gk.SampleState(4, device=device)

    def step(hidden, weight):
        return gk.weighted_linear_loss(hidden * 2, weight, labels, ids, state) * 3

    weight.requires_grad_()
    compiled = torch.compile(step, backend="eager")(hidden, weight)
    torch.testing.assert_close(compiled, gk.weighted_loss(F.linear(2 * hidden, weight), labels, ids, state) * 3)
    compiled.backward()
    assert weight.grad.isfinite().all()
