"""Unscaled gradients of kept rows, written over their logits or into the slots of rows that are not kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.launch import cdiv, next_power_of_2
from geko_kernels.kernels.logits_grad import gradient_of
from geko_kernels.kernels.rows.launch import KeyedLaunch, programs_for

BLOCK, WARPS, STEPS, PROGRAMS = 4096, 8, 4, 8  # elements, warps, blocks in a piece, programs on a multiprocessor


@triton.jit
def _move(x, out, row_stride, BLOCK: tl.constexpr):
    for start in range(0, row_stride, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < row_stride  # with padding: whole vectors are read and written
        tl.store(out + column, tl.load(x + column, mask=inside), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("row_count", "label_b", "label_s", "length", "token_count"),
        *("first", "last", "ready_from", "vocab", "softcap", "pieces"),
    ]
)
def _gradient_rows_kernel(
    logits_ptr,
    row_stride,
    row_count,
    positions_ptr,
    sources_ptr,
    end_ptr,
    labels_ptr,
    label_b,
    label_s,
    length,
    statistics_ptr,
    token_count,
    first,
    last,
    ready_from,
    vocab,
    softcap,
    pieces,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The programs share the pieces of all slots; last slots first, as they are still in cache.

    A position that is no token, or a source that is no row, gives NaN.
    """
    end = last
    if end_ptr is not None:
        end = tl.minimum(last, tl.load(end_ptr))
    stride = tl.full([], row_stride, tl.int64)
    behind = tl.minimum(end, ready_from)
    for item in range(tl.program_id(0), (behind - first) * pieces, tl.num_programs(0)):
        slot = behind - 1 - item // pieces
        source = tl.full([], 0, tl.int64) + slot
        if sources_ptr is not None:
            source = tl.load(sources_ptr + slot)
        known_source = (source >= 0) & (source < row_count)
        if source < ready_from:
            t = tl.load(positions_ptr + slot)
            known = (t >= 0) & (t < token_count)
            b, s = t // length, t % length
            if SHIFT:
                s = tl.minimum(s + 1, length - 1)  # the last position predicts nothing and is never kept
            target = tl.load(labels_ptr + b * label_b + s * label_s, mask=known, other=-1)
            step = tl.full([], 0, tl.int64) + token_count
            top = tl.load(statistics_ptr + step + t, mask=known, other=float("nan"))
            log_sum = tl.load(statistics_ptr + 2 * step + t, mask=known, other=0.0)
            begin = item % pieces * (STEPS * BLOCK)
            for start in range(begin, tl.minimum(begin + STEPS * BLOCK, row_stride), BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < row_stride
                x = tl.load(logits_ptr + source * stride + column, mask=inside & known_source, other=float("nan"))
                grad = gradient_of(x, column, target, top, log_sum, 1.0, softcap, SOFTCAP)
                grad = tl.where(column < vocab, grad, 0.0).to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + slot * stride + column, grad, mask=inside)
        elif known_source & (item % pieces == 0):
            _move(logits_ptr + source * stride, logits_ptr + slot * stride, row_stride, BLOCK)
    if sources_ptr is not None:
        for slot in range(tl.maximum(first, behind) + tl.program_id(0), end, tl.num_programs(0)):
            source = tl.load(sources_ptr + slot)
            if (source != slot) & (source >= 0) & (source < row_count):
                _move(logits_ptr + source * stride, logits_ptr + slot * stride, row_stride, BLOCK)


_launch = KeyedLaunch(_gradient_rows_kernel)


def gradient_rows_(
    logits: Tensor,
    positions: Tensor,
    sources: Tensor | None,
    end: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    first: int,
    last: int,
    ready_from: int,
    vocab: int,
    shift: bool,
    softcap: float,
) -> None:
    """See `reference.rows.gradient_rows_`; `logits` contiguous. One launch."""
    row_stride = logits.shape[1]
    last = min(last, *(len(x) for x in (logits, positions, sources) if x is not None))  # `end` may be less, not more
    block = min(next_power_of_2(row_stride), BLOCK)
    pieces = cdiv(row_stride, STEPS * block)
    programs = programs_for(max(1, (last - first) * pieces), PROGRAMS, logits)
    constants = {"SHIFT": shift, "SOFTCAP": softcap != 0, "BLOCK": block, "STEPS": STEPS}
    places = (positions.data_ptr() % 16, labels.data_ptr() % 16, None if sources is None else sources.data_ptr() % 16)
    key = (logits.get_device(), logits.dtype, row_stride, *places, end is None, *constants.values())
    args = (
        *(logits, row_stride, len(logits), positions, sources, end, labels, *labels.stride(), labels.shape[1]),
        *(statistics, labels.numel(), first, last, ready_from, vocab, softcap, pieces),
    )
    _launch(key, programs, args, constants, max(block * WARPS // BLOCK, 1))
