// The table of kernels: one copy per instruction set, chosen once at run time (isa.cpp).
//
// Every entry is a function on raw pointers that knows no torch, starts no thread and checks nothing; the callers (the
// ops in this folder, csrc/step) have checked their arguments. Determinism: each entry computes an output element by a
// fixed sequence of operations that does not depend on how many rows or panels one call is given.
#pragma once

#include "packed.h"
#include "types.h"

namespace gpt2rt {

enum class Activation : int { kNone = 0, kGeluNew = 1, kGelu = 2, kRelu = 3, kSilu = 4, kTanh = 5, kQuickGelu = 6 };
constexpr int kNumActivations = 7;

// y = act(x w^T + bias) + residual, for the rows given and the panels panel_begin..panel_end
struct GemmArgs {
  const void* x;  // m rows of weight.rows, ldx bytes apart
  int64_t ldx;
  int64_t m;
  PackedWeight weight;
  int64_t panel_begin;
  int64_t panel_end;
  const float* bias;  // [n] or nullptr
  Activation activation;
  const void* residual;  // [m, n] of y_dtype, row stride ld_residual, added after the activation; nullptr; or y itself
  int64_t ld_residual;
  void* y;  // m rows, ldy bytes apart: n of y_dtype; or, with y_group > 0, int8 rows in groups (packed.h), for the next
  DType y_dtype;
  int64_t ldy;
  int64_t y_group;  // divides 64, and n is a multiple of 64
};

// One tile of query rows of one head: consecutive positions of one sequence.
struct AttentionArgs {
  const void* query;  // [rows, head_dim], row stride query_stride (elements)
  DType query_dtype;
  int64_t query_stride;
  const void* key;  // key cache of the layer, at this head's first element of block 0
  const void* value;
  DType cache_dtype;
  int64_t block_stride;  // elements from a block to the next: n_head * block_size * head_dim
  // int8 cache: the scales of keys and values, at this head's first token of block 0, with a block every
  // block_stride / head_dim floats; else nullptr
  const float* key_scales;
  const float* value_scales;
  int64_t block_size;
  int64_t head_dim;
  const int32_t* block_table;  // of this sequence
  int64_t first_position;      // absolute position of row 0; row i attends to positions 0..first_position + i
  int64_t rows;                // 1..kQueryTile
  float scale;
  void* out;  // [rows, head_dim], row stride out_stride (elements)
  DType out_dtype;
  int64_t out_stride;
  float* scratch;  // attention_scratch_floats(head_dim) floats
  // -1: all splits, merged into out. Else the number of the one split to compute, whose result goes to
  // partials + split * attention_partial_floats(rows, head_dim), for attention_merge
  int64_t split;
  float* partials;
};

static constexpr int64_t attention_partial_floats(int64_t rows, int64_t head_dim) {
  return rows * (attention_row_floats(head_dim) + 2);
}

// scores of a sampler in blocks of this many
constexpr int64_t kScoreBlock = 64;

// what the temperature does to a score: (score - shift) / divisor
struct Temper {
  bool active;
  float shift;
  float divisor;
};

// what repeating costs: repetition divides positive scores and multiplies negative ones
struct Penalties {
  float repetition;
  float frequency;  // of each time in the output
  float presence;
};

struct Kernels {
  const char* name;
  // y = (x - mean) / sqrt(var + eps) * w + b over n elements; y may be x
  void (*layer_norm_row)(DType dtype, const void* x, const void* weight, const void* bias, float eps, int64_t n,
                         void* y);
  // y = a + b
  void (*add_row)(DType dtype, const void* a, const void* b, int64_t n, void* y);
  // y = gelu_new(x + bias)
  void (*bias_gelu_new_row)(DType dtype, const void* x, const void* bias, int64_t n, void* y);
  // y = a + b, read as dtype, written as float32
  void (*add_row_f32)(DType dtype, const void* a, const void* b, int64_t n, float* y);
  void (*convert_row)(DType from, const void* x, DType to, void* y, int64_t n);
  // packs columns (output features) 0..num_columns of w [num_columns, k] into one panel [k][64], zero past num_columns;
  // strides in elements, one of them is 1; out_dtype is dtype or float32
  void (*pack_panel)(DType dtype, const void* w, int64_t stride_n, int64_t stride_k, int64_t num_columns, int64_t k,
                     DType out_dtype, void* out);
  // a float32 row as weight.rows wants it: bfloat16, or int8 in groups (packed.h)
  void (*prepare_row)(const PackedWeight& weight, const float* x, void* row);
  // a row of the weight (an output feature) as float32 [k]: embedding lookup in a packed table
  void (*unpack_row)(const PackedWeight& weight, int64_t row, float* y);
  // by what meets what: float32 rows and any weight; bfloat16 rows and bfloat16 weights (nullptr where there is no such
  // instruction); int8 rows and int8 or int4 weights
  void (*gemm_float32)(const GemmArgs& args);
  void (*gemm_bfloat16)(const GemmArgs& args);
  void (*gemm_int8)(const GemmArgs& args);
  // n elements become int8 codes and one scale: kernels/kv_cache.h
  void (*quantize_head)(DType dtype, const void* x, int64_t n, int8_t* codes, float* scale);
  void (*attention)(const AttentionArgs& args);
  // the same with products of bfloat16 pairs, for a bfloat16 cache; nullptr where there is no such instruction
  void (*attention_bfloat16)(const AttentionArgs& args);
  // out from partials, which holds every split of the tile, by either; destroys them
  void (*attention_merge)(const AttentionArgs& args);
  int64_t (*attention_scratch_floats)(int64_t head_dim);
  // maxima[b] = largest of scores[64 b] .. of n; false if there is a NaN or +infinity, or with `finite` -infinity too
  bool (*block_maxima)(const float* scores, int64_t n, bool finite, float* maxima);
  // weights[i] = exp(tempered score - maximum) in units of 2^-42 (kernels/sampling.h); maximum: of the tempered scores
  void (*score_weights)(const float* scores, int64_t n, const Temper& temper, float maximum, int64_t* weights);
  // sums[b] = sum of the weights of block b
  void (*block_weight_sums)(const float* scores, int64_t n, const Temper& temper, float maximum, int64_t* sums);
  // sum of exp(score - maximum); maximum: of the scores, finite
  double (*exp_sum)(const float* scores, int64_t n, float maximum);
  // the number of scores above `bound`, from scores and block_maxima
  int64_t (*count_larger)(const float* scores, int64_t n, const float* maxima, float bound);
  // y = scores after the penalties for counts (kernels/score_refs.py); y may be scores
  void (*penalties_row)(const float* scores, const int32_t* counts, int64_t n, const Penalties& penalties, float* y);
};

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
// levels above AVX-512 replace some of its kernels (isa_avx512_*.cpp)
namespace avx512_vnni {
void replace(Kernels& table);
}
namespace avx512_bf16 {
void replace(Kernels& table);
}
namespace amx {
// whether the compiler knew AMX
bool built();
// false, and the table as it was, if the kernels fail their check; only for processors that have AMX, in a process that
// the system lets use it
bool replace(Kernels& table);
}  // namespace amx
#endif

// The table in use. The first call reads GPT2RT_CPU_ISA; an unknown or unsupported value raises, at each call.
const Kernels& kernels();

}  // namespace gpt2rt
