"""The maths of weighted_loss as loops over visits in double precision, written from the definitions alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geko_kernels import GEKOConfig

FREEZE, LIGHT, FOCUS, HARD = range(4)


@dataclass
class Row:
    """What is known of one sample."""

    history: list[float] = field(default_factory=list)  # newest last, at most five
    q_value: float = 0.5
    confidence: float = 0.0
    times_seen: int = 0
    bucket: int = FOCUS
    wrong_streak: int = 0
    quarantined: bool = False


@dataclass
class Visit:
    """One sample in one call."""

    sample_id: int
    tokens: list[tuple[int, int, int]]  # (row, position, target)
    loss: float = 0.0
    confidence: float = 0.0
    accuracy: float = 0.0
    correct: bool = False
    quality: float = 1.0
    q_value: float = 0.5
    bucket: int = FOCUS
    weight: float = 0.0
    start: tuple[int, int] = (0, 0)  # row and position of its first token


def find_visits(labels: Tensor, sample_ids: Tensor | None, shift: bool, ignore_index: int) -> list[Visit]:
    """The visits of a batch in order of position, those without a token to predict included."""
    visits = []
    batch, length = labels.shape
    for row in range(batch):
        if sample_ids is None:
            ids = [row] * length
        elif sample_ids.dim() == 1:
            ids = [int(sample_ids[row])] * length
        else:
            ids = sample_ids[row].tolist()
        if sample_ids is None or sample_ids.dim() == 1:
            visits.append(Visit(row if sample_ids is None else int(sample_ids[row]), [], start=(row, 0)))
        for position in range(length):
            new_run = position == 0 or ids[position] != ids[position - 1]
            if sample_ids is not None and sample_ids.dim() == 2 and new_run and ids[position] != -1:
                visits.append(Visit(ids[position], [], start=(row, position)))
            if ids[position] == -1:
                continue
            if shift:
                if position + 1 == length or ids[position + 1] != ids[position]:
                    continue
                target = int(labels[row, position + 1])
            else:
                target = int(labels[row, position])
            if target != ignore_index:
                visits[-1].tokens.append((row, position, target))
    return visits


def quality(history: list[float], kind: str) -> float:
    if len(history) < 2:
        return 1.0
    if kind == "std":
        mean = sum(history) / len(history)
        unsteady = math.sqrt(sum((x - mean) ** 2 for x in history) / len(history))
    else:
        rises = [max(b - a, 0.0) for a, b in zip(history, history[1:], strict=False)]
        unsteady = math.sqrt(sum(r * r for r in rises) / len(rises))
    return 1.0 - min(unsteady, 1.0)


def classify(visit: Visit, config: GEKOConfig) -> int:
    if not visit.correct:
        return HARD if visit.confidence > config.focus_confidence else FOCUS
    sure = visit.confidence > config.freeze_confidence
    return (
        FREEZE if sure and visit.quality > config.freeze_quality and visit.q_value >= config.min_q_for_freeze else LIGHT
    )


def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    table: list[Row] | None,
    config: GEKOConfig,
    *,
    reduction: str = "mean",
    shift: bool = False,
    ignore_index: int = -100,
    num_items: float | None = None,
    softcap: float | None = None,
    update: bool = True,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    bucket_weights: tuple[float, float, float] | None = None,
) -> tuple[Tensor, list[Visit]]:
    """The loss, differentiable in `logits` (B, S, V) float64, and what each visit saw; changes `table` if `update`."""
    by_bucket = dict(zip((HARD, FOCUS, LIGHT), bucket_weights or config.bucket_weights, strict=True))
    by_bucket[FREEZE] = config.freeze_weight
    visits = find_visits(labels, sample_ids, shift, ignore_index)
    nothing = logits[:0].sum()  # 0, tied to the logits
    losses: list[Tensor] = []
    after: dict[int, Row] = {}
    items = 0.0
    for visit in visits:
        shares = [1.0 if token_weights is None else float(token_weights[r, p + shift]) for r, p, _ in visit.tokens]
        visit.tokens = [token for token, share in zip(visit.tokens, shares, strict=True) if share > 0]
        shares = [share for share in shares if share > 0]
        total = sum(shares)
        before = Row() if table is None or visit.sample_id == -1 else table[visit.sample_id]
        visit.q_value, visit.bucket = before.q_value, before.bucket
        visit.quality = quality(before.history, config.quality)
        if not visit.tokens or visit.sample_id == -1:
            losses.append(nothing)
            visit.tokens = []
            continue
        items += total
        token_losses = []
        for (row, position, target), share in zip(visit.tokens, shares, strict=True):
            z = logits[row, position]
            if softcap:
                z = softcap * torch.tanh(z / softcap)
            token_losses.append(share * (torch.logsumexp(z, 0) - z[target]))
            visit.confidence += share * float(torch.softmax(z.detach(), 0).max()) / total
            visit.accuracy += share * float(z[target] == z.max()) / total
        mean = sum(token_losses) / total
        visit.loss = float(mean.detach())
        history = [*before.history, visit.loss][-5:]
        visit.quality = quality(history, config.quality)
        rate = config.q_value_lr
        visit.q_value = (1 - rate) * before.q_value + rate * (1 - min(visit.loss / config.q_value_loss_scale, 1))
        if config.correctness == "loss":
            visit.correct = visit.loss < config.correct_loss
        else:
            visit.correct = visit.accuracy >= config.correct_accuracy
        visit.bucket = classify(visit, config)
        visit.weight = 1.0 if table is None else 0.0 if before.quarantined else by_bucket[visit.bucket]
        if sample_weights is not None:
            visit.weight *= float(sample_weights[visit.start[: sample_weights.dim()]])
        losses.append(visit.weight * (sum(token_losses) if reduction == "token_mean" else mean))
        streak = 0 if visit.correct else min(before.wrong_streak + 1, 255)
        after[visit.sample_id] = Row(
            *(history, visit.q_value, visit.confidence, before.times_seen + 1, visit.bucket, streak, before.quarantined)
        )
    if table is not None and update:
        for sample_id, row in after.items():
            table[sample_id] = row
    stacked = torch.stack(losses) if losses else nothing[None][:0]
    if reduction == "none":
        return stacked, visits
    if reduction == "sum":
        return stacked.sum(), visits
    counted = sum(bool(v.tokens) for v in visits) if reduction == "mean" else items
    return stacked.sum() / (num_items or counted or 1), visits
