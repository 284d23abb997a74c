"""The noise guard quarantines samples that look mislabelled, if the model has learnt enough to judge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState

KNOWN = 0.2  # least share of correct samples at which a wrong answer says something about the label
LENIENT = 1 / 3  # share of the margin that is enough where wrong labels are common
SURE = 0.2  # share of the median confidence of correct samples, below which the model has no answer yet
ENOUGH = 3600  # samples; with fewer the model has learnt less, so a larger share has to look mislabelled
_SAMPLE = 1 << 20  # samples of which the median is taken


def few_samples_factor(num_samples: int) -> float:
    """The factor on the least share of suspects: 1 from `ENOUGH` samples on, larger for fewer."""
    return max(1.0, math.sqrt(ENOUGH / num_samples))


def generalises(state: SampleState) -> bool:
    """Was the model more often right than wrong when it was confident about samples seen for the first time?

    Call it once most samples have been seen. The answer is False for what is memorised (facts, random labels) or learnt
    only over many epochs: a confident wrong answer then says nothing about the label. With 30 % wrong labels in a task
    that is learnt in one epoch, 21 % were right and 11 % HARD; with made-up facts 0 and 6 %. After earlier runs the
    state can no longer tell, and the answer is True.
    """
    first = state.times_seen == 1
    if int(first.count_nonzero()) <= 0.5 * len(state):
        return True
    right = int((first & (state.bucket <= Bucket.LIGHT)).count_nonzero())
    return right > int((first & (state.bucket == Bucket.HARD)).count_nonzero())


def update_quarantine_(state: SampleState) -> int:
    """Set `state.quarantined`: weight 0 until the sample is found correct. For runs that generalise.

    On a mislabelled sample the model is confident of another answer. On a sample that it has not learnt yet, because it
    is rare, hard or random, the model is unsure. So a sample is suspect if

    - it was wrong at the last `noise_guard_visits` visits, with a loss above `noise_guard_margin` (nats a token),
    - its label is less likely than the model's answer by that margin: `loss + log(confidence) > noise_guard_margin`,
      which for one token is `max(logits) - logits[label]`,
    - and the confidence was at least `SURE` times that of correct samples.

    Suspects are quarantined once they and the quarantined samples make up `noise_guard_min_share` of all samples (fewer
    may just as well be rare and right), or `sqrt(ENOUGH / N)` times that for N below `ENOUGH`; highest loss first, up
    to `noise_guard_share`. If they make up three times that share, wrong labels are so common that a third of the
    margin is enough. A sample is released when a probe finds it correct. While no more than `KNOWN` of the samples are
    correct, all are released and none is quarantined.

    With several processes, call it on synced states; all decide the same.

    Returns: how many more would be suspects at a third of the margin, 0 if that is already used. Labels confused with
        similar classes look like that, and so do hard samples: only someone who knows the labels' source can tell.
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
    """(N,) bool: samples that are quarantined, or would be if there were more like them.

    For runs that generalise. Only the quarantined ones, while no more than `KNOWN` of the samples are correct.
    """
    correct = (state.times_seen > 0) & (state.bucket <= Bucket.LIGHT)
    found = state.quarantined.clone()
    if int(correct.count_nonzero()) > KNOWN * len(state):
        found[_suspects(state, correct, state.config.noise_guard_margin)] = True
    return found


def nearly_suspects(state: SampleState) -> Tensor:
    """ids (n,) int64 of samples that one more visit with the same result would make suspects.

    Probing them at once decides before another epoch teaches the model their labels: with 30 % wrong labels 93 % of
    these were found after one epoch; with a training step as the second visit, 88 % after two.
    """
    config = state.config
    near = (state.wrong_streak == config.noise_guard_visits - 1) & ~state.quarantined & (state.times_seen > 0)
    for losses in state.loss_history[:, -(config.noise_guard_visits - 1) :].unbind(1):
        near &= losses > LENIENT * config.noise_guard_margin
    return near.nonzero()[:, 0]


def _suspects(state: SampleState, correct: Tensor, margin: float) -> Tensor:
    """ids (n,) int64 of samples, not quarantined, that are more likely mislabelled than not yet learnt."""
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
