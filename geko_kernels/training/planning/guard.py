"""The noise guard quarantines samples that look mislabelled, if the model has learnt enough to judge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState

KNOWN = 0.2  # the least share of correct samples; below it a wrong answer says nothing about the label
LENIENT = 1 / 3  # share of the margin that is enough if wrong labels are common
SURE = 0.2  # share of the median confidence of correct samples; below it the model has no answer yet
ENOUGH = 3600  # samples; with fewer the model has learnt less, so a larger share has to look mislabelled
_SAMPLE = 1 << 20  # the most samples from which the median is taken


def few_samples_factor(num_samples: int) -> float:
    """The factor on the least share of suspects: 1 for `ENOUGH` samples or more, larger for fewer."""
    return max(1.0, math.sqrt(ENOUGH / num_samples))


def generalises(state: SampleState) -> bool:
    """Whether the model was more often right than wrong when it was confident about a sample at its first visit.

    Call it once most samples have been seen. It is False for data that are memorised (facts, random labels) or learnt
    only over many epochs: a confident wrong answer then says nothing about the label. In a task learnt in one epoch
    with 30 % wrong labels, 21 % were right and 11 % HARD; with made-up facts, 0 and 6 %. After earlier runs the state
    no longer shows first visits, and the result is True.
    """
    first = state.times_seen == 1
    if int(first.count_nonzero()) <= 0.5 * len(state):
        return True
    right = int((first & (state.bucket <= Bucket.LIGHT)).count_nonzero())
    return right > int((first & (state.bucket == Bucket.HARD)).count_nonzero())


def update_quarantine_(state: SampleState) -> int:
    """Set `state.quarantined`: weight 0 until the sample is found correct. For runs that generalise.

    The model is confident of another answer on a mislabelled sample, but unsure on one that it has not learnt yet,
    because that is rare, hard or random. So a sample is a suspect if

    - it was wrong at the last `noise_guard_visits` visits, with a loss above `noise_guard_margin` (nats a token),
    - its label is less likely than the model's answer by that margin: `loss + log(confidence) > noise_guard_margin`,
      which for one token is `max(logits) - logits[label]`,
    - and the confidence was at least `SURE` times that of correct samples.

    Suspects are quarantined once they and the quarantined samples make up `noise_guard_min_share` of all samples, or
    `sqrt(ENOUGH / N)` times that for N below `ENOUGH`: fewer may well be rare and right. Those with the highest loss
    come first, up to `noise_guard_share`. If suspects make up three times that least share, wrong labels are so common
    that a third of the margin is enough. A sample is released when a probe finds it correct. While no more than `KNOWN`
    of the samples are correct, all are released and none is quarantined.

    With several processes, call it on synced states; then all decide the same.

    Returns: how many more samples would be suspects at a third of the margin, 0 if that is already used. Some have a
        label of a similar class, others are hard: only someone who knows where the labels come from can tell.
    """
    config, held = state.config, state.quarantined
    correct = (state.times_seen > 0) & (state.bucket <= Bucket.LIGHT)
    if not config.noise_guard or int(correct.count_nonzero()) <= KNOWN * len(state):
        held.fill_(False)
        return 0
    held &= ~correct
    suspects = _suspects(state, correct, config.noise_guard_margin)
    milder = _suspects(state, correct, LENIENT * config.noise_guard_margin)
    doubtful = len(milder) - len(suspects)
    inside = int(held.count_nonzero())
    share = (inside + len(suspects)) / len(state)
    least = config.noise_guard_min_share * few_samples_factor(len(state))
    if share < least:
        return doubtful
    if share >= 3 * least:
        suspects, doubtful = milder, 0
    room = max(int(config.noise_guard_share * len(state)) - inside, 0)
    if len(suspects) > room:
        worst_first = torch.argsort(state.loss_history[suspects, -1], descending=True, stable=True)
        suspects = suspects[worst_first[:room]]
    held[suspects] = True
    return doubtful


def suspects(state: SampleState) -> Tensor:
    """(N,) bool: samples that are quarantined, or would be if there were more suspects.

    For runs that generalise. While no more than `KNOWN` of the samples are correct, only the quarantined ones.
    """
    correct = (state.times_seen > 0) & (state.bucket <= Bucket.LIGHT)
    found = state.quarantined.clone()
    if int(correct.count_nonzero()) > KNOWN * len(state):
        found[_suspects(state, correct, state.config.noise_guard_margin)] = True
    return found


def nearly_suspects(state: SampleState) -> Tensor:
    """ids (n,) int64 of samples that one more visit with the same result would make suspects.

    Probing them at once decides before another epoch teaches the model their labels: with 30 % wrong labels, 93 % of
    these were found after one epoch. With a training step as the second visit, 88 % were found after two.
    """
    config = state.config
    near = (state.wrong_streak == config.noise_guard_visits - 1) & ~state.quarantined & (state.times_seen > 0)
    for losses in state.loss_history[:, -(config.noise_guard_visits - 1) :].unbind(1):
        near &= losses > LENIENT * config.noise_guard_margin
    return near.nonzero()[:, 0]


def _suspects(state: SampleState, correct: Tensor, margin: float) -> Tensor:
    """ids (n,) int64 of samples that are suspects and not yet quarantined."""
    visits = state.config.noise_guard_visits
    suspect = (state.wrong_streak >= visits) & ~correct & ~state.quarantined
    for losses in state.loss_history[:, -visits:].unbind(1):
        suspect &= losses > margin
    ids = suspect.nonzero()[:, 0]
    if len(ids) == 0:
        return ids
    step = -(-len(state) // _SAMPLE)
    typical = state.confidence[::step][correct[::step]].median()
    confidence = state.confidence[ids]
    return ids[(state.loss_history[ids, -1] + confidence.log() > margin) & (confidence >= SURE * typical)]
