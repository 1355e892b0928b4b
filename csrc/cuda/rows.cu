// The instances of the kernel for few rows, and which one a launch takes.
#include "rows.h"

#include <cuda_runtime.h>

#include "rows.cuh"

namespace gpt2rt::cuda {
namespace {

// 13 warps of at most 128 registers: one block fits a multiprocessor whatever its registers, and short rows, with their
// 3 to 7 warps, have several
template <typename T, Format format, int parts>
__global__ __launch_bounds__(32 * kMaxWarps, 1) void fused_linear_rows_kernel(const __grid_constant__ RowsParams p) {
  GPT2RT_DYNAMIC_SHARED(shared);
  fused_linear_rows<T, format, parts>(p, shared);
}

template <typename T, Format format, int parts>
cudaError_t launch(const RowsParams& p, bool pdl, cudaStream_t stream) {
  const auto kernel = fused_linear_rows_kernel<T, format, parts>;
  cudaLaunchConfig_t config = {};
  const int rows = kTile * tiles_for(p.n, p.k);
  config.gridDim = dim3((p.n + rows - 1) / rows);
  config.blockDim = dim3(32 * warps_for(p.k));
  config.dynamicSmemBytes = shared_bytes(p.n, p.k, p.num_rows, parts, format == Format::code4);
  config.stream = stream;
  if (config.dynamicSmemBytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.dynamicSmemBytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute dependent = {};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &dependent;
  config.numAttrs = pdl ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <typename T, Format format>
cudaError_t launch(const RowsParams& p, bool pdl, cudaStream_t stream) {
  // groups of 32 take the two halves of a chunk apart
  return p.group_shift == 5 ? launch<T, format, 4>(p, pdl, stream) : launch<T, format, 2>(p, pdl, stream);
}

template <typename T>
cudaError_t launch(const RowsParams& p, Format format, bool pdl, cudaStream_t stream) {
  switch (format) {
    case Format::int4:
      return launch<T, Format::int4>(p, pdl, stream);
    case Format::int4_zeros:
      return launch<T, Format::int4_zeros>(p, pdl, stream);
    case Format::code4:
      return launch<T, Format::code4>(p, pdl, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int max_elements() { return kMaxSteps * kStep; }

const char* launch_rows(const RowsParams& params, Format format, Type compute, bool pdl, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      compute == Type::bfloat16 ? launch<BFloat>(params, format, pdl, on) : launch<Half>(params, format, pdl, on);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gpt2rt::cuda
