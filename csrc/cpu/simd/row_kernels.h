// The statistics and the gradient of a group of rows of logits; a table of functions per capability.
#pragma once

#include <cstdint>

namespace geko {

struct TokenStats {
  float loss, top, log_sum, confidence, hit;
};

// One row of logits: `vocab` elements, `stride` apart.
struct Row {
  const void* logits;
  int64_t stride, vocab, target;
  float softcap;  // 0: none
};

// What the gradient needs beyond the row: `scale * (exp(z - top) * confidence - onehot)`.
struct RowGrad {
  void* out;
  int64_t stride;
  float top, confidence, scale;
};

constexpr int64_t kGroup = 16;  // rows at a time, at most: of a small vocabulary, each takes one lane of a vector

// Of one vocabulary, strides and softcap; none is written that is read as another.
using StatsKernel = void (*)(const Row* rows, int64_t count, TokenStats* out);
using GradKernel = void (*)(const Row* rows, const RowGrad* to, int64_t count);

enum Element { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct RowKernels {
  const char* capability;
  StatsKernel stats[3];  // indexed by Element
  GradKernel grad[3];
};

extern const RowKernels kPortableKernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define GEKO_X86
extern const RowKernels kAvx2Kernels, kAvx512Kernels;
#endif

// The widest that this CPU runs, or the one that GEKO_CPU_CAPABILITY (avx512, avx2, portable) names; chosen once.
// Throws std::runtime_error where that one is unknown or this CPU can't run it.
const RowKernels& row_kernels();

// Threads that the ops use.
int64_t num_threads();

}  // namespace geko
