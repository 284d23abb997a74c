"""How the kernels find a token's sample id, its target, and its row of logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# integer arguments that Triton does not specialize (for 1 and for multiples of 16)
BATCH_INTS = ["label_b", "label_s", "id_b", "id_s", "length", "ignore_index", "token_count", "vocab", "num_samples"]
VECTOR_BITS = tl.constexpr(128)  # widest load of one thread


@triton.jit
def token_sample(batch, t, live, PACKED: tl.constexpr):
    """Sample id of token(s) t: `sample_ids[b, s]` packed, else `sample_ids[b]`, else b; -1 where not live."""
    _, _, _, ids_ptr, id_b, id_s, length, _ = batch
    b = (t // length).to(tl.int64)
    if ids_ptr is None:
        sample = b
    else:
        at = b * id_b
        if PACKED:
            at += (t % length).to(tl.int64) * id_s
        sample = tl.load(ids_ptr + at, mask=live, other=-1)
    return tl.where(live, sample, -1)


@triton.jit
def visit_starts(batch, t, live, PACKED: tl.constexpr):
    """Sample id of token(s) t, and whether a visit starts there: never at padding; without packing once a row."""
    _, _, _, _, _, _, length, _ = batch
    sample = token_sample(batch, t, live, PACKED)
    starts = live & (t % length == 0)
    if PACKED:
        inside = live & (t % length != 0)
        starts = (starts | (inside & (token_sample(batch, t - 1, inside, PACKED) != sample))) & (sample != -1)
    return sample, starts


@triton.jit
def token_target(batch, t, live, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """The label that token(s) t predict, 0 if none, and whether there is one (in the vocabulary or not)."""
    labels_ptr, label_b, label_s, _, _, _, length, ignore_index = batch
    sample = token_sample(batch, t, live, PACKED)
    b = (t // length).to(tl.int64)
    s = (t % length).to(tl.int64)
    asked = live & (sample != -1)
    if SHIFT:
        asked &= s + 1 < length
        if PACKED:
            asked &= token_sample(batch, t + 1, asked, PACKED) == sample
        s += 1
    target = tl.load(labels_ptr + b * label_b + s * label_s, mask=asked, other=0)
    return target, asked & (target != ignore_index)


@triton.jit
def soft_cap(x, cap):
    """`cap * tanh(x / cap)`, accurate to an ulp or two even for small values."""
    u = x / cap
    square = u * u
    small = u * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(tl.abs(u) * (-2 * LOG2E))
    large = (1 - decay) / (1 + decay)
    return cap * tl.where(square < 0.09, small, tl.where(u < 0, -large, large))


@triton.jit
def row_span(row_ptr, vocab):
    """Split a contiguous row so that its middle is read and written 16 bytes at a time, wherever it starts.

    Returns: the 16-byte boundary at or before the row; `lead`, the elements between it and the row; `first` and `end`,
    counted from the boundary, of the whole vectors inside the row. `edge_span` has the elements at both ends.
    """
    PER: tl.constexpr = VECTOR_BITS // row_ptr.dtype.element_ty.primitive_bitwidth
    lead = ((row_ptr.to(tl.int64) % 16) // (16 // PER)).to(tl.int32)
    aligned = tl.multiple_of(row_ptr - lead, 16)
    first = (lead > 0).to(tl.int32) * PER
    end = (lead + vocab) // PER * PER
    return aligned, lead, first, end


@triton.jit
def edge_span(lead, end, vocab, PER: tl.constexpr):
    """(2 * PER,) positions counted from the boundary of `row_span`, and which of them are the row's ends."""
    lane = tl.arange(0, 2 * PER)
    leading = lane < PER
    position = tl.where(leading, lane, end + lane - PER)
    return position, tl.where(leading, (lead > 0) & (position >= lead), position < lead + vocab)


def id_strides(sample_ids: Tensor | None) -> tuple[int, int]:
    """(id_b, id_s) of `token_sample`."""
    if sample_ids is None:
        return 0, 0
    return sample_ids.stride(0), sample_ids.stride(1) if sample_ids.dim() == 2 else 0
