"""Gathers scaled hidden states for the GEMM of dW, and scatters scaled rows of dX to their tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.launch import next_power_of_2
from geko_kernels.kernels.rows.launch import KeyedLaunch, programs_for

BLOCK, PROGRAMS = 1024, 16  # elements of a row at a time, programs on a multiprocessor


@triton.jit(do_not_specialize=["first", "count", "token_count"])
def _move_rows_kernel(
    out_ptr,
    x_ptr,
    positions_ptr,
    coeff_ptr,
    end_ptr,
    first,
    count,
    token_count,
    columns,
    SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out[i] = x[t] * coeff[t]`, or with SCATTER `out[t] = x[i] * coeff[t]`, t = positions[first + i].

    A coefficient of 0 gives zeros. A position that is no token gathers zeros and scatters nothing.
    """
    if end_ptr is not None:
        count = tl.minimum(count, tl.load(end_ptr))
    width = tl.full([], columns, tl.int64)
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        t = tl.load(positions_ptr + first + i)
        known = (t >= 0) & (t < token_count)
        coefficient = tl.load(coeff_ptr + t, mask=known, other=0.0)
        if SCATTER:
            x, out = x_ptr + i * width, out_ptr + t * width
        else:
            x, out = x_ptr + t * width, out_ptr + i * width
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            values = tl.load(x + column, mask=inside & (coefficient != 0), other=0.0).to(tl.float32) * coefficient
            written = inside & known if SCATTER else inside
            tl.store(out + column, values.to(out_ptr.dtype.element_ty), mask=written)


_launch = KeyedLaunch(_move_rows_kernel)


def _move(
    out: Tensor,
    x: Tensor,
    positions: Tensor,
    coeff: Tensor,
    end: Tensor | None,
    first: int,
    count: int,
    scatter: bool,
) -> None:
    if not count:
        return
    columns = x.shape[1]
    block = min(next_power_of_2(columns), BLOCK)
    programs = programs_for(count, PROGRAMS, x)
    places = (x.data_ptr() % 16, out.data_ptr() % 16, positions.data_ptr() % 16)
    key = (x.get_device(), x.dtype, out.dtype, columns, *places, end is None, scatter)
    args = (out, x, positions, coeff, end, first, count, coeff.shape[0], columns)
    _launch(key, programs, args, {"SCATTER": scatter, "BLOCK": block}, 4)


def gather_rows(hidden: Tensor, positions: Tensor, coeff: Tensor, count: int, end: Tensor | None = None) -> Tensor:
    """See `reference.rows.gather_rows`; `hidden` contiguous. One launch.

    Args: end () int32: rows from this one on are left undefined.
    """
    out = torch.empty((count, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    _move(out, hidden, positions, coeff, end, 0, count, False)
    return out


def scatter_rows_(out: Tensor, product: Tensor, positions: Tensor, coeff: Tensor, first: int) -> None:
    """See `reference.rows.scatter_rows_`; all contiguous. One launch."""
    _move(out, product, positions, coeff, None, first, len(product), True)
