#include "csrc/cpu/gradient_memory.h"

#ifdef __linux__
#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <utility>
#endif

namespace geko {
namespace {

Tensor new_gradient(const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  if (logits.dim() == 2) return empty({logits.size(0), logits.size(1)}, type);
  return empty({logits.size(0), logits.size(1), logits.size(2)}, type);
}

}  // namespace

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
namespace {

constexpr size_t kHugePage = 2 << 20;

struct Block {
  void* start = nullptr;
  size_t bytes = 0;
};

class KeptBlock {
 public:
  // The kept block if it has exactly this size, else a new one; null if the system has no memory left.
  Block take(size_t bytes) {
    const Block kept = exchange({});
    if (kept.bytes == bytes) return kept;
    unmap(kept);
    void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return {};
    madvise(start, bytes, MADV_HUGEPAGE);
    return {start, bytes};
  }

  void give_back(Block block) {
    madvise(block.start, block.bytes, MADV_FREE);
    unmap(exchange(block));
  }

 private:
  Block exchange(Block block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    return std::exchange(kept_, block);
  }

  static void unmap(Block block) {
    if (block.start) munmap(block.start, block.bytes);
  }

  std::mutex mutex_;
  Block kept_;
};

KeptBlock& kept_block() {
  static KeptBlock& block = *new KeptBlock;  // never destroyed: tensors may outlive every static
  return block;
}

}  // namespace

Tensor empty_gradient(const Tensor& logits) {
  const size_t count = logits.numel(), size = logits.element_size(), bytes = count * size;
  if (bytes < 2 * kHugePage || count > PTRDIFF_MAX / size) return new_gradient(logits);
  const Block block = kept_block().take((bytes + kHugePage - 1) / kHugePage * kHugePage);
  if (!block.start) return new_gradient(logits);
  const size_t dims = logits.dim();
  const int64_t vocab = logits.size(dims - 1), strides[3] = {logits.size(1) * vocab, vocab, 1};
  return torch::stable::from_blob(
      block.start, logits.sizes(), {strides + 3 - dims, dims}, logits.device(), logits.scalar_type(),
      [block](void*) { kept_block().give_back(block); });
}
#else
Tensor empty_gradient(const Tensor& logits) { return new_gradient(logits); }
#endif

}  // namespace geko
