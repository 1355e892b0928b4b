// bfloat16 rows and bfloat16 weights, on VDPBF16PS: two products and two additions to float32 for each lane.
//
// Every output is one chain over pairs of k in increasing order from 0, as the instruction rounds it (to nearest even,
// subnormals are zero), for every number of rows and every way of cutting the work. On Zen 4 the instruction starts
// once a cycle, which is twice the multiply-adds of float32.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

inline __m512bh pair_from_memory(const bf16* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
}

template <int kRows, Prefetch kPrefetch>
inline void microkernel_bfloat16(const bf16* x, int64_t ldx, int64_t steps, const bf16* panel, const char* next,
                                 float* tile) {
  __m512 sum[kRows][4];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < steps; ++i, panel += 2 * kPanel) {
    prefetch_step<bf16, kPrefetch>(panel, next, i);
    __m512bh w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + j * 2 * kLanes));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh a = pair_from_memory(x + r * ldx + 2 * i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], a, w[j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_ps(tile + r * kPanel + j * kLanes, sum[r][j]);
  }
}

template <int kRows, Prefetch kPrefetch>
inline void microkernel_bfloat16_rows(int rows, const bf16* x, int64_t ldx, int64_t steps, const bf16* panel,
                                      const char* next, float* tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return microkernel_bfloat16_rows<kRows - 1, kPrefetch>(rows, x, ldx, steps, panel, next, tile);
  }
  microkernel_bfloat16<kRows, kPrefetch>(x, ldx, steps, panel, next, tile);
}

void gemm_bfloat16(const GemmArgs& args) {
  const PackedWeight& w = args.weight;
  const int64_t steps = (w.k + 1) / 2;
  const int64_t ldx = args.ldx / static_cast<int64_t>(sizeof(bf16));
  alignas(64) float tile[kMaxRows * kPanel];
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const bf16* panel = static_cast<const bf16*>(w.data) + p * steps * 2 * kPanel;
    const int64_t column = p * kPanel;
    const int64_t columns = w.n - column < kPanel ? w.n - column : kPanel;
    for_row_blocks<bf16>(args.m, steps, panel, [&](auto prefetching, int64_t row, int rows, const char* next) {
      microkernel_bfloat16_rows<kMaxRows, decltype(prefetching)::value>(
          rows, static_cast<const bf16*>(args.x) + row * ldx, ldx, steps, panel, next, tile);
      finish_rows(args, tile, row, rows, column, columns);
    });
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
