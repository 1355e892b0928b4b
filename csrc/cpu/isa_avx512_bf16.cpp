// The kernels that gain from -mavx512bf16 on top of AVX-512 and VNNI (flags: setup.py); the others are those of
// isa_avx512_vnni.cpp.
#define GPT2RT_ISA avx512_bf16
#include "vec_avx512.h"
// the Vec comes first; the kernels that stay as they are are not used here
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/table.h"

#include "kernels/gemm_bfloat16.h"
#include "kernels/attention_bfloat16.h"

namespace gpt2rt::avx512_bf16 {

void replace(Kernels& table) {
  table.gemm_bfloat16 = gemm_bfloat16;
  table.attention_bfloat16 = attention_bfloat16;
  table.attention_scratch_floats = attention_scratch_floats_bfloat16;
}

}  // namespace gpt2rt::avx512_bf16
