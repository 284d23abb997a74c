"""Statistics and unscaled gradient in one launch: a row is read from memory once, and again while it is in cache.

Two launches move 6 bytes an element of bf16, this one 4. The rows in flight have to fit into the L2 cache, so a few
large programs a multiprocessor take one row after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.logits_grad import gradient_of
from geko_kernels.kernels.token_stats import _contiguous_row, _store_statistics

BLOCK, WARPS, PROGRAMS = 16384, 32, 1  # elements and warps of a program, programs a multiprocessor


@triton.jit(do_not_specialize=["count", "vocab", "softcap"])
def _score_rows_kernel(
    logits_ptr, row_stride, targets_ptr, tokens_ptr, count, vocab, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    stride = tl.full([], row_stride, tl.int64)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        x = logits_ptr + row * stride
        target = tl.load(targets_ptr + row)
        top, total, z_target = _contiguous_row(x, target, vocab, softcap, SOFTCAP, BLOCK)
        _store_statistics(tokens_ptr, row, True, True, top, total, z_target, count)
        log_sum = tl.log(total)
        tl.debug_barrier()  # all have read the target's logit
        blocks = tl.cdiv(row_stride, BLOCK)
        for i in range(blocks):  # the last block first: the first pass left it in cache
            column = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            inside = column < row_stride
            logits = tl.load(x + column, mask=inside, other=0.0, eviction_policy="evict_first")
            grad = gradient_of(logits, column, target, top, log_sum, 1.0, softcap, SOFTCAP)
            tl.store(x + column, tl.where(column < vocab, grad, 0.0).to(x.dtype.element_ty), mask=inside)


def score_rows_(logits: Tensor, targets: Tensor, vocab: int, softcap: float) -> Tensor:
    """See `reference_rows.score_rows_`; `logits` contiguous. One launch."""
    count, row_stride = logits.shape
    tokens = torch.empty((5, count), dtype=torch.float32, device=logits.device)
    if count:
        block = min(max(triton.next_power_of_2(row_stride), 128), BLOCK)
        programs = count
        if logits.is_cuda:
            programs = PROGRAMS * torch.cuda.get_device_properties(logits.device).multi_processor_count
        _score_rows_kernel[(min(count, programs * BLOCK // block),)](
            *(logits, row_stride, targets, tokens, count, vocab, softcap),
            SOFTCAP=softcap != 0,
            BLOCK=block,
            num_warps=max(block * WARPS // BLOCK, 1),
        )
    return tokens
