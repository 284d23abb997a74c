"""The noise guard: samples that look mislabelled are quarantined, where the model's opinion counts for something."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState

KNOWN = 0.2  # share of correct samples from which on being wrong says something about the label
LENIENT = 1 / 3  # of the margin, where wrong labels are common
SURE = 0.2  # of the median confidence of correct samples: below it the model has no answer of its own yet
ENOUGH = 3600  # samples; fewer teach the model less before it judges, so a larger share has to look mislabelled
_SAMPLE = 1 << 20  # samples that the median is taken of


def few_samples_factor(num_samples: int) -> float:
    """What the least share of suspects is multiplied by: 1 from `ENOUGH` samples on, more for fewer."""
    return max(1.0, math.sqrt(ENOUGH / num_samples))


def generalises(state: SampleState) -> bool:
    """Was the model, where it was sure, more often right than wrong about samples that it saw for the first time?

    To be asked once most samples have been seen. What is learnt by heart (facts, random labels) or only after many
    epochs is not: there a sure and wrong answer says nothing about the label. With 30 % wrong labels in a task that
    is learnt in an epoch 21 % were right and 11 % HARD; of made-up facts 0 and 6 %. A state that earlier runs have
    filled cannot tell any more, and is trusted.
    """
    first = state.times_seen == 1
    if int(first.count_nonzero()) <= 0.5 * len(state):
        return True
    right = int((first & (state.bucket <= Bucket.LIGHT)).count_nonzero())
    return right > int((first & (state.bucket == Bucket.HARD)).count_nonzero())


def update_quarantine_(state: SampleState) -> int:
    """Set `state.quarantined`: weight 0 until the sample is found correct. For runs that generalise.

    A mislabelled sample is one where the model is sure of another answer. A sample that it has not learnt yet, rare,
    hard or random as it may be, leaves it unsure. So a sample is suspect that

    - was wrong at `noise_guard_visits` visits running, with a loss above `noise_guard_margin` (nats a token);
    - has a label that much less likely than the model's own answer: `loss + log(confidence) > noise_guard_margin`,
      which for one token is the margin `max(logits) - logits[label]`;
    - met a confidence of at least `SURE` times what correct samples have.

    Suspects go in once they and those inside make up `noise_guard_min_share` of all samples (fewer may as well be
    rare and right), of N below `ENOUGH` samples `sqrt(ENOUGH / N)` times that; highest loss first, up to
    `noise_guard_share`. Where they make up three times as many, wrong labels are so common that a third of the margin
    is enough. A sample comes out when a probe finds it correct. All come out, and none goes in, while no more than
    `KNOWN` of the samples are correct.

    Several processes: call it on synced states; all decide the same.

    Returns: how many more would be suspects at a third of the margin, 0 where that is in force. Labels that are wrong
        in confusable ways look like that, and so do hard samples: only who knows how they were made can tell.
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

    For runs that generalise. None, but for the quarantined, while no more than `KNOWN` of the samples are correct.
    """
    correct = (state.times_seen > 0) & (state.bucket <= Bucket.LIGHT)
    found = state.quarantined.clone()
    if int(correct.count_nonzero()) > KNOWN * len(state):
        found[_suspects(state, correct, state.config.noise_guard_margin)] = True
    return found


def nearly_suspects(state: SampleState) -> Tensor:
    """ids (n,) int64 of samples that one more visit would make suspects, had they stayed as they are.

    Looking at them at once tells before another epoch has taught the model their labels: with 30 % wrong labels 93 %
    of these were found after one epoch, and 88 % after two where the second visit was a training step.
    """
    config = state.config
    near = (state.wrong_streak == config.noise_guard_visits - 1) & ~state.quarantined & (state.times_seen > 0)
    for losses in state.loss_history[:, -(config.noise_guard_visits - 1) :].unbind(1):
        near &= losses > LENIENT * config.noise_guard_margin
    return near.nonzero()[:, 0]


def _suspects(state: SampleState, correct: Tensor, margin: float) -> Tensor:
    """ids (n,) int64 of samples not held that are more likely mislabelled than not yet learnt."""
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
