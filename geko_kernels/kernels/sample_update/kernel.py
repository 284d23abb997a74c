"""Sample update: segment means, learning state, bucket and weight of each visit, and the loss, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.columns import num_samples_of
from geko_kernels.kernels.batch import BATCH_INTS, id_strides, token_sample, visit_starts
from geko_kernels.kernels.launch import MOST, Launch, cdiv, next_power_of_2
from geko_kernels.kernels.memory import Outputs, room_apart
from geko_kernels.kernels.sample_update.claims import writers
from geko_kernels.kernels.sample_update.judge import judge_visits, old_rows, write_rows
from geko_kernels.kernels.sample_update.means import add_exactly, is_finite, joined, run_length, visit_means
from geko_kernels.kernels.sample_update.outputs import finish, store_coefficients, store_padding, store_visits
from geko_kernels.kernels.sample_update.prepare import (
    COUNT_PLANE,
    PREP_TILE,
    plane,
    visit_prep_launch,
)
from geko_kernels.kernels.table import pointers, prepared_of
from geko_kernels.reference import ops as reference
from geko_kernels.reference.ops import Reduction

TOKEN_MEAN = tl.constexpr(int(Reduction.TOKEN_MEAN))
PACKED_GROUP = 16  # tokens of a program; a divisor of PREP_TILE


@triton.jit
def _locate_packed(batch, scratch_ptr, entries, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Packed: positions and samples of the program's tokens, which start a visit; the first entry; all visits."""
    t = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    samples, starts = visit_starts(batch, t, t < entries, True)
    my_tile = tl.program_id(0) * GROUP // TILE
    tiles = tl.cdiv(entries, TILE)
    before = tl.zeros([TILE], tl.int32)
    visits = tl.zeros([TILE], tl.int32)
    for start in range(0, tiles, TILE):
        tile = start + tl.arange(0, TILE)
        count = tl.load(plane(scratch_ptr, COUNT_PLANE, entries) + tile, mask=tile < tiles, other=0)
        visits += count
        before += tl.where(tile < my_tile, count, 0)
    neighbour = my_tile * TILE + tl.arange(0, TILE)
    _, others = visit_starts(batch, neighbour, neighbour < tl.program_id(0) * GROUP, True)
    return t, samples, starts, tl.sum(before + others.to(tl.int32), 0), tl.sum(visits, 0)


@triton.jit
def _update_visits(
    batch,
    token_stats,
    where,
    table,
    outputs,
    scratch_ptr,
    REDUCTION: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates ROWS visits and writes their entries; returns what each adds to the loss and to the divisor."""
    entries, slot, entry, live, sample, first, lengths, longest = where
    rules_ptr, weights_ptr, columns, claim_ptr, quarantined_ptr, num_samples, sample_weights_ptr = table
    HAS_TABLE: tl.constexpr = columns[0] is not None
    known = live & (sample >= 0) & (sample < num_samples) if HAS_TABLE else live
    loss_sum, items, divisor, loss, sure, accuracy = visit_means(
        batch, token_stats, first, lengths, longest, known, SHIFT, PACKED, ROWS, BLOCK
    )
    means = (items, loss, sure, accuracy)
    counted = items > 0
    finite = counted & is_finite(loss, sure)
    old = old_rows(scratch_ptr, entries, slot, live, HAS_TABLE)
    q_value, quality, correct, bucket, weight = judge_visits(old, means, finite, rules_ptr, weights_ptr, HAS_TABLE)
    if quarantined_ptr is not None:
        shut_out = tl.load(quarantined_ptr + sample, mask=known, other=0)
        weight = tl.where(shut_out != 0, 0.0, weight)
    if sample_weights_ptr is not None:
        weight = tl.where(counted, weight * tl.load(sample_weights_ptr + slot, mask=live, other=0.0), 0.0)
    judged = (q_value, quality, correct, bucket, weight)
    if HAS_TABLE and UPDATE:
        writes = writers(batch, token_stats, claim_ptr, slot, sample, known, finite, entries, SHIFT, PACKED, ROWS)
        write_rows(columns, sample, writes, old, means, judged)
    if REDUCTION == TOKEN_MEAN:
        coefficient, contribution = weight, weight * loss_sum
        divided_by = items if token_stats[3] is None else tl.where(counted, divisor, 0.0)
    else:
        coefficient = tl.div_rn(weight, divisor)
        contribution, divided_by = weight * loss, counted.to(tl.int32)
    contribution = tl.where(counted, contribution, 0.0)
    coefficient = tl.where(counted, coefficient, 0.0)
    store_visits(outputs, entries, entry, live, sample, means, judged, contribution, REDUCTION)
    store_coefficients(batch, token_stats, outputs, first, lengths, longest, entry, coefficient, SHIFT, PACKED, BLOCK)
    return contribution, divided_by


@triton.jit(do_not_specialize=BATCH_INTS)
def _sample_update_kernel(
    statistics_ptr,
    labels_ptr,
    ids_ptr,
    rules_ptr,
    weights_ptr,
    num_items_ptr,
    q_value_ptr,
    confidence_ptr,
    history_ptr,
    seen_ptr,
    bucket_ptr,
    streak_ptr,
    changed_ptr,
    claim_ptr,
    quarantined_ptr,
    token_weights_ptr,
    sample_weights_ptr,
    scratch_ptr,
    value_ptr,
    scale_ptr,
    coeff_ptr,
    token_visit_ptr,
    floats_ptr,
    ints_ptr,
    flags_ptr,
    label_b,
    label_s,
    id_b,
    id_s,
    length,
    ignore_index,
    token_count,
    vocab,
    num_samples,
    REDUCTION: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program for a tile of ROWS rows; packed, for a GROUP of tokens: the visits that start there, one by one."""
    batch = (labels_ptr, label_b, label_s, ids_ptr, id_b, id_s, length, ignore_index)
    token_stats = (statistics_ptr, token_count, vocab, token_weights_ptr)
    columns = (q_value_ptr, confidence_ptr, history_ptr, seen_ptr, bucket_ptr, streak_ptr, changed_ptr)
    table = (rules_ptr, weights_ptr, columns, claim_ptr, quarantined_ptr, num_samples, sample_weights_ptr)
    outputs = (value_ptr, floats_ptr, ints_ptr, flags_ptr, coeff_ptr, token_visit_ptr)
    WHOLE: tl.constexpr = token_weights_ptr is None or REDUCTION != TOKEN_MEAN
    loss = tl.zeros([ROWS], tl.float32)
    lost = tl.zeros([ROWS], tl.float32)
    items = tl.zeros([ROWS], tl.int32 if WHOLE else tl.float32)
    items_lost = tl.zeros([ROWS], tl.float32)
    if PACKED:
        entries = token_count
        t, samples, starts, entry, visits = _locate_packed(batch, scratch_ptr, entries, TILE, GROUP)
        store_padding(outputs, entries, t, samples, visits, REDUCTION)
        one = tl.zeros([1], tl.int32)
        token = tl.min(tl.where(starts, t, entries), 0)
        while token < entries:
            sample = tl.sum(tl.where(t == token, samples, 0), 0)
            longest = run_length(batch, token, sample, BLOCK)
            at = one + token
            where = (entries, at, one + entry, one == 0, sample + one.to(tl.int64), at, one + longest, longest)
            one_loss, one_items = _update_visits(
                batch, token_stats, where, table, outputs, scratch_ptr, REDUCTION, SHIFT, PACKED, UPDATE, ROWS, BLOCK
            )
            loss, lost = add_exactly(loss, lost, one_loss)
            if WHOLE:
                items += one_items
            else:
                items, items_lost = add_exactly(items, items_lost, one_items)
            entry += 1
            token = tl.min(tl.where(starts & (t > token), t, entries), 0)
    else:
        entries = token_count // length
        slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        live = slot < entries
        first = slot * length
        sample = token_sample(batch, first, live, False)
        where = (entries, slot, slot, live, sample, first, tl.where(live, length, 0), length)
        loss, items = _update_visits(
            batch, token_stats, where, table, outputs, scratch_ptr, REDUCTION, SHIFT, PACKED, UPDATE, ROWS, BLOCK
        )
    loss = tl.sum(joined(loss, lost), 0)
    if not WHOLE:
        items = joined(items, items_lost)
    finish(scratch_ptr, entries, loss, tl.sum(items, 0), num_items_ptr, value_ptr, scale_ptr, REDUCTION, WHOLE)


def update_launch(
    labels: Tensor,
    sample_ids: Tensor | None,
    num_samples: int,
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
    update: bool,
) -> Launch:
    """The update itself, after `prepare_visits` has filled scratch.

    Pointers: statistics, labels, sample_ids, rules, weights, num_items, those of `pointers`, token_weights,
    sample_weights, scratch, and the returns of `reference.sample_update_`.
    """
    rows, length = labels.shape
    count = labels.numel()
    packed = sample_ids is not None and sample_ids.dim() == 2
    block, tile, warps = visit_shape(length, packed)
    numbers = (*labels.stride(), *id_strides(sample_ids), length, ignore_index, count, vocab, num_samples)
    constants = {"REDUCTION": reduction, "SHIFT": shift, "PACKED": packed, "UPDATE": update}
    shape = {"ROWS": tile, "BLOCK": block, "TILE": PREP_TILE, "GROUP": PACKED_GROUP}
    programs = cdiv(count, PACKED_GROUP) if packed else cdiv(rows, tile)
    return Launch(_sample_update_kernel, programs, numbers, {**constants, **shape}, warps)


def visit_shape(length: int, packed: bool) -> tuple[int, int, int]:
    """(tokens in a step, visits at a time, warps): at most four tokens for each thread."""
    if packed:
        return 512, 1, 4
    block = min(next_power_of_2(length), 2048)
    return block, max(min(512 // block, 128), 1), max(block // 128, 4)


_launches: dict[Hashable, tuple[Launch, Launch]] = {}


def sample_update_(
    statistics: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
    update: bool,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    room: Callable[[Tensor, bool, int], tuple[Outputs, Tensor]] = room_apart,
) -> Outputs:
    """See `reference.sample_update_`. Two launches: preparation and update. `room`: one of `kernels/memory.py`."""
    rest = (reduction, ignore_index, shift, update)
    if not labels.numel():
        first = (statistics, labels, sample_ids, rules, weights, num_items)
        return reference.sample_update_(*first, columns, error, vocab, *rest, token_weights, sample_weights)
    packed = sample_ids is not None and sample_ids.dim() == 2
    outputs, scratch = room(labels, packed, reduction)
    num_samples, table = num_samples_of(columns), pointers(columns)
    prepared = (labels, sample_ids, *prepared_of(table), error, scratch)
    weighing = (token_weights, sample_weights)
    updated = (statistics, labels, sample_ids, rules, weights, num_items, *table, *weighing, scratch)
    places = [None if pointer is None else pointer.data_ptr() % 16 for pointer in (error, *updated)]
    ids = None if sample_ids is None else sample_ids.stride()
    # everything that binaries, grids and numbers depend on
    key = (labels.get_device(), labels.shape, labels.stride(), ids, num_samples, vocab, *rest, *places)
    launches = _launches.get(key)
    if launches is None:
        if len(_launches) >= MOST:
            _launches.clear()
        prepare = visit_prep_launch(labels, sample_ids, num_samples, vocab, ignore_index, shift, update)
        launches = _launches[key] = prepare, update_launch(labels, sample_ids, num_samples, vocab, *rest)
    launches[0](*prepared)
    launches[1](*updated, *outputs)
    return outputs
