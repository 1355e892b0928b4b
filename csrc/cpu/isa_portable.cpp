// The kernels compiled for the baseline of the architecture (flags: setup.py).
#define GPT2RT_ISA portable
#include "vec_portable.h"
// the Vec comes first
#include "kernels/table.h"

namespace gpt2rt {

extern const Kernels kKernelsPortable;
const Kernels kKernelsPortable = GPT2RT_KERNEL_TABLE("portable");

}  // namespace gpt2rt
