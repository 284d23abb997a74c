"""Sample update: segment means, learning state, bucket and weight of each visit, and the loss, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels import reference
from geko_kernels.kernels.addressing import BATCH_INTS, token_sample, visit_starts
from geko_kernels.kernels.claims import writers
from geko_kernels.kernels.visit_maths import judge_visits, old_rows, write_rows
from geko_kernels.kernels.visit_means import is_finite, run_length, visit_means
from geko_kernels.kernels.visit_output import NONE, store_coefficients, store_padding, store_visits
from geko_kernels.kernels.visit_prep import (
    COUNT_PLANE,
    ITEMS_PLANE,
    LOSS_PLANE,
    PREP_TILE,
    empty_scratch,
    launch_visit_prep,
    plane,
)
from geko_kernels.reference import Reduction

MEAN = tl.constexpr(int(Reduction.MEAN))
TOKEN_MEAN = tl.constexpr(int(Reduction.TOKEN_MEAN))
SUM = tl.constexpr(int(Reduction.SUM))


@triton.jit
def _total(scratch_ptr, entries, partials, num_items_ptr, value_ptr, scale_ptr, REDUCTION: tl.constexpr):
    """The last program to arrive: all partial sums in a fixed order, then the divisor."""
    loss = tl.zeros([1024], tl.float32)
    items = tl.zeros([1024], tl.int32)
    for start in range(0, partials, 1024):
        i = start + tl.arange(0, 1024)
        inside = i < partials
        bits = tl.load(plane(scratch_ptr, LOSS_PLANE, entries) + i, mask=inside, other=0, cache_modifier=".cg")
        loss += bits.to(tl.float32, bitcast=True)
        items += tl.load(plane(scratch_ptr, ITEMS_PLANE, entries) + i, mask=inside, other=0, cache_modifier=".cg")
    value = tl.sum(loss, 0)
    if REDUCTION != SUM:  # MEAN, TOKEN_MEAN
        if num_items_ptr is None:
            divisor = tl.sum(items, 0).to(tl.float32)
        else:
            divisor = tl.load(num_items_ptr).to(tl.float32)
        scale = tl.where(divisor > 0, tl.div_rn(1.0, divisor), 0.0)
        tl.store(scale_ptr, scale)
        value *= scale
    tl.store(value_ptr, value)


@triton.jit
def _locate_packed(batch, scratch_ptr, entries, TILE: tl.constexpr):
    """Packed, program t: the sample of token t, whether a visit starts there, that visit's entry, visits in all."""
    t = tl.program_id(0)
    sample, starts = visit_starts(batch, t, True, True)
    before = tl.zeros([TILE], tl.int32)
    visits = tl.zeros([TILE], tl.int32)
    for start in range(0, tl.cdiv(entries, TILE), TILE):
        tile = start + tl.arange(0, TILE)
        count = tl.load(plane(scratch_ptr, COUNT_PLANE, entries) + tile, mask=tile < tl.cdiv(entries, TILE), other=0)
        visits += count
        before += tl.where(tile < t // TILE, count, 0)
    entry = tl.sum(before, 0)
    if starts:
        neighbour = t // TILE * TILE + tl.arange(0, TILE)
        _, others = visit_starts(batch, neighbour, neighbour < t, True)
        entry += tl.sum(others.to(tl.int32), 0)
    return sample, starts, entry, tl.sum(visits, 0)


@triton.jit
def _update_visits(
    batch,
    tokens_ptr,
    token_count,
    vocab,
    where,
    constants,
    columns,
    guards,
    scratch_ptr,
    outputs,
    coeff_ptr,
    token_visit_ptr,
    REDUCTION: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS visits from their tokens to their entries; returns their loss and items for the batch's total."""
    entries, slot, entry, live, sample, first, lengths, longest = where
    rules_ptr, weights_ptr = constants
    claim_ptr, quarantined_ptr, table_rows = guards
    HAS_TABLE: tl.constexpr = columns[0] is not None
    known = live & (sample >= 0) & (sample < table_rows) if HAS_TABLE else live
    loss_sum, items, loss, sure, accuracy = visit_means(
        batch, tokens_ptr, token_count, first, lengths, longest, known, vocab, SHIFT, PACKED, ROWS, BLOCK
    )
    means = (items, loss, sure, accuracy)
    finite = (items > 0) & is_finite(loss, sure)
    old = old_rows(scratch_ptr, entries, slot, live, HAS_TABLE)
    q_value, quality, correct, bucket, weight = judge_visits(old, means, finite, rules_ptr, weights_ptr, HAS_TABLE)
    if quarantined_ptr is not None:
        shut_out = tl.load(quarantined_ptr + sample, mask=known, other=0)
        weight = tl.where(shut_out != 0, 0.0, weight)
    judged = (q_value, quality, correct, bucket, weight)
    if HAS_TABLE and UPDATE:
        writes = writers(
            batch,
            tokens_ptr,
            token_count,
            claim_ptr,
            slot,
            sample,
            known,
            finite,
            entries,
            vocab,
            SHIFT,
            PACKED,
            ROWS,
            BLOCK,
        )
        write_rows(columns, sample, writes, old, means, judged)
    if REDUCTION == TOKEN_MEAN:
        coefficient = weight
        contribution = tl.where(items > 0, weight * loss_sum, 0.0)
    else:
        coefficient = tl.div_rn(weight, tl.maximum(items, 1).to(tl.float32))
        contribution = tl.where(items > 0, weight * loss, 0.0)
    coefficient = tl.where(items > 0, coefficient, 0.0)
    store_visits(outputs, entries, entry, live, sample, means, judged, contribution, REDUCTION)
    store_coefficients(
        batch,
        coeff_ptr,
        token_visit_ptr,
        first,
        lengths,
        longest,
        entry,
        coefficient,
        vocab,
        SHIFT,
        PACKED,
        BLOCK,
    )
    if REDUCTION == TOKEN_MEAN:
        return tl.sum(contribution, 0), tl.sum(items, 0)
    else:
        return tl.sum(contribution, 0), tl.sum((items > 0).to(tl.int32), 0)


@triton.jit(do_not_specialize=BATCH_INTS)
def _sample_update_kernel(
    tokens_ptr,
    labels_ptr,
    label_b,
    label_s,
    ids_ptr,
    id_b,
    id_s,
    length,
    ignore_index,
    token_count,
    vocab,
    rules_ptr,
    weights_ptr,
    num_items_ptr,
    q_value_ptr,
    confidence_ptr,
    loss_history_ptr,
    times_seen_ptr,
    bucket_ptr,
    wrong_streak_ptr,
    changed_ptr,
    claim_ptr,
    quarantined_ptr,
    scratch_ptr,
    value_ptr,
    scale_ptr,
    coeff_ptr,
    token_visit_ptr,
    floats_ptr,
    ints_ptr,
    flags_ptr,
    table_rows,
    REDUCTION: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a tile of ROWS rows, or packed one a token, at work where a visit starts."""
    batch = (labels_ptr, label_b, label_s, ids_ptr, id_b, id_s, length, ignore_index)
    columns = (
        q_value_ptr,
        confidence_ptr,
        loss_history_ptr,
        times_seen_ptr,
        bucket_ptr,
        wrong_streak_ptr,
        changed_ptr,
    )
    outputs = (value_ptr, floats_ptr, ints_ptr, flags_ptr)
    program = tl.program_id(0)
    if PACKED:
        entries = token_count
        sample, starts, at, partials = _locate_packed(batch, scratch_ptr, entries, TILE)
        store_padding(outputs, coeff_ptr, token_visit_ptr, entries, program, sample, partials, REDUCTION)
        _, first_starts = visit_starts(batch, program * 0, True, True)
        arrivals = partials + 1 - first_starts.to(tl.int32)  # program 0 comes in any case
        longest = 0
        if starts:
            longest = run_length(batch, program, sample, BLOCK)
        one = tl.zeros([1], tl.int32)
        slot, entry, lengths = one + program, one + at, one + longest
        sample = sample + one.to(tl.int64)
        live = lengths > 0
        first = slot
        works = starts | (program == 0)
    else:
        entries = token_count // length
        slot = program * ROWS + tl.arange(0, ROWS)
        entry, at, longest = slot, program, length
        live = slot < entries
        first = slot * length
        lengths = tl.where(live, length, 0)
        sample = token_sample(batch, first, live, False)
        partials = tl.num_programs(0)
        arrivals = partials
        starts = True
        works = True
    if works:
        where = (entries, slot, entry, live, sample, first, lengths, longest)
        guards = (claim_ptr, quarantined_ptr, table_rows)
        constants = (rules_ptr, weights_ptr)
        loss, items = _update_visits(
            batch,
            tokens_ptr,
            token_count,
            vocab,
            where,
            constants,
            columns,
            guards,
            scratch_ptr,
            outputs,
            coeff_ptr,
            token_visit_ptr,
            REDUCTION,
            SHIFT,
            PACKED,
            UPDATE,
            ROWS,
            BLOCK,
        )
        if program == 0 and REDUCTION != MEAN and REDUCTION != TOKEN_MEAN:
            tl.store(scale_ptr, 1.0)
        if REDUCTION != NONE:
            if starts:
                tl.store(plane(scratch_ptr, LOSS_PLANE, entries) + at, loss.to(tl.int32, bitcast=True))
                tl.store(plane(scratch_ptr, ITEMS_PLANE, entries) + at, items)
            tl.debug_barrier()
            if tl.atomic_add(scratch_ptr, 1, sem="acq_rel") == arrivals - 1:
                _total(scratch_ptr, entries, partials, num_items_ptr, value_ptr, scale_ptr, REDUCTION)


def launch_sample_update(
    tokens: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: tuple[Tensor | None, ...],
    scratch: Tensor,
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The update proper, after `prepare_visits` has filled `scratch`. Args and returns: `reference.sample_update_`.

    Args: columns (q_value, confidence, loss_history, times_seen, bucket, wrong_streak, changed, claim, quarantined).
    """
    rows, length = labels.shape
    count = labels.numel()
    packed = sample_ids is not None and sample_ids.dim() == 2
    entries = count if packed else rows
    device = labels.device
    value = torch.empty(() if reduction else (entries,), dtype=torch.float32, device=device)
    scale = torch.empty((), dtype=torch.float32, device=device)
    coeff = torch.empty(count, dtype=torch.float32, device=device)
    token_visit = torch.empty(count if packed else 0, dtype=torch.int32, device=device)
    floats = torch.empty((6, entries), dtype=torch.float32, device=device)
    ints = torch.empty((2, entries), dtype=torch.int64, device=device)
    flags = torch.empty((2, entries), dtype=torch.uint8, device=device)
    block, tile, warps = visit_shape(length, packed)
    id_b = sample_ids.stride(0) if sample_ids is not None else 0
    id_s = sample_ids.stride(1) if sample_ids is not None and packed else 0
    table_rows = -1 if columns[0] is None else columns[0].shape[0]
    _sample_update_kernel[(count if packed else triton.cdiv(rows, tile),)](
        *(tokens, labels, *labels.stride(), sample_ids, id_b, id_s, length, ignore_index, count, vocab),
        *(rules, weights, num_items, *columns, scratch, value, scale, coeff, token_visit, floats, ints, flags),
        table_rows,
        REDUCTION=reduction,
        SHIFT=shift,
        PACKED=packed,
        UPDATE=update,
        ROWS=tile,
        BLOCK=block,
        TILE=PREP_TILE,
        num_warps=warps,
    )
    return value, scale, coeff, token_visit, floats, ints, flags


def visit_shape(length: int, packed: bool) -> tuple[int, int, int]:
    """(tokens a step, visits a program, warps)."""
    if packed:
        return 256, 1, 2  # one program a token: small, since most have nothing to do
    block = min(triton.next_power_of_2(length), 1024)
    return block, min(1024 // block, 128), 4


def sample_update_(
    tokens: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    q_value: Tensor | None,
    confidence: Tensor | None,
    loss_history: Tensor | None,
    times_seen: Tensor | None,
    bucket: Tensor | None,
    wrong_streak: Tensor | None,
    changed: Tensor | None,
    claim: Tensor | None,
    quarantined: Tensor | None,
    error: Tensor | None,
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sample_update_`. Two launches: preparation and update."""
    columns = (q_value, confidence, loss_history, times_seen, bucket, wrong_streak, changed, claim, quarantined)
    rest = (reduction, ignore_index, shift, update)
    if not labels.numel():
        return reference.sample_update_(
            tokens, labels, sample_ids, rules, weights, num_items, *columns, error, vocab, *rest
        )
    packed = sample_ids is not None and sample_ids.dim() == 2
    scratch = empty_scratch(labels, packed)
    prepared = (q_value, loss_history, times_seen, bucket, claim, error)
    launch_visit_prep(labels, sample_ids, prepared, scratch, vocab, ignore_index, shift, update)
    return launch_sample_update(tokens, labels, sample_ids, rules, weights, num_items, columns, scratch, vocab, *rest)
