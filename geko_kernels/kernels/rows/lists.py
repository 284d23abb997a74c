"""Row lists of the linear path: which tokens are scored, and which rows of the buffer are kept. One launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.batch import BATCH_INTS, token_target, visit_starts
from geko_kernels.kernels.launch import cdiv
from geko_kernels.kernels.rows.launch import KeyedLaunch

LISTED, MOST = 1024, 64  # tokens that a program lists at a time, programs
BLOCK, WARPS = 4096, 16  # rows counted at a time; on an H200, 8192 and 32 took up to a third more


@triton.jit(do_not_specialize=[*BATCH_INTS, "each"])
def _scored_rows_kernel(
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
    rows_ptr,
    targets_ptr,
    visits_ptr,
    each,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program lists `each` tokens. It counts all tokens first, which takes less time than a second launch."""
    batch = (labels_ptr, label_b, label_s, ids_ptr, id_b, id_s, length, ignore_index)
    begin = tl.program_id(0) * each
    every, before, starts_before = tl.zeros([COUNTED], tl.int32), tl.zeros([COUNTED], tl.int32), 0
    for first in range(0, token_count, COUNTED):
        t = first + tl.arange(0, COUNTED)
        target, asked = token_target(batch, t, t < token_count, SHIFT, PACKED)
        scored = asked & (target >= 0) & (target < vocab)
        every += scored.to(tl.int32)
        before += (scored & (t < begin)).to(tl.int32)
        if PACKED:
            _, starts = visit_starts(batch, t, t < token_count, PACKED)
            starts_before += tl.sum((starts & (t < begin)).to(tl.int32), 0)
    count, listed, started = tl.sum(every, 0), tl.sum(before, 0), starts_before
    end = tl.minimum(begin + each, token_count)
    for first in range(begin, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        live = t < end
        target, asked = token_target(batch, t, live, SHIFT, PACKED)
        scored = asked & (target >= 0) & (target < vocab)
        at = listed + tl.cumsum(scored.to(tl.int32), 0) - 1
        tl.store(rows_ptr + at, t.to(tl.int64), mask=scored)
        tl.store(targets_ptr + at, target, mask=scored)
        if PACKED:
            _, starts = visit_starts(batch, t, live, PACKED)
            visit = started + tl.cumsum(starts.to(tl.int32), 0) - 1
            started += tl.sum(starts.to(tl.int32), 0)
        else:
            visit = t // length
        tl.store(visits_ptr + 1 + at, visit, mask=scored)
        listed += tl.sum(scored.to(tl.int32), 0)
        beyond = live & (t >= count)
        tl.store(rows_ptr + t, tl.zeros([BLOCK], tl.int64), mask=beyond)
        tl.store(targets_ptr + t, tl.zeros([BLOCK], tl.int64), mask=beyond)
    if begin == 0:
        tl.store(visits_ptr, count)


@triton.jit
def _kept(coeff_ptr, row, mask, token_count):
    """Whether the coefficient of token `row` is not 0; one outside the batch has none."""
    known = mask & (row >= 0) & (row < token_count)
    return tl.load(coeff_ptr + row, mask=known, other=0.0) != 0


@triton.jit(do_not_specialize=["start", "new", "held", "token_count"])
def _kept_rows_kernel(
    coeff_ptr, rows_ptr, positions_ptr, sources_ptr, end_ptr, start, new, held, token_count, BLOCK: tl.constexpr
):
    end = held
    rows_ptr += start
    for first in range(0, new, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = tl.load(rows_ptr + i, mask=i < new, other=0)
        end += tl.sum(_kept(coeff_ptr, row, i < new, token_count).to(tl.int32), 0)
    tl.store(end_ptr, end)
    if end == held:
        return
    movers = 0  # slots of kept rows behind the front; listed for now behind the front of `sources`
    for first in range(0, new, BLOCK):
        if held + first + BLOCK > end:  # the others lie in the front
            i = first + tl.arange(0, BLOCK)
            slot = held + i
            row = tl.load(rows_ptr + i, mask=i < new, other=0)
            moves = _kept(coeff_ptr, row, i < new, token_count) & (slot >= end)
            rank = movers + tl.cumsum(moves.to(tl.int32), 0) - 1
            tl.store(sources_ptr + end + rank, slot.to(tl.int64), mask=moves)
            movers += tl.sum(moves.to(tl.int32), 0)
    tl.debug_barrier()
    holes = 0
    for first in range(0, end - held, BLOCK):
        i = first + tl.arange(0, BLOCK)
        front = i < end - held
        row = tl.load(rows_ptr + i, mask=front, other=0)
        hole = front & ~_kept(coeff_ptr, row, front, token_count)
        rank = holes + tl.cumsum(hole.to(tl.int32), 0) - 1
        filler = tl.load(sources_ptr + end + rank, mask=hole, other=0)
        source = tl.where(hole, filler, (held + i).to(tl.int64))
        tl.store(sources_ptr + held + i, source, mask=front)
        tl.store(positions_ptr + held + i, tl.load(rows_ptr + source - held, mask=front, other=0), mask=front)
        holes += tl.sum(hole.to(tl.int32), 0)


_launch_scored, _launch_kept = KeyedLaunch(_scored_rows_kernel), KeyedLaunch(_kept_rows_kernel)


def scored_rows(
    labels: Tensor, sample_ids: Tensor | None, vocab: int, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.rows.scored_rows`. One launch."""
    count = labels.numel()
    rows = torch.empty(count, dtype=torch.int64, device=labels.device)
    targets = torch.empty_like(rows)
    visits = torch.empty(1 + count, dtype=torch.int32, device=labels.device)
    packed = sample_ids is not None and sample_ids.dim() == 2
    id_b = sample_ids.stride(0) if sample_ids is not None else 0
    id_s = sample_ids.stride(1) if sample_ids is not None and packed else 0
    args = (
        *(labels, *labels.stride(), sample_ids, id_b, id_s, labels.shape[1], ignore_index, count, vocab),
        *(rows, targets, visits),
    )
    ids = None if sample_ids is None else sample_ids.data_ptr() % 16
    key = (labels.get_device(), labels.data_ptr() % 16, ids, packed, shift)
    each = cdiv(cdiv(count, MOST), LISTED) * LISTED
    constants = {"SHIFT": shift, "PACKED": packed, "COUNTED": BLOCK, "BLOCK": LISTED}
    _launch_scored(key, cdiv(count, each) if count else 1, (*args, each), constants, WARPS)
    return rows, targets, visits


def kept_rows_(
    coeff: Tensor, rows: Tensor, positions: Tensor, sources: Tensor, held: int, start: int, count: int
) -> Tensor:
    """See `reference.rows.kept_rows_`. One launch."""
    end = torch.empty((), dtype=torch.int32, device=rows.device)
    args = (coeff, rows, positions, sources, end, start, count, held, coeff.shape[0])
    _launch_kept((rows.get_device(), rows.data_ptr() % 16), 1, args, {"BLOCK": BLOCK}, WARPS)
    return end
