// The instances of the persistent decode kernel, and how one is launched.
#include "persistent.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "persistent.cuh"

namespace gpt2rt::cuda {
namespace {

constexpr int kBlockThreads = consumer_threads(kGroups) + 32;

template <typename T>
__global__ __launch_bounds__(kBlockThreads, 1) void persistent_kernel(const __grid_constant__ PersistentParams p,
                                                                      int row, int fixed) {
  GPT2RT_DYNAMIC_SHARED(shared);
  persistent_step<T, kGroups>(p, shared, row, fixed);
}

using Kernel = void (*)(PersistentParams, int, int);
Kernel kernel_of(Type type) { return type == Type::bfloat16 ? persistent_kernel<BFloat> : persistent_kernel<Half>; }

}  // namespace

const char* persistent_grid(const PersistentParams& params, Type type, int* blocks, int* stages) {
  int device = 0, most = 0, multiprocessors = 0, cooperative = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, device);
  };
  ask(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&cooperative, cudaDevAttrCooperativeLaunch);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (cooperative == 0) return "the device has no cooperative launches";
  *stages = stages_in(params, kGroups, most);
  if (*stages == 0) return "the rows of this model are too long for the device's shared memory";
  PersistentParams p = params;
  p.stages = *stages;
  const Kernel kernel = kernel_of(type);
  const int bytes = persistent_bytes(p, kGroups);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kBlockThreads, bytes);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (resident < 1) return "no block of this model's size fits a multiprocessor";
  // one a multiprocessor: a second would share its memory path and lengthen every barrier
  *blocks = std::min(multiprocessors, kMaxBlocks);
  return nullptr;
}

const char* launch_persistent(PersistentParams params, Type type, int blocks, void* stream) {
  int most = 0;
  const char* why = persistent_grid(params, type, &most, &params.stages);
  if (why != nullptr) return why;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks > 0 ? std::min(blocks, most) : most);
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = persistent_bytes(params, kGroups);
  config.stream = static_cast<cudaStream_t>(stream);
  // all blocks run at the same time, or the launch fails: without that the barrier would wait forever
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const int row = longest_row(params), fixed = fixed_bytes(params, kGroups);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel_of(type), params, row, fixed);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gpt2rt::cuda
