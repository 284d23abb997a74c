"""Statistics of the buffer's rows and, if most rows are kept, their unscaled gradients in the same launch.

The rows start at multiples of 16 bytes and are padded to whole vectors, so the code is simpler than in `token_stats`:
every lane reads 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.batch import LOG2E, VECTOR_BITS
from geko_kernels.kernels.launch import next_power_of_2
from geko_kernels.kernels.rows.launch import KeyedLaunch, programs_for
from geko_kernels.kernels.token_stats import _accumulate, _base2, _capped, _store_statistics

# elements and warps of a program, programs on a multiprocessor, loads in flight
READ = 4096, 8, 8, 1
FUSED = 8192, 16, 4, 1  # with gradients


@triton.jit
def _row_statistics(
    x, target, row_stride, vocab, cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Maximum, sum of exponentials and target logit of one row."""
    PER: tl.constexpr = VECTOR_BITS // x.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // PER
    lane = tl.arange(0, LANES)[:, None] * PER
    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    at_target = tl.full([LANES], float("-inf"), tl.float32)
    for start in tl.range(0, row_stride, BLOCK, num_stages=STAGES):
        vector = start + lane
        column = vector + tl.arange(0, PER)[None, :]
        inside = column < vocab
        z = tl.load(x + column, mask=tl.broadcast_to(vector < row_stride, [LANES, PER]), other=float("-inf"))
        z = _capped(tl.where(inside, z.to(tl.float32), float("-inf")), inside, cap, SOFTCAP)
        if SOFTCAP:  # from the same values as the maximum, so that a hit is exact
            at_target = tl.maximum(at_target, tl.max(tl.where(column == target, z, float("-inf")), 1))
        top, total = _accumulate(top, total, z, 1)
    peak = tl.max(top, 0)
    total = tl.sum(total * _base2(top, tl.where(peak == float("-inf"), 0.0, peak)), 0)
    if SOFTCAP:
        z_target = tl.max(at_target, 0)
    else:
        z_target = tl.load(x + target, mask=(target >= 0) & (target < vocab), other=float("nan")).to(tl.float32)
    return peak, total, z_target


@triton.jit
def _row_entropy(
    x, top, log_sum, row_stride, vocab, cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """`-sum(p * log(p))` of one row, which the statistics left in cache."""
    PER: tl.constexpr = VECTOR_BITS // x.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // PER
    lane = tl.arange(0, LANES)[:, None] * PER
    total = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, row_stride, BLOCK, num_stages=STAGES):
        vector = start + lane
        column = vector + tl.arange(0, PER)[None, :]
        inside = column < vocab
        z = tl.load(x + column, mask=tl.broadcast_to(vector < row_stride, [LANES, PER]), other=float("-inf"))
        z = _capped(tl.where(inside, z.to(tl.float32), float("-inf")), inside, cap, SOFTCAP)
        log_p = z - top - log_sum
        total -= tl.sum(tl.where(log_p == float("-inf"), 0.0, tl.exp2(log_p * LOG2E) * log_p), 1)
    return tl.sum(total, 0)


@triton.jit
def _slope(z, cap, SOFTCAP: tl.constexpr):
    """`d(cap * tanh(x / cap)) / dx`, from the capped z."""
    if SOFTCAP:
        slope = 1 - (z / cap) * (z / cap)
    else:
        slope = 1.0
    return slope


@triton.jit
def _row_gradient(
    x,
    target,
    z_target,
    top,
    log_sum,
    row_stride,
    vocab,
    cap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes `softmax - onehot` over the logits of one row; last block first, as it is still in cache."""
    PER: tl.constexpr = VECTOR_BITS // x.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // PER
    lane = tl.arange(0, LANES)[:, None] * PER
    blocks = tl.cdiv(row_stride, BLOCK)
    for block in tl.range(0, blocks, num_stages=STAGES):
        vector = (blocks - 1 - block) * BLOCK + lane
        column = vector + tl.arange(0, PER)[None, :]
        mask = tl.broadcast_to(vector < row_stride, [LANES, PER])
        z = _capped(tl.load(x + column, mask=mask, other=0.0), True, cap, SOFTCAP)
        grad = tl.exp2((z - top - log_sum) * LOG2E) * _slope(z, cap, SOFTCAP)
        tl.store(x + column, grad.to(x.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # the target and the padding are written again
    grad = (tl.exp2((z_target - top - log_sum) * LOG2E) - 1) * _slope(z_target, cap, SOFTCAP)
    tl.store(x + target, grad.to(x.dtype.element_ty), mask=(target >= 0) & (target < vocab))
    for start in range(vocab, row_stride, 128):
        column = start + tl.arange(0, 128)
        tl.store(x + column, tl.zeros([128], tl.float32).to(x.dtype.element_ty), mask=column < row_stride)


@triton.jit(do_not_specialize=["slot", "start", "count", "token_count", "vocab", "softcap"])
def _score_rows_kernel(
    logits_ptr,
    row_stride,
    rows_ptr,
    targets_ptr,
    statistics_ptr,
    entropy_ptr,
    slot,
    start,
    count,
    token_count,
    vocab,
    softcap,
    FUSED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    stride = tl.full([], row_stride, tl.int64)
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        x = tl.multiple_of(logits_ptr + (slot + i) * stride, 16)
        target = tl.load(targets_ptr + start + i)
        top, total, z_target = _row_statistics(x, target, row_stride, vocab, softcap, SOFTCAP, BLOCK, STAGES)
        t = tl.load(rows_ptr + start + i)
        known = (t >= 0) & (t < token_count)
        _store_statistics(statistics_ptr, t, known, True, top, total, z_target, token_count)
        if ENTROPY:
            log_z = tl.log(total)
            entropy = _row_entropy(x, top, log_z, row_stride, vocab, softcap, SOFTCAP, BLOCK, STAGES)
            tl.store(entropy_ptr + t, entropy, mask=known)
        if FUSED:
            tl.debug_barrier()  # all have read the row and the target's logit
            log_sum = tl.log(total)
            _row_gradient(x, target, z_target, top, log_sum, row_stride, vocab, softcap, SOFTCAP, BLOCK, STAGES)


_launch = KeyedLaunch(_score_rows_kernel)


def score_rows_(
    logits: Tensor,
    rows: Tensor,
    targets: Tensor,
    statistics: Tensor,
    fused: bool,
    slot: int,
    start: int,
    count: int,
    vocab: int,
    softcap: float,
    entropy: Tensor | None = None,
) -> None:
    """See `reference.rows.score_rows_`; `logits` contiguous, its rows at multiples of 16 bytes. One launch."""
    if not count:
        return
    row_stride = logits.shape[1]
    block, warps, each, stages = FUSED if fused else READ
    small = min(max(next_power_of_2(row_stride), 128), block)
    warps, each = max(warps * small // block, 1), each * block // small
    asked = entropy is not None
    constants = {"FUSED": fused, "ENTROPY": asked, "SOFTCAP": softcap != 0, "BLOCK": small, "STAGES": stages}
    key = (logits.get_device(), logits.dtype, row_stride, *constants.values(), warps)
    args = (
        logits,
        row_stride,
        rows,
        targets,
        statistics,
        entropy,
        slot,
        start,
        count,
        statistics.shape[1],
        vocab,
        softcap,
    )
    _launch(key, programs_for(count, each, logits), args, constants, warps)
