"""Callbacks that take the time of steps and epochs on the device."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """When each optimizer step has ended on the device; the host may run ahead, as it does in training."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def steps_ms(self, warm_up: int) -> list[float]:
        """Milliseconds of each step after the warm-up."""
        pairs = zip(self.ends[warm_up - 1 :], self.ends[warm_up:], strict=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]


class EpochClock(TrainerCallback):
    """Seconds from each epoch's begin, before its probes and plan, to its end on the device."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self._now()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self.begin)
