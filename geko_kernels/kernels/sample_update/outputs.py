"""The outputs: the visits' entries, the coefficient of each token, and the loss of the batch."""

from __future__ import annotations

import triton
import triton.language as tl

from geko_kernels.kernels.sample_update.means import add_exactly, joined, scored_tokens, token_weight
from geko_kernels.kernels.sample_update.prepare import ITEMS_PLANE, LOSS_PLANE, plane
from geko_kernels.reference.ops import Reduction

NONE = tl.constexpr(int(Reduction.NONE))
SUM = tl.constexpr(int(Reduction.SUM))


@triton.jit
def store_visits(outputs, entries, entry, live, sample, means, judged, contribution, REDUCTION: tl.constexpr):
    """Writes each visit's entry in floats, ints, flags and, for NONE, the loss."""
    value_ptr, floats_ptr, ints_ptr, flags_ptr, _, _ = outputs
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
    token_stats,
    outputs,
    first,
    lengths,
    longest,
    entry,
    coefficient,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each token's coefficient, 0 without a loss, and, packed, its visit's entry."""
    _, _, vocab, token_weights_ptr = token_stats
    _, _, _, _, coeff_ptr, token_visit_ptr = outputs
    for start in range(0, longest, BLOCK):
        offset = start + tl.arange(0, BLOCK)[None, :]
        t = first[:, None] + offset
        inside = offset < lengths[:, None]
        scored, _wrong = scored_tokens(batch, t, inside, vocab, SHIFT, PACKED)
        by_token = coefficient[:, None]
        if token_weights_ptr is not None:
            by_token *= token_weight(token_weights_ptr, t, scored, SHIFT)
        tl.store(coeff_ptr + t, tl.where(scored, by_token, 0.0), mask=inside)
        if PACKED:
            tl.store(token_visit_ptr + t, entry[:, None] + tl.zeros_like(t), mask=inside)


@triton.jit
def store_padding(outputs, entries, t, samples, visits, REDUCTION: tl.constexpr):
    """Packed: writes the outputs of padding tokens t and of unused entries t."""
    _, _, _, _, coeff_ptr, token_visit_ptr = outputs
    padding = (t < entries) & (samples == -1)
    tl.store(coeff_ptr + t, tl.zeros_like(t).to(tl.float32), mask=padding)
    tl.store(token_visit_ptr + t, tl.zeros_like(t) - 1, mask=padding)
    unused = (t >= visits) & (t < entries)
    none = tl.zeros_like(t)
    zero = none.to(tl.float32)
    means = (none, zero, zero, zero)
    judged = (zero + 0.5, zero + 1.0, none > 0, none + 2, zero)
    store_visits(outputs, entries, t, unused, none.to(tl.int64) - 1, means, judged, zero, REDUCTION)


@triton.jit
def _total(
    scratch_ptr,
    entries,
    partials,
    num_items_ptr,
    value_ptr,
    scale_ptr,
    REDUCTION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The last program to arrive adds all partial sums in a fixed order, and divides."""
    loss = tl.zeros([1024], tl.float32)
    lost = tl.zeros([1024], tl.float32)
    items = tl.zeros([1024], tl.int32)
    weighed = tl.zeros([1024], tl.float32)
    weighed_lost = tl.zeros([1024], tl.float32)
    for start in range(0, partials, 1024):
        i = start + tl.arange(0, 1024)
        inside = i < partials
        bits = tl.load(plane(scratch_ptr, LOSS_PLANE, entries) + i, mask=inside, other=0, cache_modifier=".cg")
        loss, lost = add_exactly(loss, lost, bits.to(tl.float32, bitcast=True))
        part = tl.load(plane(scratch_ptr, ITEMS_PLANE, entries) + i, mask=inside, other=0, cache_modifier=".cg")
        if WHOLE:
            items += part
        else:
            weighed, weighed_lost = add_exactly(weighed, weighed_lost, part.to(tl.float32, bitcast=True))
    value = tl.sum(joined(loss, lost), 0)
    scale = 1.0
    if REDUCTION != SUM:  # MEAN, TOKEN_MEAN
        if num_items_ptr is not None:
            divisor = tl.load(num_items_ptr).to(tl.float32)
        elif WHOLE:
            divisor = tl.sum(items, 0).to(tl.float32)
        else:
            divisor = tl.sum(joined(weighed, weighed_lost), 0)
        scale = tl.where(divisor > 0, tl.div_rn(1.0, divisor), 0.0)
        value = tl.where(divisor > 0, tl.div_rn(value, divisor), value * 0.0)
    tl.store(scale_ptr, scale)
    tl.store(value_ptr, value)


@triton.jit
def finish(
    scratch_ptr,
    entries,
    loss,
    items,
    num_items_ptr,
    value_ptr,
    scale_ptr,
    REDUCTION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write this program's part of the loss and of the divisor (int32 if WHOLE); the last program adds all parts."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if REDUCTION == NONE:
        if program == 0:
            tl.store(scale_ptr, 1.0)
    else:
        tl.store(plane(scratch_ptr, LOSS_PLANE, entries) + program, loss.to(tl.int32, bitcast=True))
        if WHOLE:
            tl.store(plane(scratch_ptr, ITEMS_PLANE, entries) + program, items)
        else:
            tl.store(plane(scratch_ptr, ITEMS_PLANE, entries) + program, items.to(tl.int32, bitcast=True))
        tl.debug_barrier()
        if tl.atomic_add(scratch_ptr, 1, sem="acq_rel") == programs - 1:
            _total(scratch_ptr, entries, programs, num_items_ptr, value_ptr, scale_ptr, REDUCTION, WHOLE)
