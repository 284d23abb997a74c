"""The head and the labels of `weighted_linear_loss`, and how much of its logits to hold at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geko_kernels.losses.linear_gradients import HIDDEN_BYTES

WHOLE_MIB = 2048  # by default all rows are held at once if they fit into this,
CHUNK_MIB = 1024  # else a buffer of this size
SCORE_ROWS = 4096  # a GEMM that only scores is no faster with more
LEAST_ROWS = 512  # a buffer of fewer rows adds to dW so often that computing the logits twice is faster
LEAST_COLUMNS = 2048  # narrower blocks add to dX too often
EDGE = 8  # columns beyond a block, for targets outside of it; rows start at multiples of 16 bytes


@dataclass(frozen=True)
class Head:
    """`logits = hidden @ weight[:vocab].T + bias[:vocab]`; rows of the weight beyond `vocab` are zeros."""

    hidden: Tensor  # (T, H), contiguous
    weight: Tensor  # (ld, H)
    bias: Tensor | None  # (ld,)
    vocab: int

    @property
    def row_bytes(self) -> int:
        """Of the logits of a token."""
        return len(self.weight) * self.weight.element_size()

    def logits(self, rows: Tensor | slice, out: Tensor) -> None:
        """Write the logits of tokens `rows`, padding included, to `out` (len(rows), ld)."""
        hidden = self.hidden[rows] if isinstance(rows, slice) else self.hidden.index_select(0, rows)
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)


@dataclass(frozen=True)
class LabelBatch:
    """What the logits are scored against; see `weighted_loss`."""

    labels: Tensor  # (B, S)
    sample_ids: Tensor | None
    ignore_index: int
    shift: bool
    softcap: float
    token_weights: Tensor | None  # (B, S)
    sample_weights: Tensor | None  # as the ops take them


@dataclass(frozen=True)
class Budget:
    """How much of the logits to hold at a time within `mib` MiB, or by default. dX and dW are not part of it.

    narrow: dW has 2 bytes an element, so several flushes sum it in float32, which takes as much again as dW.
    dx: dX is asked for.
    """

    head: Head
    mib: float | None
    narrow: bool
    dx: bool

    @property
    def _bytes(self) -> int:
        return int((CHUNK_MIB if self.mib is None else self.mib) * 2**20)

    def rows(self, scored: int) -> int:
        """How many of `scored` rows to hold.

        If all of them fit into the budget and the memory of a float32 sum together, all are held: one flush writes dW.
        """
        row = self.head.row_bytes
        spared = self.head.weight.numel() * 2 if self.narrow else 0
        if scored * row <= (WHOLE_MIB if self.mib is None else self.mib) * 2**20 + spared:
            return scored
        room = self._bytes - HIDDEN_BYTES - HIDDEN_BYTES // 4  # a product of dX, and small tensors
        return min(scored, max(room // (row + self.head.hidden[:1].nbytes), 8))  # with dW's operand

    def by_blocks(self, scored: int) -> bool:
        """Whether to hold some columns of all rows instead, see `linear_blocks.py`.

        That is so if very few rows fit, and those columns fit where dW's float32 sum would have been.
        """
        if self.rows(scored) >= min(scored, LEAST_ROWS):
            return False
        spared = self.head.weight.numel() * 2 if self.narrow else 0
        return self._columns(self._bytes + spared, scored, copies=1) >= LEAST_COLUMNS

    def columns(self, kept: int) -> int:
        """How many columns of `kept` rows to hold, a multiple of 64."""
        return max(self._columns(self._bytes, kept, copies=int(kept < len(self.head.hidden))), LEAST_COLUMNS)

    def _columns(self, room: int, kept: int, copies: int) -> int:
        """`copies`: of the kept hidden states, besides the scaled ones."""
        hidden, size = self.head.hidden, self.head.weight.element_size()
        operands = (1 + copies) * kept * hidden.shape[1] * size
        sums = kept * hidden.shape[1] * max(4, size) - hidden.numel() * size if self.dx else 0  # dX follows the rest
        return ((room - operands - sums) // (max(kept, 1) * size) - 2 * EDGE) // 64 * 64

    def score_rows(self, scored: int) -> int:
        """How many of `scored` rows to hold that are only scored, while there are no dX and dW yet."""
        later = self.head.hidden.numel() + self.head.weight.numel() if self.by_blocks(scored) else 0
        held = (self._bytes + later * self.head.weight.element_size()) // self.head.row_bytes
        return min(scored, SCORE_ROWS, max(held, 8))
