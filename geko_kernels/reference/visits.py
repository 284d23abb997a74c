"""How a visit changes its sample's row in the learning state, in plain PyTorch: means, Q-value, quality, bucket."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from geko_kernels.columns import COLUMNS
from geko_kernels.reference.layout import Layout


class Rules(enum.IntEnum):
    """The index of each config value in the rules tensor."""

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


Table = Mapping[str, Tensor]  # columns of the `SampleState` by name, (N, ...); empty without one


class VisitMeans(NamedTuple):
    """Means over the tokens of each visit, (M,) each."""

    ids: Tensor
    row: Tensor  # the id's row in the table; any row for an id outside of it
    in_table: Tensor
    num_tokens: Tensor  # valid tokens
    items: Tensor  # their number, or the sum of their weights
    divisor: Tensor  # items, or 1 if there are none
    counted: Tensor  # has a valid token
    finite: Tensor  # and finite means
    loss_sum: Tensor
    loss: Tensor
    confidence: Tensor
    accuracy: Tensor


class Learnt(NamedTuple):
    """The new values of each visit's row, (M, ...) each."""

    q_value: Tensor
    loss_history: Tensor
    times_seen: Tensor
    quality: Tensor
    bucket: Tensor
    correct: Tensor


def real_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype of statistics and losses of logits or hidden states."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which to sum many float32: in float32, a long sum loses small terms."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def visit_means(statistics: Tensor, where: Layout, num_samples: int, by_token: Tensor | None) -> VisitMeans:
    """Means of the statistics (5, T) over each visit's valid tokens, weighted `by_token` (T,).

    `num_samples` is -1 without a table.
    """
    entries = where.ids.shape[0]
    slot = torch.where(where.visit < 0, entries, where.visit)

    def per_visit(values: Tensor) -> Tensor:
        sums = torch.zeros(entries + 1, dtype=values.dtype, device=values.device)
        return sums.index_add_(0, slot, values)[:-1]

    num_tokens = per_visit(where.valid.long())
    wide, items = statistics.to(sum_dtype(statistics.device)), num_tokens
    if by_token is not None:
        by_token = by_token.to(wide.dtype)
        wide, items = wide * by_token, per_visit(torch.where(where.valid, by_token, 0))
    divisor = torch.where(num_tokens > 0, items, 1)
    sums = [per_visit(torch.where(where.valid, wide[i], 0)) for i in (0, 3, 4)]
    loss, sure, accuracy = ((part / divisor).to(statistics.dtype) for part in sums)
    loss_sum = sums[0].to(statistics.dtype)
    counted = num_tokens > 0
    finite = counted & loss.float().isfinite() & sure.isfinite()
    row = where.ids.clamp(0, max(num_samples - 1, 0))
    in_table = (where.ids >= 0) & (where.ids < num_samples)
    means = (loss_sum, loss, sure, accuracy)
    return VisitMeans(where.ids, row, in_table, num_tokens, items, divisor, counted, finite, *means)


def learn(visits: VisitMeans, table: Table, rules: Tensor) -> Learnt:
    """The new row of each visit; a visit without finite means leaves Q-value and quality as they were."""

    def old(name: str) -> Tensor:
        dtype, start, row, *_ = COLUMNS[name]
        if name not in table:
            return torch.full((*visits.ids.shape, *row), start, dtype=dtype, device=visits.ids.device)
        return torch.where(visits.in_table.view(-1, *(1 for _ in row)), table[name][visits.row], start)

    old_history, old_q, old_seen = old("loss_history"), old("q_value"), old("times_seen")
    seen = old_seen.clamp(0, torch.iinfo(torch.int32).max - 1) + 1  # a damaged file may hold anything
    loss = visits.loss.float()
    history = torch.cat([old_history[:, 1:], loss[:, None]], 1)
    lr = rules[Rules.Q_LR]
    q = (1 - lr) * old_q + lr * (1 - (loss / rules[Rules.Q_SCALE]).clamp(max=1))
    q = torch.where(visits.finite, q, old_q)
    quality = torch.where(visits.finite, quality_of(history, seen, rules), quality_of(old_history, old_seen, rules))
    by_loss = visits.loss < rules[Rules.CORRECT_LOSS]
    by_accuracy = visits.accuracy >= rules[Rules.CORRECT_ACCURACY]
    correct = visits.finite & torch.where(rules[Rules.BY_ACCURACY] > 0, by_accuracy, by_loss)
    steady = (visits.confidence > rules[Rules.FREEZE_CONFIDENCE]) & (quality > rules[Rules.FREEZE_QUALITY])
    frozen = correct & steady & (q >= rules[Rules.MIN_Q])
    hard = ~correct & (visits.confidence > rules[Rules.FOCUS_CONFIDENCE])
    bucket = torch.where(correct, torch.where(frozen, 0, 1), torch.where(hard, 3, 2))
    bucket = torch.where(visits.counted, bucket, old("bucket").long())
    return Learnt(q, history, seen, quality, bucket, correct)


def write_rows_(visits: VisitMeans, learnt: Learnt, table: Table) -> None:
    """Write the rows of finite visits; of a sample visited twice, the last visit's."""
    num_samples = len(table["q_value"])
    place = torch.where(visits.finite, visits.ids, num_samples)
    position = torch.arange(len(place), device=place.device)
    last = torch.full((num_samples + 1,), -1, device=place.device).scatter_reduce_(0, place, position, "amax")
    write = visits.finite & (last[place] == position)
    at = visits.ids[write]
    streak = (table["wrong_streak"][at].int() + 1).clamp(max=255)
    written = {
        "q_value": learnt.q_value[write],
        "confidence": visits.confidence[write],
        "loss_history": learnt.loss_history[write],
        "times_seen": learnt.times_seen[write],
        "bucket": learnt.bucket[write],
        "wrong_streak": torch.where(learnt.correct[write], 0, streak),
        "changed": torch.ones_like(at),
    }
    for name, values in written.items():
        table[name][at] = values.to(table[name].dtype)


def quality_of(history: Tensor, times_seen: Tensor, rules: Tensor) -> Tensor:
    """(n, 5) losses, newest last, of which the last `times_seen` count -> (n,) quality in [0, 1]; 0 for a NaN."""
    count = times_seen.clamp(0, history.shape[1])
    slot = torch.arange(history.shape[1], device=history.device)
    live = slot >= history.shape[1] - count[:, None]
    rises = live[:, :-1] & (history[:, 1:] > history[:, :-1])
    rise = torch.where(rises, history[:, 1:] - history[:, :-1], 0)
    by_rise = (rise.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
    mean = torch.where(live, history, 0).sum(1) / count.clamp(min=1)
    by_std = (torch.where(live, history - mean[:, None], 0).square().sum(1) / count.clamp(min=1)).sqrt()
    unsteady = torch.where(rules[Rules.BY_STD] > 0, by_std, by_rise)
    return 1 - torch.where(unsteady < 1, unsteady, 1)
