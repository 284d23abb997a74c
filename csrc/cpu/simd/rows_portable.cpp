// The row kernels for any CPU.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "csrc/cpu/simd/half.h"
#include "csrc/cpu/simd/row_kernels.h"

#define GEKO_CAPABILITY portable
#include "csrc/cpu/simd/vec_portable.h"

#include "csrc/cpu/simd/row_kernels_impl.h"

namespace geko {
const RowKernels kPortableKernels = portable::make_kernels("portable");
}
