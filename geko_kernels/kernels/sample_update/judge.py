"""Quality, Q-value, bucket, weight and the new row, from a visit's means and its sample's old row."""

from __future__ import annotations

import triton
import triton.language as tl

from geko_kernels.kernels.sample_update.prepare import BUCKET_PLANE, HISTORY, HISTORY_PLANE, Q_PLANE, SEEN_PLANE, plane
from geko_kernels.reference.visits import Rules

FREEZE_CONFIDENCE = tl.constexpr(int(Rules.FREEZE_CONFIDENCE))
FREEZE_QUALITY = tl.constexpr(int(Rules.FREEZE_QUALITY))
FOCUS_CONFIDENCE = tl.constexpr(int(Rules.FOCUS_CONFIDENCE))
CORRECT_LOSS = tl.constexpr(int(Rules.CORRECT_LOSS))
CORRECT_ACCURACY = tl.constexpr(int(Rules.CORRECT_ACCURACY))
Q_LR = tl.constexpr(int(Rules.Q_LR))
Q_SCALE = tl.constexpr(int(Rules.Q_SCALE))
MIN_Q = tl.constexpr(int(Rules.MIN_Q))
BY_ACCURACY = tl.constexpr(int(Rules.BY_ACCURACY))
BY_STD = tl.constexpr(int(Rules.BY_STD))
FREEZE, LIGHT, FOCUS, HARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _quality(history, seen, rules_ptr):
    """See `reference.visits.quality_of`; history: a tuple of five (ROWS,) losses, newest last.

    Compares values that may be NaN instead of using `tl.minimum` and `tl.maximum`, which do not define NaN.
    """
    count = tl.maximum(tl.minimum(seen, HISTORY), 0)
    divisor = tl.maximum(count, 1).to(tl.float32)
    rises = tl.zeros_like(history[0])
    mean = tl.zeros_like(history[0])
    for i in tl.static_range(HISTORY):
        live = count + i >= HISTORY
        mean += tl.where(live, history[i], 0.0)
        if i + 1 < HISTORY:
            rise = history[i + 1] - history[i]
            rises += tl.where(live & (history[i + 1] > history[i]), rise * rise, 0.0)
    mean = tl.div_rn(mean, divisor)
    spread = tl.zeros_like(mean)
    for i in tl.static_range(HISTORY):
        apart = history[i] - mean
        spread += tl.where(count + i >= HISTORY, apart * apart, 0.0)
    by_rise = tl.sqrt_rn(tl.div_rn(rises, tl.maximum(count - 1, 1).to(tl.float32)))
    by_std = tl.sqrt_rn(tl.div_rn(spread, divisor))
    unsteady = tl.where(tl.load(rules_ptr + BY_STD) > 0, by_std, by_rise)
    return 1 - tl.where(unsteady < 1, unsteady, 1.0)


@triton.jit
def seen_again(seen):
    """`seen + 1`, up to the largest int32; a damaged file may have made `seen` negative."""
    return tl.where(seen < 0, 0, tl.minimum(seen, 2147483646)) + 1


@triton.jit
def old_rows(scratch_ptr, entries, slot, live, HAS_TABLE: tl.constexpr):
    """(q_value, times_seen, bucket, loss_history) of each visit's sample before this call, as prepared."""
    q_value = tl.where(live, 0.5, 0.5)
    seen = tl.where(live, 0, 0)
    bucket = tl.where(live, FOCUS, FOCUS)
    zero = tl.zeros_like(q_value)
    history = (zero, zero, zero, zero, zero)
    if HAS_TABLE:
        q_bits = tl.load(plane(scratch_ptr, Q_PLANE, entries) + slot, mask=live, other=0)
        q_value = q_bits.to(tl.float32, bitcast=True)
        seen = tl.load(plane(scratch_ptr, SEEN_PLANE, entries) + slot, mask=live, other=0)
        bucket = tl.load(plane(scratch_ptr, BUCKET_PLANE, entries) + slot, mask=live, other=2)
        oldest = plane(scratch_ptr, HISTORY_PLANE, entries) + slot
        step = entries.to(tl.int64)
        history = (
            tl.load(oldest, mask=live, other=0).to(tl.float32, bitcast=True),
            tl.load(oldest + step, mask=live, other=0).to(tl.float32, bitcast=True),
            tl.load(oldest + 2 * step, mask=live, other=0).to(tl.float32, bitcast=True),
            tl.load(oldest + 3 * step, mask=live, other=0).to(tl.float32, bitcast=True),
            tl.load(oldest + 4 * step, mask=live, other=0).to(tl.float32, bitcast=True),
        )
    return q_value, seen, bucket, history


@triton.jit
def judge_visits(old, means, finite, rules_ptr, weights_ptr, HAS_TABLE: tl.constexpr):
    """(q_value, quality, correct, bucket, weight) from `old_rows` and the means (items, loss, confidence, accuracy)."""
    old_q, old_seen, old_bucket, old_history = old
    items, loss, sure, accuracy = means
    counted = items > 0
    lr = tl.load(rules_ptr + Q_LR)
    scaled = tl.div_rn(loss, tl.load(rules_ptr + Q_SCALE))
    gain = 1 - tl.where(scaled > 1, 1.0, scaled)
    q_value = tl.where(finite, (1 - lr) * old_q + lr * gain, old_q)
    history = (old_history[1], old_history[2], old_history[3], old_history[4], loss)
    was, now = _quality(old_history, old_seen, rules_ptr), _quality(history, seen_again(old_seen), rules_ptr)
    quality = tl.where(finite, now, was)
    by_loss = loss < tl.load(rules_ptr + CORRECT_LOSS)
    by_accuracy = accuracy >= tl.load(rules_ptr + CORRECT_ACCURACY)
    correct = finite & tl.where(tl.load(rules_ptr + BY_ACCURACY) > 0, by_accuracy, by_loss)
    steady = (sure > tl.load(rules_ptr + FREEZE_CONFIDENCE)) & (quality > tl.load(rules_ptr + FREEZE_QUALITY))
    frozen = correct & steady & (q_value >= tl.load(rules_ptr + MIN_Q))
    hard = ~correct & (sure > tl.load(rules_ptr + FOCUS_CONFIDENCE))
    bucket = tl.where(correct, tl.where(frozen, FREEZE, LIGHT), tl.where(hard, HARD, FOCUS))
    bucket = tl.where(counted, bucket, old_bucket)
    if HAS_TABLE:
        weight = tl.load(weights_ptr + bucket, mask=counted, other=0.0)
    else:
        weight = counted.to(tl.float32)
    return q_value, quality, correct, bucket, weight


@triton.jit
def write_rows(columns, sample, mask, old, means, judged):
    """The new row of each sample whose visit is in `mask`, at most one visit a sample."""
    q_value_ptr, confidence_ptr, loss_history_ptr, times_seen_ptr, bucket_ptr, wrong_streak_ptr, changed_ptr = columns
    _, old_seen, _, old_history = old
    _, loss, sure, _ = means
    q_value, _, correct, bucket, _ = judged
    tl.store(q_value_ptr + sample, q_value, mask=mask)
    tl.store(confidence_ptr + sample, sure, mask=mask)
    for i in tl.static_range(1, HISTORY):
        tl.store(loss_history_ptr + sample * HISTORY + i - 1, old_history[i], mask=mask)
    tl.store(loss_history_ptr + sample * HISTORY + HISTORY - 1, loss, mask=mask)
    tl.store(times_seen_ptr + sample, seen_again(old_seen), mask=mask)
    tl.store(bucket_ptr + sample, bucket.to(tl.uint8), mask=mask)
    streak = tl.load(wrong_streak_ptr + sample, mask=mask, other=0).to(tl.int32) + 1
    tl.store(wrong_streak_ptr + sample, tl.where(correct, 0, tl.minimum(streak, 255)).to(tl.uint8), mask=mask)
    tl.store(changed_ptr + sample, mask, mask=mask)
