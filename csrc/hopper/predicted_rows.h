// Token statistics and, scaled by a predicted factor, the logits gradient.
// A row whose predicted factor is 0 is not written; see reference.one_pass.predicted_rows_.

#pragma once

#include "csrc/hopper/rows.h"

struct PredictedRows {
  const void* logits;      // (B, S, V), stride 1 along V
  void* grad;              // the same, rows at the same offset from a 16-byte boundary; or the logits themselves
  const int* target;       // (T,), -1: predicts nothing
  const float* coeff;      // (T,)
  const int* counts;       // (parts,): their sum divides the loss
  const float* num_items;  // (1,), or null: divides instead of the counts
  const float* upstream;   // (1,)
  float* tokens;           // (5, T), see reference.token_stats
  float* factor;           // (T,): coeff / divisor * upstream
  int64_t logits_b, logits_s, grad_b, grad_s;
  int count, length, vocab;  // count: T
  int parts;                 // 0: nothing divides
  Tiling tiling;

  static constexpr bool kPadded = false;  // elements outside of the row are not written

  __device__ Wanted wanted(int t) const { return {target[t], coeff[t]}; }

  static __device__ bool reads(int y) { return y >= 0; }

  // each row's factor by what is wanted of it
  __device__ auto factors(int lane) const {
    return [common = common_scale(lane), upstream = *upstream](const Wanted& row) {
      // a row without a target is never copied in: waiting for it would not end
      return row.target >= 0 && row.coeff != 0 ? row.coeff * common * upstream : 0.f;
    };
  }

  template <typename T>
  __device__ Row row(int t, int rank) const {
    const int64_t b = t / length, s = t % length;
    const T* from = static_cast<const T*>(logits) + b * logits_b + s * logits_s;
    T* to = static_cast<T*>(grad) + b * grad_b + s * grad_s;
    const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
    const int vectors = (lead + vocab + Vector<T>::kSize - 1) / Vector<T>::kSize;
    return Row(from - lead, to - lead, lead, lead + vocab, vectors, tiling, rank);
  }

  __device__ void store(int t, int y, const Statistics& sum, float by) const {
    store_statistics(tokens + t, count, sum, sum.at_target, y >= 0);
    factor[t] = by;
  }

  // whether each block's slice fits, and logits and gradient have their vectors at the same offsets
  bool fits(int blocks, int per) const {
    if (!logits || !grad || !target || !coeff || !upstream || !tokens || !factor) return false;
    if (parts && !counts && !num_items) return false;
    if (length < 1 || vocab < 1 || parts < 0) return false;
    if ((logits_b - grad_b) % per || (logits_s - grad_s) % per) return false;
    if ((reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(grad)) % 16) return false;
    return int64_t(tiling.slice) * blocks * per >= int64_t(vocab) + per - 1;
  }

 private:
  // the inverse of the loss's divisor, bit for bit as kernels/sample_update/outputs.py computes it
  __device__ float common_scale(int lane) const {
    if (!parts) return 1;
    float divisor;
    if (num_items) {
      divisor = *num_items;
    } else {
      int sum = 0;
      for (int i = lane; i < parts; i += 32) sum += counts[i];
      divisor = static_cast<float>(__reduce_add_sync(~0u, sum));
    }
    return divisor > 0 ? __fdiv_rn(1.f, divisor) : 0;
  }
};
