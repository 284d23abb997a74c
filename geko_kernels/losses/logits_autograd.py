"""The backward of `weighted_loss`: a loss that is already computed is tied to the logits that it came from."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from geko_kernels import ops, torch_private
from geko_kernels.losses.derivatives import check_upstream, once
from geko_kernels.losses.results import ForwardResult


class _LogitsLoss(torch.autograd.Function):
    """Ties a loss that is already computed to the logits it came from."""

    @staticmethod
    def forward(
        logits: Tensor, labels: Tensor, result: ForwardResult, shift: bool, softcap: float, inplace: bool
    ) -> Tensor:
        return result.loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, labels, result, ctx.shift, ctx.softcap, ctx.inplace = inputs
        ctx.save_for_backward(logits, labels)
        # on ctx, not saved: checkpointing's backward has to use the forward that updated the state
        ctx.saved = result.statistics, result.coeff, result.scale, result.token_visit

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        check_upstream("weighted_loss", grad_output)
        logits, labels = ctx.saved_tensors
        grad = _logits_grad(grad_output, logits, labels, ctx.saved, ctx.shift, ctx.softcap, ctx.inplace)
        return once("weighted_loss", grad, logits, grad_output), None, None, None, None, None


class _PlannedLoss(torch.autograd.Function):
    """`_LogitsLoss` for a call that bypasses the dispatcher; without `setup_context`, which would cost two calls."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, outcome: tuple[Any, ...], inplace: bool) -> Tensor:
        # on ctx, not saved: see `_LogitsLoss`
        loss, ctx.plan, ctx.kept, _entries, ctx.predicted, ctx.prediction = outcome
        ctx.inplace = inplace
        ctx.save_for_backward(logits, labels)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        check_upstream("weighted_loss", grad_output)
        logits, labels = ctx.saved_tensors
        plan, kept, inplace = ctx.plan, ctx.kept, ctx.inplace
        predicted, ctx.predicted = ctx.predicted, None  # used once: a second backward computes it again
        if inplace:
            _check_single(grad_output)
        args = (logits, labels, plan, kept, grad_output, inplace)
        grad = ops.planned_logits_grad(*args, predicted, ctx.prediction)
        if grad is None:
            saved = plan.saved(kept)
            grad = _logits_grad(grad_output, logits, labels, saved, plan.shift, plan.softcap, inplace)
        return once("weighted_loss", grad, logits, grad_output), None, None, None


class _NativeLoss(torch.autograd.Function):
    """`_LogitsLoss` for the C++ backend, whose gradient op takes the saved values unchanged."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, result: ForwardResult, shift: bool, softcap: float, native: ModuleType
    ) -> Tensor:
        ctx.save_for_backward(logits, labels)
        # on ctx, not saved: see `_LogitsLoss`
        ctx.call = result.statistics, result.coeff, result.scale, result.token_visit, shift, softcap
        ctx.native = native
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        check_upstream("weighted_loss", grad_output)
        logits, labels = ctx.saved_tensors
        if not logits.numel():
            return torch.zeros_like(logits), None, None, None, None, None
        if not torch.is_grad_enabled():
            return ctx.native.logits_grad(grad_output, logits, labels, *ctx.call), None, None, None, None, None
        with torch.no_grad():
            grad = ctx.native.logits_grad(grad_output, logits, labels, *ctx.call)
        return once("weighted_loss", grad, logits, grad_output), None, None, None, None, None


apply_native = super(torch.autograd.Function, _NativeLoss).apply  # as the next
apply_planned = super(torch.autograd.Function, _PlannedLoss).apply  # see `apply_loss`; torch.func is not at work here


def _logits_grad(
    grad_output: Tensor,
    logits: Tensor,
    labels: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    shift: bool,
    softcap: float,
    inplace: bool,
) -> Tensor:
    if not logits.numel():
        return torch.zeros_like(logits)
    with torch.no_grad():
        args = (grad_output, *batch_of(logits, labels), *saved, shift, softcap)
        if inplace:
            _check_single(grad_output)
            ops.logits_grad_(*args)
            return logits
        return ops.logits_grad(*args).view(logits.shape)


def batch_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, V) and (B, S), S = 1 where each row is one visit."""
    return (logits, labels) if logits.dim() == 3 else (logits.unsqueeze(1), labels.unsqueeze(1))


def apply_loss(*args: Any) -> Tensor:
    """`_LogitsLoss.apply(*args)` without inspecting the signature for torch.func, half of a call's CPU overhead."""
    if torch.compiler.is_compiling() or torch_private.transformed():
        return _LogitsLoss.apply(*args)
    return super(torch.autograd.Function, _LogitsLoss).apply(*args)


def _check_single(grad_output: Tensor) -> None:
    if torch_private.batched(grad_output):
        raise NotImplementedError(
            "inplace=True writes one gradient over the logits, so it takes neither several gradients at once "
            "(is_grads_batched, jacrev) nor the transforms of torch.func; leave inplace=False"
        )
