// Logits 16 bytes at a time, and the online softmax over them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

__device__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x - top): the difference first, so that a large common offset loses no digits
__device__ float exp_from(float x, float top) { return exp2_approx((x - top) * kLog2e); }

// 16 bytes of logits
template <typename T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static __device__ void unpack(uint4 v, float* x) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  static __device__ float maximum(uint4 v) {
    float x[4];
    unpack(v, x);
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  }
  static __device__ uint4 pack(const float* x) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
  static __device__ float one(float x) { return x; }
};

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kSize = 8;
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static __device__ void unpack(uint4 v, float* x) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ float maximum(uint4 v) {
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&v);
    const __nv_bfloat162 top = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    return fmaxf(__low2float(top), __high2float(top));
  }
  static __device__ uint4 pack(const float* x) {
    uint4 v;
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    return v;
  }
  static __device__ float one(__nv_bfloat16 x) { return __bfloat162float(x); }
};

template <>
struct Vector<__half> {
  static constexpr int kSize = 8;
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static __device__ void unpack(uint4 v, float* x) {
    const __half2* pairs = reinterpret_cast<const __half2*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = __half22float2(pairs[i]);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  }
  static __device__ float maximum(uint4 v) {
    const __half2* pairs = reinterpret_cast<const __half2*>(&v);
    const __half2 top = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    return fmaxf(__low2float(top), __high2float(top));
  }
  static __device__ uint4 pack(const float* x) {
    uint4 v;
    __half2* pairs = reinterpret_cast<__half2*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
    return v;
  }
  static __device__ float one(__half x) { return __half2float(x); }
};

// the maximum of some logits, the sum of their exp(x - safe), and the target's logit if it is among them
struct Statistics {
  float top = -kInfinity, total = 0, at_target = -kInfinity;
  float safe = 0;  // top, but 0 while all is -inf

  __device__ void raise(float peak) {
    if (peak > top) {
      total *= exp_from(top, peak);
      top = safe = peak;
    }
  }

  __device__ void join(float other_top, float other_total, float other_target) {
    raise(other_top);
    total += other_total * (other_top == -kInfinity ? 1.f : exp_from(other_top, safe));
    at_target = fmaxf(at_target, other_target);
  }

  __device__ void join_warp() {
#pragma unroll
    for (int apart = 16; apart; apart /= 2)
      join(__shfl_xor_sync(~0u, top, apart), __shfl_xor_sync(~0u, total, apart),
           __shfl_xor_sync(~0u, at_target, apart));
  }
};

}  // namespace
