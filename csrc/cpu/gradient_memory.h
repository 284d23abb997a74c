// Memory for gradients, reused from step to step.
#pragma once

#include "csrc/cpu/tensors.h"

namespace geko {

// `torch.empty(logits.shape)` in the logits' dtype. On Linux a large one gets huge pages. The last one freed is kept
// for the next call; the kernel may take its pages back at any time (MADV_FREE). First writes to 100 MB of new memory
// cost 50 ms with 4 KiB pages and 4.3 ms with huge pages (2 cores of an EPYC); reused memory costs nothing extra.
Tensor empty_gradient(const Tensor& logits);

}  // namespace geko
