"""Multiplication of a large tensor by a number that is 1 nearly always, and then free."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PROGRAMS = 2048  # several a multiprocessor; all leave at once where the factor is 1


@triton.jit
def _rescale_kernel(values_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + at, mask=at < count, other=0.0)
            tl.store(values_ptr + at, (values.to(tl.float32) * factor).to(values.dtype), mask=at < count)


def rescale_(values: Tensor, factor: Tensor) -> None:
    """See `reference_rows.rescale_`; `values` contiguous. One launch."""
    count = values.numel()
    if count:
        programs = min(triton.cdiv(count, BLOCK), PROGRAMS)
        _rescale_kernel[(programs,)](values, factor, count, BLOCK=BLOCK, num_warps=8)
