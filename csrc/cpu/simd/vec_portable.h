// Eight floats in plain C++, for any CPU; the compiler vectorises the loops.
#pragma once

#include <cmath>
#include <cstring>

#include "csrc/cpu/simd/half.h"

namespace geko::GEKO_CAPABILITY {

struct Floats {
  static constexpr int64_t size = 8;
  float v[size];

  explicit Floats(float x) {
    for (float& lane : v) lane = x;
  }
  template <class Lane>
  static Floats make(Lane lane) {
    Floats out(0.f);
    for (int64_t i = 0; i < size; ++i) out.v[i] = lane(i);
    return out;
  }
  template <class T>
  static Floats load(const T* from) {
    return make([&](int64_t i) { return widen(from[i]); });
  }
  // rounds to nearest even; to bfloat16, a NaN with any of its low 16 bits set may come out as another number
  template <class T>
  void store(T* to) const {
    for (int64_t i = 0; i < size; ++i) to[i] = narrow<T>(v[i]);
  }
};

inline Floats operator+(Floats a, Floats b) {
  return Floats::make([&](int64_t i) { return a.v[i] + b.v[i]; });
}
inline Floats operator-(Floats a, Floats b) {
  return Floats::make([&](int64_t i) { return a.v[i] - b.v[i]; });
}
inline Floats operator*(Floats a, Floats b) {
  return Floats::make([&](int64_t i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(Floats a, Floats b) {
  return Floats::make([&](int64_t i) { return a.v[i] / b.v[i]; });
}
// a * b + c
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
// the larger, b where a is NaN or b is NaN
inline Floats max(Floats a, Floats b) {
  return Floats::make([&](int64_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats min(Floats a, Floats b) {
  return Floats::make([&](int64_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats abs(Floats a) {
  return Floats::make([&](int64_t i) { return std::fabs(a.v[i]); });
}
inline Floats copysign(Floats a, Floats sign) {
  return Floats::make([&](int64_t i) { return std::copysign(a.v[i], sign.v[i]); });
}
// a < limit ? below : other
inline Floats select_below(Floats a, Floats limit, Floats below, Floats other) {
  return Floats::make([&](int64_t i) { return a.v[i] < limit.v[i] ? below.v[i] : other.v[i]; });
}
// to the nearest integer, for |a| < 2^22
inline Floats round(Floats a) {
  const Floats magic(12582912.f);  // 1.5 * 2^23
  return (a + magic) - magic;
}
// p * 2^n for an integer n <= 127, 0 for n < -126
inline Floats scale(Floats p, Floats n) {
  return Floats::make([&](int64_t i) {
    const float biased = n.v[i] + 127.f, kept = biased > 0.f ? biased : 0.f;  // NaN gives 0, and p is NaN there
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(kept)) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return p.v[i] * power;
  });
}

}  // namespace geko::GEKO_CAPABILITY
