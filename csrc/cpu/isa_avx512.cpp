// The kernels compiled for -mavx512f -mavx512bw -mavx512dq -mavx512vl and those of AVX2 (flags: setup.py).
#define GPT2RT_ISA avx512
#include "vec_avx512.h"
// the Vec comes first
#include "kernels/table.h"

namespace gpt2rt {

extern const Kernels kKernelsAvx512;
const Kernels kKernelsAvx512 = GPT2RT_KERNEL_TABLE("avx512");

}  // namespace gpt2rt
