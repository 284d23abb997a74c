"""Visits that wait to be counted: many at once take as many launches as one forward's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geko_kernels.losses.results import SampleStats

ENTRIES = 2**16  # 2.5 MiB


class Visited(NamedTuple):
    """What is counted of each visit, as `SampleStats` has it, in order of time."""

    sample_ids: Tensor  # (M,) int64
    num_tokens: Tensor  # (M,) int64
    loss: Tensor  # (M,) float64
    accuracy: Tensor  # (M,) float64
    weight: Tensor  # (M,) float64

    @classmethod
    def of(cls, stats: SampleStats) -> Visited:
        floats = (value.double() for value in (stats.loss, stats.accuracy, stats.weight))
        return cls(stats.sample_ids, stats.num_tokens, *floats)


class PendingVisits:
    """Copies of the statistics of some forwards, as a CUDA graph or a compiled step may reuse their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._held = device, 0
        self._memory: tuple[Tensor, Tensor] | None = None  # (2, ENTRIES) int64, (3, ENTRIES) float64

    def add(self, stats: SampleStats) -> bool:
        """Hold one forward's visits; False if there is no room, and nothing is held then."""
        begin, end = self._held, self._held + len(stats.sample_ids)
        if end > ENTRIES:
            return False
        if self._memory is None:
            with torch.inference_mode(False):  # the first forward may be a probe in it, later ones are written outside
                ints = torch.empty(2, ENTRIES, dtype=torch.int64, device=self._device)
                self._memory = ints, torch.empty(3, ENTRIES, dtype=torch.float64, device=self._device)
        ints, floats = self._memory
        ints[:, begin:end] = torch.stack((stats.sample_ids, stats.num_tokens))
        floats[:, begin:end] = torch.stack((stats.loss, stats.accuracy, stats.weight))
        self._held = end
        return True

    def take(self) -> Visited | None:
        """The visits held, which then are not held any more; valid until the next `add`. None if there are none."""
        if not self._held or self._memory is None:
            return None
        ints, floats = (part[:, : self._held] for part in self._memory)
        self._held = 0
        return Visited(*ints.unbind(), *floats.unbind())
