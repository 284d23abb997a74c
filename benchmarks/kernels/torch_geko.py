"""The GEKO step as one composes it from PyTorch ops: what `geko_kernels.weighted_loss` replaces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geko_kernels import Bucket, SampleState
from geko_kernels.reference.visits import quality_of


def geko_step(
    logits: Tensor, labels: Tensor, sample_ids: Tensor, length: int, state: SampleState
) -> tuple[Tensor, Tensor]:
    """`weighted_loss(logits, labels, sample_ids, state, return_stats=True)` for samples of `length` tokens.

    Args: logits (T, V), labels (T,) and sample_ids (T // length,) in order of position.
    Returns: the loss () and (6, samples): loss, confidence, accuracy, quality, Q-value, weight.
    """
    config = state.config
    logits = logits.float()
    token_loss = F.cross_entropy(logits, labels, reduction="none")
    sample_loss = token_loss.view(-1, length).mean(1)
    with torch.no_grad():
        loss = sample_loss.detach()
        token_confidence, guess = torch.softmax(logits, -1).max(-1)
        confidence = token_confidence.view(-1, length).mean(1)
        accuracy = (guess == labels).float().view(-1, length).mean(1)
        history = torch.cat([state.loss_history[sample_ids, 1:], loss[:, None]], 1)
        seen = state.times_seen[sample_ids] + 1
        quality = quality_of(history, seen, state.rules)
        reward = 1 - (loss / config.q_value_loss_scale).clamp(max=1)
        q_value = (1 - config.q_value_lr) * state.q_value[sample_ids] + config.q_value_lr * reward
        correct = loss < config.correct_loss
        steady = (confidence > config.freeze_confidence) & (quality > config.freeze_quality)
        right = torch.where(steady & (q_value >= config.min_q_for_freeze), int(Bucket.FREEZE), int(Bucket.LIGHT))
        wrong = torch.where(confidence > config.focus_confidence, int(Bucket.HARD), int(Bucket.FOCUS))
        bucket = torch.where(correct, right, wrong)
        state.q_value[sample_ids], state.confidence[sample_ids] = q_value, confidence
        state.loss_history[sample_ids], state.times_seen[sample_ids] = history, seen
        state.bucket[sample_ids] = bucket.to(state.bucket.dtype)
        weight = state.weights[bucket]
        stats = torch.stack([loss, confidence, accuracy, quality, q_value, weight])
    return (weight * sample_loss).mean(), stats
