"""The forward of the logits path in two launches: token statistics (with visit preparation), sample update."""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels import reference
from geko_kernels.kernels.sample_update import launch_sample_update
from geko_kernels.kernels.token_stats import launch_statistics
from geko_kernels.kernels.visit_prep import empty_scratch


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
    packed = sample_ids is not None and sample_ids.dim() == 2
    tokens = torch.empty((5, labels.numel()), dtype=torch.float32, device=logits.device)
    scratch = empty_scratch(labels, packed)
    prepared = (q_value, loss_history, times_seen, bucket, claim, error)
    ids = None if sample_ids is None else (sample_ids.stride(), sample_ids.data_ptr() % 16)
    # all that the two binaries and grids depend on; what is allocated here or in SampleState is aligned
    key = (
        *(logits.shape, logits.stride(), logits.dtype, logits.get_device(), logits.data_ptr() % 16),
        *(labels.stride(), labels.data_ptr() % 16, ids),
        *(-1 if q_value is None else q_value.shape[0], error is None, num_items is None or num_items.data_ptr() % 16),
        *(reduction, ignore_index, shift, softcap != 0, update),
    )
    launch_statistics(logits, labels, sample_ids, tokens, prepared, scratch, ignore_index, shift, softcap, update, key)
    rest = (scratch, logits.shape[-1], reduction, ignore_index, shift, update, key)
    return *launch_sample_update(tokens, labels, sample_ids, rules, weights, num_items, columns, *rest), tokens
