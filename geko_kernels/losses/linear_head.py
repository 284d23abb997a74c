"""The head and the labels of `weighted_linear_loss`, and how much of its logits to hold at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geko_kernels import ops
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

    def logits(self, rows: Tensor | slice, out: Tensor) -> None:
        """Write the logits of tokens `rows`, padding included, to `out` (len(rows), ld)."""
        hidden = self.hidden[rows] if isinstance(rows, slice) else self.hidden.index_select(0, rows)
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)


def make_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """The head with `hidden` contiguous and no lazy view, and weight and bias in its dtype.

    For a GPU V is padded, since cuBLAS needs aligned rows: it ran at 94 TFLOP/s at V = 50257, at 627 at 50304 (H200,
    bf16).
    """
    vocab, dtype = weight.shape[0], hidden.dtype
    if vocab % 8 and (weight.is_cuda or ops.backend_name(weight.device, dtype) == "triton"):
        padded = -(-vocab // 64) * 64
        weight = torch.nn.functional.pad(weight.to(dtype), (0, 0, 0, padded - vocab))
        bias = torch.nn.functional.pad(bias.to(dtype), (0, padded - vocab)) if bias is not None else None
    weight = weight if weight.dtype == dtype else weight.to(dtype)
    bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    return Head(hidden.contiguous().resolve_neg(), weight, bias, vocab)  # the ops read its memory


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


class Budget:
    """How much of the logits to hold at a time within `mib` MiB, or by default. dX and dW are not part of it.

    Args:
        narrow: dW has 2 bytes an element, so several flushes sum it in float32, which takes as much again as dW.
        dx, dw: dX and dW are asked for.
    """

    def __init__(self, head: Head, mib: float | None, narrow: bool, dx: bool, dw: bool) -> None:
        (self.tokens, self.width), self.size = head.hidden.shape, head.weight.element_size()
        self.vocab = head.weight.shape[0]
        self.row = self.vocab * self.size
        self.bytes = int((CHUNK_MIB if mib is None else mib) * 2**20)
        self.spared = self.vocab * self.width * 2 if narrow else 0
        self.whole = self.spared + (WHOLE_MIB * 2**20 if mib is None else self.bytes)
        self.dx, self.dw = dx, dw

    def rows(self, scored: int) -> int:
        """How many of `scored` rows to hold.

        If all of them fit into the budget and the memory of a float32 sum together, all are held: one flush writes dW.
        """
        if scored * self.row <= self.whole:
            return scored
        room = self.bytes - HIDDEN_BYTES - HIDDEN_BYTES // 4  # a product of dX, and small tensors
        return min(scored, max(room // (self.row + self.width * self.size), 8))  # with dW's operand

    def by_blocks(self, scored: int) -> bool:
        """Whether to hold some columns of all rows instead, see `linear_blocks.py`.

        That is so if very few rows fit, and those columns fit where dW's float32 sum would have been.
        """
        if self.rows(scored) >= min(scored, LEAST_ROWS):
            return False
        return self._columns(self.bytes + self.spared, scored, copies=1) >= LEAST_COLUMNS

    def columns(self, kept: int) -> int:
        """How many columns of `kept` rows to hold, a multiple of 64."""
        return max(self._columns(self.bytes, kept, copies=int(kept < self.tokens)), LEAST_COLUMNS)

    def _columns(self, room: int, kept: int, copies: int) -> int:
        """`copies`: of the kept hidden states, besides the scaled ones."""
        operands = (1 + copies) * kept * self.width * self.size
        sums = (
            (kept * max(4, self.size) - self.tokens * self.size) * self.width if self.dx else 0
        )  # dX follows the rest
        return ((room - operands - sums) // (max(kept, 1) * self.size) - 2 * EDGE) // 64 * 64

    def score_rows(self, scored: int) -> int:
        """How many of `scored` rows to hold that are only scored, while there are no dX and dW yet, if they come."""
        later = (self.tokens * self.dx + self.vocab * self.dw) * self.width * self.size
        room = self.bytes + (later if self.by_blocks(scored) else 0)
        return min(scored, SCORE_ROWS, max(room // self.row, 8))
