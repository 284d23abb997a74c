"""d(bias): the weighted sum of the rows of a tile of gradients, without loss of precision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.launch import cdiv
from geko_kernels.kernels.rows.launch import KeyedLaunch
from geko_kernels.kernels.sample_update.means import add_exactly, joined

BLOCK, STEP, PART = 256, 16, 256  # columns of a program, rows at a time, rows of a program


@triton.jit(do_not_specialize=["rows", "blocks"])
def _column_sums_kernel(
    out_ptr,
    tile_ptr,
    by_row_ptr,
    columns,
    rows,
    blocks,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PART: tl.constexpr,
):
    """Program (block, part) sums PART rows of BLOCK columns: STEP rows at a time as a tree, those sums exactly."""
    part = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    width = tl.full([], columns, tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, rows), STEP):
        row = start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(tile_ptr + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
        factor = tl.load(by_row_ptr + row, mask=row < rows, other=0.0)
        total, lost = add_exactly(total, lost, tl.sum(x.to(tl.float32) * factor[:, None], 0))
    tl.store(out_ptr + part * width + column, joined(total, lost), mask=column < columns)


_launch = KeyedLaunch(_column_sums_kernel)


def column_sums(tile: Tensor, by_row: Tensor) -> Tensor:
    """See `reference.rows.column_sums`; `tile` and `by_row` contiguous. One launch, and torch's sum of the parts."""
    rows, columns = tile.shape
    parts, blocks = cdiv(rows, PART), cdiv(columns, BLOCK)
    out = torch.empty(parts, columns, dtype=torch.float32, device=tile.device)
    if out.numel():
        key = (tile.get_device(), tile.dtype, columns, tile.data_ptr() % 16, by_row.data_ptr() % 16)
        args = (out, tile, by_row, columns, rows, blocks)
        _launch(key, parts * blocks, args, {"BLOCK": BLOCK, "STEP": STEP, "PART": PART}, 4)
    return out.sum(0, dtype=torch.float64)
