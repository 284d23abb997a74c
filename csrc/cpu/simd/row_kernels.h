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

// Further arguments of the gradient, `scale * (exp(z - top) * confidence - onehot)`.
struct RowGrad {
  void* out;
  int64_t stride;
  float top, confidence, scale;
};

constexpr int64_t kGroup = 16;  // the most rows at a time; with a small vocabulary each takes one lane of a vector

// The rows share vocabulary, strides and softcap; no row that is written is read as another.
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

// The widest kernels that this CPU runs, or those named by GEKO_CPU_CAPABILITY (avx512, avx2, portable); chosen once.
// Throws std::runtime_error if that name is unknown or this CPU can't run them.
const RowKernels& row_kernels();

// Threads that the ops use.
int64_t num_threads();

}  // namespace geko
