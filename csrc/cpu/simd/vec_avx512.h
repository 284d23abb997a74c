// Sixteen floats in an AVX-512 register; see vec_portable.h for what each function does.
#pragma once

#include <immintrin.h>

#include "csrc/cpu/simd/half.h"

namespace geko::GEKO_CAPABILITY {

struct Floats {
  static constexpr int64_t size = 16;
  __m512 v;

  Floats(__m512 x) : v(x) {}
  explicit Floats(float x) : v(_mm512_set1_ps(x)) {}
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static Floats load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(BFloat16* to) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  void store(Half* to) const {
    const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  }
};

// Faster versions of functions in row_kernels_impl.h; those with a `count` take parts of fewer than 16 elements.
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Floats load_part(const float* from, int64_t count) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(from[0]), first_lanes(count), from);
}
inline float lane0(Floats x) { return _mm512_cvtss_f32(x.v); }
inline float sum_lanes(Floats x, int64_t count = Floats::size) {
  return _mm512_reduce_add_ps(_mm512_maskz_mov_ps(first_lanes(count), x.v));
}
inline float max_lanes(Floats x) { return _mm512_reduce_max_ps(x.v); }  // no lane is NaN

inline Floats operator+(Floats a, Floats b) { return _mm512_add_ps(a.v, b.v); }
inline Floats operator-(Floats a, Floats b) { return _mm512_sub_ps(a.v, b.v); }
inline Floats operator*(Floats a, Floats b) { return _mm512_mul_ps(a.v, b.v); }
inline Floats operator/(Floats a, Floats b) { return _mm512_div_ps(a.v, b.v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a.v, b.v); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a.v, b.v); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a.v); }
inline Floats copysign(Floats a, Floats sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  const __m512i magnitude = _mm512_andnot_si512(bit, _mm512_castps_si512(a.v));
  return _mm512_castsi512_ps(_mm512_or_si512(magnitude, _mm512_and_si512(bit, _mm512_castps_si512(sign.v))));
}
inline Floats select_below(Floats a, Floats limit, Floats below, Floats other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, limit.v, _CMP_LT_OQ), other.v, below.v);
}
inline Floats round(Floats a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats scale(Floats p, Floats n) { return _mm512_scalef_ps(p.v, n.v); }

}  // namespace geko::GEKO_CAPABILITY
