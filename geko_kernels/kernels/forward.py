"""The forward of the logits path in two launches: token statistics (with visit preparation), sample update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geko_kernels import reference
from geko_kernels.kernels.plan import Columns, Plan, plan_of
from geko_kernels.kernels.sample_update import empty_outputs
from geko_kernels.kernels.visit_prep import scratch_words


def loss_forward_(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    q_value: Tensor | None,
    confidence: Tensor | None,
    loss_history: Tensor | None,
    times_seen: Tensor | None,
    bucket: Tensor | None,
    wrong_streak: Tensor | None,
    changed: Tensor | None,
    claim: Tensor | None,
    quarantined: Tensor | None,
    error: Tensor | None,
    reduction: int,
    ignore_index: int,
    shift: bool,
    softcap: float,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.loss_forward_`. Allocates its outputs and one scratch tensor; waits for nothing."""
    columns = (q_value, confidence, loss_history, times_seen, bucket, wrong_streak, changed, claim, quarantined)
    if not labels.numel():
        return reference.loss_forward_(
            *(logits, labels, sample_ids, rules, weights, num_items, *columns, error),
            *(reduction, ignore_index, shift, softcap, update),
        )
    plan = plan_of(
        *(logits, labels, sample_ids, num_items, (*columns, error)),
        *(reduction, ignore_index, shift, softcap, update),
    )
    tokens = torch.empty((5, plan.count), dtype=torch.float32, device=logits.device)
    scratch = torch.empty(scratch_words(labels, plan.packed), dtype=torch.int32, device=logits.device)
    outputs = empty_outputs(labels, plan.packed, reduction)
    prepared = (q_value, loss_history, times_seen, bucket, claim, error)
    plan.statistics(logits, labels, sample_ids, tokens, *prepared, scratch)
    plan.update(tokens, labels, sample_ids, rules, weights, num_items, *columns, scratch, *outputs)
    return *outputs, tokens


def planned_loss_forward(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Columns,
    stats: bool,
    *options: Any,
) -> tuple[Tensor, Plan, Tensor, Tensor | None]:
    """`loss_forward_` with its outputs in two or three pieces of memory; logits also (B, V).

    Args: columns (..., quarantined, error); options (reduction, ignore_index, shift, softcap, update).
    Returns: the loss; the plan; kept and, with `stats`, visits: the op's other outputs as `plan.saved` and
        `plan.entries_of` see them.
    """
    plan = plan_of(logits, labels, sample_ids, num_items, columns, *options)
    apart = stats or plan.packed  # packed there are as many entries as tokens: too many to keep for nothing
    loss, kept, visits = plan.forward(logits, labels, sample_ids, rules, weights, num_items, columns, apart)
    return loss, plan, kept, visits


def planned_logits_grad(
    logits: Tensor, labels: Tensor, plan: Plan, kept: Tensor, grad_output: Tensor, inplace: bool
) -> Tensor:
    """`logits_grad` or `logits_grad_` of a forward that left `kept`, in the shape of the logits."""
    out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    plan.gradient(out, kept, grad_output, logits, labels, inplace)
    return out
