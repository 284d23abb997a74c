// Views of tensors as checked pointers, and work spread over rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "csrc/cpu/simd/row_kernels.h"
#include "csrc/stable_abi.h"

namespace geko {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kTypeOf = ScalarType::Undefined;
template <>
constexpr ScalarType kTypeOf<float> = ScalarType::Float;
template <>
constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;
template <>
constexpr ScalarType kTypeOf<int32_t> = ScalarType::Int;
template <>
constexpr ScalarType kTypeOf<uint8_t> = ScalarType::Byte;

// A new CPU tensor, not filled. It calls the shim's own function, which takes 0.3 us; through the dispatcher, as in
// `torch::stable::empty`, it takes 0.8 us.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type);

// "(2, 3) Float" for an error message.
std::string shape_and_type(const Tensor& tensor);
std::string shape_of(std::initializer_list<int64_t> sizes);
int64_t elements_of(std::initializer_list<int64_t> sizes);

// Whether the elements have aligned memory: a storage may have been resized to nothing, or start between elements.
inline bool has_memory(const Tensor& tensor) {
  const auto at = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  return tensor.numel() == 0 || (at != 0 && at % tensor.element_size() == 0);
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes)
    if (tensor.size(d++) != size) return false;
  return true;
}

// The data of a contiguous CPU tensor of these sizes and this type; throws std::runtime_error for any other.
inline void* data_of(
    const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == type && has_shape(tensor, sizes) && tensor.is_contiguous() &&
          has_memory(tensor),
      name, " must be a contiguous CPU tensor of ", elements_of(sizes), " elements, ", shape_of(sizes), " ",
      torch::headeronly::toString(type), ", got ", shape_and_type(tensor));
  return tensor.data_ptr();
}

template <class T>
T* data(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  return static_cast<T*>(data_of(tensor, kTypeOf<T>, sizes, name));
}

// `data`, or nullptr for None.
template <class T>
T* data(const std::optional<Tensor>& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  return tensor ? data<T>(*tensor, sizes, name) : nullptr;
}

// The bytes of a bool tensor, which may hold any value.
inline uint8_t* flags(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  return static_cast<uint8_t*>(data_of(tensor, ScalarType::Bool, sizes, name));
}

// Rows that a thread takes at a time: enough work to outweigh taking them. The 8 is a row's own overhead, in elements.
inline int64_t rows_a_step(int64_t vocab) { return std::max<int64_t>(1, 8192 / (vocab + 8)); }

// Calls `work(start, stop)` for all of [0, count) in steps, on torch's threads. Each thread begins with its own part,
// the same one in every call, so that its data is still in its cache. Then it takes steps from other parts, so that a
// slow thread delays no other. `backwards`: the last step of a part first.
template <class Work>
void for_each_parallel(int64_t count, int64_t step, const Work& work, bool backwards = false) {
  constexpr int64_t kMost = 64;  // parts
  struct alignas(64) Part {
    std::atomic<int64_t> taken{0};  // steps
  };
  const int64_t steps = (count + step - 1) / step, parts = std::min({num_threads(), steps, kMost});
  if (parts <= 1) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
  Part taken[kMost];
  torch::stable::parallel_for(0, parts, 1, [&](int64_t own, int64_t) {
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t part = (own + k) % parts, first = part * steps / parts, size = (part + 1) * steps / parts - first;
      for (int64_t i; (i = taken[part].taken.fetch_add(1)) < size;) {
        const int64_t start = (first + (backwards ? size - 1 - i : i)) * step;
        work(start, std::min(start + step, count));
      }
    }
  });
}

}  // namespace geko
