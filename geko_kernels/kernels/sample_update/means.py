"""Segment means: loss, confidence and accuracy of each visit, summed in a fixed order without loss of precision."""

from __future__ import annotations

import triton
import triton.language as tl

from geko_kernels.kernels.batch import token_sample, token_target


@triton.jit
def scored_tokens(batch, t, live, vocab, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """Which tokens have a loss, and which have a label outside the vocabulary."""
    target, asked = token_target(batch, t, live, SHIFT, PACKED)
    inside = (target >= 0) & (target < vocab)
    return asked & inside, asked & ~inside


@triton.jit
def add_exactly(total, lost, x):
    """`total + x`, and `lost` plus the rounding error of that sum (two-sum); `joined` adds both."""
    new = total + x
    back = new - total
    return new, lost + ((total - (new - back)) + (x - back))


@triton.jit
def joined(total, lost):
    """The sum from `add_exactly`; an infinite sum has no rounding error to add."""
    return tl.where(tl.abs(lost) < float("inf"), total + lost, total)


@triton.jit
def token_weight(token_weights_ptr, t, scored, SHIFT: tl.constexpr):
    """The weight of the label that token(s) t predict; 0 where nothing is scored."""
    at = t + 1 if SHIFT else t
    return tl.load(token_weights_ptr + at, mask=scored, other=0.0)


@triton.jit
def visit_means(
    batch,
    token_stats,
    first,
    lengths,
    longest,
    known,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss sum, valid tokens, divisor of the means, and the means of loss, confidence and hit of ROWS visits.

    Args: first, lengths (ROWS,): tokens of the visits; known (ROWS,): False leaves out a visit with a bad id.
    """
    statistics_ptr, token_count, vocab, token_weights_ptr = token_stats
    loss = tl.zeros([ROWS, BLOCK], tl.float32)
    loss_lost = tl.zeros([ROWS, BLOCK], tl.float32)
    sure = tl.zeros([ROWS, BLOCK], tl.float32)
    sure_lost = tl.zeros([ROWS, BLOCK], tl.float32)
    hits = tl.zeros([ROWS, BLOCK], tl.float32)  # exact integers without weights
    hits_lost = tl.zeros([ROWS, BLOCK], tl.float32)
    weighed = tl.zeros([ROWS, BLOCK], tl.float32)
    weighed_lost = tl.zeros([ROWS, BLOCK], tl.float32)
    count = tl.zeros([ROWS, BLOCK], tl.int32)
    bad = tl.zeros([ROWS, BLOCK], tl.int32)
    stride = token_count.to(tl.int64)
    for start in range(0, longest, BLOCK):
        offset = start + tl.arange(0, BLOCK)[None, :]
        t = first[:, None] + offset
        inside = offset < lengths[:, None]
        scored, wrong = scored_tokens(batch, t, inside, vocab, SHIFT, PACKED)
        # 0 where not scored; no mask, so that these loads do not wait for the labels
        if token_weights_ptr is None:
            loss, loss_lost = add_exactly(loss, loss_lost, tl.load(statistics_ptr + t, mask=inside, other=0.0))
            sure, sure_lost = add_exactly(
                sure, sure_lost, tl.load(statistics_ptr + 3 * stride + t, mask=inside, other=0.0)
            )
            hits += tl.load(statistics_ptr + 4 * stride + t, mask=inside, other=0.0)
        else:
            weight = token_weight(token_weights_ptr, t, scored, SHIFT)
            one_loss = tl.load(statistics_ptr + t, mask=inside, other=0.0)
            one_sure = tl.load(statistics_ptr + 3 * stride + t, mask=inside, other=0.0)
            one_hit = tl.load(statistics_ptr + 4 * stride + t, mask=inside, other=0.0)
            loss, loss_lost = add_exactly(loss, loss_lost, weight * one_loss)
            sure, sure_lost = add_exactly(sure, sure_lost, weight * one_sure)
            hits, hits_lost = add_exactly(hits, hits_lost, weight * one_hit)
            weighed, weighed_lost = add_exactly(weighed, weighed_lost, weight)
        count += scored.to(tl.int32)
        bad += wrong.to(tl.int32)
    kept = known & (tl.sum(bad, 1) == 0)
    items = tl.where(kept, tl.sum(count, 1), 0)
    if token_weights_ptr is None:
        divisor = tl.maximum(items, 1).to(tl.float32)
    else:
        hits = joined(hits, hits_lost)
        divisor = tl.where(items > 0, tl.sum(joined(weighed, weighed_lost), 1), 1.0)
    loss_sum = tl.where(kept, tl.sum(joined(loss, loss_lost), 1), 0.0)
    sure_mean = tl.div_rn(tl.where(kept, tl.sum(joined(sure, sure_lost), 1), 0.0), divisor)
    accuracy = tl.div_rn(tl.where(kept, tl.sum(hits, 1), 0.0), divisor)
    return loss_sum, items, divisor, tl.div_rn(loss_sum, divisor), sure_mean, accuracy


@triton.jit
def is_finite(loss, confidence):
    """Neither NaN nor infinite."""
    return (tl.abs(loss) < float("inf")) & (tl.abs(confidence) < float("inf"))


@triton.jit
def run_length(batch, first, sample, BLOCK: tl.constexpr):
    """Packed: tokens of the visit that starts at token `first`."""
    _, _, _, _, _, _, row_length, _ = batch
    row_end = (first // row_length + 1) * row_length
    end = row_end
    start = first
    while start < end:
        t = start + tl.arange(0, BLOCK)
        inside = t < row_end
        other = inside & (token_sample(batch, t, inside, True) != sample)
        end = tl.minimum(end, tl.min(tl.where(other, t, row_end), 0))
        start += BLOCK
    return end - first
