"""The order and number of an epoch's ids: the permutation, where it is cut, and the repeats in the last batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from threading import Thread

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

_CHUNK = 1 << 16  # ids turned into Python integers at a time
_PART = 1 << 20  # samples computed at a time by `in_turn`
_FEW = 1 / 64  # share of the samples; a smaller plan would only make the model forget the others
_SCATTER = -1640531527  # odd, so that the product's upper bits scatter neighbouring ids


class PaddedIds(Sampler[int]):
    """`ids` (n,) in order, padded to a multiple of `pad_to` with marked repeats, see `GEKOSampler`."""

    def __init__(self, ids: Tensor, pad_to: int) -> None:
        self.ids, self.pad_to = ids, pad_to

    def __len__(self) -> int:
        return math.ceil(len(self.ids) / self.pad_to) * self.pad_to

    def __iter__(self) -> Iterator[int]:
        return iterate_padded(self.ids, len(self))


def iterate_padded(ids: Tensor, length: int, start: int = 0) -> Iterator[int]:
    """`ids[start:]` as integers, a chunk at a time, then `~ids[0], ~ids[1], ...` up to `length` in all."""
    for chunk in ids[start:].split(_CHUNK):
        yield from chunk.tolist()
    for place in range(max(start, len(ids)), length):
        yield ~int(ids[(place - len(ids)) % len(ids)])


def by_length(ids: Tensor, lengths: Tensor, window: int) -> Tensor:
    """`ids` with each `window` of them sorted by `lengths[ids]`, longest first."""
    windows = [part[lengths[part.long()].argsort(descending=True, stable=True)] for part in ids.split(window)]
    return torch.cat(windows) if windows else ids


def in_turn(total: int, interval: int, epoch: int, device: torch.device) -> Tensor:
    """(N,) bool: samples whose turn it is, one epoch in `interval`; neighbouring ids follow no pattern."""
    turn = torch.empty(total, dtype=torch.bool, device=device)
    for start in range(0, total, _PART):
        part = torch.arange(start, min(start + _PART, total), dtype=torch.int32, device=device).mul_(_SCATTER)
        part.bitwise_right_shift_(16).bitwise_and_(0x7FFF).add_(epoch).remainder_(interval)
        turn[start : start + _PART] = part == 0
    return turn


def cut_after(kept: Tensor, budget: int) -> int:
    """The number of slots that contain `budget` kept samples; 0 if hardly any are kept."""
    count = int(np.count_nonzero(kept.numpy()))
    if budget <= 0 or count <= _FEW * len(kept):
        return 0
    if count <= budget:
        return len(kept)
    return int(torch.searchsorted(kept.cumsum(0, dtype=torch.int32), budget)) + 1


class Orders:
    """`torch.randperm(total, generator=torch.Generator().manual_seed(seed + epoch))` of each epoch as int32."""

    def __init__(self, total: int, seed: int) -> None:
        self.total, self.seed = total, seed
        self._ahead: tuple[int, Thread, Tensor] | None = None

    def of(self, epoch: int) -> Tensor:
        """(N,) int32, which the caller may change."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == epoch:
            ahead[1].join()
            return ahead[2]
        order = torch.empty(self.total, dtype=torch.int32, device="cpu")
        self._fill_(order, epoch)
        return order

    def prepare(self, epoch: int) -> None:
        """Draw that epoch's permutation in a thread: with 10 million samples it takes most of a plan's time."""
        if self._ahead is None:
            order = torch.empty(self.total, dtype=torch.int32, device="cpu")
            thread = Thread(target=self._fill_, args=(order, epoch))
            self._ahead = epoch, thread, order
            thread.start()

    def _fill_(self, order: Tensor, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        torch.randperm(self.total, generator=generator, dtype=torch.int32, device="cpu", out=order)
