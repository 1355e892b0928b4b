// int8 rows (quantised in groups, prepare.h) and weights of int8 or int4.
//
// The products of a group are summed in int32, which is exact: sum q (code - zero) = sum q code - zero sum q, and the
// row brings sum q. The sum, as float32, is multiplied by the scale of the row's group times the scale of the weight's
// and added to the total in the order of the groups. int8 weights have one scale for all of k, applied last.
//
// A panel is one sequential stream, whatever the number of rows: the groups are the outer loop, the rows the inner one,
// in blocks whose sums stay in registers; the totals stay in L1. Of many rows, each group of int4 is unpacked once to
// bytes.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// rows whose totals are kept at a time: 12 KiB, which leaves room in an L1 of 32 KiB for a group of the weight
constexpr int64_t kIntTileRows = 48;
// rows from which a group of int4 is unpacked once, and the largest such group: 16 KiB of bytes
constexpr int64_t kUnpackRows = 13;
constexpr int64_t kUnpackedGroup = 256;
// bytes that int8 codes are fetched ahead, to L2, for two blocks of rows: on Zen 4 8 rows read 41 GB/s so and 36 GB/s
// with kCodesAhead to L1. Three blocks, and int4, which has more to compute for each byte, are slower for it.
constexpr int64_t kFarAhead = 8192;
// bytes of a panel between one step of four (int4: eight) elements of k and the next
constexpr int64_t kStepBytes = kPanel * 4;

// The int8 rows that meet a group of the weight, and the totals that they add to
struct IntRows {
  const char* x;  // at the first row
  int64_t ldx;
  int64_t codes;   // byte offsets in a row of this group's codes,
  int64_t scales;  // scale and
  int64_t sums;    // sum of codes
  float* totals;   // [rows, 64]
};

inline int32_t load_word(const char* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

inline float load_float(const char* p) {
  float x;
  std::memcpy(&x, p, 4);
  return x;
}

// How the codes of a group lie and what their sums are multiplied by
enum class IntCodes {
  kInt8,       // [steps of 4][64][4] bytes, no scale
  kInt4,       // [steps of 8][64][4] pairs of codes, a scale for each column
  kInt4Zeros,  // and a zero point
  kUnpacked,   // as the two above, unpacked to [steps of 4][64][4] bytes
  kUnpackedZeros,
};

struct IntGroup {
  const uint8_t* codes;
  int64_t steps;
  const uint16_t* scales;
  const uint8_t* zeros;
};

// totals += the group's products for kRows rows; in each step `lines` cache lines of the stream `ahead` are prefetched,
// to L1, or with kFar to L2
template <IntCodes kCodes, bool kFar, int kRows>
[[gnu::noinline]] void add_group(const IntGroup& group, const IntRows& rows, const char* ahead, int lines) {
  constexpr bool kPairs4 = kCodes == IntCodes::kInt4 || kCodes == IntCodes::kInt4Zeros;
  constexpr bool kZeros = kCodes == IntCodes::kInt4Zeros || kCodes == IntCodes::kUnpackedZeros;
  constexpr int32_t kOffset = kCodes == IntCodes::kInt8 ? 128 : kZeros ? 0 : 8;
  // in registers: the compiler must assume that a store of totals could change them
  const int64_t ldx = rows.ldx, steps = group.steps;
  const char* sums = rows.x + rows.sums;
  const char* scales = rows.x + rows.scales;
  float* totals = rows.totals;
  for (int64_t first = 0; first < kPanel; first += kIntVectors * kLanes) {
    Ints sum[kRows][kIntVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Ints start = set1_int(-kOffset * load_word(sums + r * ldx));
#pragma GCC unroll 16
      for (int j = 0; j < kIntVectors; ++j) sum[r][j] = start;
    }
    const uint8_t* codes = group.codes + first * 4;
    const char* q = rows.x + rows.codes;
    for (int64_t s = 0; s < steps; ++s, codes += kStepBytes) {
      if (first == 0) {
        for (int line = 0; line < lines; ++line, ahead += 64) kFar ? prefetch_l2(ahead) : prefetch(ahead);
      }
#pragma GCC unroll 2
      for (int half = 0; half < (kPairs4 ? 2 : 1); ++half, q += 4) {
        Ints w[kIntVectors];
#pragma GCC unroll 16
        for (int j = 0; j < kIntVectors; ++j) {
          w[j] = load_ints(codes + j * kLanes * 4);
          if (kPairs4) w[j] = (half == 0 ? w[j] : shift_right(w[j], 4)) & set1_int(0x0f0f0f0f);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Ints a = set1_int(load_word(q + r * ldx));
#pragma GCC unroll 16
          for (int j = 0; j < kIntVectors; ++j) sum[r][j] = dot4(sum[r][j], w[j], a);
        }
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kIntVectors; ++j) {
      const int64_t column = first + j * kLanes;
      const Vec scale = kCodes == IntCodes::kInt8 ? zero() : load(reinterpret_cast<const f16*>(group.scales) + column);
      const Vec zero_point = kZeros ? load_bytes(group.zeros + column) : zero();
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* total = totals + r * kPanel + column;
        Vec products = to_float(sum[r][j]);
        // integers below 2^24, so this is exact
        if (kZeros) products = fma(set1(-static_cast<float>(load_word(sums + r * ldx))), zero_point, products);
        const Vec row_scale = set1(load_float(scales + r * ldx));
        store(total, fma(products, kCodes == IntCodes::kInt8 ? row_scale : mul(row_scale, scale), load(total)));
      }
    }
  }
}

template <IntCodes kCodes, bool kFar, int kRows>
inline void add_group_rows(int count, const IntGroup& group, const IntRows& rows, const char* ahead, int lines) {
  if constexpr (kRows > 1) {
    if (count < kRows) return add_group_rows<kCodes, kFar, kRows - 1>(count, group, rows, ahead, lines);
  }
  add_group<kCodes, kFar, kRows>(group, rows, ahead, lines);
}

// all rows of a tile, in blocks as even as possible; each block prefetches its share of the stream
template <IntCodes kCodes, bool kFar = false>
inline void add_group_tile(int64_t m, const IntGroup& group, IntRows rows) {
  const int64_t blocks = (m + kIntRows - 1) / kIntRows;
  if constexpr (kCodes == IntCodes::kInt8 && !kFar) {
    if (blocks == 2) return add_group_tile<kCodes, true>(m, group, rows);
  }
  const char* ahead = reinterpret_cast<const char*>(group.codes) + (kFar ? kFarAhead : kCodesAhead);
  constexpr bool kFromMemory = kCodes != IntCodes::kUnpacked && kCodes != IntCodes::kUnpackedZeros;
  // one block is so fast that the processor's own prefetching does better alone: one row of int4 3072 x 768 on Zen 4
  // with 2 MiB pages took 20 us instead of 24 us
  const int lines = !kFromMemory || blocks == 1 ? 0 : blocks == 2 ? 2 : 1;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t left = blocks - block;
    const int count = static_cast<int>((m - row + left - 1) / left);
    add_group_rows<kCodes, kFar, kIntRows>(count, group, rows, ahead, block < 4 ? lines : 0);
    ahead += group.steps * lines * 64;
    row += count;
    rows.x += count * rows.ldx;
    rows.totals += count * kPanel;
  }
}

// one byte a code from two; prefetches the stream itself
inline void unpack_nibbles(const uint8_t* codes, int64_t steps, uint8_t* bytes) {
  const Ints low = set1_int(0x0f0f0f0f);
  for (int64_t s = 0; s < steps; ++s, codes += kStepBytes, bytes += 2 * kStepBytes) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStepBytes; i += kLanes * 4) {
      const Ints pairs = load_ints(codes + i);
      if (i % 64 == 0) prefetch(codes + i + kCodesAhead);
      store_ints(bytes + i, pairs & low);
      store_ints(bytes + kStepBytes + i, shift_right(pairs, 4) & low);
    }
  }
}

// totals [m, 64] of one panel
inline void sum_int8_panel(const PackedWeight& w, const char* panel, IntRows rows, int64_t m) {
  const Int8Row layout = int8_row(w.k, kInt8Group);
  rows.scales = layout.scales;
  rows.sums = layout.sums;
  IntGroup group{reinterpret_cast<const uint8_t*>(panel), kInt8Group / 4, nullptr, nullptr};
  for (int64_t g = 0; g < layout.groups; ++g) {
    add_group_tile<IntCodes::kInt8>(m, group, rows);
    group.codes += kInt8Group * kPanel;
    rows.codes += kInt8Group;
    rows.scales += 4;
    rows.sums += 4;
  }
}

template <bool kZeros>
inline void sum_int4_panel(const PackedWeight& w, const char* panel, IntRows rows, int64_t m) {
  const Int8Row layout = int8_row(w.k, w.group);
  rows.scales = layout.scales;
  rows.sums = layout.sums;
  const bool unpack = m >= kUnpackRows && w.group <= kUnpackedGroup;
  alignas(64) uint8_t bytes[kUnpackedGroup * kPanel];
  for (int64_t g = 0; g < layout.groups; ++g, panel += group_bytes(w.format, w.group, kZeros)) {
    const Group4 packed = group4(w, panel);
    IntGroup group{packed.codes, w.group / 8, packed.half_scales, packed.zeros};
    if (unpack) {
      unpack_nibbles(packed.codes, group.steps, bytes);
      group.codes = bytes;
      group.steps *= 2;
      add_group_tile<kZeros ? IntCodes::kUnpackedZeros : IntCodes::kUnpacked>(m, group, rows);
    } else {
      add_group_tile<kZeros ? IntCodes::kInt4Zeros : IntCodes::kInt4>(m, group, rows);
    }
    rows.codes += w.group;
    rows.scales += 4;
    rows.sums += 4;
  }
}

void gemm_int8(const GemmArgs& args) {
  const PackedWeight& w = args.weight;
  const bool int8 = w.format == WeightFormat::kInt8;
  alignas(64) float tile[kIntTileRows * kPanel];
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const char* panel = static_cast<const char*>(w.data) + p * panel_bytes(w);
    const int64_t columns = w.n - p * kPanel < kPanel ? w.n - p * kPanel : kPanel;
    const float* column_scales = reinterpret_cast<const float*>(panel + round_up(w.k, kInt8Group) * kPanel);
    for (int64_t row = 0; row < args.m; row += kIntTileRows) {
      const int64_t m = args.m - row < kIntTileRows ? args.m - row : kIntTileRows;
      const IntRows rows{static_cast<const char*>(args.x) + row * args.ldx, args.ldx, 0, 0, 0, tile};
      std::memset(tile, 0, static_cast<size_t>(m * kPanel) * sizeof(float));
      if (int8) {
        sum_int8_panel(w, panel, rows, m);
      } else if (w.zeros) {
        sum_int4_panel<true>(w, panel, rows, m);
      } else {
        sum_int4_panel<false>(w, panel, rows, m);
      }
      for (int64_t r = 0; r < m; ++r) {
        float* sums = tile + r * kPanel;
        if (int8) {
          for (int64_t c = 0; c < kPanel; c += kLanes) store(sums + c, mul(load(sums + c), load(column_scales + c)));
        }
      }
      finish_rows(args, tile, row, static_cast<int>(m), p * kPanel, columns);
    }
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
