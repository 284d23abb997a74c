// The row kernels for any CPU.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/cpu/half.h"
#include "csrc/cpu/row_kernels.h"

#define GEKO_CAPABILITY portable
#include "csrc/cpu/vec_portable.h"

#include "csrc/cpu/row_kernels_impl.h"

namespace geko {
const RowKernels kPortableKernels = portable::make_kernels("portable");
}
