// The fused linear layer for up to eight rows of x and 4-bit weights; kernels/linear_rows.py has the same in Triton.
//
// A block owns 16 or 32 rows of the weight; its warps share their elements, 128 at a time. Every thread has all its
// words on the way before it waits for the kernel before this one. The products run on tensor cores, 16 weight rows by
// 8 columns, which cost one instruction for eight weights a thread and sum in float32. Columns that no row of x needs
// hold *parts* of a row instead: with two parts, the two chunks of 64 that a step spans, with four parts their halves,
// each in a column of its own that is zero elsewhere. So a product never mixes groups, and a group's scale multiplies
// the sum of its codes.
//
// A column's sum does not depend on what stands in the others, tile sizes depend on the weight alone, and rows of x are
// taken in batches of 8 / parts: the bits of a row do not depend on how many rows there are. No atomics.
#pragma once

#include "finish.cuh"
#include "stage.cuh"

namespace gpt2rt::cuda {

constexpr int kTile = 16;
// steps that a thread holds in registers: 8 words each
constexpr int kHeld = 4;
constexpr int kMaxSteps = kHeld * kMaxWarps;
constexpr int kMaxRows = 8;

__host__ __device__ constexpr int batch_rows(int parts) { return 8 / parts; }

// short rows: more warps, so that more words are on the way; long ones: what the registers hold
__host__ __device__ inline bool is_short(int k) { return k <= 2 * kMaxWarps * kStep; }
inline int warps_for(int k) {
  const int steps = (k + kStep - 1) / kStep, held = is_short(k) ? 2 : kHeld;
  return (steps + held - 1) / held;
}
// Tiles of 16 rows that a block takes: two where its registers hold them and blocks enough are left for a large GPU, so
// that the work on x is done half as often. A starting point, not tuned on a device yet.
__host__ __device__ inline int tiles_for(int n, int k) { return is_short(k) && n >= 96 * 2 * kTile ? 2 : 1; }

// bytes of shared memory: x, sums of the warps, scratch of the norm, table
inline int shared_bytes(int n, int k, int num_rows, int parts, bool has_table) {
  const int rows = num_rows < batch_rows(parts) ? num_rows : batch_rows(parts);
  const int table = has_table ? 4 * Codes<Half>::pairs * Codes<Half>::copies : 0;
  return 16 * rows * Layout(k).row() + 4 * 8 * kTile * tiles_for(n, k) * warps_for(k) + 64 + table;
}

template <typename T, Format format>
using Unpack = std::conditional_t<format == Format::code4, Codes<T>, Integers<T>>;

// words, scales and zero points of one step: of two rows of the weight
struct Held {
  uint4 words[2];
  float scales[2];
  // of the first and of the second 32 elements of the chunk
  uint8_t zeros[2][2];
};

// of the 16 rows from `first` on
template <Format format>
__device__ inline Held load_held(const RowsParams& p, int64_t first, int step, int part) {
  const int lane = threadIdx.x % 32, unit = 4 * step + lane % 4;
  const int chunks = (p.k + 63) / 64, chunk = unit / 2;
  const int group = (64 * chunk + 32 * (part % 2)) >> p.group_shift;
  // int64: n * stride passes 2^31 for large vocabularies; inside the block 32 bits do
  const uint4* words = reinterpret_cast<const uint4*>(p.words) + first * 2 * chunks;
  const int64_t groups = first * p.num_groups;
  Held held;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const uint32_t in_groups = row * p.num_groups;
    held.words[half] = make_uint4(0, 0, 0, 0);
    held.scales[half] = 0.0f;
    held.zeros[half][0] = held.zeros[half][1] = 0;
    if (first + row >= p.n || chunk >= chunks) continue;
    held.words[half] = load_once(words + static_cast<uint32_t>(row * 2 * chunks + unit));
    if (group < p.num_groups) {
      if constexpr (format == Format::code4) {
        held.scales[half] = (static_cast<const float*>(p.scales) + groups)[in_groups + group];
      } else {
        held.scales[half] = Half::value((static_cast<const uint16_t*>(p.scales) + groups)[in_groups + group]);
      }
    }
    if constexpr (format == Format::int4_zeros) {
      const uint8_t* zeros = p.zeros + groups;
      held.zeros[half][0] = zeros[in_groups + ((64 * chunk) >> p.group_shift)];
      // the second half of the last chunk may be past the last group; x is zero there
      held.zeros[half][1] = zeros[in_groups + min((64 * chunk + 32) >> p.group_shift, p.num_groups - 1)];
    }
  }
  return held;
}

// 128 elements of 16 rows of the weight by the columns of x; adds to total, as the tensor cores spread it
template <typename T, Format format, int parts>
__device__ inline void multiply_step(const Held& held, const uint32_t* table, const uint4* x, int units, bool active,
                                     int part, float (&total)[4]) {
  Unpack<T, format> unpack[2];
  uint4 words[2] = {held.words[0], held.words[1]};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // unpacked anew for each batch of rows: values kept from the first one would fill the registers
    keep_here(words[half]);
    if constexpr (format == Format::code4) {
      unpack[half].table = table;
    } else if constexpr (format == Format::int4_zeros) {
      unpack[half] = Integers<T>(held.zeros[half][0], held.zeros[half][1]);
    } else {
      unpack[half] = Integers<T>(8, 8);
    }
  }
  // of four parts, a column takes the first or the second 32 elements of the chunk: a half of each register, or two of
  // the registers
  constexpr bool apart = std::is_same_v<typename Unpack<T, format>::Planes, PlanesApart>;
  const bool second = part % 2 != 0;
  const uint32_t first_mask = apart ? (second ? 0xffff0000u : 0x0000ffffu) : (second ? 0u : 0xffffffffu);
  const uint32_t second_mask = apart ? first_mask : ~first_mask;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    uint4 b = active ? x[word * units] : make_uint4(0, 0, 0, 0);
    if constexpr (parts == 4) b = make_uint4(b.x & first_mask, b.y & first_mask, b.z & second_mask, b.w & second_mask);
    const auto nth = [word](const uint4& four) {
      return word == 0 ? four.x : word == 1 ? four.y : word == 2 ? four.z : four.w;
    };
    uint32_t upper[4], lower[4];
    unpack[0].unpack(nth(words[0]), upper);
    unpack[1].unpack(nth(words[1]), lower);
    matrix_multiply_add<T>(sums, {upper[0], lower[0], upper[1], lower[1]}, b.x, b.y);
    matrix_multiply_add<T>(sums, {upper[2], lower[2], upper[3], lower[3]}, b.z, b.w);
  }
  total[0] += sums[0] * held.scales[0];
  total[1] += sums[1] * held.scales[0];
  total[2] += sums[2] * held.scales[1];
  total[3] += sums[3] * held.scales[1];
}

template <typename T, Format format, int parts>
__device__ inline void fused_linear_rows(const RowsParams& p, uint4* shared) {
  constexpr int batch = batch_rows(parts);
  let_dependents_start();
  const Layout layout(p.k);
  const int steps = layout.units / 4, warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4* x = shared;
  float* sums = reinterpret_cast<float*>(x + min(p.num_rows, batch) * layout.row());
  const int tiles = tiles_for(p.n, p.k);
  float* scratch = sums + 8 * kTile * tiles * warps;
  uint32_t* table = reinterpret_cast<uint32_t*>(scratch + 16);
  // the chunk (and with four parts its half) that the sums of this lane belong to: its own unit's
  const int sum_part = parts == 4 ? t : t / 2 * 2;

  // two steps of each of two tiles, or of a short or a long row two or four
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile * tiles;
  const auto step_of = [&](int i) { return warp + (tiles == 2 ? i % 2 : i) * warps; };
  Held held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t from = first_row + (tiles == 2 ? i / 2 * kTile : 0);
    if (step_of(i) < steps) held[i] = load_held<format>(p, from, step_of(i), sum_part);
  }
  if (p.norm_weight.data != nullptr) {
    for (int e = 32 * threadIdx.x; e < p.k; e += 32 * blockDim.x) {
      prefetch(static_cast<const char*>(p.norm_weight.data) + e * size_of(p.norm_weight.type));
      prefetch(static_cast<const char*>(p.norm_bias.data) + e * size_of(p.norm_bias.type));
    }
  }
  if constexpr (format == Format::code4) {
    for (int byte = threadIdx.x; byte < Codes<T>::pairs; byte += blockDim.x) {
      const uint32_t value = Codes<T>::entry(p.codebook, byte);
      uint4* to = reinterpret_cast<uint4*>(table + byte * Codes<T>::copies);
      // each thread begins in another bank
      for (int i = 0; i < Codes<T>::copies / 4; ++i) to[(i + byte) % 8] = make_uint4(value, value, value, value);
    }
  }

  wait_for_inputs();
  // column g of b: its row of the batch, its part, and whether this lane's unit belongs to that part
  const int m = g % batch, part = g / batch;
  const bool own_chunk = (parts == 4 ? part / 2 : part) == t / 2;
#pragma unroll 1
  for (int first = 0; first < p.num_rows; first += batch) {
    const int rows = min(batch, p.num_rows - first);
#pragma unroll 1
    for (int i = 0; i < rows; ++i)
      stage_row<T, typename Unpack<T, format>::Planes>(p, layout, first + i, i, x, scratch);
    __syncthreads();
    const bool active = m < rows && own_chunk;
    float total[2][4] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int step = step_of(i);
      if (step >= steps) continue;
      multiply_step<T, format, parts>(held[i], table + lane, x + layout.at(m, 0, 4 * step + t), layout.units, active,
                                      part, total[i / 2]);
    }
    // sums [warp][tile][column][row of the weight]
    float* mine = sums + 8 * kTile * tiles * warp;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (tile >= tiles) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // of one tile both halves of the steps
        const float sum = total[tile][i] + (tiles == 1 ? total[1][i] : 0.0f);
        mine[(8 * tile + 2 * t + i % 2) * kTile + g + 8 * (i / 2)] = sum;
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile * tiles * rows; i += blockDim.x) {
      const int row = i / (kTile * tiles), within = i % (kTile * tiles), tile = within / kTile;
      const int64_t column = first_row + within;
      float y = 0.0f;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
#pragma unroll
        for (int other = 0; other < parts; ++other) {
          y += sums[(8 * (tiles * w + tile) + batch * other + row) * kTile + within % kTile];
        }
      }
      if (column < p.n) finish(p, first + row, static_cast<int>(column), y);
    }
    // no barrier: the next batch writes sums only after it has staged x, behind one
  }
}

}  // namespace gpt2rt::cuda
