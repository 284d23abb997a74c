// Which token belongs to which visit, and what it predicts: the equal of `layout` in geko_kernels/reference/layout.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace geko {

constexpr int64_t kNoError = std::numeric_limits<int64_t>::max();

// token / length, both at least 0. On some CPUs a division of 64 bits takes as long as a short row.
inline int64_t quotient(int64_t token, int64_t length) {
  if (length == 1) return token;
  if ((token | length) >> 32) return token / length;
  return static_cast<uint32_t>(token) / static_cast<uint32_t>(length);
}

// (batch, length) labels, and sample ids: one a row, one a token (packed), or null where each row is its own sample.
struct Batch {
  const int64_t *labels, *ids;
  bool packed;
  int64_t batch, length, vocab, ignore_index;
  bool shift;

  int64_t tokens() const { return batch * length; }
  int64_t row_of(int64_t token) const { return quotient(token, length); }
  int64_t visits() const { return packed ? tokens() : batch; }
  int64_t id_of(int64_t token) const {
    if (packed) return ids[token];
    return ids ? ids[row_of(token)] : row_of(token);
  }
  // The label that a token predicts; ignore_index where there is none.
  int64_t target_of(int64_t token) const {
    if (id_of(token) == -1) return ignore_index;
    if (!shift) return labels[token];
    const bool last = token + 1 == (row_of(token) + 1) * length || id_of(token) != id_of(token + 1);
    return last ? ignore_index : labels[token + 1];
  }
  bool in_vocab(int64_t target) const { return target != ignore_index && target >= 0 && target < vocab; }
};

struct Layout {
  std::vector<int32_t> visit;    // (T,) entry of the token's visit, -1 for padding
  std::vector<int64_t> ids;      // (M,) sample id of the visit, -1 unused
  std::vector<bool> left_out;    // (M,) the visit holds a bad value
  std::vector<bool> scored;      // (T,) has a label inside the vocabulary to predict
  int64_t error = kNoError;      // smallest error key

  bool valid(int64_t token) const { return scored[token] && !left_out[visit[token]]; }
};

// The minimum of these keys is the first offender.
inline int64_t error_key(int64_t position, bool is_label, int64_t value) {
  const int64_t low = std::clamp<int64_t>(value, INT32_MIN, INT32_MAX) & 0xFFFFFFFF;
  return std::min<int64_t>(position, (1 << 30) - 1) << 33 | static_cast<int64_t>(is_label) << 32 | low;
}

// `num_samples` < 0 means no table, so any id but -1 counts.
inline Layout layout_of(const Batch& in, int64_t num_samples) {
  const int64_t tokens = in.tokens();
  Layout out{std::vector<int32_t>(tokens), std::vector<int64_t>(in.visits(), -1), std::vector<bool>(in.visits()),
             std::vector<bool>(tokens)};
  if (!in.packed)
    for (int64_t row = 0; row < in.batch; ++row) out.ids[row] = in.ids ? in.ids[row] : row;
  int32_t started = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t id = in.id_of(t), target = in.target_of(t);
    const bool starts = in.packed && id != -1 && (t == in.row_of(t) * in.length || id != in.id_of(t - 1));
    if (starts) out.ids[started++] = id;
    out.visit[t] = id == -1 ? -1 : in.packed ? started - 1 : static_cast<int32_t>(in.row_of(t));
    out.scored[t] = in.in_vocab(target);
    const bool bad_label = target != in.ignore_index && !out.scored[t];
    const bool bad_id = num_samples >= 0 && (id < -1 || id >= num_samples);
    if (!bad_label && !bad_id) continue;
    if (out.visit[t] >= 0) out.left_out[out.visit[t]] = true;
    if (bad_label) out.error = std::min(out.error, error_key(t, true, target));
    if (bad_id) out.error = std::min(out.error, error_key(t, false, id));
  }
  return out;
}

}  // namespace geko
