"""The learning rate by progress: fully decayed at the end of the run, however short its epochs get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def follow_progress(scheduler: LRScheduler, progress: Callable[[], float], num_steps: int) -> LRScheduler:
    """Make a schedule over `num_steps` read `progress() * num_steps` in place of its count of steps.

    `scheduler` is a LambdaLR as `transformers.get_scheduler` makes; another kind (by plateau) stays as it is.
    """
    if type(scheduler) is LambdaLR:
        scheduler.lr_lambdas = [_at_progress(factor, progress, num_steps) for factor in scheduler.lr_lambdas]
    return scheduler


def _at_progress(
    factor: Callable[[Any], float], progress: Callable[[], float], num_steps: int
) -> Callable[[int], float]:
    def at_progress(_step: int) -> float:
        return factor(progress() * num_steps)

    return at_progress
