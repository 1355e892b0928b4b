// The kernels that gain from -mavx512vnni on top of AVX-512 (flags: setup.py); the others are those of isa_avx512.cpp.
#define GPT2RT_ISA avx512_vnni
#include "vec_avx512.h"
// the Vec comes first; the kernels that stay as they are are not used here
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/table.h"

namespace gpt2rt::avx512_vnni {

void replace(Kernels& table) { table.gemm_int8 = gemm_int8; }

}  // namespace gpt2rt::avx512_vnni
