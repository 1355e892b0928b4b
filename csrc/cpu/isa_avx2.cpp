// The kernels compiled for -mavx2 -mfma -mf16c (flags: setup.py).
#define GPT2RT_ISA avx2
#include "vec_avx2.h"
// the Vec comes first
#include "kernels/table.h"

namespace gpt2rt {

extern const Kernels kKernelsAvx2;
const Kernels kKernelsAvx2 = GPT2RT_KERNEL_TABLE("avx2");

}  // namespace gpt2rt
