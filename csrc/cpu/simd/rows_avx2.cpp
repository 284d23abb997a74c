// The row kernels for CPUs with AVX2. Headers shared with other files are included before the target changes, so that
// none of their functions is compiled for it.
#include "csrc/cpu/simd/row_kernels.h"

#ifdef GEKO_X86
#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "csrc/cpu/simd/half.h"

#define GEKO_CAPABILITY avx2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "csrc/cpu/simd/vec_avx2.h"

#include "csrc/cpu/simd/row_kernels_impl.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

namespace geko {
const RowKernels kAvx2Kernels = avx2::make_kernels("avx2");
}
#endif
