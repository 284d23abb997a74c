"""Makes rows of coefficient 0 zeros, so that they may enter a GEMM whatever they held."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.rows.launch import KeyedLaunch, programs_for

BLOCK, PROGRAMS = 4096, 8  # elements at a time, programs on a multiprocessor


@triton.jit(do_not_specialize=["count", "token_count"])
def _clear_rows_kernel(tile_ptr, positions_ptr, coeff_ptr, count, token_count, columns, BLOCK: tl.constexpr):
    """A position that is no token clears its row."""
    width = tl.full([], columns, tl.int64)
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        t = tl.load(positions_ptr + i)
        known = (t >= 0) & (t < token_count)
        if tl.load(coeff_ptr + t, mask=known, other=0.0) == 0.0:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], tile_ptr.dtype.element_ty)
                tl.store(tile_ptr + i * width + column, zeros, mask=column < columns)


_launch = KeyedLaunch(_clear_rows_kernel)


def clear_rows_(tile: Tensor, positions: Tensor, coeff: Tensor) -> None:
    """See `reference.rows.clear_rows_`; `tile` contiguous. One launch."""
    count, columns = tile.shape
    if tile.numel():
        key = (tile.get_device(), tile.dtype, columns, tile.data_ptr() % 16, positions.data_ptr() % 16)
        args = (tile, positions, coeff, count, coeff.shape[0], columns)
        _launch(key, programs_for(count, PROGRAMS, tile), args, {"BLOCK": BLOCK}, 8)
