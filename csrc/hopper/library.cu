// The library that hopper.py loads: plain C functions, all of which return a cudaError_t.

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/hopper/predicted_rows.h"
#include "csrc/hopper/score_rows.h"

// Where and in what shape a kernel runs; filled once by geko_shape, kept by the caller.
struct Shape {
  int device, job, dtype;     // job: 0 predicted rows, 1 scored rows; dtype: 0 float32, 1 bfloat16, 2 float16
  int warps, blocks, shared;  // 8 or 24; blocks a cluster; bytes of shared memory a block
  const void* kernel;
};

static_assert(sizeof(Shape) == 32 && sizeof(PredictedRows) == 136 && sizeof(ScoreRows) == 72,
              "hopper.py and score_hopper.py fill them field by field");

namespace {

template <typename Job, int WARPS>
const void* kernel_of(int dtype) {
  switch (dtype) {
    case 0: return reinterpret_cast<const void*>(read_once<float, WARPS, Job>);
    case 1: return reinterpret_cast<const void*>(read_once<__nv_bfloat16, WARPS, Job>);
    case 2: return reinterpret_cast<const void*>(read_once<__half, WARPS, Job>);
    default: return nullptr;
  }
}

template <typename Job>
const void* kernel_of(const Shape& shape) {
  return shape.warps == 8 ? kernel_of<Job, 8>(shape.dtype) : kernel_of<Job, 24>(shape.dtype);
}

// `cluster` has to live as long as the configuration.
cudaLaunchConfig_t launch_config(const Shape& shape, cudaLaunchAttribute* cluster, int clusters) {
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

// Whether a block's slice, barriers and warp sums fit into its memory, and what the job asks for is there.
template <typename Job>
bool fits(const Shape& shape, const Job& job) {
  const Tiling& tiling = job.tiling;
  if (job.count < 1 || tiling.clusters < 1 || shape.blocks < 1 || shape.blocks > 8) return false;
  if (tiling.slots < 1 || tiling.chunk < 1 || tiling.slice < 1) return false;
  const int64_t slots = int64_t(tiling.slots) * tiling.chunk, sums = int64_t(kTurns) * shape.blocks * shape.warps;
  return slots >= tiling.slice && 16 * (slots + sums) + 16 * int64_t(tiling.slots) + 8 * kTurns <= shape.shared &&
         job.fits(shape.blocks, shape.dtype == 0 ? 4 : 8);
}

template <typename Job>
int launch(const Shape& shape, const Job& job, void* stream) {
  if (!fits(shape, job)) return cudaErrorInvalidValue;
  if (cudaError_t error = cudaSetDevice(shape.device)) return error;
  cudaLaunchAttribute cluster;
  const int clusters = job.tiling.clusters < job.count ? job.tiling.clusters : job.count;
  cudaLaunchConfig_t config = launch_config(shape, &cluster, clusters);
  config.stream = static_cast<cudaStream_t>(stream);
  void* arguments[] = {const_cast<Job*>(&job)};
  return cudaLaunchKernelExC(&config, shape.kernel, arguments);
}

}  // namespace

extern "C" int geko_shape(Shape* shape, int* clusters) {
  shape->kernel = shape->job == 0 ? kernel_of<PredictedRows>(*shape) : kernel_of<ScoreRows>(*shape);
  if (!shape->kernel) return cudaErrorInvalidValue;
  if (cudaError_t error = cudaSetDevice(shape->device)) return error;
  if (cudaError_t error =
          cudaFuncSetAttribute(shape->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape->shared))
    return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(*shape, &cluster, 1);
  return cudaOccupancyMaxActiveClusters(clusters, shape->kernel, &config);
}

extern "C" int geko_predicted_rows(const Shape* shape, const PredictedRows* rows, void* stream) {
  return launch(*shape, *rows, stream);
}

extern "C" int geko_score_rows(const Shape* shape, const ScoreRows* rows, void* stream) {
  return launch(*shape, *rows, stream);
}

extern "C" const char* geko_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
