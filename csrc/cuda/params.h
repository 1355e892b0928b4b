// What one launch of the kernel for few rows gets; the meaning of each tensor is that of kernels/linear_rows.py.
#pragma once

#include <cstdint>

namespace gpt2rt::cuda {

// storage dtypes of everything but the codes
enum class Type : int32_t { float32, float16, bfloat16 };

// the order is that of ACTIVATIONS in kernels/fusion.py
enum class Activation : int32_t { linear, gelu_new, gelu, relu, silu, tanh, quick_gelu };

// of the 4-bit codes: minus 8, minus a zero point for each group, or a place in a table
enum class Format : int32_t { int4, int4_zeros, code4 };

// a tensor of which the kernel knows the dtype only at run time; data == nullptr: there is none
struct Any {
  void* data = nullptr;
  // elements between rows
  int64_t stride = 0;
  Type type = Type::float32;
};

struct RowsParams {
  // [num_rows, k], or else the partial results of split attention
  Any x;
  // 16 bytes of x can be read at once: base and stride are multiples
  bool x_aligned = false;
  // values [num_rows, k / head_dim, num_splits, head_dim], lse [num_rows, k / head_dim, num_splits], seq_lens
  // [num_rows]
  const float* values = nullptr;
  const float* lse = nullptr;
  const int32_t* seq_lens = nullptr;
  int32_t num_splits = 0;

  // [n, 8 * ceil(k / 64)]
  const uint32_t* words = nullptr;
  // [n, num_groups]: float16 for integers, float32 with a table
  const void* scales = nullptr;
  const uint8_t* zeros = nullptr;
  const float* codebook = nullptr;
  int32_t num_groups = 0;
  // group_size = 1 << group_shift
  int32_t group_shift = 0;

  Any norm_weight, norm_bias;
  // as x_aligned, of both
  bool norm_aligned = false;
  float eps = 0.0f;
  Any bias, residual, out;
  Activation activation = Activation::linear;

  // [num_blocks, n_head, block_size, head_dim]; the columns of the product are then queries, keys, values
  Any key_cache, value_cache;
  const int64_t* slots = nullptr;
  int64_t num_slots = 0;
  int32_t block_size = 0;
  int32_t head_dim = 0;

  int32_t num_rows = 0;
  int32_t n = 0;
  int32_t k = 0;
};

}  // namespace gpt2rt::cuda
