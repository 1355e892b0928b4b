// Body of isa_portable.cpp, isa_avx2.cpp and isa_avx512.cpp: the kernels on the Vec included before, and their table.
// Everything but the table has internal linkage, and no std template is used, so that no function compiled for one
// instruction set can be taken by the linker in place of another's.
#pragma once

#include "../kernels.h"

#include "dispatch.h"
#include "math.h"
#include "rows.h"
#include "pack.h"
#include "codes.h"
#include "prepare.h"
#include "epilogue.h"
#include "gemm_codes.h"
#include "gemm_int8.h"
#include "gemm.h"
#include "kv_cache.h"
#include "attention.h"
#include "sampling.h"
#include "scores.h"

#define GPT2RT_KERNEL_TABLE(isa_name)                                   \
  {                                                                     \
      .name = isa_name,                                                 \
      .layer_norm_row = GPT2RT_ISA::layer_norm_row_any,                 \
      .add_row = GPT2RT_ISA::add_row_any,                               \
      .bias_gelu_new_row = GPT2RT_ISA::bias_gelu_new_row_any,           \
      .add_row_f32 = GPT2RT_ISA::add_row_f32_any,                       \
      .convert_row = GPT2RT_ISA::convert_row_any,                       \
      .pack_panel = GPT2RT_ISA::pack_panel_any,                         \
      .prepare_row = GPT2RT_ISA::prepare_row,                           \
      .unpack_row = GPT2RT_ISA::unpack_row,                             \
      .gemm_float32 = GPT2RT_ISA::gemm_float32,                         \
      .gemm_bfloat16 = nullptr,                                         \
      .gemm_int8 = GPT2RT_ISA::gemm_int8,                               \
      .quantize_head = GPT2RT_ISA::quantize_head_any,                   \
      .attention = GPT2RT_ISA::attention,                               \
      .attention_bfloat16 = nullptr,                                    \
      .attention_merge = GPT2RT_ISA::attention_merge,                   \
      .attention_scratch_floats = GPT2RT_ISA::attention_scratch_floats, \
      .block_maxima = GPT2RT_ISA::block_maxima,                         \
      .score_weights = GPT2RT_ISA::score_weights,                       \
      .block_weight_sums = GPT2RT_ISA::block_weight_sums,               \
      .exp_sum = GPT2RT_ISA::exp_sum,                                   \
      .count_larger = GPT2RT_ISA::count_larger,                         \
      .penalties_row = GPT2RT_ISA::penalties_row,                       \
  }
