// The launcher that ops.cpp calls; it knows nothing of torch.
#pragma once

#include "params.h"

namespace gpt2rt::cuda {

// Longest row that the registers of a block hold.
int max_elements();

// Launch on a stream (a cudaStream_t) of the current device; nothing is allocated and nothing waits for the device.
// compute: float16 or bfloat16. Returns nullptr, or what CUDA says went wrong.
const char* launch_rows(const RowsParams& params, Format format, Type compute, bool pdl, void* stream);

}  // namespace gpt2rt::cuda
