#include "csrc/cpu/tensors.h"

namespace geko {
namespace {

template <class Sizes>
std::string listed(const Sizes& sizes) {
  std::string out = "(";
  for (const int64_t size : sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
  return out + (sizes.size() == 1 ? ",)" : ")");
}

}  // namespace

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  int64_t strides[4], stride = 1;  // contiguous
  STD_TORCH_CHECK(sizes.size() <= 4, "at most 4 dimensions");
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes.begin()[d], 1)) strides[d] = stride;
  AtenTensorHandle made;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const auto failed = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code, cpu, 0, &made);
  STD_TORCH_CHECK(
      failed == TORCH_SUCCESS, "no memory for a tensor of ", shape_of(sizes), " ", torch::headeronly::toString(type));
  return Tensor(made);
}

std::string shape_of(std::initializer_list<int64_t> sizes) { return listed(sizes); }

std::string shape_and_type(const Tensor& tensor) {
  std::string out = listed(tensor.sizes()) + " " + torch::headeronly::toString(tensor.scalar_type());
  if (!tensor.is_cpu()) return out + " on another device";
  if (!tensor.is_contiguous()) return out + ", not contiguous";
  return has_memory(tensor) ? out : out + ", without memory or not aligned";
}

int64_t elements_of(std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

}  // namespace geko
