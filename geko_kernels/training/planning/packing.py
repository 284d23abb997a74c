"""Packs of whole documents, with no more tokens than a row or a batch may have."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


class Fill(Enum):
    """How documents fill a pack, and how a pack's tokens are counted."""

    BEST_FIT = "best fit"  # longest first, into the least room left; counts the sum of the lengths
    IN_ORDER = "in order"  # one after the other; counts the sum of the lengths
    PADDED = "padded"  # one after the other; counts rows x the longest


class Packer(NamedTuple):
    """Cuts the ids of a plan into packs of at most `tokens` tokens, depending only on the ids and their order."""

    lengths: Tensor  # (N,) int64, tokens of each sample
    tokens: int
    fill: Fill
    multiple: int = 1  # a padded row, or a pack without padding, is padded to a multiple of this

    def pack(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (n,) -> the ids in the order of their packs (n,), and where each pack ends (p,) int64.

        With BEST_FIT a pack takes the place of its longest document, so the order is as random as that of `ids`, and
        packs of many short documents come no earlier than others. Within a pack the order of `ids` is kept.
        """
        lengths = self.lengths[ids.long()].numpy().clip(min=1)
        room = self.tokens // self.multiple * self.multiple
        if self.fill is Fill.BEST_FIT:
            packs = best_fit(lengths, room)
            order = np.argsort(packs, kind="stable")
            return ids[torch.from_numpy(order)], torch.from_numpy(np.bincount(packs).cumsum())
        if self.fill is Fill.PADDED:
            lengths = -(-lengths // self.multiple) * self.multiple
        return ids, torch.from_numpy(fill_in_order(lengths, room, _padded if self.fill is Fill.PADDED else np.cumsum))

    def check(self, name: str) -> None:
        """Raise `ValueError` if a sample is longer than a pack; `name` is the setting of the packs' length."""
        room = self.tokens // self.multiple * self.multiple
        longest = int(self.lengths.max())
        if longest <= room:
            return
        over = self.lengths > room
        row = int(over.nonzero()[0])
        filled = f" (in multiples of {self.multiple}: {room})" if room != self.tokens else ""
        raise ValueError(
            f"{int(over.sum())} of the {len(over)} rows of train_dataset have more tokens than {name}={self.tokens}"
            f"{filled}, first row {row}, which has {int(self.lengths[row])}; the longest has {longest}. No document is "
            f"cut: raise {name} to {-(-longest // self.multiple) * self.multiple}, or truncate the rows beforehand"
        )


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """(n,) lengths from 1 to `room` -> (n,) the pack of each by best-fit decreasing.

    Each document, longest first, goes into the pack with the least sufficient room; among equals, into the pack that
    has had that room longest. Documents of equal length are placed together: a pack with room for k of them takes k.
    """
    order = np.argsort(-lengths, kind="stable")
    packs = np.empty(len(lengths), dtype=np.int64)
    longest = []  # index of the first document of each pack
    left: dict[int, list[np.ndarray]] = {}  # room left -> packs
    rooms: list[int] = []  # the keys of `left`, ascending
    values, starts, counts = np.unique(-lengths[order], return_index=True, return_counts=True)
    opened = 0
    for length, start, count in zip((-values).tolist(), starts.tolist(), counts.tolist(), strict=True):
        end = start + count
        while start < end:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                space = rooms.pop(at)
                free = np.concatenate(left.pop(space))
            else:
                space = room
                longest.append(order[start : end : room // length])
                free = np.arange(opened, opened + len(longest[-1]))
                opened += len(free)
            fit = space // length  # documents that each pack takes
            full, rest = divmod(end - start, fit)
            taken = min(full, len(free))
            packs[order[start : start + taken * fit]] = np.repeat(free[:taken], fit)
            start += taken * fit
            _put(left, rooms, space - fit * length, free[:taken])
            if taken < len(free) and start < end:  # the last documents of this length do not fill a pack
                packs[order[start:end]] = free[taken]
                _put(left, rooms, space - rest * length, free[taken : taken + 1])
                start, taken = end, taken + 1
            _put(left, rooms, space, free[taken:])
    place = np.empty(opened, dtype=np.int64)
    if opened:
        place[np.argsort(np.concatenate(longest))] = np.arange(opened)
    return place[packs]


def _put(left: dict[int, list[np.ndarray]], rooms: list[int], space: int, packs: np.ndarray) -> None:
    if not len(packs) or not space:
        return
    if space not in left:
        left[space] = []
        insort(rooms, space)
    left[space].append(packs)


def fill_in_order(lengths: np.ndarray, room: int, size: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(n,) lengths, none above `room` -> (p,) where each pack ends; `size`: a pack's tokens after each document."""
    ends, start, window = [], 0, 64
    while start < len(lengths):
        fits = int(np.searchsorted(size(lengths[start : start + window]), room, side="right"))
        if fits == window:
            window *= 2
            continue
        ends.append(start + fits)
        start, window = start + fits, max(2 * fits, 16)
    return np.array(ends, dtype=np.int64)


def _padded(lengths: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(lengths) * np.arange(1, len(lengths) + 1)


class PackedIds(Sampler[list[int]]):
    """Packs of ids as lists, padded to a multiple of `pad_to` with packs of one marked repeat, see `GEKOSampler`."""

    def __init__(self, ids: Tensor, ends: Tensor, pad_to: int) -> None:
        self.ids, self.ends, self.pad_to = ids, ends, pad_to

    def __len__(self) -> int:
        return -(-len(self.ends) // self.pad_to) * self.pad_to

    def __iter__(self) -> Iterator[list[int]]:
        return iterate_packs(self.ids, self.ends, len(self))


def iterate_packs(ids: Tensor, ends: Tensor, length: int, start: int = 0) -> Iterator[list[int]]:
    """The packs from `start` on, then `[~ids[0]], [~ids[1]], ...` up to `length` in all."""
    first = int(ends[start - 1]) if 0 < start <= len(ends) else 0
    for end in ends[start:].tolist():
        yield ids[first:end].tolist()
        first = end
    for place in range(max(start, len(ends)), length):
        yield [~int(ids[(place - len(ends)) % len(ids)])]
