"""`weighted_loss`: cross-entropy weighted by what each sample still has to teach."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from geko_kernels import ops, torch_private
from geko_kernels.config import GEKOConfig
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
from geko_kernels.losses.derivatives import check_transforms, check_upstream, once
from geko_kernels.losses.weights import prepare_weights
from geko_kernels.state import NO_ERROR, SampleState, rules_tensor


class SampleStats(NamedTuple):
    """What one call saw, one entry a visit in order of position; unused entries have sample_ids -1, 0 tokens, loss 0.

    M = B with one id a row; with one id a token M = B * S, used entries first.
    """

    sample_ids: Tensor  # (M,) int64
    num_tokens: Tensor  # (M,) int64: valid tokens, those of token weight 0 not among them
    loss: Tensor  # (M,) float32: mean over valid tokens, nats, before weighting; by token_weights, as the next two
    confidence: Tensor  # (M,) float32: mean of max(softmax)
    accuracy: Tensor  # (M,) float32: share of tokens whose label has the largest logit
    correct: Tensor  # (M,) bool
    quality: Tensor  # (M,) float32
    q_value: Tensor  # (M,) float32
    bucket: Tensor  # (M,) uint8, a Bucket
    weight: Tensor  # (M,) float32: the bucket's times the sample's; 0 where the visit has no valid token


class ForwardResult(NamedTuple):
    """What the forward op returned: what the backward and `SampleStats` are made of. See `reference.sample_update_`."""

    loss: Tensor
    scale: Tensor
    coeff: Tensor
    token_visit: Tensor
    floats: Tensor
    ints: Tensor
    flags: Tensor
    statistics: Tensor

    def stats(self) -> SampleStats:
        return _stats_of(self.floats, self.ints, self.flags)


def _stats_of(floats: Tensor, ints: Tensor, flags: Tensor) -> SampleStats:
    loss, confidence, accuracy, quality, q_value, weight = floats.unbind()
    sample_ids, num_tokens = ints.unbind()
    bucket, correct = flags.unbind()
    return SampleStats(
        sample_ids, num_tokens, loss, confidence, accuracy, correct.bool(), quality, q_value, bucket, weight
    )


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
    """`_LogitsLoss` of a call past the dispatcher, where nothing asks for `setup_context`, which costs two calls."""

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
        predicted, ctx.predicted = ctx.predicted, None  # given away: a second backward computes anew
        if inplace:
            _check_single(grad_output)
        args = (logits, labels, plan, kept, grad_output, inplace)
        grad = ops.planned_logits_grad(*args, predicted, ctx.prediction)
        if grad is None:
            saved = plan.saved(kept)
            grad = _logits_grad(grad_output, logits, labels, saved, plan.shift, plan.softcap, inplace)
        return once("weighted_loss", grad, logits, grad_output), None, None, None


class _NativeLoss(torch.autograd.Function):
    """`_LogitsLoss` on the C++ backend, whose gradient op takes what is saved as it is."""

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


_apply_native = super(torch.autograd.Function, _NativeLoss).apply  # as the next
_apply_planned = super(torch.autograd.Function, _PlannedLoss).apply  # see `_apply`; torch.func is not at work here


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
        args = (grad_output, *_batch_of(logits, labels), *saved, shift, softcap)
        if inplace:
            _check_single(grad_output)
            ops.logits_grad_(*args)
            return logits
        return ops.logits_grad(*args).view(logits.shape)


def _batch_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, V) and (B, S), S = 1 where each row is one visit."""
    return (logits, labels) if logits.dim() == 3 else (logits.unsqueeze(1), labels.unsqueeze(1))


def _apply(*args: Any) -> Tensor:
    """`_LogitsLoss.apply(*args)`, without its look at the signature for torch.func, half of a call's host time."""
    if torch.compiler.is_compiling() or torch_private.transformed():
        return _LogitsLoss.apply(*args)
    return super(torch.autograd.Function, _LogitsLoss).apply(*args)


def _check_single(grad_output: Tensor) -> None:
    if torch_private.batched(grad_output):
        raise NotImplementedError(
            "inplace=True has room for one gradient, where the logits are, neither for several at once "
            "(is_grads_batched, jacrev) nor for the transforms of torch.func; leave inplace=False"
        )


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
            The classes are last: `F.cross_entropy`'s (B, C, S) needs `.transpose(1, 2)`, which only you can know
            where S == C.
        labels: (B, S) or (B,) int64 class indices.
        sample_ids: int64, (B,): one sample a row; or (B, S): one id a token, each run of one id in a row is a visit,
            -1 is padding. None (without a state): every row is a visit.
        state: the learning state to read and update; None gives the plain loss, weight 1 for all.
        reduction: "mean", "token_mean", "sum" or "none".
        shift: causal-LM labels: position t predicts `labels[:, t + 1]`; the last position of a visit predicts nothing.
        ignore_index: label of tokens that do not count.
        num_items: the divisor of "mean" (visits) or "token_mean" (tokens) where the batch at hand is only a part:
            gradient accumulation, several processes. A finite number above 0, a constant to autograd. Whether a
            tensor on a GPU holds one is not checked, as that would wait: any other value gives an infinite or NaN loss.
        softcap: c means `logits = c * tanh(logits / c)` first.
        token_weights: u, of the labels' shape and beside them (with `shift` label t + 1 brings its own), floating
            point, finite, 0 or more, a constant to autograd. The means over a visit's tokens become
            `sum(u * l) / sum(u)`, in the loss and in the state; "token_mean" is `sum(w_i * u * l[t]) / num_items`, by
            default over the sum of u of the valid tokens, as class weights in `F.cross_entropy`. A token of weight 0
            counts for nothing, as if its label were ignore_index.
        sample_weights: v, (B,), or of the shape of one id a token, of which a visit's first token counts; else as
            token_weights. The weight of a visit is `w_i * v`; N, num_items and the state do not see v.
            On a GPU and in compiled code nobody looks at the values of both, as that would wait: one that is negative,
            infinite or NaN makes the loss NaN (with GEKO_DEBUG=1 an eager call raises there, too).
        update: whether the visits count in the state. None: where gradients are enabled. True: always, so also in a
            probe under `torch.no_grad` or `torch.inference_mode`. False: never. A repeat by activation checkpointing
            does not count again (around a compiled loss, reentrant checkpointing needs None).
        return_stats: also return `SampleStats`.
        inplace: let the gradient be written over the logits, in the backward or already in this call; nothing else may
            need them from now on. Compiled code does not use this.

    Returns:
        The loss, float32: () or, for "none", one entry a visit; with `return_stats` a pair (loss, stats).
        A batch without valid token or weight gives 0 with zero gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name; on the CPU also a
            token or sample weight that is no finite number of 0 or more.
        IndexError: on the CPU, a label outside [0, V) or an id outside the table. On a GPU such a visit is left out
            and `state.check()` raises (at once with GEKO_DEBUG=1).
        NotImplementedError: a derivative that there is not, see the limits.

    Limits: there is a first derivative in reverse mode: `backward`, `is_grads_batched`, `torch.func.grad`, `vjp` and
        `jacrev`. A second one, forward mode (`jvp`, `jacfwd`), `torch.vmap` and `functionalize` over the call raise. On
        the meta device and with fake tensors there are shapes only, and no value is checked. Gradients are ordinary
        tensors, also to `resize_`, but with `inplace` they are the logits' own memory, and not for `torch.func`.

    Source: the GEKO document's weighted loss; see `reference/ops.py` for every op in plain PyTorch.
    """
    eager = not torch.compiler.is_compiling() and not torch_private.is_fake(labels)
    if eager:
        check_transforms("weighted_loss", logits, token_weights, sample_weights)
    ignore_index, cap = check_batch("logits", logits, labels, sample_ids, state, reduction, ignore_index, softcap)
    check_switches("logits", logits, shift=shift, update=update, return_stats=return_stats, inplace=inplace)
    code = REDUCTIONS[reduction]
    if inplace and eager:
        check_inplace(logits)
    items = num_items_tensor(num_items, reduction, logits.device, eager)
    weighted = token_weights is not None or sample_weights is not None
    if weighted:
        look = eager and (logits.device.type == "cpu" or debugging())
        real = torch.float64 if logits.dtype == torch.float64 else torch.float32
        labels, token_weights, sample_weights = prepare_weights(
            labels, sample_ids, ignore_index, real, token_weights, sample_weights, look
        )
    native = ops.native(logits) if eager else None
    if eager and logits.device.type == "cpu" and native is None:
        check_values(_batch_of(logits, labels)[1], sample_ids, state, logits.shape[-1], ignore_index, shift)
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
            check_values(_batch_of(logits, labels)[1], sample_ids, state, logits.shape[-1], ignore_index, shift)
            raise
        result = ForwardResult._make(outcome)
        check_flag(error, state, logits.shape[-1])
        if not differentiable:
            loss = result.loss
        elif inplace or torch_private.transformed():
            loss = _apply(logits, labels, result, shift, cap, inplace)
        else:
            loss = _apply_native(logits, labels, result, shift, cap, native)
        return (loss, result.stats()) if return_stats else loss
    prediction = prediction_of(state, logits.device) if differentiable and eager else None
    planned = None
    if not weighted:
        foresight = (prediction and prediction[0], inplace)
        rest = (*options, writes)
        planned = ops.planned_loss_forward(logits, labels, sample_ids, *table, return_stats, *foresight, *rest)
    if planned is None:
        batch = _batch_of(logits.detach(), labels)
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
            loss = _apply(logits, labels, result, shift, cap, overwrite)
        else:
            loss = _apply_planned(logits, labels, (*planned, prediction), inplace)
    if not return_stats:
        return loss
    return loss, result.stats() if planned is None else _stats_of(*plan.entries_of(entries))


def state_arguments(
    state: SampleState | None, device: torch.device, eager: bool
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """Rules, weights, columns and error flag of `state` as `sample_update_` takes them."""
    if state is None:
        error = torch.full((), NO_ERROR, device=device) if eager and debugging() else None
        return *_plain_rules(device, eager), [], error
    return state.rules, state.weights, state.columns, state.error


def prediction_of(state: SampleState | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(upstream, predictions) of `state`, or those that all calls without a state share on `device`."""
    if state is not None:
        return state.upstream, state.predictions
    pair = _plain_prediction.get(device)
    if pair is None:
        pair = torch.ones((), device=device), torch.zeros(2, dtype=torch.int64, device=device)
        if not torch_private.transformed():  # it wraps what is made within
            _plain_prediction[device] = pair
    return pair


_plain_prediction: dict[torch.device, tuple[Tensor, Tensor]] = {}
_plain: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _plain_rules(device: torch.device, eager: bool) -> tuple[Tensor, Tensor]:
    """The default rules and weights 1, made once a device: a copy from the host would wait for it."""
    if eager and device in _plain:
        return _plain[device]
    pair = rules_tensor(GEKOConfig(), device), torch.ones(4, device=device)
    if eager and not torch_private.transformed():
        _plain[device] = pair
    return pair
