// Whether the kernels on tiles compute what they should: small products against plain loops, and int4 against the
// kernel without tiles. Run once, before the kernels are used: a hypervisor that
// loses the registers or a compiler that reorders their loads must not give wrong numbers in silence.
//
// All values are small integers and all scales powers of two, so every way of summing is exact and equality is asked.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

using Gemm = void (*)(const GemmArgs& args);

// two tiles of rows that overlap, two panels of which one is not full, a rest of k and a number of k that is odd
constexpr int64_t kCheckRows = 19;
constexpr int64_t kCheckColumns = kPanel + 6;
constexpr int64_t kCheckK = 77;
constexpr int64_t kCheckGroup = 32;

struct CheckNumbers {
  uint32_t state = 1;
  // in -range..range
  int next(int range) {
    state = state * 1664525u + 1013904223u;
    return static_cast<int>(state >> 16) % (2 * range + 1) - range;
  }
};

// y is filled with NaN, so that what a kernel leaves out is seen
inline GemmArgs check_args(WeightFormat format, RowFormat rows, const void* x, int64_t ldx, const void* panels,
                           float* y) {
  GemmArgs args{};
  args.x = x;
  args.ldx = ldx;
  args.m = kCheckRows;
  args.weight = {panels, format, kCheckColumns, kCheckK, kCheckGroup, false, nullptr, rows};
  args.panel_end = num_panels(kCheckColumns);
  args.y = y;
  std::memset(y, 0xff, static_cast<size_t>(kCheckRows * kCheckColumns) * sizeof(float));
  args.ldy = kCheckColumns * 4;
  return args;
}

inline bool bfloat16_is_right(Gemm gemm) {
  constexpr int64_t pairs = (kCheckK + 1) / 2;
  alignas(64) static bf16 x[kCheckRows][2 * pairs], panels[2][pairs][kPanel][2];
  static float y[kCheckRows][kCheckColumns];
  CheckNumbers numbers;
  const auto number = [&](int64_t k) {
    const float value = k < kCheckK ? static_cast<float>(numbers.next(9)) : 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bf16{static_cast<uint16_t>(bits >> 16)};
  };
  const auto value = [](bf16 h) { return first(load_first(&h, 1)); };
  for (auto& row : x) {
    for (int64_t k = 0; k < 2 * pairs; ++k) row[k] = number(k);
  }
  for (auto& panel : panels) {
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      for (int64_t c = 0; c < kPanel; ++c) panel[k / 2][c][k % 2] = number(k);
    }
  }
  gemm(check_args(WeightFormat::kBFloat16, RowFormat::kBFloat16, x, sizeof(x[0]), panels, y[0]));
  for (int64_t m = 0; m < kCheckRows; ++m) {
    for (int64_t n = 0; n < kCheckColumns; ++n) {
      float sum = 0.0f;
      for (int64_t k = 0; k < kCheckK; ++k) sum += value(x[m][k]) * value(panels[n / kPanel][k / 2][n % kPanel][k % 2]);
      if (y[m][n] != sum) return false;
    }
  }
  return true;
}

// rows of small codes with scales of 1 and 2
inline void fill_int8_rows(char* x, int64_t ldx, int64_t group) {
  const Int8Row layout = int8_row(kCheckK, group);
  CheckNumbers numbers;
  std::memset(x, 0, static_cast<size_t>(kCheckRows * ldx));
  for (int64_t m = 0; m < kCheckRows; ++m, x += ldx) {
    int8_t* codes = reinterpret_cast<int8_t*>(x);
    for (int64_t k = 0; k < kCheckK; ++k) {
      codes[k] = static_cast<int8_t>(numbers.next(127));
      reinterpret_cast<int32_t*>(x + layout.sums)[k / group] += codes[k];
    }
    for (int64_t g = 0; g < layout.groups; ++g) {
      reinterpret_cast<float*>(x + layout.scales)[g] = static_cast<float>(1 + (m + g) % 2);
    }
  }
}

inline bool int8_is_right(Gemm gemm) {
  constexpr int64_t padded = round_up(kCheckK, kInt8Group);
  constexpr Int8Row layout = int8_row(kCheckK, kInt8Group);
  constexpr int64_t ldx = round_up(layout.bytes, 64);
  struct Panel {
    uint8_t codes[padded / 4][kPanel][4];
    float scales[kPanel];
  };
  alignas(64) static char x[kCheckRows * ldx];
  alignas(64) static Panel panels[2];
  static_assert(sizeof(Panel) == panel_bytes(WeightFormat::kInt8, kCheckK, 0, false));
  static float y[kCheckRows][kCheckColumns];
  fill_int8_rows(x, ldx, kInt8Group);
  CheckNumbers numbers;
  for (Panel& panel : panels) {
    for (int64_t c = 0; c < kPanel; ++c) {
      for (int64_t k = 0; k < padded; ++k) {
        panel.codes[k / 4][c][k % 4] = static_cast<uint8_t>(128 + (k < kCheckK ? numbers.next(127) : 0));
      }
      panel.scales[c] = c % 2 == 0 ? 0.5f : 1.0f;
    }
  }
  gemm(check_args(WeightFormat::kInt8, RowFormat::kInt8, x, ldx, panels, y[0]));
  for (int64_t m = 0; m < kCheckRows; ++m) {
    for (int64_t n = 0; n < kCheckColumns; ++n) {
      const Panel& panel = panels[n / kPanel];
      const char* row = x + m * ldx;
      int32_t sum = 0;
      for (int64_t k = 0; k < kCheckK; ++k) {
        const int product = reinterpret_cast<const int8_t*>(row)[k] * (panel.codes[k / 4][n % kPanel][k % 4] - 128);
        sum += product * static_cast<int>(reinterpret_cast<const float*>(row + layout.scales)[k / kInt8Group]);
      }
      if (y[m][n] != static_cast<float>(sum) * panel.scales[n % kPanel]) return false;
    }
  }
  return true;
}

inline bool int4_is_right(Gemm gemm, Gemm without_tiles) {
  constexpr int64_t ldx = round_up(int8_row(kCheckK, kCheckGroup).bytes, 64);
  constexpr int64_t groups = 2 * round_up(kCheckK, kCheckGroup) / kCheckGroup;
  struct Group {
    uint16_t scales[kPanel];
    uint8_t codes[kCheckGroup / 2][kPanel];
  };
  alignas(64) static char x[kCheckRows * ldx];
  alignas(64) static Group panels[groups];
  static_assert(sizeof(Group) == group_bytes(WeightFormat::kInt4, kCheckGroup, false));
  static float y[kCheckRows][kCheckColumns], expected[kCheckRows][kCheckColumns];
  fill_int8_rows(x, ldx, kCheckGroup);
  CheckNumbers numbers;
  for (Group& group : panels) {
    for (int64_t c = 0; c < kPanel; ++c) {
      // 0.5 and 1
      group.scales[c] = c % 2 == 0 ? 0x3800 : 0x3c00;
      for (auto& row : group.codes) row[c] = static_cast<uint8_t>(numbers.next(127) + 128);
    }
  }
  gemm(check_args(WeightFormat::kInt4, RowFormat::kInt8, x, ldx, panels, y[0]));
  without_tiles(check_args(WeightFormat::kInt4, RowFormat::kInt8, x, ldx, panels, expected[0]));
  return std::memcmp(y, expected, sizeof(y)) == 0;
}

// the kernels are arguments so that a test can pass wrong ones
inline bool tiles_are_right(Gemm gemm_bfloat16, Gemm gemm_int8, Gemm gemm_int8_without_tiles) {
  return bfloat16_is_right(gemm_bfloat16) && int8_is_right(gemm_int8) &&
         int4_is_right(gemm_int8, gemm_int8_without_tiles);
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
