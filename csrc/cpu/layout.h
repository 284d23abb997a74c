// Which token belongs to which visit, and what it predicts; the same as `layout` in geko_kernels/reference/layout.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace geko {

constexpr int64_t kNoError = std::numeric_limits<int64_t>::max();

// token / length, both at least 0. On some CPUs a 64-bit division takes as long as a short row.
inline int64_t quotient(int64_t token, int64_t length) {
  if (length == 1) return token;
  if ((token | length) >> 32) return token / length;
  return static_cast<uint32_t>(token) / static_cast<uint32_t>(length);
}

// (batch, length) labels, and sample ids: one a row, one a token (packed), or null if each row is its own sample.
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
  // The label that a token predicts; ignore_index if there is none.
  int64_t target_of(int64_t token) const {
    if (id_of(token) == -1) return ignore_index;
    if (!shift) return labels[token];
    const bool last = token + 1 == (row_of(token) + 1) * length || id_of(token) != id_of(token + 1);
    return last ? ignore_index : labels[token + 1];
  }
  bool in_vocab(int64_t target) const { return target != ignore_index && target >= 0 && target < vocab; }
};

// The tokens [first, end) of one visit; an unused entry has id -1 and no tokens.
struct Span {
  int64_t id = -1, first = 0, end = 0;
};

// The minimum of these keys is the first offender.
inline int64_t error_key(int64_t position, bool is_label, int64_t value) {
  const int64_t low = std::clamp<int64_t>(value, INT32_MIN, INT32_MAX) & 0xFFFFFFFF;
  return std::min<int64_t>(position, (1 << 30) - 1) << 33 | static_cast<int64_t>(is_label) << 32 | low;
}

// The visits of a packed batch in order; writes the entry of each token's visit to `token_visit` (T,), -1 for padding.
inline std::vector<Span> spans_of(const Batch& in, int32_t* token_visit) {
  std::vector<Span> spans;
  for (int64_t t = 0, row = 0; row < in.batch; ++row)
    for (int64_t i = 0; i < in.length; ++i, ++t) {
      const int64_t id = in.ids[t];
      if (id != -1 && (i == 0 || id != in.ids[t - 1])) spans.push_back({id, t, t});
      if (id != -1) spans.back().end = t + 1;
      token_visit[t] = id == -1 ? -1 : static_cast<int32_t>(spans.size()) - 1;
    }
  return spans;
}

// The smallest error key of a visit's tokens: of labels outside the vocabulary and of an id outside the table.
// `num_samples` < 0 means no table, so any id but -1 counts.
inline int64_t error_of(const Batch& in, const Span& span, int64_t num_samples) {
  int64_t error = kNoError;
  const bool bad_id = num_samples >= 0 && (span.id < -1 || span.id >= num_samples);
  for (int64_t t = span.first; t < span.end; ++t) {
    const int64_t target = in.target_of(t);
    if (target != in.ignore_index && !in.in_vocab(target)) error = std::min(error, error_key(t, true, target));
    if (bad_id) error = std::min(error, error_key(t, false, span.id));
  }
  return error;
}

}  // namespace geko
