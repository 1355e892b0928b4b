// From the sum of a column to memory: bias, activation, residual, or the KV cache.
#pragma once

#include "device.cuh"

namespace gpt2rt::cuda {

// kernels/fusion.py has the same formulas
__device__ inline float activated(float y, Activation activation) {
  switch (activation) {
    case Activation::gelu_new:
      return y / (1.0f + expf(-2.0f * 0.7978845608028654f * (y + 0.044715f * y * y * y)));
    case Activation::gelu:
      return 0.5f * y * (1.0f + erff(y * 0.7071067811865476f));
    case Activation::relu:
      // not fmaxf: NaN must stay NaN
      return y < 0.0f ? 0.0f : y;
    case Activation::silu:
      return y / (1.0f + expf(-y));
    case Activation::tanh:
      return tanhf(y);
    case Activation::quick_gelu:
      return y / (1.0f + expf(-1.702f * y));
    case Activation::linear:
      break;
  }
  return y;
}

__device__ inline void finish(const RowsParams& p, int row, int column, float y) {
  if (p.bias.data != nullptr) y += load(p.bias, column);
  y = activated(y, p.activation);
  if (p.residual.data != nullptr) y += load(p.residual, row * p.residual.stride + column);
  const int width = p.slots == nullptr ? p.n : p.n / 3;
  if (column < width) {
    store(p.out, row * p.out.stride + column, y);
    return;
  }
  const int64_t slot = p.slots[row];
  if (slot < 0 || slot >= p.num_slots) return;
  const int within = column % width, head = within / p.head_dim;
  const int64_t block = slot / p.block_size, offset = slot % p.block_size;
  const int64_t at = ((block * (width / p.head_dim) + head) * p.block_size + offset) * p.head_dim + within % p.head_dim;
  store(column < 2 * width ? p.key_cache : p.value_cache, at, y);
}

}  // namespace gpt2rt::cuda
