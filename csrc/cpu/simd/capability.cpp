// Which row kernels this CPU runs, and the number of threads.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "csrc/cpu/simd/row_kernels.h"
#include "csrc/stable_abi.h"

namespace geko {
namespace {

#ifdef GEKO_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const RowKernels& choose() {
  const char* variable = std::getenv("GEKO_CPU_CAPABILITY");
  const std::string asked = variable ? variable : "";
#ifdef GEKO_X86
  if (has_avx512() && (asked.empty() || asked == "avx512")) return kAvx512Kernels;
  if (has_avx2() && (asked.empty() || asked == "avx2")) return kAvx2Kernels;
#endif
  if (asked.empty() || asked == "portable") return kPortableKernels;
  throw std::runtime_error(
      "GEKO_CPU_CAPABILITY must be avx512, avx2 or portable, and one that this CPU runs, got '" + asked + "'");
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace geko
