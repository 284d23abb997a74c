// The row kernels for CPUs with AVX-512. Headers shared with other files are included before the target changes, so
// that none of their functions is compiled for it.
#include "csrc/cpu/simd/row_kernels.h"

#ifdef GEKO_X86
#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "csrc/cpu/simd/half.h"

#define GEKO_CAPABILITY avx512
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#include "csrc/cpu/simd/vec_avx512.h"

#include "csrc/cpu/simd/row_kernels_impl.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

namespace geko {
const RowKernels kAvx512Kernels = avx512::make_kernels("avx512");
}
#endif
