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
LEAST_COLUMNS = 1024  # narrower blocks add to dX as often
EDGE = 8  # columns beyond a block, for targets outside of it; rows start at multiples of 16 bytes


@dataclass(frozen=True)
class Head:
    """`logits = hidden @ weight[:vocab].T + bias[:vocab]`; rows of the weight beyond `vocab` are zeros."""

    hidden: Tensor  # (T, H), contiguous
    weight: Tensor  # (ld, H)
    bias: Tensor | None  # (ld,)
    vocab: int

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


def buffer_rows(head: Head, mib: float | None, narrow: bool, scored: int) -> int:
    """How many of `scored` rows of logits to hold within `mib` MiB; by default `WHOLE_MIB` for all, or `CHUNK_MIB`.

    If dW has 2 bytes an element (`narrow`), several flushes sum it in float32, which takes as much again as dW. If all
    rows fit into the budget and that memory together, all are held, and a single flush writes dW.
    """
    size = head.weight.element_size()
    row = head.weight.shape[0] * size
    spared = head.weight.numel() * 2 if narrow else 0
    if scored * row <= (WHOLE_MIB if mib is None else mib) * 2**20 + spared:
        return scored
    room = int((CHUNK_MIB if mib is None else mib) * 2**20) - HIDDEN_BYTES - HIDDEN_BYTES // 4  # dX, and small tensors
    return min(scored, max(room // (row + head.hidden.shape[1] * size), 8))  # with dW's operand


def block_columns(head: Head, mib: float | None, narrow: bool, dx: bool, scored: int) -> int:
    """How many columns of logits of all `scored` rows to hold within `mib` MiB; 0 to hold whole rows instead.

    Args: narrow: as in `buffer_rows`; dx: whether dX is asked for.
    """
    if buffer_rows(head, mib, narrow, scored) >= min(scored, LEAST_ROWS):
        return 0
    columns, size = head.hidden.shape[1], head.weight.element_size()
    operands = 2 * scored * columns * size  # the kept hidden states, and the same scaled
    sums = scored * columns * max(4, size) - head.hidden.numel() * size if dx else 0
    room = (CHUNK_MIB if mib is None else mib) * 2**20 - operands - sums
    held = (int(room // (scored * size)) - 2 * EDGE) // 64 * 64
    return held if held >= LEAST_COLUMNS else 0


def score_rows(head: Head, mib: float | None, scored: int) -> int:
    """How many rows of logits to hold that are only scored, before there are dX and dW, within `mib` MiB and those."""
    size = head.weight.element_size()
    later = (head.hidden.numel() + head.weight.numel()) * size
    held = int((CHUNK_MIB if mib is None else mib) * 2**20 + later) // (head.weight.shape[0] * size)
    return min(scored, SCORE_ROWS, max(held, 8))
