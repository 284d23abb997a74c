// Eight floats in an AVX2 register; see vec_portable.h for what each function does.
#pragma once

#include <immintrin.h>

#include "csrc/cpu/simd/half.h"

namespace geko::GEKO_CAPABILITY {

struct Floats {
  static constexpr int64_t size = 8;
  __m256 v;

  Floats(__m256 x) : v(x) {}
  explicit Floats(float x) : v(_mm256_set1_ps(x)) {}
  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static Floats load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(BFloat16* to) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
  void store(Half* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// Faster versions of functions in row_kernels_impl.h.
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load_part(const float* from, int64_t count) {
  const __m256i lanes = first_lanes(count);
  return _mm256_blendv_ps(_mm256_set1_ps(from[0]), _mm256_maskload_ps(from, lanes), _mm256_castsi256_ps(lanes));
}
inline float lane0(Floats x) { return _mm256_cvtss_f32(x.v); }

inline Floats operator+(Floats a, Floats b) { return _mm256_add_ps(a.v, b.v); }
inline Floats operator-(Floats a, Floats b) { return _mm256_sub_ps(a.v, b.v); }
inline Floats operator*(Floats a, Floats b) { return _mm256_mul_ps(a.v, b.v); }
inline Floats operator/(Floats a, Floats b) { return _mm256_div_ps(a.v, b.v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a.v, b.v); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a.v, b.v); }
inline Floats abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v); }
inline Floats copysign(Floats a, Floats sign) {
  const __m256 bit = _mm256_set1_ps(-0.f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v));
}
inline Floats select_below(Floats a, Floats limit, Floats below, Floats other) {
  return _mm256_blendv_ps(other.v, below.v, _mm256_cmp_ps(a.v, limit.v, _CMP_LT_OQ));
}
inline Floats round(Floats a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats scale(Floats p, Floats n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  const __m256i bits = _mm256_slli_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), 23);
  return _mm256_mul_ps(p.v, _mm256_castsi256_ps(bits));
}

}  // namespace geko::GEKO_CAPABILITY
