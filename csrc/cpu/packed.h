// How weights and the rows that meet them lie in memory: packed panels and prepared rows.
//
// A weight [N, K] is stored as ceil(N / 64) panels of 64 output columns, each one sequential stream:
//   float32, float16  [K][64]
//   bfloat16          [ceil(K / 2)][64][2], pairs of neighbours along K, zero past K
//   int8              [padded K / 4][64][4] unsigned codes (code + 128; 128 past K), then 64 float32 scales
//   int4              for each group of K: 64 float16 scales, 64 zero points (uint8) if there are any, then
//                     [group / 8][64][4] bytes; byte j of a column holds the codes of elements j (low nibble) and j + 4
//                     (high nibble) of the eight
//   code4             the same with 64 float32 scales: 4-bit indices into a codebook of 16 values (NF4, FP4)
// Columns past N and elements past K are zero codes with zero scales, so that they add nothing.
//
// A row that meets them is float32, or prepared once: rounded to bfloat16, or quantised to int8 in groups of K, each
// with its scale and the sum of its codes.
//
// Included by the files compiled once per instruction set: everything here has internal linkage.
#pragma once

#include "types.h"

namespace gpt2rt {

// the codes are those of the plan (gpt2rt.graph), so they must not change; the first three equal DType's
enum class WeightFormat : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4, kCode4 = 5 };
constexpr int kNumWeightFormats = 6;

enum class RowFormat : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// elements of K that share an activation scale where the weight has one scale for all of K
constexpr int64_t kInt8Group = 64;
// bounds of the groups of 4-bit formats
constexpr int64_t kMinGroup = 32;
constexpr int64_t kMaxGroup = 4096;

struct PackedWeight {
  const void* data;  // panels, 64-byte aligned
  WeightFormat format;
  int64_t n;
  int64_t k;
  int64_t group;          // 4-bit formats: elements of K that share a scale, a multiple of 32; else unused
  bool zeros;             // int4: there are zero points (else it is 8)
  const float* codebook;  // code4: 16 values
  RowFormat rows;         // what meets it
};

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

static constexpr int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

static constexpr bool is_4bit(WeightFormat format) {
  return format == WeightFormat::kInt4 || format == WeightFormat::kCode4;
}

// elements of K with the same scales
static constexpr int64_t row_group(WeightFormat format, int64_t group) { return is_4bit(format) ? group : kInt8Group; }

// bytes of the scales and zero points before the codes of one group
static constexpr int64_t group_header_bytes(WeightFormat format, bool zeros) {
  return format == WeightFormat::kCode4 ? kPanel * 4 : kPanel * 2 + (zeros ? kPanel : 0);
}

static constexpr int64_t group_bytes(WeightFormat format, int64_t group, bool zeros) {
  return group_header_bytes(format, zeros) + group / 2 * kPanel;
}

static constexpr int64_t panel_bytes(WeightFormat format, int64_t k, int64_t group, bool zeros) {
  switch (format) {
    case WeightFormat::kFloat32:
      return k * kPanel * 4;
    case WeightFormat::kBFloat16:
      return round_up(k, 2) * kPanel * 2;
    case WeightFormat::kFloat16:
      return k * kPanel * 2;
    case WeightFormat::kInt8:
      return round_up(k, kInt8Group) * kPanel + kPanel * 4;
    default:
      return round_up(k, group) / group * group_bytes(format, group, zeros);
  }
}

static constexpr int64_t panel_bytes(const PackedWeight& w) { return panel_bytes(w.format, w.k, w.group, w.zeros); }

// An int8 row: codes [padded K], zero past K | float32 scales [groups] | int32 sums of the codes of each group
struct Int8Row {
  int64_t groups;
  int64_t scales;  // byte offsets
  int64_t sums;
  int64_t bytes;
};

static constexpr Int8Row int8_row(int64_t k, int64_t group) {
  Int8Row row{};
  const int64_t padded = round_up(k, group);
  row.groups = padded / group;
  row.scales = round_up(padded, 64);
  row.sums = row.scales + row.groups * 4;
  row.bytes = row.sums + row.groups * 4;
  return row;
}

// bytes of a row prepared for this weight
static constexpr int64_t row_bytes(const PackedWeight& w) {
  switch (w.rows) {
    case RowFormat::kBFloat16:
      return round_up(w.k, 2) * 2;
    case RowFormat::kInt8:
      return int8_row(w.k, row_group(w.format, w.group)).bytes;
    default:
      return w.k * 4;
  }
}

}  // namespace gpt2rt
