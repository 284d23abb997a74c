"""`token_weights` and `sample_weights`: in place, checkpointed, compiled, as ops; and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from test_compile import assert_equal, both, op_arguments, setup
from test_weights import LOSSES, both_losses
from torch.utils.checkpoint import checkpoint

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.losses.weights import prepare_weights

LABELS = torch.tensor([[1, 4, -100], [0, 2, 3]])


def test_in_place(backend, device):
    labels, u = torch.randint(5, (3, 4), device=device), torch.rand(3, 4, device=device)
    grads = []
    for inplace in (False, True):
        leaf = torch.ones(3, 4, 5, device=device, requires_grad=True)
        logits = leaf * torch.arange(5, device=device)
        gk.weighted_loss(logits, labels, token_weights=u, inplace=inplace).backward()
        grads.append(leaf.grad)
    assert grads[0].equal(grads[1]) and grads[0].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_repeat_by_checkpointing_counts_once(backend, device, kind):
    logits, labels = torch.randn(3, 4, 5, device=device), torch.randint(5, (3, 4), device=device)
    ids, u, v = torch.arange(3, device=device), torch.rand(3, 4, device=device), torch.rand(3, device=device)
    results = []
    for repeat in (False, True):
        state, leaf = gk.SampleState(3, device=device), logits.clone().requires_grad_()

        def head(x, state=state):
            return both_losses(kind, x * 1, labels, ids, state, token_weights=u, sample_weights=v)

        loss = checkpoint(head, leaf, use_reentrant=False) if repeat else head(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad, state))
    assert_equal(results)
    assert results[1][2].times_seen.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_second_derivative_is_refused_and_without_update_nothing_is_written(backend, device, kind):
    logits = torch.randn(3, 4, 5, device=device, requires_grad=True)
    labels, ids = torch.randint(5, (3, 4), device=device), torch.arange(3, device=device)
    state = gk.SampleState(3, device=device)
    loss = both_losses(kind, logits, labels, ids, state, update=False, token_weights=torch.rand(3, 4, device=device))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.square().sum().backward()
    assert not state.times_seen.any() and not state.changed.any()


def weights_for(form, device="cpu"):
    """token_weights and sample_weights for the batch of test_compile.py."""
    rows, length = {"opcheck": (2, 3), "row": (4, 3), "token": (4, 3)}[form]
    return torch.rand(rows, length, device=device) + 0.1, torch.rand(rows, length, device=device)


@pytest.mark.parametrize("packed", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("given", ["token", "sample", "both"])
@pytest.mark.parametrize("name", ["sample_update_", "loss_forward_"])
def test_opcheck(backend, device, name, packed, given):
    u, v = weights_for("opcheck", device)
    weights = (None if given == "sample" else u, None if given == "token" else v if packed else v[:, 0].contiguous())
    torch.library.opcheck(
        getattr(torch.ops.geko, name).default, (*op_arguments(name, device, packed, True, 2), *weights)
    )


@pytest.mark.parametrize("form", ["row", "token"])
@pytest.mark.parametrize("reduction", ["token_mean", "none"])
@pytest.mark.usefixtures("reference")
def test_compiled_equals_eager(form, reduction):
    hidden, weight, labels, ids = setup()
    u, v = weights_for(form)
    u[2, 1] = 0

    def step(x, state):
        sample_ids, sample_weights = (ids[:, 2], v[:, 0]) if form == "row" else (ids, v)
        weights = {"token_weights": u, "sample_weights": sample_weights}
        return gk.weighted_loss(x @ weight.T, labels, sample_ids, state, reduction=reduction, shift=True, **weights)

    assert_equal(both(step, hidden, backend="aot_eager"))


@pytest.mark.parametrize("bad", [-1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["token_weights", "sample_weights"])
def test_a_bad_value_that_nobody_looks_at_shows_in_the_loss(backend, device, name, bad):
    """As on a GPU, where looking would wait, and in compiled code."""
    logits, labels = torch.randn(2, 3, 5, device=device), torch.tensor([[0, 1, 2], [0, 1, 2]], device=device)
    state, ids = gk.SampleState(2, device=device), torch.arange(2, device=device)
    weights = {"token_weights": torch.ones(2, 3, device=device), "sample_weights": torch.ones(2, device=device)}
    weights[name].view(-1)[-1] = bad
    labels, u, v = prepare_weights(labels, ids, -100, torch.float32, look=False, **weights)
    where = (logits, labels, ids, state.rules, state.weights, None, state.columns, state.error)
    for code, expected in ((0, [False, True]), (1, True), (2, True)):
        loss = ops.loss_forward_(*where, code, -100, False, 0.0, True, u, v)[0]
        assert loss.isnan().tolist() == expected
    assert state.times_seen.tolist() == [3, 0 if name == "token_weights" else 3]


BAD = [
    ({"token_weights": [1.0]}, TypeError, "token_weights must be a torch.Tensor or None, got list"),
    (
        {"token_weights": torch.ones(2, 3, dtype=torch.long)},
        TypeError,
        "token_weights must be float32, bfloat16, float16 or float64, got torch.int64; use token_weights.float()",
    ),
    ({"token_weights": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "or float64, got torch.complex64"),
    ({"token_weights": torch.ones(2)}, ValueError, "token_weights must be (2, 3), one a label, got (2,)"),
    ({"token_weights": torch.ones(2, 3, device="meta")}, ValueError, "token_weights must be on the device of the lab"),
    ({"token_weights": torch.ones(2, 3).to_sparse()}, TypeError, "token_weights must be a dense tensor, got one of"),
    (
        {"token_weights": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        "token_weights must not require a gradient, since it is a constant; use token_weights.detach()",
    ),
    (
        {"token_weights": torch.tensor([[1, 1, 1], [0, -0.5, torch.nan]])},
        ValueError,
        "token_weights must hold finite numbers of 0 or more, in the range of float32, got -0.5 at [1, 1]",
    ),
    ({"token_weights": torch.full((2, 3), torch.nan)}, ValueError, "in the range of float32, got nan at [0, 0]"),
    ({"token_weights": torch.full((2, 3), torch.inf)}, ValueError, "in the range of float32, got inf at [0, 0]"),
    ({"token_weights": torch.full((2, 3), 1e39, dtype=torch.float64)}, ValueError, "float32, got 1e+39 at [0, 0]"),
    ({"token_weights": torch.full((2, 3), 1e-60, dtype=torch.float64)}, ValueError, "float32, got 1e-60 at [0, 0]"),
    ({"sample_weights": 1.0}, TypeError, "sample_weights must be a torch.Tensor or None, got float"),
    ({"sample_weights": torch.ones(2, dtype=torch.bool)}, TypeError, "got torch.bool; use sample_weights.float()"),
    ({"sample_weights": torch.ones(2, 3)}, ValueError, "sample_weights must be (2,), one a row, got (2, 3)"),
    (
        {"sample_weights": torch.ones(2), "sample_ids": torch.zeros(2, 3, dtype=torch.long)},
        ValueError,
        "sample_weights must be (2, 3), one a token as sample_ids are, got (2,)",
    ),
    ({"sample_weights": torch.tensor([2, -torch.inf])}, ValueError, "sample_weights must hold finite numbers of 0 or"),
    ({"sample_weights": torch.ones(2, requires_grad=True)}, ValueError, "sample_weights must not require a gradient"),
]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_what_is_refused(kind, changes, error, message):
    state = gk.SampleState(2)
    arguments = {"sample_ids": torch.arange(2), **changes}
    with pytest.raises(error, match=re.escape(message)):
        both_losses(kind, torch.randn(2, 3, 5), LABELS, arguments.pop("sample_ids"), state, **arguments)
    assert not state.times_seen.any() and not state.changed.any()


def test_weights_are_constants_to_every_derivative():
    logits, ones = torch.randn(2, 3, 5), torch.ones(2, 3)

    def loss(u):
        return gk.weighted_loss(logits, LABELS, token_weights=u)

    with pytest.raises(ValueError, match="token_weights must not require a gradient"):
        torch.func.grad(loss)(ones)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (ones,), (ones,))


@pytest.mark.parametrize(("u", "v"), [((2, 2), None), ((2, 3, 1), None), (None, (3,)), (None, (2, 3))])
def test_an_op_refuses_weights_of_another_shape(backend, device, u, v):
    arguments = op_arguments("loss_forward_", device, False, True, 1)
    u, v = (None if shape is None else torch.ones(shape, device=device) for shape in (u, v))
    with pytest.raises((ValueError, RuntimeError), match="(token|sample)_weights must be"):
        ops.loss_forward_(*arguments, u, v)
