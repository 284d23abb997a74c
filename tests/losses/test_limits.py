"""Derivatives, transforms and tensors that the losses do not take: the right value or an error that names the limit."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import geko_kernels as gk

ROWS, LENGTH, VOCAB, COLUMNS = 3, 4, 7, 5
LABELS = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
NO_SECOND = "has no second derivative; use F.cross_entropy"
NO_FORWARD = "has no forward-mode derivative (forward_ad, torch.func.jvp, jacfwd, hessian); use F.cross_entropy"
REDUCTIONS = ["mean", "token_mean", "sum", "none"]


def head(device="cpu"):
    """hidden, weight and bias."""
    shapes = (ROWS, LENGTH, COLUMNS), (VOCAB, COLUMNS), (VOCAB,)
    return [torch.randn(shape, device=device) for shape in shapes]


def loss_of(linear: bool, device="cpu", **options):
    """A function of the logits, or of hidden, weight and bias."""
    ids, state = torch.arange(ROWS, device=device), gk.SampleState(ROWS, device=device)
    labels = LABELS.to(device)
    if not linear:
        return lambda logits: gk.weighted_loss(logits, labels, ids, state, **options)
    return lambda hidden, weight, bias: gk.weighted_linear_loss(
        hidden, weight, labels, ids, state, bias=bias, **options
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_gradient_of_the_linear_loss_has_a_derivative(backend, device, reduction, place):
    """With the upstream gradient 1 of `backward`, which needs no gradient itself."""
    inputs = [tensor.requires_grad_() for tensor in head(device)]
    loss = loss_of(True, device, reduction=reduction)(*inputs).sum()
    grad = torch.autograd.grad(loss, inputs, create_graph=True)[place]
    plain = torch.autograd.grad(loss_of(True, device, reduction=reduction)(*inputs).sum(), inputs)[place]
    assert grad.equal(plain)
    for other in inputs:
        with pytest.raises(NotImplementedError, match=f"weighted_linear_loss {NO_SECOND}"):
            torch.autograd.grad(grad.square().sum(), other, allow_unused=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        grad.square().sum().backward()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_part_hides_no_second_derivative(reference, frozen):
    inputs = head()
    learning = [tensor.requires_grad_() for place, tensor in enumerate(inputs) if place != frozen]
    grads = torch.autograd.grad(loss_of(True)(*inputs), learning, create_graph=True)
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("how", ["hvp", "vhp", "hessian", "jvp"])
def test_functional_second_derivatives_are_refused(reference, linear, how):
    inputs = tuple(head()) if linear else torch.randn(ROWS, LENGTH, VOCAB)
    arguments = (loss_of(linear), inputs) if how == "hessian" else (loss_of(linear), inputs, inputs)
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        getattr(torch.autograd.functional, how)(*arguments)


def test_the_upstream_gradient_has_no_derivative_either(backend, device):
    logits = torch.randn(ROWS, LENGTH, VOCAB, device=device, requires_grad=True)
    upstream = torch.ones((), device=device, requires_grad=True)
    grad = torch.autograd.grad(loss_of(False, device)(logits), logits, upstream, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        torch.autograd.grad(grad.sum(), upstream, allow_unused=True)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("place", [None, 0, 1, 2])
def test_a_tangent_is_refused(reference, place, needs_gradient):
    """`place` of the linear loss's arguments, or the logits."""
    inputs = [torch.randn(ROWS, LENGTH, VOCAB)] if place is None else head()
    with forward_ad.dual_level():
        loss_of(place is not None)(*inputs)  # none has a tangent
        at = place or 0
        inputs[at] = forward_ad.make_dual(inputs[at].requires_grad_(needs_gradient), torch.ones_like(inputs[at]))
        with pytest.raises(NotImplementedError, match=re.escape(NO_FORWARD)):
            loss_of(place is not None)(*inputs)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.func.linearize(f, x),
        lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,)),
    ],
)
def test_forward_mode_transforms_are_refused(reference, transform):
    with pytest.raises(NotImplementedError, match=re.escape(f"weighted_loss {NO_FORWARD}")):
        transform(loss_of(False), torch.randn(ROWS, LENGTH, VOCAB))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_tangent_of_the_upstream_gradient_is_refused(reference, linear, reduction):
    inputs = head() if linear else [torch.randn(ROWS, LENGTH, VOCAB)]
    loss = loss_of(linear, reduction=reduction)(*(tensor.requires_grad_() for tensor in inputs))
    message = re.escape("has no forward-mode derivative (forward_ad or torch.func.jvp around a backward)")
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(NotImplementedError, match=message):
            torch.autograd.grad(loss, inputs, upstream)


def test_jvp_of_a_vjp_is_refused(reference):
    logits, one = torch.randn(ROWS, LENGTH, VOCAB), torch.ones(())
    with pytest.raises(NotImplementedError, match=r"the gradient of weighted_loss has no forward-mode derivative"):
        torch.func.jvp(lambda upstream: torch.func.vjp(loss_of(False), logits)[1](upstream), (one,), (one,))


def test_functionalize_is_refused():
    with pytest.raises(NotImplementedError, match=r"weighted_loss does not run under torch\.func\.functionalize"):
        torch.func.functionalize(loss_of(False))(torch.randn(ROWS, LENGTH, VOCAB))


def test_inplace_does_not_run_under_torch_func():
    message = "inplace=True writes one gradient over the logits.* nor the transforms of torch.func"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda z: gk.weighted_loss(z * 1, LABELS, inplace=True))(torch.randn(ROWS, LENGTH, VOCAB))


def test_jacrev_and_batched_gradients_are_those_of_pytorch(backend, device):
    logits, labels = torch.randn(5, VOCAB, device=device), LABELS[0].new_tensor([0, 6, 3, 3, 1]).to(device)

    def ours(z):
        return gk.weighted_loss(z, labels, reduction="none")

    def theirs(z):
        return F.cross_entropy(z, labels, reduction="none")

    want = torch.func.jacrev(theirs)(logits)
    torch.testing.assert_close(torch.func.jacrev(ours)(logits), want)
    leaf = logits.clone().requires_grad_()
    grads = torch.autograd.grad(ours(leaf), leaf, torch.eye(5, device=device), is_grads_batched=True)
    torch.testing.assert_close(grads[0], want)
    with pytest.raises(NotImplementedError, match="inplace=True writes one gradient over the logits"):
        loss = gk.weighted_loss(leaf * 1, labels, reduction="none", inplace=True)
        torch.autograd.grad(loss, leaf, torch.eye(5, device=device), is_grads_batched=True)


def test_vmap_is_refused():
    logits, labels = torch.randn(ROWS, LENGTH, VOCAB), LABELS
    message = "weighted_loss does not run under torch.vmap: its state is updated in place"
    for function in (gk.weighted_loss, torch.func.grad(gk.weighted_loss)):
        with pytest.raises(NotImplementedError, match=message):
            torch.vmap(function)(logits, labels)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.vmap])
def test_the_linear_loss_takes_no_transform_of_torch_func(transform):
    hidden, weight, _ = head()
    message = re.escape("weighted_linear_loss does not run under the transforms of torch.func")
    with pytest.raises(NotImplementedError, match=message):
        transform(lambda h: gk.weighted_linear_loss(h[None], weight, LABELS[:1]))(hidden[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trace_computes_anew_or_is_refused(dtype):
    logits, labels = torch.randn(3, 5, 7, dtype=dtype), torch.randint(0, 7, (3, 5))

    def loss(logits):
        return gk.weighted_loss(logits * 1, labels, reduction="token_mean")

    traced = torch.jit.trace(loss, logits, check_trace=False)
    expected = F.cross_entropy((2 * logits).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(traced(2 * logits), expected)
    with pytest.raises(NotImplementedError, match="torch.jit.trace where the logits require a gradient"):
        torch.jit.trace(loss, logits.clone().requires_grad_(), check_trace=False)
    with pytest.raises(NotImplementedError, match="weighted_linear_loss does not run under torch.jit.trace"):
        torch.jit.trace(lambda hidden: gk.weighted_linear_loss(hidden, torch.eye(7, dtype=dtype), labels), logits)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_linear_loss_makes_one_gradient_at_a_time(reference, reduction):
    inputs = [tensor.requires_grad_() for tensor in head()]
    loss = loss_of(True, reduction=reduction)(*inputs)
    upstream = torch.eye(ROWS) if reduction == "none" else torch.ones(2)
    with pytest.raises(NotImplementedError, match="weighted_linear_loss makes one gradient at a time"):
        torch.autograd.grad(loss, inputs, upstream, is_grads_batched=True)


def test_meta_tensors_have_shapes_only():
    logits = torch.randn(ROWS, LENGTH, VOCAB, device="meta", requires_grad=True)
    ids, state = torch.arange(ROWS, device="meta"), gk.SampleState(ROWS, device="meta")
    loss, stats = gk.weighted_loss(logits, LABELS.to("meta"), ids, state, reduction="none", return_stats=True)
    loss.sum().backward()
    assert loss.shape == stats.loss.shape == (ROWS,) and logits.grad.shape == logits.shape
    hidden, weight, _ = head("meta")
    with pytest.raises(NotImplementedError, match="weighted_linear_loss does not run on meta or fake tensors"):
        gk.weighted_linear_loss(hidden, weight, LABELS.to("meta"))


def test_gradients_may_be_resized(backend, device):
    inputs = [tensor.requires_grad_() for tensor in head(device)]
    for grad in torch.autograd.grad(loss_of(True, device)(*inputs), inputs):
        kept = grad.flatten().clone()
        assert grad.resize_(40).numel() == 40 and grad[: len(kept)].equal(kept[:40])
    logits = torch.randn(ROWS, LENGTH, VOCAB, device=device, requires_grad=True)
    grad = torch.autograd.grad(loss_of(False, device)(logits), logits)[0]
    kept = grad.flatten().clone()
    assert grad.resize_(100)[: len(kept)].equal(kept)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_changed_before_the_backward(backend, device, linear, reduction):
    """An error where the backward needs them, and where not the gradient of the labels that were there."""
    labels, ids = LABELS.to(device).clone(), torch.arange(ROWS, device=device)
    inputs = [tensor.requires_grad_() for tensor in head(device)]

    def loss_now():
        call = (labels, ids, gk.SampleState(ROWS, device=device))
        if linear:
            return gk.weighted_linear_loss(*inputs[:2], *call, bias=inputs[2], reduction=reduction).sum()
        return gk.weighted_loss(F.linear(*inputs), *call, reduction=reduction).sum()

    want = torch.autograd.grad(loss_now(), inputs)
    loss = loss_now()
    ids.zero_()  # whose sample a visit is, the backward never asks
    for grad, expected in zip(torch.autograd.grad(loss, inputs), want, strict=True):
        torch.testing.assert_close(grad, expected)
    loss = loss_now()
    labels.zero_()
    if linear and reduction != "none":
        torch.autograd.grad(loss, inputs)  # made in the forward
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("per", ["row", "token", None])
def test_an_empty_batch(backend, device, shape, per, reduction, linear):
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    ids = {"row": torch.arange(shape[0], device=device), "token": labels, None: None}[per]
    state = None if per is None else gk.SampleState(4, device=device)
    options = {"reduction": reduction, "return_stats": True}
    if linear:
        inputs = [
            tensor.requires_grad_() for tensor in (torch.randn(*shape, COLUMNS, device=device), *head(device)[1:])
        ]
        loss, stats = gk.weighted_linear_loss(*inputs[:2], labels, ids, state, bias=inputs[2], **options)
    else:
        inputs = [torch.randn(*shape, VOCAB, device=device, requires_grad=True)]
        loss, stats = gk.weighted_loss(*inputs, labels, ids, state, **options)
    entries = labels.numel() if per == "token" else shape[0]
    assert loss.shape == ((entries,) if reduction == "none" else ()) and not loss.any()
    assert all(column.shape == (entries,) for column in stats)
    for tensor, grad in zip(inputs, torch.autograd.grad(loss.sum(), inputs), strict=True):
        assert grad.shape == tensor.shape and not grad.any()


def derivatives(transform, fullgraph, logits, labels):
    """torch.compile of a transform of `torch.func` of the loss."""
    torch._dynamo.reset()

    def loss(logits):
        return gk.weighted_loss(logits, labels, reduction="token_mean")

    return torch.compile(lambda logits: transform(loss, logits), backend="eager", fullgraph=fullgraph)(logits)


def test_a_compiled_transform_is_never_silently_zero():
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    plain = torch.func.grad(lambda logits: F.cross_entropy(logits.flatten(0, 1), labels.flatten()))(logits)

    def gradient(loss, logits):
        return torch.func.grad(loss)(logits)

    def tangent(loss, logits):
        return torch.func.jvp(loss, (logits,), (torch.ones_like(logits),))

    torch.testing.assert_close(derivatives(gradient, False, logits, labels), plain)
    with pytest.raises(NotImplementedError, match="weighted_loss has no forward-mode derivative"):
        derivatives(tangent, False, logits, labels)
    for transform in (gradient, tangent):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True out"):
            derivatives(transform, True, logits, labels)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_tangent_is_refused(mode):
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))

    def tangent(logits, labels):
        return torch.func.jvp(lambda logits: gk.weighted_loss(logits, labels), (logits,), (logits,))

    with pytest.raises(NotImplementedError, match="weighted_loss has no forward-mode derivative"):
        make_fx(tangent, tracing_mode=mode)(logits, labels)
