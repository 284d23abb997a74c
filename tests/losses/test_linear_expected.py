"""What earlier calls have kept decides how `weighted_linear_loss` gets its gradients, and never their values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import geko_kernels as gk
from geko_kernels.losses import linear_call, linear_chunks, linear_expected
from geko_kernels.losses.linear_gradients import HeadGradients
from geko_kernels.losses.linear_head import Budget

COLUMNS = 24  # hidden
pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def many_paths(monkeypatch):
    """A small call too goes by rows, and few kept rows are summed by GEMMs that read their number on the device."""
    monkeypatch.setattr(linear_call, "_AT_ONCE", 0)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 4)
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)
    monkeypatch.setattr(HeadGradients, "counts_on_device", lambda self: self.bias_grad is None)


def grads(loss, inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize(
    ("zeros", "most", "rows", "taken"),
    [
        (50, 1e9, 200, 1),
        (50, 0.5 * 90 * 64 * COLUMNS - 1, 200, 0),
        (50, 1e9, 40, 0),
        (10, 1e9, 200, 0),
        (0, 1e9, 200, 0),
    ],
)
def test_only_few_rows_of_a_single_fill_are_summed_without_their_number(
    backend, monkeypatch, zeros, most, rows, taken, learnt
):
    """If more are expected, or several fills, cuBLAS is faster. The values are right though all or none are kept."""
    monkeypatch.setattr(linear_expected, "FEW", most)
    monkeypatch.setattr(Budget, "rows", lambda self, scored: min(rows, scored))
    calls, add_all = [], HeadGradients.add_all
    monkeypatch.setattr(HeadGradients, "add_all", lambda *args: (calls.append(1), add_all(*args))[1])
    weight, labels, ids = torch.randn(64, COLUMNS) / 2, torch.randint(64, (6, 15)), torch.arange(6)
    hidden, state = 8 * weight[labels] if learnt else torch.randn(6, 15, COLUMNS), gk.SampleState(6)
    state.zero_share.learn(zeros, 100)
    other, inputs = copy.deepcopy(state), [tensor.requires_grad_() for tensor in (hidden, weight)]
    ours = grads(gk.weighted_linear_loss(*inputs, labels, ids, state), inputs)
    for one, want in zip(ours, grads(gk.weighted_loss(F.linear(*inputs), labels, ids, other), inputs), strict=True):
        torch.testing.assert_close(one, want, rtol=2e-4, atol=2e-5)
    assert len(calls) == taken
    assert state.zero_share.values()[2:4] == [zeros / 2 + 90 * learnt, 50 + 90]


@pytest.mark.parametrize("hard", [4, 10])  # tokens: the visit's weight is 0 at its end and was not before; or higher
@pytest.mark.parametrize("arrived", [True, False])
def test_nothing_is_kept_of_the_last_fill_and_a_visit_is_corrected(backend, monkeypatch, arrived, hard):
    """dW's operand for the last fill, made ahead of its count, is not that of the corrected rows."""
    monkeypatch.setattr(Budget, "rows", lambda self, scored: min(20, scored))
    monkeypatch.setattr(linear_chunks.HostCopy, "arrived", lambda _: arrived)
    weight, labels = torch.randn(50, COLUMNS) / 2, torch.randint(50, (1, 60))
    hidden, ids = 8 * weight[labels], torch.arange(60)[None] // 40  # a visit of two fills, and one that is learnt
    hidden[0, :hard] = torch.randn(hard, COLUMNS) / 10
    inputs, state = [tensor.requires_grad_() for tensor in (hidden, weight)], gk.SampleState(2)
    state.zero_share.learn(50, 100)
    other = copy.deepcopy(state)
    ours = grads(gk.weighted_linear_loss(*inputs, labels, ids, state), inputs)
    for one, want in zip(ours, grads(gk.weighted_loss(F.linear(*inputs), labels, ids, other), inputs), strict=True):
        torch.testing.assert_close(one, want, rtol=2e-4, atol=2e-5)


class Wrapped(torch.Tensor):
    """Has no memory of its own, as a quantized weight."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapped, lambda wrapped: wrapped.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


KINDS = {
    "transposed": lambda x: x[:64, :COLUMNS].t().contiguous().t(),
    "every second row": lambda x: x[:, :COLUMNS].contiguous()[::2],
    "some columns": lambda x: x[:64, 5 : 5 + COLUMNS],
    "negated lazily": lambda x: torch._neg_view(x[:64, :COLUMNS].contiguous()),
    "without memory": lambda x: Wrapped(x[:64, :COLUMNS].contiguous()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_may_lie_in_memory_as_it_likes(backend, kind):
    """PyTorch's own products take each of these."""
    weight, hidden = KINDS[kind](torch.randn(128, 2 * COLUMNS) / 2), torch.randn(6, 15, COLUMNS).requires_grad_()
    labels, ids, state = torch.randint(64, (6, 15)), torch.arange(6), gk.SampleState(6)
    state.zero_share.learn(50, 100)
    other, inputs = copy.deepcopy(state), [hidden]
    if kind != "without memory":
        inputs.append(weight.requires_grad_())
    ours = grads(gk.weighted_linear_loss(hidden, weight, labels, ids, state), inputs)
    for one, want in zip(
        ours, grads(gk.weighted_loss(F.linear(hidden, weight), labels, ids, other), inputs), strict=True
    ):
        torch.testing.assert_close(one, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("zeros", [0, 50, 100])
def test_hidden_states_may_be_negated_lazily(backend, zeros):
    weight, base = (torch.randn(64, COLUMNS) / 2).requires_grad_(), torch.randn(6, 15, COLUMNS).requires_grad_()
    labels, ids, state = torch.randint(64, (6, 15)), torch.arange(6), gk.SampleState(6)
    state.zero_share.learn(zeros, 100)
    other, hidden = copy.deepcopy(state), torch._neg_view(base)
    ours = grads(gk.weighted_linear_loss(hidden, weight, labels, ids, state), (base, weight))
    want = grads(gk.weighted_loss(F.linear(hidden, weight), labels, ids, other), (base, weight))
    for one, each in zip(ours, want, strict=True):
        torch.testing.assert_close(one, each, rtol=2e-4, atol=2e-5)


def test_the_bits_of_few_rows_do_not_depend_on_when_a_count_arrives(backend, monkeypatch):
    """A buffer that was taken for all tokens has more room for parts of dX's sums than one for the scored rows."""
    monkeypatch.setattr(linear_chunks, "AHEAD", 11 * 896 * COLUMNS)
    weight, labels = torch.randn(896, COLUMNS) / 2, torch.randint(896, (6, 15))
    hidden = 8 * weight[labels]
    hidden[0] = torch.randn(15, COLUMNS)
    labels[1, :6] = -100
    inputs, found = [tensor.requires_grad_() for tensor in (hidden, weight)], []
    for arrived in (True, False):
        monkeypatch.setattr(linear_chunks.HostCopy, "arrived", lambda _, arrived=arrived: arrived)
        state = gk.SampleState(6)
        state.zero_share.learn(80, 100)
        state.zero_share.scored_share = 1.0
        found.append(grads(gk.weighted_linear_loss(*inputs, labels, torch.arange(6), state), inputs))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
