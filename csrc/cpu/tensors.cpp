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
