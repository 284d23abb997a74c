"""Prediction: the target of each token and the coefficient of its gradient, before the logits are read.

A visit's coefficient is predicted from its labels and its sample's bucket after the last visit. `sample_update_` nearly
always finds the same one. The launch also prepares the visits, see `sample_update.prepare`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.batch import BATCH_INTS, id_strides, token_sample, token_target, visit_starts
from geko_kernels.kernels.launch import Launch, cdiv, next_power_of_2
from geko_kernels.kernels.sample_update.means import run_length, scored_tokens
from geko_kernels.kernels.sample_update.prepare import PREP_TILE, prepare_visits
from geko_kernels.reference.ops import Reduction

TOKEN_MEAN = tl.constexpr(int(Reduction.TOKEN_MEAN))
GROUP = 64  # packed: tokens a program


@triton.jit
def _store_targets(
    batch,
    vocab,
    target_ptr,
    first,
    lengths,
    longest,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The targets of ROWS visits; returns how many tokens each has to predict, -1 if a label is bad."""
    count = tl.zeros([ROWS, BLOCK], tl.int32)
    bad = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, longest, BLOCK):
        offset = start + tl.arange(0, BLOCK)[None, :]
        t = first[:, None] + offset
        inside = offset < lengths[:, None]
        target, asked = token_target(batch, t, inside, SHIFT, PACKED)
        within = (target >= 0) & (target < vocab)
        tl.store(target_ptr + t, tl.where(asked & within, target, -1).to(tl.int32), mask=inside)
        count += (asked & within).to(tl.int32)
        bad += (asked & ~within).to(tl.int32)
    return tl.where(tl.sum(bad, 1) == 0, tl.sum(count, 1), -1)


@triton.jit
def _predict_visits(
    batch,
    vocab,
    where,
    table,
    outputs,
    REDUCTION: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Predicts ROWS visits; returns what each adds to the divisor."""
    live, sample, first, lengths, longest = where
    weights_ptr, bucket_ptr, quarantined_ptr, num_samples = table
    target_ptr, coeff_ptr = outputs
    items = _store_targets(batch, vocab, target_ptr, first, lengths, longest, SHIFT, PACKED, ROWS, BLOCK)
    if bucket_ptr is not None:
        known = live & (sample >= 0) & (sample < num_samples)
        bucket = tl.load(bucket_ptr + sample, mask=known, other=2).to(tl.int32)
        weight = tl.load(weights_ptr + tl.minimum(bucket, 3))  # a damaged file may hold more
        shut_out = tl.load(quarantined_ptr + sample, mask=known, other=0)
        weight = tl.where(shut_out != 0, 0.0, weight)
    else:
        known = live
        weight = tl.where(live, 1.0, 0.0)
    counted = known & (items > 0)
    coefficient = weight
    if REDUCTION != TOKEN_MEAN:
        coefficient = tl.div_rn(weight, tl.maximum(items, 1).to(tl.float32))
    coefficient = tl.where(counted, coefficient, 0.0)
    for start in range(0, longest, BLOCK):
        offset = start + tl.arange(0, BLOCK)[None, :]
        t = first[:, None] + offset
        inside = offset < lengths[:, None]
        scored, _wrong = scored_tokens(batch, t, inside, vocab, SHIFT, PACKED)
        tl.store(coeff_ptr + t, tl.where(scored, coefficient[:, None], 0.0), mask=inside)
    return tl.where(counted, items if REDUCTION == TOKEN_MEAN else 1, 0)


@triton.jit(do_not_specialize=[*BATCH_INTS, "prep_programs"])
def _predict_kernel(
    labels_ptr,
    ids_ptr,
    weights_ptr,
    q_value_ptr,
    loss_history_ptr,
    times_seen_ptr,
    bucket_ptr,
    claim_ptr,
    quarantined_ptr,
    error_ptr,
    scratch_ptr,
    target_ptr,
    coeff_ptr,
    counts_ptr,
    label_b,
    label_s,
    id_b,
    id_s,
    length,
    ignore_index,
    token_count,
    vocab,
    num_samples,
    prep_programs,
    REDUCTION: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The first programs prepare the visits; then one for each tile of ROWS rows; packed, each GROUP of tokens."""
    batch = (labels_ptr, label_b, label_s, ids_ptr, id_b, id_s, length, ignore_index)
    table = (weights_ptr, bucket_ptr, quarantined_ptr, num_samples)
    outputs = (target_ptr, coeff_ptr)
    program = tl.program_id(0)
    if program < prep_programs:
        columns = (q_value_ptr, loss_history_ptr, times_seen_ptr, bucket_ptr, claim_ptr, num_samples)
        prepare_visits(program, batch, columns, error_ptr, scratch_ptr, token_count, vocab, SHIFT, PACKED, UPDATE, TILE)
    else:
        program -= prep_programs
        items = tl.zeros([ROWS], tl.int32)
        if PACKED:
            t = program * GROUP + tl.arange(0, GROUP)
            samples, starts = visit_starts(batch, t, t < token_count, True)
            padding = (t < token_count) & (samples == -1)
            tl.store(target_ptr + t, tl.zeros_like(t) - 1, mask=padding)
            tl.store(coeff_ptr + t, tl.zeros_like(t).to(tl.float32), mask=padding)
            one = tl.zeros([1], tl.int32)
            token = tl.min(tl.where(starts, t, token_count), 0)
            while token < token_count:
                sample = tl.sum(tl.where(t == token, samples, 0), 0)
                longest = run_length(batch, token, sample, BLOCK)
                where = (one == 0, sample + one.to(tl.int64), one + token, one + longest, longest)
                items += _predict_visits(batch, vocab, where, table, outputs, REDUCTION, SHIFT, PACKED, ROWS, BLOCK)
                token = tl.min(tl.where(starts & (t > token), t, token_count), 0)
        else:
            slot = program * ROWS + tl.arange(0, ROWS)
            live = slot < token_count // length
            first = slot * length
            sample = token_sample(batch, first, live, False)
            where = (live, sample, first, tl.where(live, length, 0), length)
            items += _predict_visits(batch, vocab, where, table, outputs, REDUCTION, SHIFT, PACKED, ROWS, BLOCK)
        tl.store(counts_ptr + program, tl.sum(items, 0))


def predict_shape(length: int, packed: bool) -> tuple[int, int]:
    """(tokens in a step, visits at a time)."""
    if packed:
        return 512, 1
    block = min(next_power_of_2(length), 2048)
    return block, max(min(512 // block, 128), 1)


def predict_parts(labels: Tensor, packed: bool) -> int:
    """How many counts the launch writes."""
    if packed:
        return cdiv(labels.numel(), GROUP)
    return cdiv(labels.shape[0], predict_shape(labels.shape[1], packed)[1])


def predict_launch(
    labels: Tensor,
    sample_ids: Tensor | None,
    num_samples: int,
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
    update: bool,
) -> Launch:
    """See `reference.one_pass.predict`, whose counts (parts,) add up to the divisor; also prepares the visits.

    Pointers: labels, sample_ids, weights, q_value, loss_history, times_seen, bucket, claim, quarantined, error,
    scratch, target, coeff, counts.
    """
    count, length = labels.numel(), labels.shape[1]
    packed = sample_ids is not None and sample_ids.dim() == 2
    block, rows = predict_shape(length, packed)
    prep_programs = cdiv(count, PREP_TILE)
    numbers = (
        *(*labels.stride(), *id_strides(sample_ids), length, ignore_index),
        *(count, vocab, num_samples, prep_programs),
    )
    constants = {"REDUCTION": reduction, "SHIFT": shift, "PACKED": packed, "UPDATE": update}
    shape = {"ROWS": rows, "BLOCK": block, "TILE": PREP_TILE, "GROUP": GROUP}
    programs = prep_programs + predict_parts(labels, packed)
    return Launch(_predict_kernel, programs, numbers, {**constants, **shape}, 4)
