"""`EpochPlan`: what `GEKOSampler` has drawn for one epoch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EpochPlan(NamedTuple):
    """One epoch: its samples in order, and its part of the run."""

    ids: Tensor  # (n,) int32 on the CPU: first those selected by bucket, then those of the uniform finish
    selected: int  # the number of those selected by bucket
    start: float  # progress of the run at the first sample,
    turn: float  # after the selected ones,
    end: float  # and after the last one
    packs: Tensor | None = None  # (p,) int64: where each pack of ids ends, if they are packed

    @property
    def units(self) -> int:
        """The number of packs, or of ids without packing; batches consist of these."""
        return len(self.ids if self.packs is None else self.packs)

    def samples(self, units: int) -> int:
        """Samples in the first `units` units."""
        units = min(units, self.units)
        return units if self.packs is None or units == 0 else int(self.packs[units - 1])

    def units_of(self, samples: int) -> int:
        """How many units the first `samples` samples fill."""
        return samples if self.packs is None else int(torch.searchsorted(self.packs, samples, right=True))
