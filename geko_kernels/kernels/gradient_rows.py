"""Gradients of kept rows, unscaled, over their logits or into the slots of rows that are not kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.logits_grad import gradient_of, gradient_shape

STEPS = 8  # blocks a program: with one, 260 thousand programs that find nothing to do cost 0.2 ms


@triton.jit(do_not_specialize=["first", "last", "label_b", "label_s", "length", "token_count", "softcap", "parts"])
def _gradient_rows_kernel(
    logits_ptr,
    row_stride,
    positions_ptr,
    sources_ptr,
    end_ptr,
    labels_ptr,
    label_b,
    label_s,
    length,
    tokens_ptr,
    token_count,
    first,
    last,
    vocab,
    softcap,
    parts,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MOVE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program STEPS blocks of a slot; the last slots first, which the statistics left in cache."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    slot = first + program // parts
    end = last
    if end_ptr is not None:
        end = tl.minimum(last, tl.load(end_ptr))
    if slot < end:
        source = slot.to(tl.int64)
        if sources_ptr is not None:
            source = tl.load(sources_ptr + slot)
        out = logits_ptr + slot.to(tl.int64) * row_stride
        x = logits_ptr + source * row_stride
        begin = (program % parts) * (STEPS * BLOCK)
        stop = tl.minimum(begin + STEPS * BLOCK, row_stride)  # padding too: whole vectors are read and written
        if MOVE:
            if source != slot:
                for start in range(begin, stop, BLOCK):
                    column = start + tl.arange(0, BLOCK)
                    tl.store(out + column, tl.load(x + column, mask=column < stop), mask=column < stop)
        else:
            t = tl.load(positions_ptr + slot)
            b, s = t // length, t % length
            target = tl.load(labels_ptr + b * label_b + (s + 1 if SHIFT else s) * label_s)
            top = tl.load(tokens_ptr + token_count.to(tl.int64) + t)
            log_sum = tl.load(tokens_ptr + 2 * token_count.to(tl.int64) + t)
            for start in range(begin, stop, BLOCK):
                column = start + tl.arange(0, BLOCK)
                logits = tl.load(x + column, mask=column < stop, other=0.0)
                grad = gradient_of(logits, column, target, top, log_sum, 1.0, softcap, SOFTCAP)
                grad = tl.where(column < vocab, grad, 0.0).to(logits_ptr.dtype.element_ty)
                tl.store(out + column, grad, mask=column < stop)


def gradient_rows_(
    logits: Tensor,
    positions: Tensor,
    sources: Tensor | None,
    end: Tensor | None,
    labels: Tensor,
    tokens: Tensor,
    first: int,
    last: int,
    vocab: int,
    shift: bool,
    softcap: float,
    ready: bool,
) -> None:
    """See `reference_rows.gradient_rows_`; `logits` contiguous. One launch, whose programs beyond `end` do nothing."""
    if first == last:
        return
    row_stride = logits.shape[1]
    _, block, warps = gradient_shape(row_stride, True)
    parts = triton.cdiv(row_stride, STEPS * block)
    _gradient_rows_kernel[((last - first) * parts,)](
        *(logits, row_stride, positions, sources, end, labels, *labels.stride(), labels.shape[1]),
        *(tokens, labels.numel(), first, last, vocab, softcap, parts),
        SHIFT=shift,
        SOFTCAP=softcap != 0,
        MOVE=ready,
        BLOCK=block,
        STEPS=STEPS,
        num_warps=warps,
    )
