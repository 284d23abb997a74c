// Views of tensors as checked pointers, and work spread over rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>

#include "csrc/cpu/row_kernels.h"
#include "csrc/stable_abi.h"

namespace geko {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The data of a contiguous CPU tensor of `numel` elements of T; throws std::runtime_error for any other.
template <class T>
T* data(const Tensor& tensor, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == numel && tensor.element_size() == sizeof(T),
      name, " must be a contiguous CPU tensor of ", numel, " elements of ", sizeof(T), " bytes");
  return static_cast<T*>(tensor.data_ptr());
}

// `data`, or nullptr for None.
template <class T>
T* data(const std::optional<Tensor>& tensor, int64_t numel, const char* name) {
  return tensor ? data<T>(*tensor, numel, name) : nullptr;
}

// Rows that a thread takes at a time: enough work to pay for asking.
inline int64_t rows_a_step(int64_t vocab) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(vocab, 1)); }

// Calls `work(i)` once for each i below `count`, in any order, on torch's threads, which take the next `step` as they
// finish: a thread that met rows without work, or a busy core, holds up no other.
template <class Work>
void for_each_parallel(int64_t count, int64_t step, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t steps = (count + step - 1) / step;
  const int64_t threads = std::min(num_threads(), steps);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t start; (start = next.fetch_add(step)) < count;)
      for (int64_t i = start; i < std::min(start + step, count); ++i) work(i);
  });
}

}  // namespace geko
