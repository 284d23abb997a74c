"""Scored rows and their gradients by the CUDA kernel for Hopper: each row of logits is read once, in Triton twice."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from geko_kernels.kernels.launch import MOST
from geko_kernels.kernels.one_pass import hopper
from geko_kernels.kernels.rows import score

# bytes of scored logits, and of a row, from which on this is used: below, a cluster has too few rows to read ahead, or
# the exchange between warps takes too long
SMALLEST = 2**27
SMALLEST_ROW = 2**15
# struct ScoreRows: 4 pointers; token_count; count, vocab, vectors; struct Tiling
_ARGUMENTS = struct.Struct("@4Q q 7i 0q")


class ScoreLaunch(hopper.LibraryLaunch):
    """`reference.rows.score_rows_` with gradients, on a buffer whose rows have `row_stride` elements.

    Raises: ValueError for rows without a kernel.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, row_stride: int, vocab: int) -> None:
        tiling, self._row = hopper.tiling_of(row_stride, dtype), row_stride * dtype.itemsize
        if tiling is None or not 0 < vocab <= row_stride or self._row % 16:
            raise ValueError(f"no kernel for {dtype} rows of {row_stride} elements, {vocab} of them logits")
        super().__init__("geko_score_rows", device, dtype, tiling)
        self._numbers = (vocab, self._row // 16, *self.tiling)

    def __call__(
        self, logits: Tensor, rows: Tensor, targets: Tensor, statistics: Tensor, slot: int, start: int, count: int
    ) -> None:
        """On the current stream."""
        at = (logits.data_ptr() + slot * self._row, rows.data_ptr() + 8 * start, targets.data_ptr() + 8 * start)
        self.start(_ARGUMENTS.pack(*at, statistics.data_ptr(), statistics.shape[1], count, *self._numbers))


launch_of = functools.lru_cache(MOST)(ScoreLaunch)


def serves(logits: Tensor, count: int, softcap: float, entropy: Tensor | None) -> bool:
    """Whether `count` rows of `logits` (R, ld) are scored faster with one reading, and the kernel can do it."""
    row = logits.shape[1] * logits.element_size()
    return (
        not softcap
        and entropy is None
        and row >= SMALLEST_ROW
        and count * row >= SMALLEST
        and hopper.tiling_of(logits.shape[1], logits.dtype) is not None
        and not hopper.missing(logits.device)  # last: it warns
    )


def score_rows_(
    logits: Tensor,
    rows: Tensor,
    targets: Tensor,
    statistics: Tensor,
    fused: bool,
    slot: int,
    start: int,
    count: int,
    vocab: int,
    softcap: float,
    entropy: Tensor | None = None,
) -> None:
    """See `reference.rows.score_rows_`; `logits` contiguous, its rows at multiples of 16 bytes. One launch."""
    if not fused or not serves(logits, count, softcap, entropy):
        where = (fused, slot, start, count, vocab, softcap, entropy)
        return score.score_rows_(logits, rows, targets, statistics, *where)
    launch = launch_of(logits.device, logits.dtype, logits.shape[1], vocab)
    launch(logits, rows, targets, statistics, slot, start, count)
