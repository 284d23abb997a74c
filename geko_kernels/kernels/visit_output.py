"""What a visit leaves behind: its entry in the outputs and its coefficient in each of its tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from geko_kernels.kernels.visit_means import scored_tokens
from geko_kernels.reference import Reduction

NONE = tl.constexpr(int(Reduction.NONE))


@triton.jit
def store_visits(outputs, entries, entry, live, sample, means, judged, contribution, REDUCTION: tl.constexpr):
    """One entry a visit in floats, ints, flags and, for NONE, the loss."""
    value_ptr, floats_ptr, ints_ptr, flags_ptr = outputs
    items, loss, sure, accuracy = means
    q_value, quality, correct, bucket, weight = judged
    step = entries.to(tl.int64)
    tl.store(floats_ptr + entry, loss, mask=live)
    tl.store(floats_ptr + step + entry, sure, mask=live)
    tl.store(floats_ptr + 2 * step + entry, accuracy, mask=live)
    tl.store(floats_ptr + 3 * step + entry, quality, mask=live)
    tl.store(floats_ptr + 4 * step + entry, q_value, mask=live)
    tl.store(floats_ptr + 5 * step + entry, weight, mask=live)
    tl.store(ints_ptr + entry, sample, mask=live)
    tl.store(ints_ptr + step + entry, items.to(tl.int64), mask=live)
    tl.store(flags_ptr + entry, bucket.to(tl.uint8), mask=live)
    tl.store(flags_ptr + step + entry, correct.to(tl.uint8), mask=live)
    if REDUCTION == NONE:
        tl.store(value_ptr + entry, contribution, mask=live)


@triton.jit
def store_coefficients(
    batch,
    coeff_ptr,
    token_visit_ptr,
    first,
    length,
    longest,
    entry,
    coefficient,
    vocab,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Token by token: the visit's coefficient where the token has a loss, else 0; packed also its entry."""
    for start in range(0, longest, BLOCK):
        offset = start + tl.arange(0, BLOCK)[None, :]
        t = first[:, None] + offset
        inside = offset < length[:, None]
        scored, _ = scored_tokens(batch, t, inside, vocab, SHIFT, PACKED)
        tl.store(coeff_ptr + t, tl.where(scored, coefficient[:, None], 0.0), mask=inside)
        if PACKED:
            tl.store(token_visit_ptr + t, entry[:, None] + tl.zeros_like(t), mask=inside)


@triton.jit
def store_padding(outputs, coeff_ptr, token_visit_ptr, entries, t, sample, visits, REDUCTION: tl.constexpr):
    """Packed: what token t owes where it is padding, and entry t where no visit takes it."""
    if sample == -1:
        tl.store(coeff_ptr + t, 0.0)
        tl.store(token_visit_ptr + t, -1)
    if t >= visits:
        zero = tl.zeros([1], tl.float32)
        none = tl.zeros([1], tl.int32)
        means = (none, zero, zero, zero)
        judged = (zero + 0.5, zero + 1.0, none > 0, none + 2, zero)
        store_visits(outputs, entries, none + t, none == 0, none.to(tl.int64) - 1, means, judged, zero, REDUCTION)
