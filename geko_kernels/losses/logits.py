"""`weighted_loss`: cross-entropy weighted by what each sample still has to teach."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from geko_kernels import ops, torch_private
from geko_kernels.losses.arguments import (
    REDUCTIONS,
    LossOptions,
    ReductionName,
    check_batch,
    check_flag,
    check_inplace,
    check_switches,
    check_values,
    debugging,
    num_items_tensor,
)
from geko_kernels.losses.derivatives import check_transforms
from geko_kernels.losses.logits_autograd import apply_loss, apply_native, apply_planned, batch_of
from geko_kernels.losses.results import ForwardResult, SampleStats, stats_of
from geko_kernels.losses.state_arguments import prediction_of, state_arguments
from geko_kernels.losses.weights import prepare_weights
from geko_kernels.reference.visits import real_dtype
from geko_kernels.state import SampleState


@overload
def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: Literal[False] = ...,
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: Literal[True],
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, SampleStats]: ...


@overload
def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = ...,
    state: SampleState | None = ...,
    *,
    return_stats: bool,
    inplace: bool = ...,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, SampleStats]: ...


def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = None,
    state: SampleState | None = None,
    *,
    reduction: ReductionName = "mean",
    shift: bool = False,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    update: bool | None = None,
    return_stats: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, SampleStats]:
    """Cross-entropy of each sample times the weight of its bucket; updates `state` as a side effect.

    With `l = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(B, S)`, `l_i` the
    mean of `l` over the valid tokens of visit i and `w_i` the weight of its bucket after this visit:

    - "mean": `sum(w_i * l_i) / N`, N the visits with a valid token;
    - "token_mean": `sum(w_i * l[t]) / num_items` over tokens; with all weights 1 this is `F.cross_entropy`;
    - "sum": `sum(w_i * l_i)`;  "none": `w_i * l_i`, one entry a visit.

    Args:
        logits: (B, S, V), or (B, V) where each row is one visit; float32, bfloat16, float16 or float64, any strides.
            The classes come last: `F.cross_entropy`'s (B, C, S) needs `.transpose(1, 2)`. If S == C, no check can
            notice a missing transpose.
        labels: (B, S) or (B,) int64 class indices.
        sample_ids: int64, (B,): one sample a row; or (B, S): one id a token, each run of one id in a row is a visit,
            -1 is padding. None (without a state): every row is a visit.
        state: the learning state to read and update; None gives the plain loss, weight 1 for all.
        reduction: "mean", "token_mean", "sum" or "none".
        shift: causal-LM labels: position t predicts `labels[:, t + 1]`; the last position of a visit predicts nothing.
        ignore_index: label of tokens that do not count.
        num_items: the divisor of "mean" (visits) or "token_mean" (tokens), for a batch that is a part of a step
            (gradient accumulation, several processes). A finite number above 0, a constant to autograd. The value of a
            tensor on a GPU is not checked, as that would wait for the GPU: a bad one gives an infinite or NaN loss.
        softcap: c means `logits = c * tanh(logits / c)` first.
        token_weights: u, one a label (with `shift`, label t + 1 brings its own): floating point, finite, 0 or more, a
            constant to autograd. The means over a visit's tokens become `sum(u * l) / sum(u)`, in the loss and in the
            state. "token_mean" is `sum(w_i * u * l[t]) / num_items`, where num_items defaults to the sum of u over the
            valid tokens, as with class weights in `F.cross_entropy`. A token of weight 0 counts for nothing, as if its
            label were ignore_index.
        sample_weights: v, (B,); with one id a token also (B, S), where the value at a visit's first token counts;
            otherwise as token_weights. The weight of a visit is `w_i * v`; N, num_items and the state do not see v.
            On a GPU and in compiled code the values of neither weights are checked, as that would wait for the GPU: a
            negative, infinite or NaN one makes the loss NaN (with GEKO_DEBUG=1 an eager call raises there, too).
        update: whether the visits count in the state. None: where gradients are enabled. True: always, so also in a
            probe under `torch.no_grad` or `torch.inference_mode`. False: never. A repeat by activation checkpointing
            does not count again (around a compiled loss, reentrant checkpointing needs None).
        return_stats: also return `SampleStats`.
        inplace: allow the gradient to be written over the logits, in the backward or already in this call; nothing
            else may use them afterwards. Compiled code ignores this.

    Returns:
        The loss, float32: () or, for "none", one entry a visit; with `return_stats` a pair (loss, stats).
        A batch with no valid token, or with all weights 0, gives 0 and zero gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name; on the CPU also a
            token or sample weight that is negative or not finite.
        IndexError: on the CPU, a label outside [0, V) or an id outside the table. On a GPU and in compiled code such a
            visit is left out, and `state.check()` raises (eagerly with GEKO_DEBUG=1 at once); without a state nothing
            tells.
        NotImplementedError: a derivative that does not exist, see the limits.

    Limits: the first derivative in reverse mode exists: `backward`, `is_grads_batched`, `torch.func.grad`, `vjp` and
        `jacrev`. A second derivative, forward mode (`jvp`, `jacfwd`), `torch.vmap` and `functionalize` over the call
        raise, and so do `torch.func` inside `torch.compile(fullgraph=True)` and `torch.jit.trace` of logits that
        require a gradient. Meta and fake tensors give shapes only,
        and no value is checked. Gradients are ordinary tensors, also to `resize_`; with `inplace` they are the logits'
        own memory, and `torch.func` raises.

    Source: the GEKO document's weighted loss; see `reference/ops.py` for every op in plain PyTorch.
    """
    compiling = torch.compiler.is_compiling()
    eager = not compiling and not torch_private.is_fake(labels)
    if not compiling:
        check_transforms("weighted_loss", logits, token_weights, sample_weights)
    elif torch_private.transformed():  # traced, the gradient would be 0
        raise NotImplementedError(
            "weighted_loss does not run under the transforms of torch.func inside torch.compile(fullgraph=True): leave "
            "fullgraph=True out, or use backward()"
        )
    ignore_index, cap = check_batch("logits", logits, labels, sample_ids, state, reduction, ignore_index, softcap)
    check_switches("logits", logits, shift=shift, update=update, return_stats=return_stats, inplace=inplace)
    code = REDUCTIONS[reduction]
    if inplace and eager:
        check_inplace(logits)
    items = num_items_tensor(num_items, reduction, logits.device, eager)
    weighted = token_weights is not None or sample_weights is not None
    if weighted:
        look = eager and (logits.device.type == "cpu" or debugging())
        labels, token_weights, sample_weights = prepare_weights(
            labels, sample_ids, ignore_index, real_dtype(logits), token_weights, sample_weights, look
        )
    native = ops.native(logits) if eager else None
    if eager and logits.device.type == "cpu" and native is None:
        check_values(batch_of(logits, labels)[1], sample_ids, state, logits.shape[-1], ignore_index, shift)
    rules, weights, columns, error = state_arguments(state, logits.device, eager)
    writes = state is not None and ops.counts(update)
    table = (rules, weights, items, columns, error)
    options = (code, ignore_index, shift, cap)
    differentiable = logits.requires_grad and torch.is_grad_enabled()
    if native is not None:
        call = (logits.detach(), labels, sample_ids, rules, weights, items), options, token_weights, sample_weights
        try:
            outcome = ops.native_update_(native, "loss_forward_", columns, error, return_stats, writes, *call)
        except RuntimeError:
            check_values(batch_of(logits, labels)[1], sample_ids, state, logits.shape[-1], ignore_index, shift)
            raise
        result = ForwardResult._make(outcome)
        check_flag(error, state, logits.shape[-1])
        if not differentiable:
            loss = result.loss
        elif inplace or torch_private.transformed():
            loss = apply_loss(logits, labels, result, shift, cap, inplace)
        else:
            loss = apply_native(logits, labels, result, shift, cap, native)
        return (loss, result.stats()) if return_stats else loss
    prediction = prediction_of(state, logits.device) if differentiable and eager else None
    planned = None
    if not weighted:
        foresight = (prediction and prediction[:2], inplace)
        rest = (*options, writes)
        planned = ops.planned_loss_forward(logits, labels, sample_ids, *table, return_stats, *foresight, *rest)
    if planned is None:
        batch = batch_of(logits.detach(), labels)
        by_weight = token_weights, sample_weights
        result = ForwardResult(*ops.loss_forward_(*batch, sample_ids, *table, *options, writes, *by_weight))
        loss = result.loss
    else:
        loss, plan, _, entries, _ = planned
    if eager:
        check_flag(error, state, logits.shape[-1])
    if differentiable:
        if planned is None:
            overwrite = inplace and not torch.compiler.is_compiling()
            loss = apply_loss(logits, labels, result, shift, cap, overwrite)
        else:
            loss = apply_planned(logits, labels, (*planned, prediction and prediction[::2]), inplace)
    if not return_stats:
        return loss
    return loss, result.stats() if planned is None else stats_of(*plan.entries_of(entries))
