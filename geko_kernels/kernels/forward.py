"""The forward of the logits path in two launches: token statistics (with visit preparation), sample update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geko_kernels.columns import num_samples_of
from geko_kernels.kernels.memory import room_apart
from geko_kernels.kernels.one_pass.plan import PredictedPlan, predicted_plan
from geko_kernels.kernels.plan import Plan, plan_of
from geko_kernels.kernels.table import pointers, prepared_of
from geko_kernels.reference import ops as reference
from geko_kernels.zero_share import ZeroShare


def loss_forward_(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    reduction: int,
    ignore_index: int,
    shift: bool,
    softcap: float,
    update: bool,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.loss_forward_`. Allocates its outputs and one scratch tensor; does not wait for the device."""
    options = (reduction, ignore_index, shift, softcap, update)
    if not labels.numel():
        first = (logits, labels, sample_ids, rules, weights, num_items)
        return reference.loss_forward_(*first, columns, error, *options, token_weights, sample_weights)
    weighing = (token_weights, sample_weights)
    aligned = tuple(None if given is None else given.data_ptr() % 16 for given in weighing)
    plan = plan_of(logits, labels, sample_ids, num_items, columns, error, *options, aligned)
    statistics = torch.empty((5, plan.count), dtype=torch.float32, device=logits.device)
    outputs, scratch = room_apart(labels, plan.packed, reduction)
    table = pointers(columns)
    plan.statistics_launch(logits, labels, sample_ids, statistics, *prepared_of(table), error, scratch)
    plan.update_launch(statistics, labels, sample_ids, rules, weights, num_items, *table, *weighing, scratch, *outputs)
    return *outputs, statistics


def planned_loss_forward(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    stats: bool,
    foresight: tuple[Tensor, ZeroShare | None] | None,
    inplace: bool,
    *options: Any,
) -> tuple[Tensor, Plan, Tensor, Tensor | None, Tensor | None]:
    """`loss_forward_` with its outputs in two or three pieces of memory; logits also (B, V).

    Args: foresight: if the gradient may be predicted (over the logits if `inplace`), the last backward's upstream
        gradient () and, with a state, the share by which a call with a prediction takes the faster path; else None;
        options (reduction, ignore_index, shift, softcap, update).
    Returns: the loss; the plan; kept and, with `stats`, visits: memory that holds the op's other outputs, see
        `plan.saved` and `plan.entries_of`; the predicted gradient, which `predicted_logits_grad` corrects, or None.
    """
    plan = plan_of(logits, labels, sample_ids, num_items, columns, error, *options)
    predicted = looking = grad = None
    if foresight is not None:
        upstream, share = foresight
        predicted = _predicting(plan, inplace, logits, labels, sample_ids, columns, options)
        if predicted is not None and share is not None:
            looking = share if share.due(logits.device) else None
            predicted = None if share.three_passes else predicted
    apart = stats or plan.packed  # packed, there is an entry for each token: too many to keep unused
    args = (logits, labels, sample_ids, rules, weights, num_items, columns, error, apart)
    if predicted is None:
        loss, kept, visits = plan.forward(*args)
    else:
        plan = predicted
        grad = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        loss, kept, visits = predicted.forward(*args, grad, upstream)
    if looking is not None:
        rest = kept[plan.kept_words :] if visits is None else visits
        looking.look(rest[: plan.flags], plan.zero_tokens)
    return loss, plan, kept, visits, grad


def _predicting(
    plan: Plan,
    inplace: bool,
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    columns: Sequence[Tensor],
    options: tuple[Any, ...],
) -> PredictedPlan | None:
    """The plan that predicts the gradient for calls of `plan`, if there is one."""
    if inplace not in plan.predicting:
        batch = (logits[:, None], labels[:, None]) if logits.dim() == 2 else (logits, labels)
        plan.predicting[inplace] = predicted_plan(
            inplace, plan.layout, *batch, sample_ids, num_samples_of(columns), *options
        )
    return plan.predicting[inplace]


def planned_logits_grad(
    logits: Tensor, labels: Tensor, plan: Plan, kept: Tensor, grad_output: Tensor, inplace: bool
) -> Tensor:
    """`logits_grad` or `logits_grad_` of a forward that left `kept`, in the shape of the logits."""
    out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    plan.gradient(out, kept, grad_output, logits, labels, inplace)
    return out


def predicted_logits_grad(
    logits: Tensor,
    labels: Tensor,
    plan: PredictedPlan,
    kept: Tensor,
    grad_output: Tensor,
    predicted: Tensor,
    upstream: Tensor,
    counts: Tensor,
) -> Tensor:
    """The same after a forward that left `predicted`: corrects it in place, see `reference.one_pass.correct_rows_`."""
    plan.correct(predicted, kept, grad_output, logits, labels, upstream, counts)
    return predicted
