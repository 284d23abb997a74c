// Token statistics and, scaled by a predicted factor, the logits gradient: each row of logits read once (sm_90).
// A row whose predicted factor is 0 is not written; see reference.one_pass.predicted_rows_.
//
// A cluster of blocks takes a row, each block a slice of it. A producer warp keeps copying the slices of this row and
// the next ones into a ring of chunks in shared memory; the other warps read each chunk twice: for the statistics, and,
// once the cluster has added those up (distributed shared memory), for the gradient, after which the chunk is free.

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/hopper/clusters.h"
#include "csrc/hopper/vectors.h"

struct Arguments {
  const void* logits;      // (B, S, V), stride 1 along V
  void* grad;              // the same, rows at the same offset from a 16-byte boundary; or the logits themselves
  const int* target;       // (T,), -1: predicts nothing
  const float* coeff;      // (T,)
  const int* counts;       // (parts,): their sum divides the loss
  const float* num_items;  // (1,), or null: divides instead of the counts
  const float* upstream;   // (1,)
  float* tokens;           // (5, T), see reference.token_stats
  float* factor;           // (T,): coeff / divisor * upstream
  int64_t logits_b, logits_s, grad_b, grad_s;
  int rows, length, vocab;
  int parts;     // 0: nothing divides
  int slice;     // vectors of 16 bytes a block
  int chunk;     // vectors a chunk
  int slots;     // chunks in shared memory
  int clusters;  // how many run at a time
};

namespace {

constexpr int kStep = 4;  // vectors that a thread takes at once; 1 and 2 were slower
constexpr int kTurns = 4;  // rows of partial sums held: as rows may be finished late, a block can be three ahead

// where a row's slice lies: vectors [first, last) counted from the 16-byte boundary at or before the row
template <typename T>
struct Row {
  static constexpr int kPer = Vector<T>::kSize;
  const uint4* logits;
  uint4* grad;
  int lead, first, last;

  __device__ Row(const Arguments& a, int t, int rank) {
    const int64_t b = t / a.length, s = t % a.length;
    const T* row = static_cast<const T*>(a.logits) + b * a.logits_b + s * a.logits_s;
    T* out = static_cast<T*>(a.grad) + b * a.grad_b + s * a.grad_s;
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    logits = reinterpret_cast<const uint4*>(row - lead);
    grad = reinterpret_cast<uint4*>(out - lead);
    const int all = (lead + a.vocab + kPer - 1) / kPer;
    first = min(rank * a.slice, all);
    last = min(first + a.slice, all);
  }
};

// the token statistics of row t, 0 where y < 0; by one thread
__device__ void store_tokens(const Arguments& a, int t, int y, const Statistics& sum, float factor) {
  const float total = sum.top == -kInfinity ? __int_as_float(0x7fc00000) : sum.total;  // 0 / 0, as in PyTorch
  const float top = total != total && fabsf(sum.top) != kInfinity ? total : sum.top;  // with a NaN the maximum is NaN
  const float log_sum = logf(total), loss = log_sum - (sum.at_target - top);
  float* out = a.tokens + t;
  const int64_t step = a.rows;
  out[0] = y < 0 ? 0 : loss;
  out[step] = y < 0 ? 0 : top;
  out[2 * step] = y < 0 ? 0 : log_sum;
  out[3 * step] = y < 0 ? 0 : 1 / total;
  out[4 * step] = y >= 0 && sum.at_target == top && loss == loss;
  a.factor[t] = factor;
}

// the inverse of the loss's divisor, bit for bit as kernels/sample_update/outputs.py computes it
__device__ float common_scale(const Arguments& a, int lane) {
  if (!a.parts) return 1;
  float divisor;
  if (a.num_items) {
    divisor = *a.num_items;
  } else {
    int count = 0;
    for (int i = lane; i < a.parts; i += 32) count += a.counts[i];
    divisor = static_cast<float>(__reduce_add_sync(~0u, count));
  }
  return divisor > 0 ? __fdiv_rn(1.f, divisor) : 0;
}

template <typename T, int WARPS>
__global__ void __launch_bounds__(WARPS * 32 + 32) predicted_rows(const __grid_constant__ Arguments a) {
  using V = Vector<T>;
  constexpr int kPer = V::kSize, kThreads = WARPS * 32;
  extern __shared__ __align__(128) uint4 ring[];
  const int rank = cluster_rank(), blocks = cluster_size();
  const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  float4* partials = reinterpret_cast<float4*>(ring + a.slots * a.chunk);  // (kTurns, blocks * WARPS)
  const uint32_t full = shared_address(partials + kTurns * blocks * WARPS);
  const uint32_t empty = full + 8 * a.slots, summed = empty + 8 * a.slots;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.slots; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS);
    for (int i = 0; i < kTurns; ++i) barrier_init(summed + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  if (warp == WARPS) {
    int slot = 0, target = -1;
    uint32_t parity = 1;
    for (int i = 0, t = cluster; t < a.rows; ++i, t += clusters) {
      if (i % 32 == 0) {
        const int64_t ahead = t + int64_t(lane) * clusters;
        target = ahead < a.rows ? a.target[ahead] : -1;
      }
      if (__shfl_sync(~0u, target, i % 32) < 0) continue;
      const Row<T> row(a, t, rank);
      for (int v = row.first; v < row.last; v += a.chunk) {
        if (lane == 0) {
          barrier_wait(empty + 8 * slot, parity);
          const uint32_t bytes = 16 * min(a.chunk, row.last - v);
          barrier_expect(full + 8 * slot, bytes);
          copy_in(shared_address(ring + slot * a.chunk), row.logits + v, bytes, full + 8 * slot);
        }
        if (++slot == a.slots) slot = 0, parity ^= 1;
      }
    }
  } else {
    const float common = common_scale(a, lane), upstream = *a.upstream;
    // rows that are not written: their sums are not needed until the next row has been read
    int slot = 0, scored = 0, late = -1, late_target = 0;
    uint32_t parity = 0;
    const auto wait_sums = [&](int number) {
      barrier_wait_cluster(summed + 8 * (number % kTurns), number / kTurns % 2);
    };
    const auto sums_of = [&](int number) {
      Statistics sum;
      for (int i = lane; i < blocks * WARPS; i += 32) {
        const float4 part = partials[number % kTurns * blocks * WARPS + i];
        sum.join(part.x, part.y, part.z);
      }
      sum.join_warp();
      return sum;
    };
    const auto finish_late = [&](int number) {
      if (late < 0) return;
      wait_sums(number);
      if (rank == 0 && warp == 0) {
        const Statistics sum = sums_of(number);
        if (lane == 0) store_tokens(a, late, late_target, sum, 0);
      }
      late = -1;
    };
    int target = cluster < a.rows ? a.target[cluster] : 0;
    float coeff = cluster < a.rows ? a.coeff[cluster] : 0;
    for (int t = cluster; t < a.rows; t += clusters) {
      const int y = target;
      // a row without a target is never copied in: waiting for it would not end
      const float factor = y >= 0 && coeff != 0 ? coeff * common * upstream : 0.f;
      if (t + clusters < a.rows) target = a.target[t + clusters], coeff = a.coeff[t + clusters];
      const Row<T> row(a, t, rank);
      const int head = row.lead, tail = row.lead + a.vocab;  // the row's elements, from the boundary
      const bool keep = factor != 0;
      Statistics sum;
      const int first_slot = slot;
      if (y >= 0) {
        const int y_at = head + y;
        for (int from = row.first; from < row.last; from += a.chunk) {
          const uint4* chunk = ring + slot * a.chunk;
          const int size = min(a.chunk, row.last - from);
          const bool ends = from * kPer < head || (from + size) * kPer > tail;
          barrier_wait(full + 8 * slot, parity);
          for (int at = threadIdx.x; at < size; at += kThreads * kStep) {
            uint4 v[kStep];
#pragma unroll
            for (int u = 0; u < kStep; ++u) {
              const uint32_t none = V::kMinusInfinity;
              v[u] = at + u * kThreads < size ? chunk[at + u * kThreads] : make_uint4(none, none, none, none);
            }
            if (ends) {
#pragma unroll
              for (int u = 0; u < kStep; ++u) {
                float x[kPer];
                V::unpack(v[u], x);
#pragma unroll
                for (int j = 0; j < kPer; ++j) {
                  const int e = (from + at + u * kThreads) * kPer + j;
                  x[j] = e >= head && e < tail ? x[j] : -kInfinity;
                }
                v[u] = V::pack(x);
              }
            }
            float peak = V::maximum(v[0]);
#pragma unroll
            for (int u = 1; u < kStep; ++u) peak = fmaxf(peak, V::maximum(v[u]));
            sum.raise(peak);
#pragma unroll
            for (int u = 0; u < kStep; ++u) {
              float x[kPer];
              V::unpack(v[u], x);
#pragma unroll
              for (int j = 0; j < kPer; ++j) x[j] = exp_from(x[j], sum.safe);
#pragma unroll
              for (int apart = kPer / 2; apart; apart /= 2)
#pragma unroll
                for (int j = 0; j < apart; ++j) x[j] += x[j + apart];
              sum.total += x[0];
            }
          }
          if (y_at >= from * kPer && y_at < (from + size) * kPer)
            sum.at_target = V::one(reinterpret_cast<const T*>(chunk)[y_at - from * kPer]);
          if (!keep) {
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * slot);
          }
          if (++slot == a.slots) slot = 0, parity ^= 1;
        }
        sum.join_warp();
        float4* mine = partials + scored % kTurns * blocks * WARPS;
        const uint32_t barrier = summed + 8 * (scored % kTurns);
        if (threadIdx.x == 0) barrier_expect(barrier, blocks * WARPS * sizeof(float4));
        if (lane < blocks)
          send(in_block(shared_address(mine + rank * WARPS + warp), lane), {sum.top, sum.total, sum.at_target, 0},
               in_block(barrier, lane));
        finish_late(scored - 1);
        if (keep) {
          wait_sums(scored);
          sum = sums_of(scored);
        } else {
          late = t, late_target = y;
        }
        ++scored;
      }
      if (rank == 0 && threadIdx.x == 0 && (keep || y < 0)) store_tokens(a, t, y, sum, factor);
      if (keep) {
        const float share = factor / sum.total;
        const int y_at = head + y;
        slot = first_slot;
        for (int from = row.first; from < row.last; from += a.chunk) {
          const uint4* chunk = ring + slot * a.chunk;
          const int size = min(a.chunk, row.last - from);
          const bool special = from * kPer < head || (from + size) * kPer > tail ||
                               (y_at >= from * kPer && y_at < (from + size) * kPer);
          uint4* out = row.grad + from;
          for (int at = threadIdx.x; at < size; at += kThreads * kStep) {
            uint4 v[kStep];
#pragma unroll
            for (int u = 0; u < kStep; ++u)
              if (at + u * kThreads < size) v[u] = chunk[at + u * kThreads];
#pragma unroll
            for (int u = 0; u < kStep; ++u) {
              const int here = at + u * kThreads;
              if (here >= size) continue;
              float x[kPer];
              V::unpack(v[u], x);
#pragma unroll
              for (int j = 0; j < kPer; ++j) x[j] = exp_from(x[j], sum.safe) * share;
              if (special) {
                const int e = (from + here) * kPer;
#pragma unroll
                for (int j = 0; j < kPer; ++j)
                  if (e + j == y_at) x[j] -= factor;
                if (e < head || e + kPer > tail) {
                  T* one = reinterpret_cast<T*>(out + here);
#pragma unroll
                  for (int j = 0; j < kPer; ++j)
                    if (e + j >= head && e + j < tail) one[j] = T(x[j]);
                  continue;
                }
              }
              out[here] = V::pack(x);
            }
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + 8 * slot);
          if (++slot == a.slots) slot = 0;
        }
      }
    }
    finish_late(scored - 1);
  }
  cluster_sync();  // a block's shared memory has to outlive what others send to it
}

using Kernel = void (*)(Arguments);

template <int WARPS>
Kernel kernel_of(int dtype) {
  switch (dtype) {
    case 0: return predicted_rows<float, WARPS>;
    case 1: return predicted_rows<__nv_bfloat16, WARPS>;
    case 2: return predicted_rows<__half, WARPS>;
    default: return nullptr;
  }
}

}  // namespace

// Where and in what shape a kernel runs; filled once by geko_shape, kept by the caller.
struct Shape {
  int device, dtype;  // dtype: 0 float32, 1 bfloat16, 2 float16
  int warps, blocks, shared;  // 8 or 24; blocks a cluster; bytes of shared memory a block
  Kernel kernel;
};

// `cluster` has to live as long as the configuration.
static cudaLaunchConfig_t launch_config(const Shape& shape, cudaLaunchAttribute* cluster, int clusters) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {unsigned(shape.blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.attrs = cluster;
  config.numAttrs = 1;
  config.gridDim = shape.blocks * clusters;
  config.blockDim = shape.warps * 32 + 32;
  config.dynamicSmemBytes = shape.shared;
  return config;
}

// All return a cudaError_t.
extern "C" int geko_shape(Shape* shape, int* clusters) {
  shape->kernel = shape->warps == 8 ? kernel_of<8>(shape->dtype) : kernel_of<24>(shape->dtype);
  if (!shape->kernel) return cudaErrorInvalidValue;
  if (cudaError_t error = cudaSetDevice(shape->device)) return error;
  if (cudaError_t error =
          cudaFuncSetAttribute(shape->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape->shared))
    return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(*shape, &cluster, 1);
  return cudaOccupancyMaxActiveClusters(clusters, shape->kernel, &config);
}

// Whether a block's slice, barriers and warp sums fit into its memory, and whether logits and gradient have their
// vectors at the same offsets.
static bool fits(const Shape& shape, const Arguments& a) {
  if (!a.logits || !a.grad || !a.target || !a.coeff || !a.upstream || !a.tokens || !a.factor) return false;
  if (a.parts && !a.counts && !a.num_items) return false;
  if (a.rows < 1 || a.length < 1 || a.vocab < 1 || a.parts < 0 || a.clusters < 1) return false;
  if (a.slots < 1 || a.chunk < 1 || a.slice < 1 || shape.blocks < 1 || shape.blocks > 8) return false;
  const int per = shape.dtype == 0 ? 4 : 8;  // elements a vector
  if ((a.logits_b - a.grad_b) % per || (a.logits_s - a.grad_s) % per) return false;
  if ((reinterpret_cast<uintptr_t>(a.logits) - reinterpret_cast<uintptr_t>(a.grad)) % 16) return false;
  const int64_t slots = int64_t(a.slots) * a.chunk, sums = int64_t(kTurns) * shape.blocks * shape.warps;
  return int64_t(a.slice) * shape.blocks * per >= int64_t(a.vocab) + per - 1 && slots >= a.slice &&
         16 * (slots + sums) + 16 * int64_t(a.slots) + 8 * kTurns <= shape.shared;
}

extern "C" int geko_predicted_rows(const Shape* shape, const Arguments* a, void* stream) {
  if (!fits(*shape, *a)) return cudaErrorInvalidValue;
  if (cudaError_t error = cudaSetDevice(shape->device)) return error;
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = launch_config(*shape, &cluster, a->clusters < a->rows ? a->clusters : a->rows);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, shape->kernel, *a);
}

extern "C" const char* geko_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
