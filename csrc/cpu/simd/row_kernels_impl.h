// The row kernels, written once over `Floats`. Included by one file per capability, after its vec_*.h.
#pragma once

namespace geko::GEKO_CAPABILITY {
namespace {

constexpr int64_t kBlock = 4096;  // elements between updates of the running maximum: 16 KiB of float32 stay in L1

// exp(x) for x <= 88, within 1 ulp; 0 below -104 (-87 without AVX-512), NaN for NaN.
inline Floats exp(Floats x) {
  const Floats bounded = max(Floats(-200.f), x);
  const Floats n = round(bounded * Floats(1.44269504f));
  const Floats r = fma(n, Floats(2.12194440e-4f), fma(n, Floats(-0.693359375f), bounded));  // x - n log(2)
  Floats p = fma(r, Floats(1.381453825e-3f), Floats(8.368745446e-3f));  // least-squares minimax over |r| <= log(2) / 2
  p = fma(p, r, Floats(4.166838899e-2f));
  p = fma(p, r, Floats(0.1666652113f));
  p = fma(p, r, Floats(0.4999999404f));
  return scale(fma(p, r * r, r) + Floats(1.f), n);
}

// tanh(x) within 2 ulp.
inline Floats tanh(Floats x) {
  const Floats magnitude = min(Floats(10.f), abs(x)), square = x * x;
  Floats p = fma(square, Floats(-5.717036780e-3f), Floats(2.065057866e-2f));  // minimax over |x| <= 0.625
  p = fma(p, square, Floats(-5.374349654e-2f));
  p = fma(p, square, Floats(0.1333149076f));
  p = fma(p, square, Floats(-0.3333328366f));
  const Floats near_zero = fma(p * square, x, x);
  const Floats far = Floats(1.f) - Floats(2.f) / (exp(magnitude + magnitude) + Floats(1.f));
  return select_below(magnitude, Floats(0.625f), near_zero, copysign(far, x));
}

template <bool kCap>
inline Floats cap(Floats x, Floats softcap) {
  if constexpr (kCap) return softcap * tanh(x / softcap);
  return x;
}

// These are templates over `F` only so that a capability's own function is preferred.
template <class F>
float lane0(F x) {
  float lanes[Floats::size];
  x.store(lanes);
  return lanes[0];
}

template <class F>
float sum_lanes(F x, int64_t count = Floats::size) {
  float lanes[Floats::size];
  x.store(lanes);
  for (int64_t i = count; i < Floats::size; ++i) lanes[i] = 0.f;
  for (int64_t half = Floats::size / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class F>
float max_lanes(F x) {
  float lanes[Floats::size], top = -INFINITY;
  x.store(lanes);
  for (float lane : lanes) top = lane > top ? lane : top;
  return top;
}

// The lanes from `count` on hold the first element: the exp of a lane that underflows costs 100 ns on some CPUs.
template <class T>
inline Floats load_part(const T* from, int64_t count) {
  T part[Floats::size];
  for (int64_t i = 0; i < Floats::size; ++i) part[i] = from[i < count ? i : 0];
  return Floats::load(part);
}

template <class F, class T>
void store_part(F x, T* to, int64_t count) {
  T part[Floats::size];
  x.store(part);
  std::memcpy(to, part, count * sizeof(T));
}

// The elements [start, start + count) of a row, copied to `room` unless they are contiguous.
template <class T>
inline const T* block_of(const T* row, int64_t stride, int64_t start, int64_t count, T* room) {
  if (stride == 1) return row + start;
  for (int64_t i = 0; i < count; ++i) room[i] = row[(start + i) * stride];
  return room;
}

template <class T>
float block_max(const T* block, int64_t count) {
  constexpr int64_t step = 4 * Floats::size;
  Floats a(-INFINITY), b(-INFINITY), c(-INFINITY), d(-INFINITY);
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    a = max(Floats::load(block + i), a);
    b = max(Floats::load(block + i + Floats::size), b);
    c = max(Floats::load(block + i + 2 * Floats::size), c);
    d = max(Floats::load(block + i + 3 * Floats::size), d);
  }
  for (; i + Floats::size <= count; i += Floats::size) a = max(Floats::load(block + i), a);
  if (i < count) b = max(count < Floats::size ? load_part(block, count) : Floats::load(block + count - Floats::size), b);
  return max_lanes(max(max(a, b), max(c, d)));
}

template <class T, bool kCap>
float block_sum_exp(const T* block, int64_t count, float top, float softcap) {
  const Floats shift(top), limit(softcap);
  const auto term = [&](int64_t i) { return exp(cap<kCap>(Floats::load(block + i), limit) - shift); };
  constexpr int64_t w = Floats::size;
  Floats sums(0.f);
  int64_t i = 0;
  for (; i + 8 * w <= count; i += 8 * w) {  // pairwise: a long chain of adds to one float loses small terms
    const Floats low = (term(i) + term(i + w)) + (term(i + 2 * w) + term(i + 3 * w));
    const Floats high = (term(i + 4 * w) + term(i + 5 * w)) + (term(i + 6 * w) + term(i + 7 * w));
    sums = sums + (low + high);
  }
  for (; i + w <= count; i += w) sums = sums + term(i);
  float sum = sum_lanes(sums);
  if (i < count) sum += sum_lanes(exp(cap<kCap>(load_part(block + i, count - i), limit) - shift), count - i);
  return sum;
}

template <class T>
bool any_nan(const T* row, int64_t stride, int64_t vocab) {
  for (int64_t i = 0; i < vocab; ++i)
    if (std::isnan(widen(row[i * stride]))) return true;
  return false;
}

// The statistics from a row's maximum (-inf if no logit is finite) and sum.
template <class T, bool kCap>
TokenStats stats_from(const Row& row, float top, float total) {
  const T* logits = static_cast<const T*>(row.logits);
  if (top == -INFINITY) total = NAN;  // no finite logit: 0 / 0, as in PyTorch
  if (std::isnan(total) && any_nan(logits, row.stride, row.vocab)) top = NAN;
  float target = widen(logits[row.target * row.stride]);
  if constexpr (kCap) target = lane0(cap<kCap>(Floats(target), Floats(row.softcap)));
  const float log_sum = std::log(total), loss = log_sum - (target - top);
  return {loss, top, log_sum, 1.f / total, target == top && !std::isnan(loss) ? 1.f : 0.f};
}

// The statistics of a row, read in contiguous blocks, or in blocks copied to `room` (kBlock elements).
template <class T, bool kCap>
TokenStats row_stats(const Row& row, T* room) {
  const T* logits = static_cast<const T*>(row.logits);
  float top = -INFINITY, total = 0.f;
  for (int64_t start = 0; start < row.vocab; start += kBlock) {
    const int64_t count = std::min(kBlock, row.vocab - start);
    const T* block = block_of(logits, row.stride, start, count, room);
    const float block_top = lane0(cap<kCap>(Floats(block_max(block, count)), Floats(row.softcap)));
    if (block_top > top) {
      if (start > 0) total *= lane0(exp(Floats(top - block_top)));
      top = block_top;
    }
    total += block_sum_exp<T, kCap>(block, count, top == -INFINITY ? 0.f : top, row.softcap);
  }
  return stats_from<T, kCap>(row, top, total);
}

template <class T, bool kCap>
void strided_stats(const Row* rows, int64_t count, TokenStats* out) {
  T room[kBlock];
  for (int64_t i = 0; i < count; ++i) out[i] = row_stats<T, kCap>(rows[i], room);
}

// (exp(z - top) * confidence - is_target) * scale, times the softcap's derivative
template <bool kCap>
inline Floats grad_of(Floats logits, Floats top, Floats factor, Floats softcap) {
  if constexpr (!kCap) return exp(logits - top) * factor;
  const Floats t = tanh(logits / softcap);
  return exp(softcap * t - top) * factor * (Floats(1.f) - t * t);
}

template <class T, bool kCap>
void block_grad(const T* block, T* out, int64_t count, Floats top, Floats factor, Floats softcap) {
  constexpr int64_t w = Floats::size;
  const auto term = [&](Floats logits) { return grad_of<kCap>(logits, top, factor, softcap); };
  if (count < w) return store_part(term(load_part(block, count)), out, count);
  const Floats end = term(Floats::load(block + count - w));  // overlaps the others, so it is read before they are written
  for (int64_t i = 0; i + w <= count; i += w) term(Floats::load(block + i)).store(out + i);
  end.store(out + count - w);
}

template <class T, bool kCap>
void row_grad(const Row& row, const RowGrad& to, T* room) {
  const T* logits = static_cast<const T*>(row.logits);
  T* out = static_cast<T*>(to.out);
  // the target's -1 is taken in float32, before rounding to T
  float p = widen(logits[row.target * row.stride]), slope = 1.f;
  if constexpr (kCap) {
    const float t = lane0(tanh(Floats(p / row.softcap)));
    p = row.softcap * t;
    slope = 1.f - t * t;
  }
  p = lane0(exp(Floats(p - to.top))) * to.confidence;
  const float product = to.scale * to.confidence;
  const Floats top(to.top), factor(std::isnan(product) ? NAN : product), softcap(row.softcap);  // see store(BFloat16*)
  // the first block of a long row ends with a cache line of `out`, so that no store after it crosses one
  const int64_t past = reinterpret_cast<uintptr_t>(out) % 64, head = row.vocab < 512 ? 0 : (64 - past) % 64 / sizeof(T);
  for (int64_t start = 0, count; start < row.vocab; start += count) {
    count = std::min(start == 0 && head > 0 ? head : kBlock, row.vocab - start);
    const T* block = block_of(logits, row.stride, start, count, room);
    T* block_out = to.stride == 1 ? out + start : room;
    block_grad<T, kCap>(block, block_out, count, top, factor, softcap);
    if (to.stride != 1)
      for (int64_t i = 0; i < count; ++i) out[(start + i) * to.stride] = room[i];
  }
  out[row.target * to.stride] = narrow<T>((p - 1.f) * slope * to.scale);
}

template <class T, bool kCap>
void strided_grad(const Row* rows, const RowGrad* to, int64_t count) {
  T room[kBlock];
  for (int64_t i = 0; i < count; ++i) row_grad<T, kCap>(rows[i], to[i], room);
}

}  // namespace
}  // namespace geko::GEKO_CAPABILITY

#include "csrc/cpu/simd/turned_rows_impl.h"

namespace geko::GEKO_CAPABILITY {
namespace {

// The rows in groups, one row a vector lane, where that is faster; else row by row.
template <class T, bool kCap>
void stats(const Row* rows, int64_t count, TokenStats* out) {
  if (rows->vocab > kTurnedStats) {
    if (rows->stride != 1) return strided_stats<T, kCap>(rows, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] = row_stats<T, kCap>(rows[i], nullptr);
    return;
  }
  for (int64_t i = 0; i < count; i += Floats::size)
    turned_stats<T, kCap>(rows + i, std::min(count - i, Floats::size), out + i);
}

template <class T, bool kCap>
void grad(const Row* rows, const RowGrad* to, int64_t count) {
  if (rows->vocab > kTurnedGrad) {
    if (rows->stride != 1 || to->stride != 1) return strided_grad<T, kCap>(rows, to, count);
    for (int64_t i = 0; i < count; ++i) row_grad<T, kCap>(rows[i], to[i], nullptr);
    return;
  }
  for (int64_t i = 0; i < count; i += Floats::size)
    turned_grad<T, kCap>(rows + i, to + i, std::min(count - i, Floats::size));
}

template <class T>
void stats_of(const Row* rows, int64_t count, TokenStats* out) {
  rows->softcap != 0.f ? stats<T, true>(rows, count, out) : stats<T, false>(rows, count, out);
}

template <class T>
void grad_into(const Row* rows, const RowGrad* to, int64_t count) {
  rows->softcap != 0.f ? grad<T, true>(rows, to, count) : grad<T, false>(rows, to, count);
}

}  // namespace

constexpr RowKernels make_kernels(const char* capability) {
  return {capability,
          {stats_of<float>, stats_of<BFloat16>, stats_of<Half>},
          {grad_into<float>, grad_into<BFloat16>, grad_into<Half>}};
}

}  // namespace geko::GEKO_CAPABILITY
