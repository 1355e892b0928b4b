// The matrix multiplication of packed weights, cut into tasks for the threads of a phase.
#pragma once

#include <atomic>

#include "kernels.h"
#include "thread_pool.h"

namespace gpt2rt {

// what meets a weight: exact arithmetic reads float32 rows; the fast one of 16 bits and fewer where there is a kernel
inline RowFormat row_format(const Kernels& k, WeightFormat format, bool fast) {
  if (!fast) return RowFormat::kFloat32;
  if (format == WeightFormat::kInt8 || format == WeightFormat::kInt4) return RowFormat::kInt8;
  if (format == WeightFormat::kBFloat16 && k.gemm_bfloat16 != nullptr) return RowFormat::kBFloat16;
  return RowFormat::kFloat32;
}

inline void gemm(const Kernels& k, const GemmArgs& args) {
  switch (args.weight.rows) {
    case RowFormat::kFloat32:
      return k.gemm_float32(args);
    case RowFormat::kBFloat16:
      return k.gemm_bfloat16(args);
    case RowFormat::kInt8:
      return k.gemm_int8(args);
  }
}

// rows up to which reading the weight from memory takes a good part of the time
constexpr int64_t kFewRows = 32;
// rows of one task: a multiple of every microkernel's rows (4 and 6), and few enough that threads end together
constexpr int64_t kRowChunk = 96;

// Runs the panels of `args` (its panel range is ignored) that fall to this thread; called by every thread of a phase
// with the same arguments and a counter that starts at 0. done(first_row, rows, first_column,
// end_column) is called after each part, by the thread that computed it.
//
// Few rows: each thread walks one contiguous range of panels and can fetch the next while it computes. Many rows:
// panels and chunks of rows are taken from the counter, which evens out threads that were held up.
template <typename Done>
void gemm_part(const Kernels& k, GemmArgs args, int thread, int threads, std::atomic<int64_t>& counter,
               const Done& done) {
  const int64_t panels = num_panels(args.weight.n);
  const auto first_column = [&](int64_t panel) {
    return panel * kPanel < args.weight.n ? panel * kPanel : args.weight.n;
  };
  if (args.m <= kFewRows) {
    const Range range = thread_range(panels, thread, threads);
    args.panel_begin = range.begin;
    args.panel_end = range.end;
    gemm(k, args);
    done(int64_t{0}, args.m, first_column(range.begin), first_column(range.end));
    return;
  }
  const GemmArgs whole = args;
  const int64_t chunks = (whole.m + kRowChunk - 1) / kRowChunk;
  for (int64_t task; (task = counter.fetch_add(1, std::memory_order_relaxed)) < panels * chunks;) {
    const int64_t panel = task / chunks;
    const int64_t row = task % chunks * kRowChunk;
    args.panel_begin = panel;
    args.panel_end = panel + 1;
    args.x = static_cast<const char*>(whole.x) + row * whole.ldx;
    args.y = static_cast<char*>(whole.y) + row * whole.ldy;
    if (whole.residual != nullptr) {
      args.residual = static_cast<const char*>(whole.residual) + row * whole.ld_residual * item_size(whole.y_dtype);
    }
    args.m = whole.m - row < kRowChunk ? whole.m - row : kRowChunk;
    gemm(k, args);
    done(row, args.m, first_column(panel), first_column(panel + 1));
  }
}

}  // namespace gpt2rt
