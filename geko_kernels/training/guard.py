"""The noise guard: samples that look mislabelled are quarantined, relative to how far the run has come."""

from __future__ import annotations

import torch

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState

MAJORITY = 0.5  # share of correct samples above which being wrong says something about the label
IMPROVED = 0.9  # a wrong sample whose loss fell below this share of its earlier loss is still being learnt


def update_quarantine_(state: SampleState) -> None:
    """Set `state.quarantined`: weight 0 until the sample is found correct.

    A sample goes in when it was wrong at `noise_guard_visits` visits running and its loss did not fall meanwhile
    (`newest > IMPROVED * oldest of them`), at most `noise_guard_share` of all samples, highest loss first. It comes
    out when a probe finds it correct.

    None of this happens, and all come out, unless most samples are correct: where nothing has been learnt yet every
    sample is wrong, and quarantine would end the run's learning for good.

    Several processes: call it on synced states; all decide the same.
    """
    config, held = state.config, state.quarantined
    seen = state.times_seen > 0
    correct = seen & (state.bucket <= Bucket.LIGHT)
    if not config.noise_guard or correct.count_nonzero() <= MAJORITY * len(state):
        held.fill_(False)
        return
    held &= ~correct
    visits = config.noise_guard_visits
    newest, oldest = state.loss_history[:, -1], state.loss_history[:, -visits]
    suspect = seen & ~correct & ~held & (state.wrong_streak >= visits) & (newest > IMPROVED * oldest)
    suspects = suspect.nonzero()[:, 0]
    room = int(config.noise_guard_share * len(state)) - int(held.count_nonzero())
    if len(suspects) > room:
        order = torch.argsort(newest[suspects], descending=True, stable=True)
        suspects = suspects[order[: max(room, 0)]]
    held[suspects] = True
