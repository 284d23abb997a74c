"""Logits gradient: one pass that reads and writes only the rows whose weight is not zero, and zeros the others."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.batch import LOG2E, VECTOR_BITS, edge_span, row_span, soft_cap
from geko_kernels.kernels.launch import MOST, Launch, cdiv, next_power_of_2
from geko_kernels.kernels.token_stats import SMALL_VOCAB

BLOCK = 4096
WARPS = 8
ONE, BY_ROW, BY_VISIT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how the upstream gradient is indexed


@triton.jit
def _upstream(grad_output_ptr, grad_stride, token_visit_ptr, t, live, length, entries, UPSTREAM: tl.constexpr):
    """The upstream gradient of token(s) t; NaN if token_visit, from another forward, is no entry."""
    other = 0.0
    if UPSTREAM == BY_ROW:
        at = (t // length).to(tl.int64) * grad_stride
    elif UPSTREAM == BY_VISIT:
        entry = tl.load(token_visit_ptr + t, mask=live, other=0)
        live &= (entry >= 0) & (entry < entries)
        other = float("nan")
        at = entry.to(tl.int64) * grad_stride
    else:
        at = (t * 0).to(tl.int64)
    return tl.load(grad_output_ptr + at, mask=live, other=other).to(tl.float32)


@triton.jit
def _factor(
    coeff_ptr,
    scale_ptr,
    grad_output_ptr,
    grad_stride,
    token_visit_ptr,
    t,
    live,
    length,
    entries,
    UPSTREAM: tl.constexpr,
):
    """The factor of `softmax - onehot` of token(s) t; exactly 0 where the coefficient is 0."""
    coefficient = tl.load(coeff_ptr + t, mask=live, other=0.0)
    kept = live & (coefficient != 0)
    upstream = _upstream(grad_output_ptr, grad_stride, token_visit_ptr, t, kept, length, entries, UPSTREAM)
    return tl.where(kept, coefficient * tl.load(scale_ptr) * upstream, 0.0)


@triton.jit
def gradient_of(x, column, target, top, log_sum, factor, cap, SOFTCAP: tl.constexpr):
    """float32 until the last product: rounding the softmax first loses a confident target's gradient (p = .999)."""
    z = x.to(tl.float32)
    if SOFTCAP:
        z = soft_cap(z, cap)
    grad = tl.exp2((z - top - log_sum) * LOG2E)
    grad = tl.where(column == target, grad - 1, grad)
    if SOFTCAP:
        tanh = z / cap
        grad *= 1 - tanh * tanh
    return grad * factor


@triton.jit
def _write_part(out, x, position, inside, lead, target, top, log_sum, factor, cap, SOFTCAP: tl.constexpr):
    logits = tl.load(x + position, mask=inside, other=0.0)
    grad = gradient_of(logits, position - lead, target, top, log_sum, factor, cap, SOFTCAP)
    tl.store(out + position, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def contiguous_tile(
    out_ptr,
    x_ptr,
    tile,
    target,
    top,
    log_sum,
    factor,
    vocab,
    cap,
    SOFTCAP: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one row of stride 1; tile 0 also handles the row's ends."""
    PER: tl.constexpr = VECTOR_BITS // out_ptr.dtype.element_ty.primitive_bitwidth
    out, lead, first, end = row_span(out_ptr, vocab)
    x = x_ptr - lead
    if SAME:
        x = tl.multiple_of(x, 16)
    position = tile * BLOCK + tl.arange(0, BLOCK)
    inside = (position >= first) & (position < end)
    edge, ends = edge_span(lead, end, vocab, PER)
    if factor == 0:
        zero = out_ptr.dtype.element_ty
        tl.store(out + position, tl.zeros([BLOCK], zero), mask=inside)
        if tile == 0:
            tl.store(out + edge, tl.zeros([2 * PER], zero), mask=ends)
    else:
        _write_part(out, x, position, inside, lead, target, top, log_sum, factor, cap, SOFTCAP)
        if tile == 0:
            _write_part(out, x, edge, ends, lead, target, top, log_sum, factor, cap, SOFTCAP)


@triton.jit
def _strided_tile(
    out_ptr,
    out_v,
    x_ptr,
    stride_v,
    tile,
    target,
    top,
    log_sum,
    factor,
    live,
    vocab,
    cap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a tile of rows of any strides: `out_ptr`, `x_ptr`, `target`, ... (ROWS,)."""
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = live[:, None] & (column < vocab)[None, :]
    kept = inside & (factor != 0)[:, None]
    at = column.to(tl.int64)[None, :]
    logits = tl.load(x_ptr[:, None] + at * stride_v, mask=kept, other=0.0)
    grad = gradient_of(
        logits, column[None, :], target[:, None], top[:, None], log_sum[:, None], factor[:, None], cap, SOFTCAP
    )
    tl.store(out_ptr[:, None] + at * out_v, tl.where(kept, grad, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("grad_stride", "stride_b", "stride_s", "out_b", "out_s", "label_b", "label_s"),
        *("length", "token_count", "vocab", "softcap", "tiles"),
    ]
)
def _logits_grad_kernel(
    out_ptr,
    grad_output_ptr,
    logits_ptr,
    labels_ptr,
    statistics_ptr,
    coeff_ptr,
    scale_ptr,
    token_visit_ptr,
    out_b,
    out_s,
    out_v,
    grad_stride,
    stride_b,
    stride_s,
    stride_v,
    label_b,
    label_s,
    length,
    token_count,
    vocab,
    softcap,
    tiles,
    UPSTREAM: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    SAME: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a tile of a row (UNIT) or of ROWS rows; last rows first, as they are still in cache."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = program % tiles
    if UNIT:
        t = program // tiles
    else:
        t = (program // tiles) * ROWS + tl.arange(0, ROWS)
    live = t < token_count
    b, s = (t // length).to(tl.int64), (t % length).to(tl.int64)
    factor = _factor(
        coeff_ptr, scale_ptr, grad_output_ptr, grad_stride, token_visit_ptr, t, live, length, token_count, UPSTREAM
    )
    if SHIFT:
        s_label = tl.minimum(s + 1, length - 1)  # the last position predicts nothing, so its factor is 0
    else:
        s_label = s
    target = tl.load(labels_ptr + b * label_b + s_label * label_s, mask=live, other=0)
    step = token_count.to(tl.int64)
    top = tl.load(statistics_ptr + step + t, mask=live, other=0.0)
    log_sum = tl.load(statistics_ptr + 2 * step + t, mask=live, other=0.0)
    out = out_ptr + b * out_b + s * out_s
    x = logits_ptr + b * stride_b + s * stride_s
    if UNIT:
        contiguous_tile(out, x, tile, target, top, log_sum, factor, vocab, softcap, SOFTCAP, SAME, BLOCK)
    else:
        _strided_tile(out, out_v, x, stride_v, tile, target, top, log_sum, factor, live, vocab, softcap, SOFTCAP, BLOCK)


def gradient_shape(vocab: int, unit: bool) -> tuple[int, int, int]:
    """(rows, block, warps) of a program."""
    if unit:
        block = min(next_power_of_2(vocab), BLOCK)
        return 1, block, max(block * WARPS // BLOCK, 1)
    block = min(next_power_of_2(vocab), SMALL_VOCAB)
    return min(4096 // block, 64), block, 4


def gradient_launch(
    out: Tensor, grad_output: Tensor, logits: Tensor, labels: Tensor, packed: bool, shift: bool, softcap: float
) -> Launch:
    """Pointers: out, grad_output, logits, labels, statistics, coeff, scale, token_visit."""
    _, length, vocab = logits.shape
    count = labels.numel()
    stride_b, stride_s, stride_v = logits.stride()
    out_b, out_s, out_v = out.stride()
    unit = stride_v == 1 and out_v == 1 and vocab > SMALL_VOCAB
    per = 16 // logits.element_size()
    apart = (logits.data_ptr() - out.data_ptr()) % 16 or (stride_b - out_b) % per or (stride_s - out_s) % per
    rows, block, warps = gradient_shape(vocab, unit)
    # a contiguous row that does not start at a vector's boundary spans up to per - 1 more elements
    tiles = cdiv(vocab + (per - 1 if unit else 0), block)
    upstream = ONE if not grad_output.dim() else BY_VISIT if packed else BY_ROW
    numbers = (
        *(*out.stride(), grad_output.stride(0) if grad_output.dim() else 0, *logits.stride(), *labels.stride()),
        *(length, count, vocab, softcap, tiles),
    )
    constants = {"UPSTREAM": upstream, "SHIFT": shift, "SOFTCAP": softcap != 0}
    tiling = {"UNIT": unit, "SAME": not apart, "ROWS": rows, "BLOCK": block}
    return Launch(_logits_grad_kernel, cdiv(count, rows) * tiles, numbers, {**constants, **tiling}, warps)


_launches: dict[Hashable, Launch] = {}


def _run(
    out: Tensor,
    grad_output: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    coeff: Tensor,
    scale: Tensor,
    token_visit: Tensor,
    shift: bool,
    softcap: float,
) -> None:
    if not labels.numel():
        return
    packed = token_visit.numel() > 0
    # everything that the binary, the grid and the numbers depend on; the forward's outputs are aligned
    key = (
        *(logits.shape, logits.stride(), logits.dtype, logits.get_device(), logits.data_ptr() % 16),
        *(out.stride(), out.data_ptr() % 16, labels.stride(), labels.data_ptr() % 16),
        *(grad_output.dtype, grad_output.stride(), grad_output.data_ptr() % 16, packed, shift, softcap),
    )
    launch = _launches.get(key)
    if launch is None:
        if len(_launches) >= MOST:
            _launches.clear()
        launch = _launches[key] = gradient_launch(out, grad_output, logits, labels, packed, shift, softcap)
    launch(out, grad_output, logits, labels, statistics, coeff, scale, token_visit)


def logits_grad(grad_output: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    """See `reference.logits_grad`. One launch."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run(out, grad_output, logits, *rest)
    return out


def logits_grad_(grad_output: Tensor, logits: Tensor, *rest: Any) -> None:
    """`logits_grad`, written over the logits."""
    _run(logits, grad_output, logits, *rest)
