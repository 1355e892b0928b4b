// Rows of x into shared memory, normalised or merged, rounded to what tensor cores multiply, in the order of the words.
#pragma once

#include "unpack.cuh"

namespace gpt2rt::cuda {

// elements of a row that a warp takes in one step: four 16-byte units of 32 codes
constexpr int kStep = 128;
// tokens in a split of attention; SPLIT of kernels/merge_splits.py
constexpr int kSplit = 64;
constexpr int kMaxWarps = 13;

// Where x stands: word i of unit u of row m is at [m][i][u], each 16 bytes: four registers of two elements.
struct Layout {
  int units;
  __host__ __device__ explicit Layout(int k) : units(4 * ((k + kStep - 1) / kStep)) {}
  // two more: rows that are read together start in different banks
  __host__ __device__ int row() const { return 4 * units + 2; }
  __host__ __device__ int at(int m, int word, int unit) const { return m * row() + word * units + unit; }
};

// Four elements of the merge of split attention; all in one head, for head_dim is a multiple of four.
// The weights of the splits are 2^(lse - max), in order, as in kernels/merge_splits.py.
__device__ inline void merge_four(const RowsParams& p, int row, int element, float (&value)[4]) {
  const int head = element / p.head_dim, dim = element % p.head_dim;
  const int64_t at = (static_cast<int64_t>(row) * (p.k / p.head_dim) + head) * p.num_splits;
  const int wanted = (p.seq_lens[row] + kSplit - 1) / kSplit, used = min(wanted, p.num_splits);
  float most = -INFINITY, total = 0.0f;
#pragma unroll 1
  for (int split = 0; split < used; ++split) most = fmaxf(most, p.lse[at + split]);
  value[0] = value[1] = value[2] = value[3] = 0.0f;
#pragma unroll 1
  for (int split = 0; split < used; ++split) {
    const float weight = exp2f(p.lse[at + split] - most);
    const float* from = p.values + (at + split) * p.head_dim + dim;
    total += weight;
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] += weight * from[i];
  }
  // tokens that no split holds
  const float scale = wanted > p.num_splits ? NAN : used > 0 ? 1.0f / total : 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] *= scale;
}

// elements element .. element + 3 of a row that begins at `start`, element a multiple of four; zero past k
__device__ inline void row_four(const Any& from, bool aligned, int64_t start, int element, int k, float (&value)[4]) {
  if (aligned && element + 4 <= k) {
    load_four(from, start + element, value);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const float next = element + i < k ? load(from, start + element + i) : 0.0f;
    // a register array is indexed with constants alone
    value[0] = i == 0 ? next : value[0];
    value[1] = i == 1 ? next : value[1];
    value[2] = i == 2 ? next : value[2];
    value[3] = i == 3 ? next : value[3];
  }
}

__device__ inline void input_four(const RowsParams& p, int row, int element, float (&value)[4]) {
  if (p.values != nullptr && element < p.k) {
    merge_four(p, row, element, value);
  } else {
    row_four(p.x, p.x_aligned, row * p.x.stride, element, p.k, value);
  }
}

// Two times four elements that fill one register in each of four words: item 0 .. 16 * steps - 1.
template <typename Planes>
struct Item {
  int low, high, unit, reg;
  __host__ __device__ explicit Item(int item) {
    const int chunk = item / 8, half = item % 2;
    reg = item / 2 % 4;
    low = 64 * chunk + 8 * Planes::low(reg) + 4 * half;
    high = 64 * chunk + 8 * Planes::high(reg) + 4 * half;
    unit = 2 * chunk + half;
  }
};

// the sum over the block of a number for each thread, the same in all of them; scratch: kMaxWarps floats
__device__ inline float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll 1
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  // the scratch may be written again
  __syncthreads();
  return sum;
}

// four elements of a row by its mean and the inverse of its deviation; zero past k, where weight and bias are
__device__ inline void normalise_four(const RowsParams& p, int element, float mean, float factor, float (&value)[4]) {
  float weight[4], bias[4];
  row_four(p.norm_weight, p.norm_aligned, 0, element, p.k, weight);
  row_four(p.norm_bias, p.norm_aligned, 0, element, p.k, bias);
#pragma unroll
  for (int e = 0; e < 4; ++e) value[e] = (value[e] - mean) * factor * weight[e] + bias[e];
}

// Row `row` of x to place m. The threads of the block share the work; the order of its sums depends on k alone.
template <typename T, typename Planes>
__device__ inline void stage_row(const RowsParams& p, const Layout& layout, int row, int m, uint4* x, float* scratch) {
  const int items = 4 * layout.units;
  float mean = 0.0f, factor = 1.0f;
  const bool norm = p.norm_weight.data != nullptr;
  float low[4], high[4];
  if (norm) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
      const Item<Planes> item(i);
      input_four(p, row, item.low, low);
      input_four(p, row, item.high, high);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += low[e] + high[e];
    }
    mean = block_sum(sum, scratch) / p.k;
    sum = 0.0f;
    // a second pass: a difference of large squares would lose the digits of the variance
#pragma unroll 1
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
      const Item<Planes> item(i);
      input_four(p, row, item.low, low);
      input_four(p, row, item.high, high);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float a = item.low + e < p.k ? low[e] - mean : 0.0f, b = item.high + e < p.k ? high[e] - mean : 0.0f;
        sum += a * a + b * b;
      }
    }
    factor = 1.0f / sqrtf(block_sum(sum, scratch) / p.k + p.eps);
  }
  uint32_t* to = reinterpret_cast<uint32_t*>(x);
  // not unrolled, as above: the words that wait in registers need the room
#pragma unroll 1
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const Item<Planes> item(i);
    input_four(p, row, item.low, low);
    input_four(p, row, item.high, high);
    if (norm) {
      normalise_four(p, item.low, mean, factor, low);
      normalise_four(p, item.high, mean, factor, high);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[4 * layout.at(m, e, item.unit) + item.reg] = pair<T>(low[e], high[e]);
    }
  }
}

}  // namespace gpt2rt::cuda
