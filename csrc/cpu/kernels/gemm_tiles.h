// bfloat16 and int8 rows on AMX tiles (tiles.h): 2 tiles of rows x 2 tiles of columns at a time, or 1 x 4 where only
// one tile of rows is left. A tile of B is what a panel holds: 4 bytes along k of 16 columns, a row of 64 columns
// after the other.
//
// Rows are cut into tiles as even as possible, so that one configuration serves all of them; the last tile begins
// earlier if it must, and the rows that it repeats are left out. A row's products depend on that row alone.
//
// The numbers of int8 rows are those of gemm_int8.h to the last bit: the integers are exact and the scales are applied
// in the same order. So few rows take its kernel, which streams the panel with less to do for each row. bfloat16 has
// numbers of its own: for each 32 elements of k, as TDPBF16PS rounds, one chain over the even and one over the odd
// elements, whose sum is added to the total; the elements missing to 32 are zeros. Rows of any number go this way.
//
// The bounds below come from counting instructions, not from measurements: the project has had no processor with AMX.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// bytes from a row of a tile of B to the next, in a panel and in the sums
constexpr int64_t kPanelStride = kPanel * 4;
constexpr int64_t kTileBytes = kTileRows * kPanelStride;  // of a panel, for one step of k
constexpr int64_t kSlot = kTileRows * kPanel;             // elements of a tile of rows x 64 columns

// up to this many int8 rows go to gemm_int8
constexpr int64_t kVectorRows = 8;
// tiles of rows whose totals of int8 products are kept at a time: 24 KiB, and a task has no more rows
constexpr int64_t kTotalTiles = 6;
// int4 groups up to this many elements are unpacked into a buffer of 16 KiB; longer ones go to gemm_int8
constexpr int64_t kTileGroup = 256;

// m >= 1 rows as `count` tiles of `rows`
struct RowTiles {
  int64_t m;
  int64_t count;
  int64_t rows;

  explicit RowTiles(int64_t m) : m(m), count((m + kTileRows - 1) / kTileRows), rows((m + count - 1) / count) {}
  int64_t begin(int64_t tile) const { return tile * rows + rows <= m ? tile * rows : m - rows; }
  // rows at its beginning that the tile before has, too
  int64_t repeated(int64_t tile) const { return tile * rows - begin(tile); }
};

// tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 of the panel; width: bytes of k in a step
inline TileConfig tile_config(const RowTiles& rows, int64_t width) {
  TileConfig config;
  for (int t = 0; t < kNumTiles; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 6 ? rows.rows : width / 4);
    config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? width : kTileRowBytes);
  }
  return config;
}

// One or two tiles of rows; b: a panel at the same element of k
struct TileRows {
  const char* a[2];
  int64_t stride;
};

inline void zero_sums(Tiles& tiles) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
}

// the lines of the panel that come kPrefetchBytes after those of this step
inline void prefetch_panel(const char* b, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(b + kPrefetchBytes + i);
}

// the sums of two tiles of rows and 32 columns grow by `steps` steps of `width` bytes of k
template <TileDot kDot>
inline void add_2x2(Tiles& tiles, const TileRows& rows, const char* b, int64_t steps, int64_t width, bool stream) {
  const int64_t step = width / 4 * kPanelStride;
  for (int64_t s = 0; s < steps; ++s, b += step) {
    if (stream) prefetch_panel(b, step);
    tiles.load<4>(rows.a[0] + s * width, rows.stride);
    tiles.load<6>(b, kPanelStride);
    tiles.dot<kDot, 0, 4, 6>();
    tiles.load<7>(b + kTileRowBytes, kPanelStride);
    tiles.dot<kDot, 1, 4, 7>();
    tiles.load<5>(rows.a[1] + s * width, rows.stride);
    tiles.dot<kDot, 2, 5, 6>();
    tiles.dot<kDot, 3, 5, 7>();
  }
}

// of one tile of rows and 64 columns
template <TileDot kDot>
inline void add_1x4(Tiles& tiles, const TileRows& rows, const char* b, int64_t steps, int64_t width, bool stream) {
  const int64_t step = width / 4 * kPanelStride;
  for (int64_t s = 0; s < steps; ++s, b += step) {
    if (stream) prefetch_panel(b, step);
    tiles.load<4>(rows.a[0] + s * width, rows.stride);
    tiles.load<6>(b, kPanelStride);
    tiles.dot<kDot, 0, 4, 6>();
    tiles.load<7>(b + kTileRowBytes, kPanelStride);
    tiles.dot<kDot, 1, 4, 7>();
    tiles.load<6>(b + 2 * kTileRowBytes, kPanelStride);
    tiles.dot<kDot, 2, 4, 6>();
    tiles.load<7>(b + 3 * kTileRowBytes, kPanelStride);
    tiles.dot<kDot, 3, 4, 7>();
  }
}

// sums [2][16][64], 4 bytes each, of one or two tiles of rows: add(column in bytes, add_2x2 or add_1x4) does the steps
template <typename Add>
inline void sum_tiles(Tiles& tiles, int64_t count, void* sums, Add add) {
  char* out = static_cast<char*>(sums);
  if (count == 1) {
    zero_sums(tiles);
    add(0);
    tiles.store<0>(out, kPanelStride);
    tiles.store<1>(out + kTileRowBytes, kPanelStride);
    tiles.store<2>(out + 2 * kTileRowBytes, kPanelStride);
    tiles.store<3>(out + 3 * kTileRowBytes, kPanelStride);
    return;
  }
  for (int64_t column = 0; column < kPanelStride; column += 2 * kTileRowBytes, out += 2 * kTileRowBytes) {
    zero_sums(tiles);
    add(column);
    tiles.store<0>(out, kPanelStride);
    tiles.store<1>(out + kTileRowBytes, kPanelStride);
    tiles.store<2>(out + kTileBytes, kPanelStride);
    tiles.store<3>(out + kTileBytes + kTileRowBytes, kPanelStride);
  }
}

template <TileDot kDot>
inline void add_steps(Tiles& tiles, int64_t count, const TileRows& rows, const char* b, int64_t steps, int64_t width,
                      bool stream) {
  if (count == 1) {
    add_1x4<kDot>(tiles, rows, b, steps, width, stream);
  } else {
    add_2x2<kDot>(tiles, rows, b, steps, width, stream);
  }
}

// ---- bfloat16

// what is left of k after the steps of 64 bytes, with zeros up to one more step
struct TailOfK {
  int64_t offset;  // bytes of a row before it
  int64_t bytes;   // of a row; 0: none
  alignas(64) char rows[2][kTileRows][kTileRowBytes];
  alignas(64) char panel[kTileBytes];

  explicit TailOfK(int64_t row_bytes) : offset(row_bytes / kTileRowBytes * kTileRowBytes), bytes(row_bytes - offset) {}

  void copy_panel(const char* source) {
    const size_t size = static_cast<size_t>(bytes / 4 * kPanelStride);
    std::memcpy(panel, source + offset / 4 * kPanelStride, size);
    std::memset(panel + size, 0, sizeof(panel) - size);
  }

  // the tail of `count` tiles of rows, of which each has `num_rows`
  TileRows copy_rows(const TileRows& source, int64_t count, int64_t num_rows) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t r = 0; r < num_rows; ++r) {
        std::memcpy(rows[t][r], source.a[t] + r * source.stride + offset, static_cast<size_t>(bytes));
        std::memset(rows[t][r] + bytes, 0, static_cast<size_t>(kTileRowBytes - bytes));
      }
    }
    return {{rows[0][0], rows[1][0]}, kTileRowBytes};
  }
};

void gemm_bfloat16_tiles(const GemmArgs& args) {
  if (args.m == 0) return;
  const RowTiles tiling(args.m);
  Tiles tiles(tile_config(tiling, kTileRowBytes));
  const int64_t row_bytes = round_up(args.weight.k, 2) * 2;
  const int64_t steps = row_bytes / kTileRowBytes;
  TailOfK tail(row_bytes);
  alignas(64) float sums[2 * kSlot];
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const char* panel = static_cast<const char*>(args.weight.data) + p * panel_bytes(args.weight);
    const int64_t columns = args.weight.n - p * kPanel < kPanel ? args.weight.n - p * kPanel : kPanel;
    if (tail.bytes > 0) tail.copy_panel(panel);
    for (int64_t t = 0; t < tiling.count; t += 2) {
      const int64_t count = tiling.count - t < 2 ? 1 : 2;
      const char* x = static_cast<const char*>(args.x);
      const TileRows rows{{x + tiling.begin(t) * args.ldx, x + tiling.begin(t + count - 1) * args.ldx}, args.ldx};
      TileRows last{};
      if (tail.bytes > 0) last = tail.copy_rows(rows, count, tiling.rows);
      sum_tiles(tiles, count, sums, [&](int64_t column) {
        const bool stream = t == 0 && column == 0;
        add_steps<TileDot::kBFloat16>(tiles, count, rows, panel + column, steps, kTileRowBytes, stream);
        if (tail.bytes > 0) {
          add_steps<TileDot::kBFloat16>(tiles, count, last, tail.panel + column, 1, kTileRowBytes, false);
        }
      });
      for (int64_t i = 0; i < count; ++i) {
        const int64_t skip = tiling.repeated(t + i);
        finish_rows(args, sums + i * kSlot + skip * kPanel, (t + i) * tiling.rows, static_cast<int>(tiling.rows - skip),
                    p * kPanel, columns);
      }
    }
  }
}

// ---- int8

typedef int32_t TileInts __attribute__((vector_size(kLanes * 4)));

// A group of a weight as bytes [group / 4][64][4], and what its sums need: (sum - zero * sum of the row) * scale
struct ByteGroup {
  const uint8_t* codes;
  float zeros[kPanel];
  float scales[kPanel];  // of int4
};

// one byte a code from two (packed.h)
inline void unpack_pairs(const uint8_t* __restrict__ pairs, int64_t group, uint8_t* __restrict__ bytes) {
  for (int64_t i = 0; i < group / 8; ++i, pairs += kPanelStride, bytes += 2 * kPanelStride) {
    for (int64_t j = 0; j < kPanelStride; ++j) {
      bytes[j] = pairs[j] & 15;
      bytes[kPanelStride + j] = pairs[j] >> 4;
    }
  }
}

inline void unpack_group(const PackedWeight& w, const char* packed, uint8_t* bytes, ByteGroup& group) {
  const Group4 g = group4(w, packed);
  unpack_pairs(g.codes, w.group, bytes);
  group.codes = bytes;
  convert_row(reinterpret_cast<const f16*>(g.half_scales), kPanel, group.scales);
  for (int64_t c = 0; c < kPanel; ++c) group.zeros[c] = w.zeros ? static_cast<float>(g.zeros[c]) : 8.0f;
}

// totals += the group's products for rows first..end of a tile; x: the tile's rows, scales and sums: offsets in a row.
// The integers are below 2^24, so float32 holds them exactly.
template <bool kInt4>
inline void add_products(const ByteGroup& group, const int32_t* sums, const char* x, int64_t ldx, int64_t scales,
                         int64_t code_sums, int64_t first, int64_t end, float* totals) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const Vec zero_point = load(group.zeros + c);
    const Vec column_scale = kInt4 ? load(group.scales + c) : zero();
    for (int64_t r = first; r < end; ++r) {
      TileInts integers;
      std::memcpy(&integers, sums + r * kPanel + c, sizeof(integers));
      int32_t code_sum;
      std::memcpy(&code_sum, x + r * ldx + code_sums, 4);
      float scale;
      std::memcpy(&scale, x + r * ldx + scales, 4);
      const Vec products = fma(set1(-static_cast<float>(code_sum)), zero_point, __builtin_convertvector(integers, Vec));
      float* total = totals + r * kPanel + c;
      store(total, fma(products, kInt4 ? mul(set1(scale), column_scale) : set1(scale), load(total)));
    }
  }
}

// totals [tiles begin..end][16][64] of one panel
template <bool kInt4>
inline void sum_int8_tiles(const GemmArgs& args, Tiles& tiles, const RowTiles& tiling, int64_t begin, int64_t end,
                           const char* panel, float* totals) {
  const PackedWeight& w = args.weight;
  const int64_t size = row_group(w.format, w.group);
  const int64_t width = size % kTileRowBytes == 0 ? kTileRowBytes : kTileRowBytes / 2;
  const int64_t stored = kInt4 ? group_bytes(w.format, w.group, w.zeros) : size * kPanel;
  const Int8Row layout = int8_row(w.k, size);
  alignas(64) int32_t sums[2 * kSlot];
  alignas(64) uint8_t bytes[kInt4 ? kTileGroup * kPanel : 1];
  ByteGroup group;
  for (float& zero_point : group.zeros) zero_point = 128.0f;
  for (int64_t g = 0; g < layout.groups; ++g, panel += stored) {
    if (begin == 0) prefetch_panel(panel, stored);
    if constexpr (kInt4) {
      unpack_group(w, panel, bytes, group);
    } else {
      group.codes = reinterpret_cast<const uint8_t*>(panel);
    }
    for (int64_t t = begin; t < end; t += 2) {
      const int64_t count = end - t < 2 ? 1 : 2;
      const char* x = static_cast<const char*>(args.x);
      const char* const tile_x[2] = {x + tiling.begin(t) * args.ldx, x + tiling.begin(t + count - 1) * args.ldx};
      const TileRows rows{{tile_x[0] + g * size, tile_x[1] + g * size}, args.ldx};
      sum_tiles(tiles, count, sums, [&](int64_t column) {
        const char* b = reinterpret_cast<const char*>(group.codes) + column;
        add_steps<TileDot::kInt8>(tiles, count, rows, b, size / width, width, false);
      });
      for (int64_t i = 0; i < count; ++i) {
        add_products<kInt4>(group, sums + i * kSlot, tile_x[i], args.ldx, layout.scales + 4 * g, layout.sums + 4 * g,
                            tiling.repeated(t + i), tiling.rows, totals + (t - begin + i) * kSlot);
      }
    }
  }
}

void gemm_int8_tiles(const GemmArgs& args) {
  const PackedWeight& w = args.weight;
  const bool int4 = w.format == WeightFormat::kInt4;
  if (args.m <= kVectorRows || (int4 && w.group > kTileGroup)) return gemm_int8(args);
  const RowTiles tiling(args.m);
  const int64_t group = row_group(w.format, w.group);
  Tiles tiles(tile_config(tiling, group % kTileRowBytes == 0 ? kTileRowBytes : kTileRowBytes / 2));
  alignas(64) float totals[kTotalTiles * kSlot];
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const char* panel = static_cast<const char*>(w.data) + p * panel_bytes(w);
    const float* column_scales = reinterpret_cast<const float*>(panel + round_up(w.k, kInt8Group) * kPanel);
    const int64_t columns = w.n - p * kPanel < kPanel ? w.n - p * kPanel : kPanel;
    for (int64_t begin = 0; begin < tiling.count; begin += kTotalTiles) {
      const int64_t end = tiling.count - begin < kTotalTiles ? tiling.count : begin + kTotalTiles;
      std::memset(totals, 0, static_cast<size_t>((end - begin) * kSlot) * sizeof(float));
      if (int4) {
        sum_int8_tiles<true>(args, tiles, tiling, begin, end, panel, totals);
      } else {
        sum_int8_tiles<false>(args, tiles, tiling, begin, end, panel, totals);
      }
      for (int64_t t = begin; t < end; ++t) {
        const int64_t skip = tiling.repeated(t);
        const int rows = static_cast<int>(tiling.rows - skip);
        float* first = totals + (t - begin) * kSlot + skip * kPanel;
        if (!int4) {
          for (int64_t i = 0; i < rows * kPanel; i += kLanes) {
            store(first + i, mul(load(first + i), load(column_scales + i % kPanel)));
          }
        }
        finish_rows(args, first, t * tiling.rows, rows, p * kPanel, columns);
      }
    }
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
