// y = act(x w^T + bias) + residual on packed panels.
//
// Every output is a chain of fused multiply-adds over k in increasing order from 0 for each 64 elements of k, these
// sums added in order, then the bias: the same operations for every number of rows, every dtype of storage and every
// way of cutting the work, so a row's bits depend on that row alone. The chains of 64 columns x up to kMaxRows rows run
// in registers (Goto & van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). One chain over all of k
// would be as reproducible, but its rounding error is several times as large.
//
// One block of rows: bound by memory, a panel is one sequential stream and is prefetched ahead. Many rows: a panel
// stays in L2 while blocks of rows pass over it. 16-bit storage is widened in registers, at 96 % of the speed of
// float32.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// bytes that the stream of a panel is prefetched ahead; measured on Zen 4 with 2 MiB pages: 1 KiB and 8 KiB are 1 %
// slower for one row and 5 % for four
constexpr int64_t kPrefetchBytes = 4096;

template <typename T>
constexpr int kLinesPerRow = static_cast<int>(kPanel * sizeof(T)) / 64;

// what a microkernel prefetches for each element of k: lines of the panel itself, kPrefetchBytes ahead, or one or two
// lines of the next panel, to L2 (to L1 they would drive out the rows of x: half the speed at 8 rows of 768)
enum class Prefetch { kNone, kStream, kOneLine, kTwoLines };

// tile = sums over begin..end, or tile += them; next: where kOneLine and kTwoLines begin for element 0 of k
template <typename T, int kRows, Prefetch kPrefetch>
inline void microkernel(const float* x, int64_t ldx, int64_t begin, int64_t end, const T* panel, const char* next,
                        float* tile) {
  constexpr int kAtOnce = pairs_at_once(kRows) < kPairs ? pairs_at_once(kRows) : kPairs;
  for (int pair = 0; pair < kPairs; pair += kAtOnce) {
    Vec sum[kRows][2 * kAtOnce];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int j = 0; j < 2 * kAtOnce; ++j) sum[r][j] = zero();
    }
    const T* row = panel + begin * kPanel;
    for (int64_t i = begin; i < end; ++i, row += kPanel) {
      if (pair == 0) {
        if constexpr (kPrefetch == Prefetch::kStream) {
          const char* ahead = reinterpret_cast<const char*>(row) + kPrefetchBytes;
#pragma GCC unroll 16
          for (int line = 0; line < kLinesPerRow<T>; ++line) prefetch(ahead + line * 64);
        } else if constexpr (kPrefetch == Prefetch::kOneLine) {
          prefetch_l2(next + i * 64);
        } else if constexpr (kPrefetch == Prefetch::kTwoLines) {
          prefetch_l2(next + i * 128);
          prefetch_l2(next + i * 128 + 64);
        }
      }
      Vec w[2 * kAtOnce];
#pragma GCC unroll 16
      for (int p = 0; p < kAtOnce; ++p) load_pair(row, pair + p, w[2 * p], w[2 * p + 1]);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec a = set1(x[r * ldx + i]);
#pragma GCC unroll 16
        for (int j = 0; j < 2 * kAtOnce; ++j) sum[r][j] = fma(a, w[j], sum[r][j]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < kAtOnce; ++p) {
        float* a = tile + r * kPanel + first_column<T>(pair + p);
        float* b = tile + r * kPanel + second_column<T>(pair + p);
        store(a, begin == 0 ? sum[r][2 * p] : add(load(a), sum[r][2 * p]));
        store(b, begin == 0 ? sum[r][2 * p + 1] : add(load(b), sum[r][2 * p + 1]));
      }
    }
  }
}

template <typename T, int kRows, Prefetch kPrefetch>
inline void microkernel_rows(int rows, const float* x, int64_t ldx, int64_t k, const T* panel, const char* next,
                             float* tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return microkernel_rows<T, kRows - 1, kPrefetch>(rows, x, ldx, k, panel, next, tile);
  }
  // at least one round: k may be 0, which sums to 0
  int64_t begin = 0;
  do {
    const int64_t end = k - begin < kChain ? k : begin + kChain;
    microkernel<T, kRows, kPrefetch>(x, ldx, begin, end, panel, next, tile);
    begin = end;
  } while (begin < k);
}

// One panel for all rows, in blocks of rows as even as possible. A single block streams the panel from memory; of
// several, each fetches its share of the next panel while it computes, so that memory and arithmetic overlap.
template <typename T>
inline void gemm_panel(const GemmArgs& args, const T* panel, int64_t column) {
  alignas(64) float tile[kMaxRows * kPanel];
  const int64_t columns = args.weight.n - column < kPanel ? args.weight.n - column : kPanel;
  const int64_t blocks = (args.m + kMaxRows - 1) / kMaxRows;
  const float* all_x = static_cast<const float*>(args.x);
  const int64_t ldx = args.ldx / static_cast<int64_t>(sizeof(float));
  const int64_t k = args.weight.k;
  const int64_t lines = 2 * blocks >= kLinesPerRow<T> && blocks < kLinesPerRow<T> ? 2 : 1;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t left = blocks - block;
    const int rows = static_cast<int>((args.m - row + left - 1) / left);
    const float* x = all_x + row * ldx;
    // past the last panel lies nothing of ours, but a prefetch reads nothing either
    const char* next = reinterpret_cast<const char*>(panel + k * kPanel) + block * lines * k * 64;
    if (blocks == 1) {
      microkernel_rows<T, kMaxRows, Prefetch::kStream>(rows, x, ldx, k, panel, nullptr, tile);
    } else if (block * lines >= kLinesPerRow<T>) {
      microkernel_rows<T, kMaxRows, Prefetch::kNone>(rows, x, ldx, k, panel, nullptr, tile);
    } else if (lines == 1) {
      microkernel_rows<T, kMaxRows, Prefetch::kOneLine>(rows, x, ldx, k, panel, next, tile);
    } else {
      microkernel_rows<T, kMaxRows, Prefetch::kTwoLines>(rows, x, ldx, k, panel, next, tile);
    }
    with_type(args.y_dtype, [&](auto t) {
      for (int r = 0; r < rows; ++r) finish_row<decltype(t)>(args, tile + r * kPanel, row + r, column, columns);
    });
    row += rows;
  }
}

template <typename T>
void gemm_panels(const GemmArgs& args) {
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    gemm_panel(args, static_cast<const T*>(args.weight.data) + p * args.weight.k * kPanel, p * kPanel);
  }
}

void gemm_float32(const GemmArgs& args) {
  switch (args.weight.format) {
    case WeightFormat::kFloat32:
      return gemm_panels<float>(args);
    case WeightFormat::kBFloat16:
      return gemm_panels<bf16>(args);
    case WeightFormat::kFloat16:
      return gemm_panels<f16>(args);
    default:
      return gemm_codes(args);
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
