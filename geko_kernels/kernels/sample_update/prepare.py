"""Visit preparation: what the sample update needs before any of its programs may write the table.

It flags bad labels and ids, counts the visits that start in each tile (packed ids), copies the table's row of each
visit to scratch, and claims the row for the last visit of its sample. It runs inside the launch of the token
statistics, or alone before `sample_update_`.

Scratch, int32, for M entries (row form M = B, packed M = T; floats by their bits):
    [0] arrivals in the sample update;  [1 + k M + e], k = 0: loss of program e, 1: its items,
    2 + c: column c of the old row of the visit at slot e (slot: row of the batch, or packed its first token);
    [1 + 10 M + i]: visits that start in tile i (packed).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.batch import BATCH_INTS, id_strides, token_target, visit_starts
from geko_kernels.kernels.launch import Launch, cdiv

PREP_TILE = 256  # tokens of a program
HISTORY = tl.constexpr(5)
NO_ERROR = tl.constexpr(2**63 - 1)
# planes of scratch, M entries each, from word 1 on
LOSS_PLANE = tl.constexpr(0)
ITEMS_PLANE = tl.constexpr(1)
Q_PLANE = tl.constexpr(2)
SEEN_PLANE = tl.constexpr(3)
BUCKET_PLANE = tl.constexpr(4)
HISTORY_PLANE = tl.constexpr(5)
COUNT_PLANE = tl.constexpr(10)


@triton.jit
def plane(scratch_ptr, index: tl.constexpr, entries):
    """Start of a plane of scratch."""
    return scratch_ptr + 1 + entries.to(tl.int64) * index


@triton.jit
def _error_key(position, IS_LABEL: tl.constexpr, value):
    """See `reference.layout.error_key`."""
    low = tl.minimum(tl.maximum(value, -2147483648), 2147483647) & 0xFFFFFFFF
    return (tl.minimum(position, 1073741823).to(tl.int64) << 33) | (IS_LABEL << 32) | low


@triton.jit
def _flag_bad_values(
    error_ptr,
    batch,
    t,
    live,
    sample,
    starts,
    num_samples,
    vocab,
    HAS_TABLE: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
):
    target, asked = token_target(batch, t, live, SHIFT, PACKED)
    bad = asked & ((target < 0) | (target >= vocab))
    key = tl.where(bad, _error_key(t, 1, target), NO_ERROR)
    if HAS_TABLE:
        bad = starts & ((sample < -1) | (sample >= num_samples))
        key = tl.minimum(key, tl.where(bad, _error_key(t, 0, sample), NO_ERROR))
    first = tl.min(key, 0)
    if first < NO_ERROR:
        tl.atomic_min(error_ptr, first)


@triton.jit
def prepare_visits(
    tile,
    batch,
    table,
    error_ptr,
    scratch_ptr,
    token_count,
    vocab,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Prepare the visits that start in tokens [tile * TILE, (tile + 1) * TILE)."""
    _, _, _, _, _, _, length, _ = batch
    q_value_ptr, loss_history_ptr, times_seen_ptr, bucket_ptr, claim_ptr, num_samples = table
    t = tile * TILE + tl.arange(0, TILE)
    live = t < token_count
    sample, starts = visit_starts(batch, t, live, PACKED)
    entries = token_count if PACKED else token_count // length
    slot = t if PACKED else t // length
    if tile == 0:
        tl.store(scratch_ptr, 0)
    if PACKED:
        tl.store(plane(scratch_ptr, COUNT_PLANE, entries) + tile, tl.sum(starts.to(tl.int32), 0))
    if error_ptr is not None:
        HAS_TABLE: tl.constexpr = q_value_ptr is not None
        _flag_bad_values(error_ptr, batch, t, live, sample, starts, num_samples, vocab, HAS_TABLE, SHIFT, PACKED)
    if q_value_ptr is not None:
        known = starts & (sample >= 0) & (sample < num_samples)
        q_value = tl.load(q_value_ptr + sample, mask=known, other=0.5)
        seen = tl.load(times_seen_ptr + sample, mask=known, other=0)
        bucket = tl.load(bucket_ptr + sample, mask=known, other=2)
        tl.store(plane(scratch_ptr, Q_PLANE, entries) + slot, q_value.to(tl.int32, bitcast=True), mask=starts)
        tl.store(plane(scratch_ptr, SEEN_PLANE, entries) + slot, seen, mask=starts)
        tl.store(plane(scratch_ptr, BUCKET_PLANE, entries) + slot, bucket.to(tl.int32), mask=starts)
        for i in tl.static_range(HISTORY):
            loss = tl.load(loss_history_ptr + sample * HISTORY + i, mask=known, other=0.0)
            tl.store(
                plane(scratch_ptr, HISTORY_PLANE + i, entries) + slot, loss.to(tl.int32, bitcast=True), mask=starts
            )
        if UPDATE:
            tl.atomic_max(claim_ptr + sample, slot + 1, mask=known)


@triton.jit(do_not_specialize=BATCH_INTS)
def _visit_prep_kernel(
    labels_ptr,
    ids_ptr,
    q_value_ptr,
    loss_history_ptr,
    times_seen_ptr,
    bucket_ptr,
    claim_ptr,
    error_ptr,
    scratch_ptr,
    label_b,
    label_s,
    id_b,
    id_s,
    length,
    ignore_index,
    token_count,
    vocab,
    num_samples,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    TILE: tl.constexpr,
):
    batch = (labels_ptr, label_b, label_s, ids_ptr, id_b, id_s, length, ignore_index)
    table = (q_value_ptr, loss_history_ptr, times_seen_ptr, bucket_ptr, claim_ptr, num_samples)
    tile = tl.program_id(0)
    prepare_visits(tile, batch, table, error_ptr, scratch_ptr, token_count, vocab, SHIFT, PACKED, UPDATE, TILE)


def scratch_words(labels: Tensor, packed: bool) -> int:
    """int32 words that the preparation passes to the sample update; none needs an initial value."""
    count = labels.numel()
    entries, tiles = (count, cdiv(count, PREP_TILE)) if packed else (labels.shape[0], 0)
    return 1 + 10 * entries + tiles


def visit_prep_launch(
    labels: Tensor,
    sample_ids: Tensor | None,
    num_samples: int,
    vocab: int,
    ignore_index: int,
    shift: bool,
    update: bool,
) -> Launch:
    """The preparation alone. Pointers: labels, sample_ids, q_value, loss_history, times_seen, bucket, claim, error,
    scratch.
    """
    count = labels.numel()
    packed = sample_ids is not None and sample_ids.dim() == 2
    numbers = (
        *(*labels.stride(), *id_strides(sample_ids), labels.shape[1], ignore_index),
        *(count, vocab, num_samples),
    )
    constants = {"SHIFT": shift, "PACKED": packed, "UPDATE": update, "TILE": PREP_TILE}
    return Launch(_visit_prep_kernel, cdiv(count, PREP_TILE), numbers, constants, 4)
