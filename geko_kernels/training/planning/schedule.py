"""The learning rate as a function of progress, whatever the length of the epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from geko_kernels.torch_private import set_last_rates

Factor = Callable[[Any], float]


def follow_progress(scheduler: LRScheduler, progress: Callable[[], float], num_steps: int) -> Callable[[], bool]:
    """Make a schedule over `num_steps` read `progress() * num_steps` instead of its step count.

    `scheduler` is a LambdaLR from `transformers.get_scheduler`; any other kind (plateau) is left unchanged.

    Returns: a function that says whether the rate would still fall between now and the end of the run.
    """
    if type(scheduler) is not LambdaLR:
        return lambda: False
    factors: list[Factor] = list(scheduler.lr_lambdas)
    scheduler.lr_lambdas = [_at_progress(factor, progress, num_steps) for factor in factors]
    return lambda: any(factor(num_steps) < factor(progress() * num_steps) for factor in factors)


def read_progress_(scheduler: LRScheduler | None) -> None:
    """Set the rate for the current progress, after epochs without a step of the schedule."""
    if type(scheduler) is not LambdaLR:
        return
    rates = [rate * factor(0) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    set_last_rates(scheduler, rates)


def _at_progress(factor: Factor, progress: Callable[[], float], num_steps: int) -> Factor:
    def at_progress(_step: int) -> float:
        return factor(progress() * num_steps)

    return at_progress
