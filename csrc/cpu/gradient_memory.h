// Memory of gradients, used again from step to step.
#pragma once

#include "csrc/cpu/tensors.h"

namespace geko {

// `torch.empty(logits.shape)` in the logits' dtype. On Linux a large one comes from huge pages, and the last one that
// was freed is kept for the next call; the kernel may take its pages back at any time (MADV_FREE). Per 100 MB on
// 2 cores of an EPYC, first writes to new memory cost 50 ms by 4 KiB pages, 4.3 ms by huge pages, and nothing here.
Tensor empty_gradient(const Tensor& logits);

}  // namespace geko
