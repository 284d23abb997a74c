// Rows of logits, each read once for its statistics and its gradient (sm_90). A `Job` says which rows, what their
// gradient is multiplied by and where both go: see predicted_rows.h and score_rows.h.
//
// A cluster of blocks takes a row, each block a slice of it. A producer warp keeps copying the slices of this row and
// the next ones into a ring of chunks in shared memory; the other warps read each chunk twice: for the statistics, and,
// once the cluster has added those up (distributed shared memory), for the gradient, after which the chunk is free.

#pragma once

#include <cstdint>

#include "csrc/hopper/clusters.h"
#include "csrc/hopper/vectors.h"

namespace {

constexpr int kStep = 4;  // vectors that a thread takes at once; 1 and 2 were slower
constexpr int kTurns = 4;  // rows of partial sums held: as rows may be finished late, a block can be three ahead

// how the blocks of a cluster share a row; sizes in vectors of 16 bytes
struct Tiling {
  int slice;  // of a block
  int chunk;
  int slots;     // chunks in shared memory
  int clusters;  // how many run at a time
};

// where a block's slice of a row lies: vectors [first, last) of those that hold the elements [head, tail)
struct Row {
  const uint4* logits;
  uint4* grad;
  int first, last, head, tail;

  __device__ Row(const void* logits, void* grad, int head, int tail, int vectors, const Tiling& tiling, int rank)
      : logits(static_cast<const uint4*>(logits)), grad(static_cast<uint4*>(grad)), head(head), tail(tail) {
    first = min(rank * tiling.slice, vectors);
    last = min(first + tiling.slice, vectors);
  }
};

// what a row is compared with: its target, and the coefficient of its gradient
struct Wanted {
  int target;
  float coeff;
};

// the token statistics of a row to out[0], out[step], ..., see reference.token_stats; 0 where not scored
__device__ void store_statistics(float* out, int64_t step, const Statistics& sum, float at_target, bool scored) {
  const float total = sum.top == -kInfinity ? __int_as_float(0x7fc00000) : sum.total;  // 0 / 0, as in PyTorch
  const float top = total != total && fabsf(sum.top) != kInfinity ? total : sum.top;  // with a NaN the maximum is NaN
  const float log_sum = logf(total), loss = log_sum - (at_target - top);
  out[0] = scored ? loss : 0;
  out[step] = scored ? top : 0;
  out[2 * step] = scored ? log_sum : 0;
  out[3 * step] = scored ? 1 / total : 0;
  out[4 * step] = scored && at_target == top && loss == loss;
}

template <typename T, int WARPS, typename Job>
__global__ void __launch_bounds__(WARPS * 32 + 32) read_once(const __grid_constant__ Job job) {
  using V = Vector<T>;
  constexpr int kPer = V::kSize, kThreads = WARPS * 32;
  const Tiling& tiling = job.tiling;
  extern __shared__ __align__(128) uint4 ring[];
  const int rank = cluster_rank(), blocks = cluster_size();
  const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  float4* partials = reinterpret_cast<float4*>(ring + tiling.slots * tiling.chunk);  // (kTurns, blocks * WARPS)
  const uint32_t full = shared_address(partials + kTurns * blocks * WARPS);
  const uint32_t empty = full + 8 * tiling.slots, summed = empty + 8 * tiling.slots;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < tiling.slots; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS);
    for (int i = 0; i < kTurns; ++i) barrier_init(summed + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  if (warp == WARPS) {
    int slot = 0, target = -1;
    uint32_t parity = 1;
    for (int i = 0, t = cluster; t < job.count; ++i, t += clusters) {
      if (i % 32 == 0) {
        const int64_t ahead = t + int64_t(lane) * clusters;
        target = ahead < job.count ? job.wanted(ahead).target : -1;
      }
      if (!job.reads(__shfl_sync(~0u, target, i % 32))) continue;
      const Row row = job.template row<T>(t, rank);
      for (int v = row.first; v < row.last; v += tiling.chunk) {
        if (lane == 0) {
          barrier_wait(empty + 8 * slot, parity);
          const uint32_t bytes = 16 * min(tiling.chunk, row.last - v);
          barrier_expect(full + 8 * slot, bytes);
          copy_in(shared_address(ring + slot * tiling.chunk), row.logits + v, bytes, full + 8 * slot);
        }
        if (++slot == tiling.slots) slot = 0, parity ^= 1;
      }
    }
  } else {
    const auto factor_of = job.factors(lane);
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
        if (lane == 0) job.store(late, late_target, sum, 0);
      }
      late = -1;
    };
    Wanted next = job.wanted(cluster);  // no cluster is without a row
    for (int t = cluster; t < job.count; t += clusters) {
      const int y = next.target;
      const float factor = factor_of(next);
      if (t + clusters < job.count) next = job.wanted(t + clusters);
      const Row row = job.template row<T>(t, rank);
      const int head = row.head, tail = row.tail;
      const bool keep = factor != 0;
      Statistics sum;
      const int first_slot = slot;
      if (job.reads(y)) {
        const int y_at = head + y;
        for (int from = row.first; from < row.last; from += tiling.chunk) {
          const uint4* chunk = ring + slot * tiling.chunk;
          const int size = min(tiling.chunk, row.last - from);
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
          if (++slot == tiling.slots) slot = 0, parity ^= 1;
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
      if (rank == 0 && threadIdx.x == 0 && (keep || !job.reads(y))) job.store(t, y, sum, factor);
      if (keep) {
        const float share = factor / sum.total;
        const int y_at = head + y;
        slot = first_slot;
        for (int from = row.first; from < row.last; from += tiling.chunk) {
          const uint4* chunk = ring + slot * tiling.chunk;
          const int size = min(tiling.chunk, row.last - from);
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
                  if constexpr (Job::kPadded) {
#pragma unroll
                    for (int j = 0; j < kPer; ++j) x[j] = e + j < tail ? x[j] : 0;
                  } else {
                    T* one = reinterpret_cast<T*>(out + here);
#pragma unroll
                    for (int j = 0; j < kPer; ++j)
                      if (e + j >= head && e + j < tail) one[j] = T(x[j]);
                    continue;
                  }
                }
              }
              out[here] = V::pack(x);
            }
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + 8 * slot);
          if (++slot == tiling.slots) slot = 0;
        }
      }
    }
    finish_late(scored - 1);
  }
  cluster_sync();  // a block's shared memory has to outlive what others send to it
}

}  // namespace
