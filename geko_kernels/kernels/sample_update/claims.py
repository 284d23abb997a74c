"""Which visit writes the table: of several visits of one sample, the last finite one. Nothing else depends on order.

`prepare_visits` has written the highest slot of each sample to `claim`. Nearly always that is the sample's only visit,
and finite. The search below runs for a visit that lost its claim to a later one, which may turn out not to be finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from geko_kernels.kernels.batch import visit_starts
from geko_kernels.kernels.sample_update.means import is_finite, run_length, visit_means

SEARCH_BLOCK = tl.constexpr(128)  # small: the code is rare and must not cost registers or compile time


@triton.jit
def _finite_visit(
    batch,
    token_stats,
    slot,
    sample,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 if the visit at `slot` is counted and its means are finite."""
    _, _, _, _, _, _, length, _ = batch
    first = slot * length
    if PACKED:
        first = slot
        length = run_length(batch, slot, sample, BLOCK)
    one = tl.zeros([1], tl.int32)
    _, items, _, loss, sure, _ = visit_means(
        batch, token_stats, one + first, one + length, length, one == 0, SHIFT, PACKED, 1, BLOCK
    )
    return tl.max(((items > 0) & is_finite(loss, sure)).to(tl.int32), 0)


@triton.jit
def _superseded(
    batch,
    token_stats,
    slot,
    sample,
    entries,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 if a later visit of the same sample is counted and finite: then that one writes the row. Rare, so serial."""
    _, _, _, _, _, _, row_length, _ = batch
    step = 1 if PACKED else row_length  # tokens per slot
    found = 0
    start = slot + 1
    while (start < entries) & (found == 0):
        later = start + tl.arange(0, BLOCK)
        inside = later < entries
        ids, starts = visit_starts(batch, later * step, inside, PACKED)
        match = tl.min(tl.where(starts & (ids == sample), later, entries), 0)
        start += BLOCK
        if match < entries:
            start = match + 1
            found = _finite_visit(batch, token_stats, match, sample, SHIFT, PACKED, BLOCK)
    return found


@triton.jit
def writers(
    batch,
    token_stats,
    claim_ptr,
    slot,
    sample,
    known,
    finite,
    entries,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which visits write their sample's row: the last finite one of each sample. Clears the claims."""
    mine = known & (tl.load(claim_ptr + sample, mask=known, other=0) == slot + 1)
    tl.debug_barrier()  # every thread has read its claim
    tl.store(claim_ptr + sample, tl.zeros([ROWS], tl.int32), mask=mine)
    doubtful = finite & ~mine
    late = tl.zeros([ROWS], tl.int32)
    if tl.max(doubtful.to(tl.int32), 0) > 0:
        lane = tl.arange(0, ROWS)
        for i in range(ROWS):
            here = (lane == i) & doubtful
            if tl.max(here.to(tl.int32), 0) > 0:
                my_slot = tl.max(tl.where(here, slot, 0), 0)
                my_sample = tl.max(tl.where(here, sample, 0), 0)
                found = _superseded(batch, token_stats, my_slot, my_sample, entries, SHIFT, PACKED, SEARCH_BLOCK)
                late = tl.where(here, found, late)
    return finite & (late == 0)
