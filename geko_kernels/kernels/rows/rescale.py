"""Multiplies a large tensor by a number that is nearly always 1, which then costs nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.launch import cdiv
from geko_kernels.kernels.rows.launch import KeyedLaunch, programs_for

BLOCK, PROGRAMS = 4096, 8  # elements at a time, programs on a multiprocessor; all return at once if the factor is 1


@triton.jit
def _rescale_kernel(values_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + at, mask=at < count, other=0.0)
            tl.store(values_ptr + at, (values.to(tl.float32) * factor).to(values.dtype), mask=at < count)


_launch = KeyedLaunch(_rescale_kernel)


def rescale_(values: Tensor, factor: Tensor) -> None:
    """See `reference.rows.rescale_`; `values` contiguous. One launch."""
    count = values.numel()
    if count:
        key = (values.get_device(), values.dtype, count, values.data_ptr() % 16, factor.dtype, factor.data_ptr() % 16)
        _launch(key, programs_for(cdiv(count, BLOCK), PROGRAMS, values), (values, factor, count), {"BLOCK": BLOCK}, 8)
