"""`weighted_linear_loss`: head and weighted loss in one; only rows of nonzero weight enter the gradient GEMMs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from geko_kernels import ops, torch_private
from geko_kernels.host_copy import HostCopy
from geko_kernels.losses.arguments import (
    REDUCTIONS,
    LinearOptions,
    ReductionName,
    check_batch,
    check_head,
    check_switches,
    check_values,
    chunk_budget,
    debugging,
    num_items_tensor,
)
from geko_kernels.losses.derivatives import check_transforms, check_upstream, link, once
from geko_kernels.losses.linear_blocks import add_blocks
from geko_kernels.losses.linear_call import Call, Gradients, autocast_hidden
from geko_kernels.losses.linear_chunks import Chunks, Scored
from geko_kernels.losses.linear_gradients import HeadGradients
from geko_kernels.losses.linear_head import Budget, Head, LabelBatch, make_head
from geko_kernels.losses.results import ForwardResult, SampleStats
from geko_kernels.losses.weights import prepare_weights
from geko_kernels.reference.ops import Reduction
from geko_kernels.reference.visits import real_dtype
from geko_kernels.state import SampleState


class _LinearLoss(torch.autograd.Function):
    """Gradients are made in the forward, where the logits are, and scaled by the upstream gradient in the backward.

    With one upstream gradient a visit ("none") they are made in the backward, from logits computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, seen: list[ForwardResult]
    ) -> Tensor:
        head = make_head(hidden, weight, bias)
        ctx.call, ctx.gradients, ctx.link = call, None, link(hidden, weight, bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        if call.reduction == Reduction.NONE:
            ctx.save_for_backward(hidden, weight, bias, call.batch.labels)
            result = call.score(head, None)
            ctx.saved = result.statistics, result.coeff, result.token_visit  # those of the forward that was counted
        elif ops.recomputing():  # what runs is the backward of the first forward
            result = call.score(head, None)
        elif at_once := call.at_once(head, ctx.needs_input_grad[:3]):
            result, ctx.gradients = at_once
        else:
            gradients = HeadGradients(head.hidden, head.weight, *_needed(ctx, weight, bias))
            result = call.score(head, gradients)
            ctx.gradients = _unpadded(gradients, head)
        seen.append(result)
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        check_upstream("weighted_linear_loss", grad_output)
        if torch_private.batched(grad_output):
            raise NotImplementedError(
                "weighted_linear_loss makes one gradient at a time, and several are asked for at once "
                "(is_grads_batched); call torch.autograd.grad for each, or use weighted_loss of the logits"
            )
        with torch.no_grad():
            by_visit = ctx.call.reduction == Reduction.NONE
            found = _gradients_by_visit(ctx, grad_output) if by_visit else _rescaled(ctx, grad_output)
            gradients = [
                grad if grad is None or grad.dtype == dtype else grad.to(dtype)
                for grad, dtype in zip(found, ctx.dtypes, strict=True)
            ]
        sources = ctx.link, grad_output
        return (
            *(None if grad is None else once("weighted_linear_loss", grad, *sources) for grad in gradients),
            None,
            None,
        )


_apply = super(torch.autograd.Function, _LinearLoss).apply  # without inspecting torch.func, which is refused


def _rescaled(ctx: Any, grad_output: Tensor) -> Gradients:
    """The forward's gradients times the upstream gradient, in place unless the graph is kept."""
    if ctx.gradients is None:
        raise RuntimeError("weighted_linear_loss: a second backward needs retain_graph=True at the first")
    if torch_private.keeps_graph():
        hidden, weight, bias = (grad * grad_output if grad is not None else None for grad in ctx.gradients)
        return hidden, weight, bias
    gradients, ctx.gradients = ctx.gradients, None
    if grad_output.device.type == "cpu" and grad_output.item() == 1:
        return gradients
    for grad in gradients:
        if grad is not None:
            ops.direct.rescale_(grad, grad_output)
    return gradients


def _gradients_by_visit(ctx: Any, grad_output: Tensor) -> Gradients:
    hidden, weight, bias, labels = ctx.saved_tensors
    statistics, coeff, token_visit = ctx.saved
    batch = replace(ctx.call.batch, labels=labels)
    head = make_head(hidden, weight, bias)
    upstream = grad_output.to(coeff.dtype)
    if batch.sample_ids is not None and batch.sample_ids.dim() == 2:
        upstream = upstream[token_visit.long()]
    else:
        upstream = upstream[:, None].expand(batch.labels.shape).flatten()
    coeff = torch.where(coeff != 0, coeff * upstream, 0)
    gradients = HeadGradients(head.hidden, head.weight, *_needed(ctx, weight, bias))
    every = torch.arange(len(coeff), device=coeff.device)
    positions, sources = torch.empty_like(every), torch.empty_like(every)
    kept = int(HostCopy(ops.direct.kept_rows_(coeff, every, positions, sources, 0, 0, len(every))).wait())
    positions = positions[:kept]
    budget = Budget(head, ctx.call.chunk_mib, *gradients.wanted)
    if budget.by_blocks(kept):
        add_blocks(head, batch, gradients, statistics, positions, coeff, budget.columns(kept))
    else:
        chunks = Chunks(head, batch, budget, gradients)
        chunks.hold(budget.rows(kept))
        chunks.add_rows(statistics, positions, coeff, coeff)
    return _unpadded(gradients, head)


def _needed(ctx: Any, weight: Tensor, bias: Tensor | None) -> tuple[bool, torch.dtype | None, torch.dtype | None]:
    """Whether hidden needs a gradient, and the gradient dtypes of weight and bias, None for one that needs none."""
    hidden_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
    return (
        hidden_needed,
        weight.dtype if weight_needed else None,
        bias.dtype if bias is not None and bias_needed else None,
    )


def _unpadded(gradients: HeadGradients, head: Head) -> Gradients:
    hidden_grad, weight_grad, bias_grad = gradients.finish()
    if head.weight.shape[0] == head.vocab:
        return hidden_grad, weight_grad, bias_grad
    return (
        hidden_grad,
        weight_grad[: head.vocab] if weight_grad is not None else None,
        bias_grad[: head.vocab] if bias_grad is not None else None,
    )


@overload
def weighted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def weighted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: Literal[True],
    return_entropy: Literal[False] = ...,
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, SampleStats]: ...


@overload
def weighted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: Literal[False] = ...,
    return_entropy: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def weighted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: Literal[True],
    return_entropy: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, SampleStats, Tensor]: ...


@overload
def weighted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: bool = ...,
    return_entropy: bool = ...,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, SampleStats] | tuple[Tensor, Tensor] | tuple[Tensor, SampleStats, Tensor]: ...


@torch_private.leave_out_of_compile
def weighted_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = None,
    state: SampleState | None = None,
    *,
    bias: Tensor | None = None,
    reduction: ReductionName = "mean",
    shift: bool = False,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    update: bool | None = None,
    return_stats: bool = False,
    return_entropy: bool = False,
    chunk_mib: int | float | None = None,
) -> Tensor | tuple[Any, ...]:
    """`weighted_loss(F.linear(hidden, weight, bias), ...)` without ever holding all logits.

    Tokens whose label is ignored enter no GEMM, and rows whose weight is 0 enter no gradient GEMM. If a share p of the
    rows is kept, the three GEMMs cost `(1 + 2 p) / 3` of their full cost. (Few rows of weight 0 may enter as zeros,
    where leaving them out costs more: up to a quarter on a CPU with up to 16 MiB of logits; on a GPU a twentieth, if
    the budget takes several fills.) The gradient of a frozen `weight` or `hidden` costs nothing. dW is summed in
    float32. `reduction="none"` costs one more GEMM of the kept rows, because its gradients are computed in the
    backward.

    Args:
        hidden: (B, S, H), or (B, H) where each row is one visit; float32, bfloat16, float16 or float64.
        weight: (V, H), of the dtype of `hidden`; under autocast, `weight` and `bias` are cast to autocast's dtype.
        bias: (V,) or None.
        chunk_mib: the most memory in MiB for logits and their gradients at a time. Default: 2048 if all of them fit,
            else 1024. dX and dW come on top; if dW has 2 bytes an element and not all rows fit at once, so does as much
            again as dW. Where fewer than 512 rows fit, the logits may be computed twice, which takes no such sum and
            costs a fourth GEMM. On a GPU a V not divisible by 8 takes a padded copy of the weight. In float16, dX and
            dW are held in float32 until the backward: before the upstream gradient multiplies them, float16's range is
            too small.
        labels, sample_ids, state, reduction, shift, ignore_index, num_items, softcap, token_weights, sample_weights,
            update, return_stats: as in `weighted_loss`. A sample weight of 0 gives rows of weight 0.
        return_entropy: also return each token's entropy, `-(p * p.log()).sum(-1)` with `p = softmax(logits)`, in nats:
            float32 (float64 for float64), of the labels' shape, without gradient; 0 where a token predicts nothing
            or its label does not count.

    Returns: as `weighted_loss`, with the entropy last if asked for: (loss, entropy) or (loss, stats, entropy). The
        host has to learn how many rows are kept, so `torch.compile` breaks the graph here, and a CUDA graph cannot
        capture it.

    Raises: as `weighted_loss`; RuntimeError while a CUDA graph is being captured.

    Limits: gradients come from `backward` and `torch.autograd.grad` alone. A second derivative, forward mode, every
        transform of `torch.func`, `torch.jit.trace`, `is_grads_batched`, meta tensors and fake tensors raise
        NotImplementedError.
        Gradients are ordinary tensors, also to `resize_`.
    """
    check_transforms("weighted_linear_loss", hidden, weight, bias, token_weights, sample_weights)
    ignore_index, cap = check_batch("hidden", hidden, labels, sample_ids, state, reduction, ignore_index, softcap)
    switches = {"return_stats": return_stats, "return_entropy": return_entropy}
    check_switches("hidden", hidden, shift=shift, update=update, **switches)
    check_head(hidden, weight, bias)
    budget = chunk_budget(chunk_mib)
    device = hidden.device
    hidden = autocast_hidden(hidden, weight, bias)
    if token_weights is not None or sample_weights is not None:
        look = device.type == "cpu" or debugging()
        labels, token_weights, sample_weights = prepare_weights(
            labels, sample_ids, ignore_index, real_dtype(hidden), token_weights, sample_weights, look
        )
    labels_2d = labels if labels.dim() == 2 else labels.unsqueeze(1)
    native = ops.native(hidden)

    def raise_bad_values() -> None:
        check_values(labels_2d, sample_ids, state, weight.shape[0], ignore_index, shift)

    if device.type == "cpu" and native is None:
        raise_bad_values()
    batch = LabelBatch(labels_2d, sample_ids, ignore_index, shift, cap, token_weights, sample_weights)
    call = Call(
        batch=batch,
        scored=Scored(batch, weight.shape[0]),
        state=state,
        num_items=num_items_tensor(num_items, reduction, device, eager=True),
        reduction=REDUCTIONS[reduction],
        writes=state is not None and ops.counts(update),
        stats=return_stats,
        chunk_mib=budget,
        native=native,
        entropy=hidden.new_zeros(labels.numel(), dtype=real_dtype(hidden)) if return_entropy else None,
    )
    flat = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    try:
        loss, result = _run(flat, weight, bias, call)
    except RuntimeError:
        if native is not None:
            raise_bad_values()
        raise
    asked = (result.stats(),) if return_stats else ()
    if call.entropy is not None:
        asked = (*asked, call.entropy.view(labels.shape))
    return (loss, *asked) if asked else loss


def _run(flat: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, ForwardResult]:
    kind, seen = flat.device.type, list[ForwardResult]()
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (flat, weight, bias)):
            loss = _apply(flat, weight, bias, call, seen)
        else:
            with torch.no_grad():
                seen.append(call.score(make_head(flat, weight, bias), None))
            loss = seen[0].loss
    return loss, seen[0]
