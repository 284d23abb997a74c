// Token statistics of rows in a buffer of logits and, over the logits, softmax - onehot: reference.rows.score_rows_.

#pragma once

#include "csrc/hopper/rows.h"

struct ScoreRows {
  void* logits;           // (count, vectors * 16 bytes), from a 16-byte boundary on
  const int64_t* token;   // (count,): where the statistics go; outside of [0, token_count): nowhere
  const int64_t* target;  // (count,); outside of [0, vocab): the loss is NaN, and nothing is subtracted
  float* tokens;          // (5, token_count), see reference.token_stats
  int64_t token_count;
  int count, vocab, vectors;
  Tiling tiling;

  static constexpr bool kPadded = true;  // elements from vocab on become 0

  __device__ Wanted wanted(int i) const {
    const int64_t y = target[i];
    return {y >= 0 && y < vocab ? static_cast<int>(y) : -1, 1};
  }

  static __device__ bool reads(int) { return true; }

  __device__ auto factors(int) const {
    return [](const Wanted&) { return 1.f; };
  }

  template <typename T>
  __device__ Row row(int i, int rank) const {
    uint4* at = static_cast<uint4*>(logits) + int64_t(i) * vectors;
    return Row(at, at, 0, vocab, vectors, tiling, rank);
  }

  __device__ void store(int i, int y, const Statistics& sum, float) const {
    const int64_t t = token[i];
    if (t < 0 || t >= token_count) return;
    store_statistics(tokens + t, token_count, sum, y < 0 ? __int_as_float(0x7fc00000) : sum.at_target, true);
  }

  bool fits(int blocks, int per) const {
    if (!logits || !token || !target || !tokens || token_count < 0 || vocab < 1) return false;
    if (reinterpret_cast<uintptr_t>(logits) % 16 || int64_t(vectors) * per < vocab) return false;
    return int64_t(tiling.slice) * blocks >= vectors;
  }
};
