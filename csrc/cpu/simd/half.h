// bfloat16 and half scalars, widened to float and rounded back to nearest even.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace geko {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

template <class T>
inline float widen(T x) {
  return static_cast<float>(x);
}
template <class T>
inline T narrow(float x) {
  return static_cast<T>(x);
}

}  // namespace geko
