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

// elements of k that lie together in a panel row
template <typename T>
constexpr int kStepOfK = is_bf16<T> ? 2 : 1;
template <typename T>
constexpr int kLinesPerRow = static_cast<int>(kPanel * sizeof(T)) / 64 * kStepOfK<T>;

// what a microkernel prefetches for each element of k (each pair in bfloat16): lines of the panel itself,
// kPrefetchBytes ahead, or one or two lines of the next panel, to L2 (to L1 they would drive out the rows of x: half
// the speed at 8 rows of 768)
enum class Prefetch { kNone, kStream, kOneLine, kTwoLines };

template <typename T, Prefetch kPrefetch>
inline void prefetch_step(const T* row, const char* next, int64_t step) {
  if constexpr (kPrefetch == Prefetch::kStream) {
    const char* ahead = reinterpret_cast<const char*>(row) + kPrefetchBytes;
#pragma GCC unroll 16
    for (int line = 0; line < kLinesPerRow<T>; ++line) prefetch(ahead + line * 64);
  } else if constexpr (kPrefetch == Prefetch::kOneLine) {
    prefetch_l2(next + step * 64);
  } else if constexpr (kPrefetch == Prefetch::kTwoLines) {
    prefetch_l2(next + step * 128);
    prefetch_l2(next + step * 128 + 64);
  }
}

// sum[r][j] += x[r] w[j] for one element of k
template <int kRows, int kVecs>
inline void multiply_add(const float* x, int64_t ldx, const Vec (&w)[kVecs], Vec (&sum)[kRows][kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec a = set1(x[r * ldx]);
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) sum[r][j] = fma(a, w[j], sum[r][j]);
  }
}

// tile = sums over begin..end, or tile += them; next: where kOneLine and kTwoLines begin for element 0 of k
template <typename T, int kRows, Prefetch kPrefetch>
inline void microkernel(const float* x, int64_t ldx, int64_t begin, int64_t end, const T* panel, const char* next,
                        float* tile) {
  constexpr int kWanted = vectors_at_once(kRows);
  constexpr int kVecs = kWanted < kPanelVecs ? kWanted : kPanelVecs;
  constexpr int kStep = kStepOfK<T>;
  for (int first = 0; first < kPanelVecs; first += kVecs) {
    Vec sum[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) sum[r][j] = zero();
    }
    const T* row = panel + begin * kPanel;
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep, row += kStep * kPanel) {
      if (first == 0) prefetch_step<T, kPrefetch>(row, next, i / kStep);
      Vec w[kVecs];
      if constexpr (is_bf16<T>) {
        Vec second[kVecs];
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) load_bf16_words(row + (first + j) * 2 * kLanes, w[j], second[j]);
        multiply_add(x + i, ldx, w, sum);
        multiply_add(x + i + 1, ldx, second, sum);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) w[j] = load(row + (first + j) * kLanes);
        multiply_add(x + i, ldx, w, sum);
      }
    }
    if constexpr (is_bf16<T>) {
      // the last element of an odd k
      if (i < end) {
        Vec w[kVecs], unused;
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) load_bf16_words(row + (first + j) * 2 * kLanes, w[j], unused);
        multiply_add(x + i, ldx, w, sum);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) {
        float* target = tile + r * kPanel + (first + j) * kLanes;
        store(target, begin == 0 ? sum[r][j] : add(load(target), sum[r][j]));
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

template <Prefetch kPrefetch>
struct Prefetching {
  static constexpr Prefetch value = kPrefetch;
};

// One panel for all rows, in blocks of rows as even as possible: f(Prefetching, first row, rows, next). A single block
// streams the panel from memory; of several, each fetches its share of the next panel while it computes, so that memory
// and arithmetic overlap.
template <typename T, typename F>
inline void for_row_blocks(int64_t m, int64_t steps, const T* panel, F f) {
  const int64_t blocks = (m + kMaxRows - 1) / kMaxRows;
  const int64_t lines = 2 * blocks >= kLinesPerRow<T> && blocks < kLinesPerRow<T> ? 2 : 1;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t left = blocks - block;
    const int rows = static_cast<int>((m - row + left - 1) / left);
    // past the last panel lies nothing of ours, but a prefetch reads nothing either
    const char* next = reinterpret_cast<const char*>(panel + steps * kStepOfK<T> * kPanel) + block * lines * steps * 64;
    if (blocks == 1) {
      f(Prefetching<Prefetch::kStream>{}, row, rows, next);
    } else if (block * lines >= kLinesPerRow<T>) {
      f(Prefetching<Prefetch::kNone>{}, row, rows, next);
    } else if (lines == 1) {
      f(Prefetching<Prefetch::kOneLine>{}, row, rows, next);
    } else {
      f(Prefetching<Prefetch::kTwoLines>{}, row, rows, next);
    }
    row += rows;
  }
}

template <typename T>
inline void gemm_panel(const GemmArgs& args, const T* panel, int64_t column) {
  alignas(64) float tile[kMaxRows * kPanel];
  const int64_t columns = args.weight.n - column < kPanel ? args.weight.n - column : kPanel;
  const int64_t ldx = args.ldx / static_cast<int64_t>(sizeof(float));
  const int64_t k = args.weight.k;
  const int64_t steps = (k + kStepOfK<T> - 1) / kStepOfK<T>;
  for_row_blocks<T>(args.m, steps, panel, [&](auto prefetching, int64_t row, int rows, const char* next) {
    microkernel_rows<T, kMaxRows, decltype(prefetching)::value>(rows, static_cast<const float*>(args.x) + row * ldx,
                                                                ldx, k, panel, next, tile);
    finish_rows(args, tile, row, rows, column, columns);
  });
}

template <typename T>
void gemm_panels(const GemmArgs& args) {
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const char* panel = static_cast<const char*>(args.weight.data) + p * panel_bytes(args.weight);
    gemm_panel(args, reinterpret_cast<const T*>(panel), p * kPanel);
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
