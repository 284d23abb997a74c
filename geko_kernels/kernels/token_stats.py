"""Token statistics: one pass over the logits, five numbers a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.batch import (
    BATCH_INTS,
    LOG2E,
    VECTOR_BITS,
    edge_span,
    id_strides,
    row_span,
    soft_cap,
    token_target,
)
from geko_kernels.kernels.launch import Launch, cdiv, next_power_of_2
from geko_kernels.kernels.sample_update.prepare import PREP_TILE, prepare_visits

SMALL_VOCAB = 1024  # up to this size a program takes several rows


@triton.jit
def _base2(x, top):
    """`exp(x - top)` in base 2; the difference comes first, so that a large common offset loses no digits."""
    return tl.exp2((x - top) * LOG2E)


@triton.jit
def _accumulate(top, total, z, AXIS: tl.constexpr):
    """One step of the online softmax: adds the maximum and sum of exponentials along AXIS to `top` and `total`."""
    new = tl.maximum(top, tl.max(z, AXIS))
    safe = tl.where(new == float("-inf"), 0.0, new)  # all -inf so far: adds 0, not exp(-inf + inf)
    return new, total * _base2(top, safe) + tl.sum(_base2(z, tl.expand_dims(safe, AXIS)), AXIS)


@triton.jit
def _capped(x, inside, cap, SOFTCAP: tl.constexpr):
    z = x.to(tl.float32)
    if SOFTCAP:
        z = tl.where(inside, soft_cap(z, cap), float("-inf"))
    return z


@triton.jit
def _contiguous_row(x_ptr, target, vocab, cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum, sum of exponentials and target logit of one row of stride 1."""
    PER: tl.constexpr = VECTOR_BITS // x_ptr.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // PER
    aligned, lead, first, end = row_span(x_ptr, vocab)
    block = tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]  # one 16-byte vector for each lane
    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    at_target = tl.full([LANES], float("-inf"), tl.float32)
    position, ends = edge_span(lead, end, vocab, PER)
    z_ends = _capped(tl.load(aligned + position, mask=ends, other=float("-inf")), ends, cap, SOFTCAP)
    for start in range(0, end, BLOCK):
        column = start + block
        inside = (column >= first) & (column < end)
        z = _capped(tl.load(aligned + column, mask=inside, other=float("-inf")), inside, cap, SOFTCAP)
        if SOFTCAP:  # from the same values as the maximum, so that a hit is exact
            at_target = tl.maximum(at_target, tl.max(tl.where(column - lead == target, z, float("-inf")), 1))
        top, total = _accumulate(top, total, z, 1)
    peak = tl.maximum(tl.max(top, 0), tl.max(z_ends, 0))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    sum_all = tl.sum(total * _base2(top, safe), 0) + tl.sum(_base2(z_ends, safe), 0)
    if SOFTCAP:
        at_ends = tl.max(tl.where(position - lead == target, z_ends, float("-inf")), 0)
        z_target = tl.maximum(tl.max(at_target, 0), at_ends)
    else:
        z_target = tl.load(x_ptr + target).to(tl.float32)
    return peak, sum_all, z_target


@triton.jit
def _strided_rows(x_ptr, stride_v, target, live, vocab, cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The same of a tile of rows with any strides: `x_ptr`, `target`, `live` (ROWS,)."""
    top = tl.where(live, float("-inf"), float("-inf"))
    total = tl.where(live, 0.0, 0.0)
    z_target = top
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = live[:, None] & (column < vocab)[None, :]
        at = x_ptr[:, None] + column.to(tl.int64)[None, :] * stride_v
        z = _capped(tl.load(at, mask=inside, other=float("-inf")), inside, cap, SOFTCAP)
        here = tl.where(column[None, :] == target[:, None], z, float("-inf"))
        z_target = tl.maximum(z_target, tl.max(here, 1))
        top, total = _accumulate(top, total, z, 1)
    return top, total, z_target


@triton.jit
def _store_statistics(statistics_ptr, t, live, scored, top, total, z_target, token_count):
    """Loss, maximum, log-sum, confidence and hit of token(s) t; zeros where not scored."""
    total = tl.where(top == float("-inf"), float("nan"), total)  # 0 / 0, as in PyTorch
    top = tl.where((total != total) & (tl.abs(top) != float("inf")), total, top)  # with a NaN the maximum is NaN
    log_sum = tl.log(total)
    loss = log_sum - (z_target - top)
    hit = (z_target == top) & (loss == loss)
    out = statistics_ptr + t
    count = token_count.to(tl.int64)
    tl.store(out, tl.where(scored, loss, 0.0), mask=live)
    tl.store(out + count, tl.where(scored, top, 0.0), mask=live)
    tl.store(out + 2 * count, tl.where(scored, log_sum, 0.0), mask=live)
    tl.store(out + 3 * count, tl.where(scored, 1.0 / total, 0.0), mask=live)
    tl.store(out + 4 * count, (scored & hit).to(tl.float32), mask=live)


@triton.jit(do_not_specialize=[*BATCH_INTS, "stride_b", "stride_s", "softcap", "prep_programs"])
def _statistics_kernel(
    logits_ptr,
    labels_ptr,
    ids_ptr,
    statistics_ptr,
    q_value_ptr,
    loss_history_ptr,
    times_seen_ptr,
    bucket_ptr,
    claim_ptr,
    error_ptr,
    scratch_ptr,
    stride_b,
    stride_s,
    stride_v,
    label_b,
    label_s,
    id_b,
    id_s,
    length,
    ignore_index,
    token_count,
    vocab,
    softcap,
    num_samples,
    prep_programs,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    UPDATE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first `prep_programs` programs prepare the sample update; then one for each row (UNIT) or tile of rows."""
    batch = (labels_ptr, label_b, label_s, ids_ptr, id_b, id_s, length, ignore_index)
    program = tl.program_id(0)
    if scratch_ptr is not None:  # noqa: SIM102 (known when compiled; the next one is not)
        if program < prep_programs:
            table = (q_value_ptr, loss_history_ptr, times_seen_ptr, bucket_ptr, claim_ptr, num_samples)
            prepare_visits(
                program, batch, table, error_ptr, scratch_ptr, token_count, vocab, SHIFT, PACKED, UPDATE, TILE
            )
    if program >= prep_programs:
        if UNIT:
            t = program - prep_programs
        else:
            t = (program - prep_programs) * ROWS + tl.arange(0, ROWS)
        live = t < token_count
        target, asked = token_target(batch, t, live, SHIFT, PACKED)
        scored = asked & (target >= 0) & (target < vocab)
        x = logits_ptr + (t // length).to(tl.int64) * stride_b + (t % length).to(tl.int64) * stride_s
        if not UNIT:
            top, total, z_target = _strided_rows(x, stride_v, target, scored, vocab, softcap, SOFTCAP, BLOCK)
            _store_statistics(statistics_ptr, t, live, scored, top, total, z_target, token_count)
        elif scored:
            top, total, z_target = _contiguous_row(x, target, vocab, softcap, SOFTCAP, BLOCK)
            _store_statistics(statistics_ptr, t, True, True, top, total, z_target, token_count)
        else:
            _store_statistics(statistics_ptr, t, True, False, 0.0, 1.0, 0.0, token_count)


def statistics_shape(vocab: int, unit: bool) -> tuple[int, int, int]:
    """(rows, block, warps) of a program; 4096 x 8 was the fastest of those tried on an H200."""
    block = min(next_power_of_2(vocab), 4096)
    if vocab <= SMALL_VOCAB or not unit:
        block = min(block, SMALL_VOCAB)
        rows = min(4096 // block, 64)
        return rows, block, 4
    return 1, block, block // 512


def statistics_launch(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    prepare: bool,
    num_samples: int,
    ignore_index: int,
    shift: bool,
    softcap: float,
    update: bool,
) -> Launch:
    """The launch that fills statistics (5, T) and, with `prepare`, prepares the sample update in its first programs.

    Pointers: logits, labels, sample_ids, statistics, q_value, loss_history, times_seen, bucket, claim, error, scratch.
    """
    _, length, vocab = logits.shape
    count = labels.numel()
    packed = sample_ids is not None and sample_ids.dim() == 2
    unit = logits.stride(2) == 1 and vocab > SMALL_VOCAB
    rows, block, warps = statistics_shape(vocab, unit)
    prep_programs = cdiv(count, PREP_TILE) if prepare else 0
    numbers = (
        *(*logits.stride(), *labels.stride(), *id_strides(sample_ids)),
        *(length, ignore_index, count, vocab, softcap, num_samples, prep_programs),
    )
    constants = {"SHIFT": shift, "PACKED": packed, "UPDATE": update, "SOFTCAP": softcap != 0}
    shape = {"UNIT": unit, "ROWS": rows, "BLOCK": block, "TILE": PREP_TILE}
    return Launch(_statistics_kernel, prep_programs + cdiv(count, rows), numbers, {**constants, **shape}, warps)


def token_stats(
    logits: Tensor, labels: Tensor, sample_ids: Tensor | None, ignore_index: int, shift: bool, softcap: float
) -> Tensor:
    """See `reference.token_stats`. One launch; logits of a token that predicts nothing are not read."""
    statistics = torch.empty((5, labels.numel()), dtype=torch.float32, device=logits.device)
    if labels.numel():
        launch = statistics_launch(logits, labels, sample_ids, False, -1, ignore_index, shift, softcap, False)
        launch(logits, labels, sample_ids, statistics, *[None] * 7)
    return statistics
