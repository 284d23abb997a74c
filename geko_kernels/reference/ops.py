"""Every op in plain PyTorch: the truth that all kernels are tested against. Runs on any device.

Shapes: B rows, S positions a row, T = B * S tokens, V vocabulary, N samples in the table, and M entries for
visits: M = B with one id a row, M = T with one id a token (front-packed, the rest unused).
All maths is in float32, or float64 for float64 logits.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geko_kernels.columns import num_samples_of, table_of
from geko_kernels.reference.layout import Layout, layout
from geko_kernels.reference.visits import VisitMeans, learn, real_dtype, sum_dtype, visit_means, write_rows_


class Reduction(enum.IntEnum):
    """Codes of `reduction` as the ops take them."""

    NONE = 0
    MEAN = 1
    TOKEN_MEAN = 2
    SUM = 3


def _cap(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def token_stats(
    logits: Tensor, labels: Tensor, sample_ids: Tensor | None, ignore_index: int, shift: bool, softcap: float
) -> Tensor:
    """Per-token loss, maximum, log-sum, confidence and hit.

    Equal to `z = logits.float(); m = z.max(-1); s = (z - m).exp().sum(-1)` and then
    `(s.log() - (z[y] - m), m, s.log(), 1 / s, z[y] == m)`.

    Args: logits (B, S, V), labels (B, S) int64, sample_ids (B,), (B, S) or None.
    Returns: (5, T) float32: all 0 for a token that predicts nothing or has a label outside [0, V).
    """
    where = layout(labels, sample_ids, -1, logits.shape[-1], ignore_index, shift)
    scored = where.scored
    if not logits.shape[-1]:
        return torch.zeros(5, labels.numel(), dtype=real_dtype(logits), device=logits.device)
    z = _cap(logits.flatten(0, 1)[scored].to(real_dtype(logits)), softcap)
    top = z.amax(-1)
    total = (z - top[:, None]).exp().sum(-1)
    at_target = z.gather(1, where.target[scored, None])[:, 0]
    loss = total.log() - (at_target - top)
    hit = (at_target == top) & ~loss.isnan()
    out = torch.zeros(5, labels.numel(), dtype=z.dtype, device=z.device)
    out[:, scored] = torch.stack([loss, top, total.log(), 1 / total, hit.to(z.dtype)])
    return out


def sample_update_(
    statistics: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
    update: bool,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Visit means, learning state, bucket and weight of each visit, and the loss.

    Args: statistics (5, T) from `token_stats`, `tokens` in the schema;
        the columns of `SampleState`, or none (plain loss, weight 1);
        weights (4,) by `Bucket`; num_items () replaces the divisor of mean and token_mean;
        token_weights (B, S) beside the labels, above 0 where those are not ignore_index: the means become weighted;
        sample_weights (B,), or with one id a token (B, S), of which a visit's first counts: multiply its weight.
    Returns:
        loss () or (M,) for NONE;
        scale (): the divisor's inverse;
        coeff (T,): weight / tokens of the visit (weight alone for TOKEN_MEAN), 0 for a token without loss:
            the gradient of a token's loss is `coeff * scale * upstream`; with token_weights u `weight / sum(u) * u`;
        token_visit (T,) int32: entry of each token's visit, -1 for padding; empty with one id a row;
        floats (6, M): loss, confidence, accuracy, quality, q_value, weight;
        ints (2, M) int64: sample id, valid tokens;  flags (2, M) uint8: bucket, correct.
    """
    num_samples, table = num_samples_of(columns), table_of(columns)
    where = layout(labels, sample_ids, num_samples, vocab, ignore_index, shift)
    by_token = None if token_weights is None else (token_weights.roll(-1, 1) if shift else token_weights).flatten()
    visits = visit_means(statistics, where, num_samples, by_token)
    learnt = learn(visits, table, rules)
    weight = torch.ones_like(visits.loss)
    if table:
        weight = weights[learnt.bucket.clamp(max=3)].to(statistics.dtype)
        shut_out = table["quarantined"].view(torch.uint8)[visits.row] != 0  # a damaged file's bytes need not be 0 or 1
        weight = torch.where(visits.in_table & shut_out, 0, weight)
    if sample_weights is not None:
        weight = weight * _per_visit(sample_weights, where)
    weight = torch.where(visits.counted, weight, 0)
    if table and update:
        write_rows_(visits, learnt, table)
    if error is not None:
        error.copy_(torch.minimum(error, where.error))
    value, scale, coeff = _reduce(visits, weight, where, by_token, reduction, num_items)
    means = (visits.loss, visits.confidence, visits.accuracy)
    floats = torch.stack([*means, learnt.quality.to(weight.dtype), learnt.q_value.to(weight.dtype), weight])
    ints = torch.stack([visits.ids, visits.num_tokens])
    flags = torch.stack([learnt.bucket, learnt.correct.long()]).to(torch.uint8)
    packed = sample_ids is not None and sample_ids.dim() == 2
    token_visit = where.visit.int() if packed else torch.empty(0, dtype=torch.int32, device=labels.device)
    return value, scale, coeff, token_visit, floats, ints, flags


def _per_visit(sample_weights: Tensor, where: Layout) -> Tensor:
    """(M,) from (B,), or from (B, S) the value at each visit's first token, 1 for unused entries."""
    if sample_weights.dim() == 1:
        return sample_weights
    first = where.visit >= 0
    first[1:] &= where.visit[1:] != where.visit[:-1]
    by_visit = torch.ones_like(where.ids, dtype=sample_weights.dtype)
    by_visit[where.visit[first]] = sample_weights.flatten()[first]
    return by_visit


def _reduce(
    visits: VisitMeans,
    weight: Tensor,
    where: Layout,
    by_token: Tensor | None,
    reduction: int,
    num_items: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss () or (M,), scale (), coeff (T,)."""
    of_tokens, real = reduction == Reduction.TOKEN_MEAN, weight.dtype
    share = weight if of_tokens else weight / visits.divisor.to(real)
    coeff = share[where.visit] * torch.where(where.valid, 1 if by_token is None else by_token, 0).to(real)
    contribution = torch.where(visits.counted, weight * (visits.loss_sum if of_tokens else visits.loss), 0)
    if reduction in (Reduction.MEAN, Reduction.TOKEN_MEAN):
        items = (visits.items.sum() if of_tokens else visits.counted.sum()) if num_items is None else num_items
        items = items.to(real)
        scale = torch.where(items > 0, 1 / items, 0)
    else:
        items = scale = torch.ones((), dtype=real, device=weight.device)
    if reduction == Reduction.NONE:
        return contribution, scale, coeff
    total = contribution.sum(dtype=sum_dtype(weight.device))
    return torch.where(items > 0, total / items, total * 0).to(real), scale, coeff


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
    """`token_stats`, then `sample_update_`: the forward of the logits path in one op.

    Returns: `sample_update_`'s seven and `statistics` (5, T) last.
    """
    statistics = token_stats(logits, labels, sample_ids, ignore_index, shift, softcap)
    rest = (logits.shape[-1], reduction, ignore_index, shift, update, token_weights, sample_weights)
    return *sample_update_(statistics, labels, sample_ids, rules, weights, num_items, columns, error, *rest), statistics


def logits_grad(
    grad_output: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    coeff: Tensor,
    scale: Tensor,
    token_visit: Tensor,
    shift: bool,
    softcap: float,
) -> Tensor:
    """`g = coeff * scale * upstream; g * (softmax(logits) - onehot(labels))`, zeros where g is 0.

    Args: grad_output () or, for NONE, (M,); logits (B, S, V); labels (B, S); the rest from `loss_forward_`.
    Returns: (B, S, V), contiguous, in the logits' dtype.
    """
    batch, length, vocab = logits.shape
    if grad_output.dim():
        row_of = torch.arange(batch, device=labels.device).repeat_interleave(length)
        upstream = grad_output[(token_visit.long() if token_visit.numel() else row_of)]
    else:
        upstream = grad_output
    g = torch.where(coeff != 0, coeff * scale * upstream.to(statistics.dtype), 0)  # (T,)
    kept = g != 0
    target = labels.roll(-1, 1) if shift else labels
    raw = logits.flatten(0, 1)[kept].to(statistics.dtype)
    z = _cap(raw, softcap)
    grad = (z - statistics[1, kept, None] - statistics[2, kept, None]).exp()
    grad.scatter_add_(1, target.flatten()[kept, None], -torch.ones_like(grad[:, :1]))
    if softcap:
        grad *= 1 - (z / softcap).square()
    out = torch.zeros(batch * length, vocab, dtype=logits.dtype, device=logits.device)
    out[kept] = (grad * g[kept, None]).to(logits.dtype)
    return out.view(batch, length, vocab)


def logits_grad_(grad_output: Tensor, logits: Tensor, *rest: Any) -> None:
    """`logits_grad`, written over the logits."""
    logits.copy_(logits_grad(grad_output, logits, *rest))
