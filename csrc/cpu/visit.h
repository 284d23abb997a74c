// What one visit does to a sample's learning state: quality, Q-value, bucket and weight. Plain C++, no torch and no
// allocation, so that host and device code can share it. Equal to geko_kernels/reference/visits.py;
// compile without contraction of a * b + c, so that both round alike.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GEKO_HD __host__ __device__ __forceinline__
#else
#define GEKO_HD inline
#endif

namespace geko {

enum Bucket : uint8_t { FREEZE = 0, LIGHT = 1, FOCUS = 2, HARD = 3 };
enum Reduction : int64_t { NONE = 0, MEAN = 1, TOKEN_MEAN = 2, SUM = 3 };

constexpr int kHistory = 5;  // losses kept per sample
constexpr int kRules = 10;

// The numbers of `GEKOConfig` in the order of `Rules` in reference/visits.py; the rules tensor is one of these.
struct Rules {
  float freeze_confidence, freeze_quality, focus_confidence, correct_loss, correct_accuracy;
  float q_lr, q_scale, min_q, by_accuracy, by_std;
};
static_assert(sizeof(Rules) == kRules * sizeof(float), "Rules mirrors the rules tensor");

// The columns of `SampleState` that a visit reads and writes, for one sample; initially those of a sample never seen.
struct SampleRow {
  float q_value = 0.5f, confidence = 0.f;
  float history[kHistory] = {0.f, 0.f, 0.f, 0.f, 0.f};  // mean token losses, newest last
  int32_t times_seen = 0;
  uint8_t bucket = FOCUS, wrong_streak = 0;
};

// Sums over the valid tokens of a visit, weighted by the tokens' weights.
struct Sums {
  int64_t tokens = 0;  // their number
  double items = 0.;   // the sum of their weights
  double loss = 0., confidence = 0., hits = 0.;
};

// The means of a visit's tokens, and what follows from them.
struct Visit {
  int64_t tokens;                    // valid tokens
  float loss, confidence, accuracy;  // means over those
  float quality;
  bool finite, correct;
};

// 1 - min(r, 1), or 0 for a NaN; r is the root mean square of the rises among the last losses, or their standard
// deviation (by_std).
GEKO_HD float quality_of(const float* history, int32_t times_seen, const Rules& rules) {
  const int count = times_seen < 0 ? 0 : times_seen < kHistory ? times_seen : kHistory, first = kHistory - count;
  float sum = 0.f, divisor;
  if (rules.by_std > 0.f) {
    divisor = static_cast<float>(count > 1 ? count : 1);
    for (int i = first; i < kHistory; ++i) sum += history[i];
    const float mean = sum / divisor;
    sum = 0.f;
    for (int i = first; i < kHistory; ++i) sum += (history[i] - mean) * (history[i] - mean);
  } else {
    divisor = static_cast<float>(count > 2 ? count - 1 : 1);
    for (int i = first; i + 1 < kHistory; ++i) {
      const float rise = history[i + 1] > history[i] ? history[i + 1] - history[i] : 0.f;
      sum += rise * rise;
    }
  }
  const float unsteady = sqrtf(sum / divisor);
  return 1.f - (unsteady < 1.f ? unsteady : 1.f);
}

GEKO_HD uint8_t bucket_of(const Visit& visit, const SampleRow& row, const Rules& rules) {
  if (!visit.correct) return visit.confidence > rules.focus_confidence ? HARD : FOCUS;
  const bool steady = visit.confidence > rules.freeze_confidence && visit.quality > rules.freeze_quality;
  return steady && row.q_value >= rules.min_q ? FREEZE : LIGHT;
}

// `times_seen` + 1, up to the largest int32; a damaged file may have made `times_seen` negative.
GEKO_HD int32_t seen_again(int32_t times_seen) {
  return times_seen < 0 ? 1 : times_seen < INT32_MAX ? times_seen + 1 : INT32_MAX;
}

// The visit of a sample from the sums over its valid tokens. Updates `row`, or only its bucket if the visit is not
// finite. In place, since a copy would wait for the stores to what it copies.
GEKO_HD Visit judge(SampleRow& row, const Sums& sums, const Rules& rules) {
  const int64_t tokens = sums.tokens;
  const double divisor = tokens > 0 ? sums.items : 1.;
  // a visit of one token needs no division: the three divisions are a fifth of its time
  const auto mean = [divisor](double sum) { return static_cast<float>(divisor == 1. ? sum : sum / divisor); };
  Visit visit{tokens, mean(sums.loss), mean(sums.confidence), mean(sums.hits), 0.f, false, false};
  visit.finite = tokens > 0 && std::isfinite(visit.loss) && std::isfinite(visit.confidence);
  if (visit.finite) {
    for (int i = 0; i + 1 < kHistory; ++i) row.history[i] = row.history[i + 1];
    row.history[kHistory - 1] = visit.loss;
    const float scaled = visit.loss / rules.q_scale;
    row.q_value = (1.f - rules.q_lr) * row.q_value + rules.q_lr * (1.f - (scaled > 1.f ? 1.f : scaled));
    row.confidence = visit.confidence;
    row.times_seen = seen_again(row.times_seen);
    const bool by_loss = visit.loss < rules.correct_loss, by_accuracy = visit.accuracy >= rules.correct_accuracy;
    visit.correct = rules.by_accuracy > 0.f ? by_accuracy : by_loss;
    row.wrong_streak = visit.correct ? 0 : row.wrong_streak < 255 ? row.wrong_streak + 1 : 255;
  }
  visit.quality = quality_of(row.history, row.times_seen, rules);
  if (tokens > 0) row.bucket = bucket_of(visit, row, rules);
  return visit;
}

// `weights` are indexed by `Bucket`.
GEKO_HD float weight_of(const Visit& visit, const SampleRow& row, const float* weights) {
  return visit.tokens > 0 ? weights[row.bucket] : 0.f;
}

}  // namespace geko
