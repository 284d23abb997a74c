"""Every op in plain PyTorch: the truth that all kernels are tested against. Runs on any device.

Shapes: B rows, S positions a row, T = B * S tokens, V vocabulary, N samples in the table, and M entries for
visits: M = B with one id a row, M = T with one id a token (front-packed, the rest unused).
All maths is in float32, or float64 for float64 logits.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor


class Reduction(enum.IntEnum):
    """Codes of `reduction` as the ops take them."""

    NONE = 0
    MEAN = 1
    TOKEN_MEAN = 2
    SUM = 3


class Rules(enum.IntEnum):
    """Where each number of the config stands in the rules tensor."""

    FREEZE_CONFIDENCE = 0
    FREEZE_QUALITY = 1
    FOCUS_CONFIDENCE = 2
    CORRECT_LOSS = 3
    CORRECT_ACCURACY = 4
    Q_LR = 5
    Q_SCALE = 6
    MIN_Q = 7
    BY_ACCURACY = 8
    BY_STD = 9


class Layout(NamedTuple):
    """Which token belongs to which visit, and what it predicts."""

    target: Tensor  # (T,) int64, 0 where not valid
    scored: Tensor  # (T,) bool: has a label inside the vocabulary to predict
    valid: Tensor  # (T,) bool: scored, and its visit is not left out
    visit: Tensor  # (T,) int64: entry of its visit, -1 for padding
    ids: Tensor  # (M,) int64: sample id of the visit, -1 unused
    left_out: Tensor  # (M,) bool: the visit holds a bad value
    error: Tensor  # () int64: smallest error key, or int64 max


def error_key(position: Tensor, is_label: int, value: Tensor) -> Tensor:
    """position << 33 | is_label << 32 | the value's low 32 bits (saturated): the minimum is the first offender."""
    low = value.clamp(-(2**31), 2**31 - 1) & 0xFFFFFFFF
    return (position.clamp(max=2**30 - 1) << 33) | (is_label << 32) | low


def layout(
    labels: Tensor, sample_ids: Tensor | None, num_samples: int, vocab: int, ignore_index: int, shift: bool
) -> Layout:
    """Split (B, S) labels into visits; `num_samples` < 0 means no table, so any id but -1 counts."""
    batch, length = labels.shape
    device = labels.device
    rows = torch.arange(batch, device=device)
    ids = rows if sample_ids is None else sample_ids
    packed = ids.dim() == 2
    token_ids = ids if packed else ids[:, None].expand(batch, length)  # (B, S)
    target = labels
    if shift:
        target = torch.full_like(labels, ignore_index)
        target[:, :-1] = labels[:, 1:]
        follows = token_ids[:, :-1] == token_ids[:, 1:]
        target[:, :-1] = torch.where(follows, target[:, :-1], ignore_index)
    if packed:
        start = torch.ones_like(token_ids, dtype=torch.bool)
        start[:, 1:] = token_ids[:, 1:] != token_ids[:, :-1]
        start &= token_ids != -1
        visit = (start.flatten().cumsum(0) - 1).view(batch, length)
        entries = batch * length
        visit_ids = torch.full((entries + 1,), -1, dtype=torch.int64, device=device)
        visit_ids[torch.where(start, visit, entries).flatten()] = token_ids.flatten()
        visit_ids = visit_ids[:-1]
    else:
        visit = rows[:, None].expand(batch, length)
        entries, visit_ids = batch, ids
    visit = torch.where(token_ids == -1, -1, visit).flatten()
    target, token_ids = target.flatten(), token_ids.flatten()
    asked = (target != ignore_index) & (visit >= 0)
    bad_label = asked & ((target < 0) | (target >= vocab))
    bad_id = (token_ids < -1) | (token_ids >= num_samples) if num_samples >= 0 else torch.zeros_like(asked)
    position = torch.arange(batch * length, device=device)
    none = torch.iinfo(torch.int64).max
    keys = torch.where(bad_label, error_key(position, 1, target), none)
    keys = torch.minimum(keys, torch.where(bad_id, error_key(position, 0, token_ids), none))
    left_out = torch.zeros(entries + 1, dtype=torch.bool, device=device)
    left_out.index_put_((torch.where(bad_label | bad_id, visit, entries),), torch.tensor(True, device=device))
    left_out[-1] = False
    scored = asked & ~bad_label
    valid = scored & ~left_out[visit]  # visit -1 reads the spare entry
    error = keys.min() if keys.numel() else torch.full((), none, device=device)
    return Layout(torch.where(scored, target, 0), scored, valid, visit, visit_ids, left_out[:-1], error)


def _cap(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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
    z = _cap(logits.reshape(-1, logits.shape[-1])[scored].to(_compute_dtype(logits)), softcap)
    top = z.amax(-1)
    total = (z - top[:, None]).exp().sum(-1)
    at_target = z.gather(1, where.target[scored, None])[:, 0]
    loss = total.log() - (at_target - top)
    hit = (at_target == top) & ~loss.isnan()
    out = torch.zeros(5, labels.numel(), dtype=z.dtype, device=z.device)
    out[:, scored] = torch.stack([loss, top, total.log(), 1 / total, hit.to(z.dtype)])
    return out


def quality_of(history: Tensor, times_seen: Tensor, rules: Tensor) -> Tensor:
    """(n, 5) losses, newest last, of which the last `times_seen` count -> (n,) quality in [0, 1]."""
    count = times_seen.clamp(max=history.shape[1])
    slot = torch.arange(history.shape[1], device=history.device)
    live = slot >= history.shape[1] - count[:, None]
    rise = (history[:, 1:] - history[:, :-1]).clamp(min=0) * live[:, :-1]
    by_rise = (rise.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
    mean = (history * live).sum(1) / count.clamp(min=1)
    by_std = (((history - mean[:, None]) * live).square().sum(1) / count.clamp(min=1)).sqrt()
    unsteady = torch.where(rules[Rules.BY_STD] > 0, by_std, by_rise)
    return 1 - unsteady.clamp(max=1)


def sample_update_(
    tokens: Tensor,
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
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Visit means, learning state, bucket and weight of each visit, and the loss.

    Args: tokens (5, T) from `token_stats`; the columns of `SampleState` or None for each (plain loss, weight 1);
        weights (4,) of (HARD, FOCUS, LIGHT, FREEZE); num_items () replaces the divisor of mean and token_mean.
    Returns:
        loss () or (M,) for NONE;
        scale (): the divisor's inverse;
        coeff (T,): weight / tokens of the visit (weight alone for TOKEN_MEAN), 0 for a token without loss:
            the gradient of a token's loss is `coeff * scale * upstream`;
        token_visit (T,) int32: entry of each token's visit, -1 for padding; empty with one id a row;
        floats (6, M): loss, confidence, accuracy, quality, q_value, weight;
        ints (2, M) int64: sample id, valid tokens;  flags (2, M) uint8: bucket, correct.
    """
    real = tokens.dtype
    packed = sample_ids is not None and sample_ids.dim() == 2
    rows = -1 if q_value is None else q_value.shape[0]
    where = layout(labels, sample_ids, rows, vocab, ignore_index, shift)
    entries = where.ids.shape[0]
    slot = torch.where(where.visit < 0, entries, where.visit)

    def per_visit(values: Tensor) -> Tensor:
        sums = torch.zeros(entries + 1, dtype=values.dtype, device=values.device)
        return sums.index_add_(0, slot, values)[:-1]

    count = per_visit(where.valid.long())
    counted = count > 0
    divisor = count.clamp(min=1).to(real)
    mask = where.valid.to(real)
    loss_sum = per_visit(torch.where(where.valid, tokens[0], 0))
    loss = loss_sum / divisor
    sure = per_visit(torch.where(where.valid, tokens[3], 0)) / divisor
    accuracy = per_visit(torch.where(where.valid, tokens[4], 0)) / divisor
    finite = counted & loss.float().isfinite() & sure.isfinite()

    row = where.ids.clamp(0, max(rows - 1, 0))
    in_table = (where.ids >= 0) & (where.ids < rows)

    def old(column: Tensor | None, fresh: float) -> Tensor:
        if column is None:
            return torch.full((entries,), fresh, device=labels.device)
        return torch.where(in_table, column[row], fresh)

    if loss_history is None:
        old_history = torch.zeros(entries, 5, device=labels.device)
    else:
        old_history = torch.where(in_table[:, None], loss_history[row], 0.0)
    old_seen, old_q = old(times_seen, 0).int(), old(q_value, 0.5)
    seen = old_seen + 1
    history = torch.cat([old_history[:, 1:], loss.float()[:, None]], 1)
    lr, scale_q = rules[Rules.Q_LR], rules[Rules.Q_SCALE]
    q = (1 - lr) * old_q + lr * (1 - (loss.float() / scale_q).clamp(max=1))
    q = torch.where(finite, q, old_q)
    quality = torch.where(finite, quality_of(history, seen, rules), quality_of(old_history, old_seen, rules))
    by_loss, by_accuracy = loss < rules[Rules.CORRECT_LOSS], accuracy >= rules[Rules.CORRECT_ACCURACY]
    correct = finite & torch.where(rules[Rules.BY_ACCURACY] > 0, by_accuracy, by_loss)
    steady = (sure > rules[Rules.FREEZE_CONFIDENCE]) & (quality > rules[Rules.FREEZE_QUALITY])
    frozen = correct & steady & (q >= rules[Rules.MIN_Q])
    hard = ~correct & (sure > rules[Rules.FOCUS_CONFIDENCE])
    new_bucket = torch.where(correct, torch.where(frozen, 0, 1), torch.where(hard, 3, 2))
    new_bucket = torch.where(counted, new_bucket, old(bucket, 2).long())
    weight = torch.ones_like(loss) if q_value is None else weights[3 - new_bucket].to(real)
    if quarantined is not None:
        weight = torch.where(in_table & quarantined[row], 0, weight)
    weight = torch.where(counted, weight, 0)

    if q_value is not None and update:
        assert confidence is not None and loss_history is not None and times_seen is not None
        assert bucket is not None and wrong_streak is not None and changed is not None
        position = torch.arange(entries, device=labels.device)
        last = torch.full((rows + 1,), -1, device=labels.device)
        last.scatter_reduce_(0, torch.where(finite, where.ids, rows), position, "amax")
        write = finite & (last[torch.where(finite, where.ids, rows)] == position)
        at = where.ids[write]
        q_value[at], confidence[at], loss_history[at] = q[write].float(), sure[write].float(), history[write]
        times_seen[at], bucket[at] = seen[write], new_bucket[write].to(bucket.dtype)
        streak = wrong_streak[at].int() + 1
        wrong_streak[at] = torch.where(correct[write], 0, streak.clamp(max=255)).to(wrong_streak.dtype)
        changed[at] = True
    if error is not None:
        error.copy_(torch.minimum(error, where.error))

    by_token = reduction == Reduction.TOKEN_MEAN
    coeff = (weight if by_token else weight / divisor)[where.visit] * mask
    contribution = torch.where(counted, weight * (loss_sum if by_token else loss), 0)
    if reduction in (Reduction.MEAN, Reduction.TOKEN_MEAN):
        items = (count.sum() if by_token else counted.sum()) if num_items is None else num_items
        scale = torch.where(items > 0, 1 / items.to(real), 0).to(real)
    else:
        scale = torch.ones((), dtype=real, device=labels.device)
    value = contribution if reduction == Reduction.NONE else contribution.sum() * scale
    floats = torch.stack([loss, sure, accuracy, quality.to(real), q.to(real), weight])
    ints = torch.stack([where.ids, count])
    flags = torch.stack([new_bucket, correct.long()]).to(torch.uint8)
    token_visit = where.visit.int() if packed else torch.empty(0, dtype=torch.int32, device=labels.device)
    return value, scale, coeff, token_visit, floats, ints, flags


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
    """`token_stats`, then `sample_update_`: the forward of the logits path in one op.

    Returns: `sample_update_`'s seven and `tokens` (5, T) last.
    """
    tokens = token_stats(logits, labels, sample_ids, ignore_index, shift, softcap)
    columns = (q_value, confidence, loss_history, times_seen, bucket, wrong_streak, changed, claim, quarantined, error)
    vocab = logits.shape[-1]
    rest = (vocab, reduction, ignore_index, shift, update)
    return *sample_update_(tokens, labels, sample_ids, rules, weights, num_items, *columns, *rest), tokens


def logits_grad(
    grad_output: Tensor,
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
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
        rows = torch.arange(batch, device=labels.device).repeat_interleave(length)
        upstream = grad_output[(token_visit.long() if token_visit.numel() else rows)]
    else:
        upstream = grad_output
    g = torch.where(coeff != 0, coeff * scale * upstream.to(tokens.dtype), 0)  # (T,)
    kept = g != 0
    target = labels.roll(-1, 1) if shift else labels
    raw = logits.reshape(-1, vocab)[kept].to(tokens.dtype)
    z = _cap(raw, softcap)
    grad = (z - tokens[1, kept, None] - tokens[2, kept, None]).exp()
    grad.scatter_add_(1, target.flatten()[kept, None], -torch.ones_like(grad[:, :1]))
    if softcap:
        grad *= 1 - (z / softcap).square()
    out = torch.zeros(batch * length, vocab, dtype=logits.dtype, device=logits.device)
    out[kept] = (grad * g[kept, None]).to(logits.dtype)
    return out.view(batch, length, vocab)


def logits_grad_(
    grad_output: Tensor,
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    coeff: Tensor,
    scale: Tensor,
    token_visit: Tensor,
    shift: bool,
    softcap: float,
) -> None:
    """`logits_grad`, written over the logits."""
    logits.copy_(logits_grad(grad_output, logits, labels, tokens, coeff, scale, token_visit, shift, softcap))
