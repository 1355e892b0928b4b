// Tiles in plain C++, after the operation sections of LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBSUD
// and TDPBF16PS in the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. What faults there ends
// the process here, with a message. For tests only (tests/support/emulated_tiles.cpp, tests/support/trapped_tiles.cpp).
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

namespace gpt2rt::GPT2RT_ISA {
namespace {

class Tiles {
 public:
  explicit Tiles(const TileConfig& config) : config_(config) {
    check(!in_use(), "the tiles of this thread are configured twice");
    check(config.palette == 1 && config.start_row == 0, "LDTILECFG: the palette is not 1 or the start row not 0");
    for (const uint8_t byte : config.reserved) check(byte == 0, "LDTILECFG: a reserved byte is not 0");
    for (int t = 0; t < 16; ++t) {
      const int rows = config.rows[t], bytes = config.row_bytes[t];
      check(t < kNumTiles || (rows == 0 && bytes == 0), "LDTILECFG: there are 8 tiles");
      check(rows <= kTileRows && bytes <= kTileRowBytes, "LDTILECFG: a tile has at most 16 rows of 64 bytes");
      check((rows == 0) == (bytes == 0), "LDTILECFG: a tile has rows without bytes or bytes without rows");
    }
    memset(tiles_, 0, sizeof(tiles_));
    in_use() = true;
  }
  ~Tiles() { in_use() = false; }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // whether this thread has tiles
  static bool& in_use() {
    static thread_local bool flag = false;
    return flag;
  }

  template <int kTile>
  void zero() {
    zero(kTile);
  }

  template <int kTile>
  void load(const void* first_row, int64_t stride) {
    load(kTile, first_row, stride);
  }

  template <int kTile>
  void store(void* first_row, int64_t stride) const {
    store(kTile, first_row, stride);
  }

  template <TileDot kDot, int kC, int kA, int kB>
  void dot() {
    dot(kDot, kC, kA, kB);
  }

  void zero(int tile) {
    check(rows(tile) > 0, "TILEZERO: the tile is not configured");
    memset(tiles_[tile], 0, sizeof(tiles_[tile]));
  }

  void load(int tile, const void* first_row, int64_t stride) {
    check(rows(tile) > 0, "TILELOADD: the tile is not configured");
    memset(tiles_[tile], 0, sizeof(tiles_[tile]));
    for (int r = 0; r < rows(tile); ++r) {
      memcpy(tiles_[tile][r], static_cast<const char*>(first_row) + r * stride, row_bytes(tile));
    }
  }

  void store(int tile, void* first_row, int64_t stride) const {
    check(rows(tile) > 0, "TILESTORED: the tile is not configured");
    for (int r = 0; r < rows(tile); ++r) {
      memcpy(static_cast<char*>(first_row) + r * stride, tiles_[tile][r], row_bytes(tile));
    }
  }

  void dot(TileDot kind, int c, int a, int b) {
    check(c != a && c != b && a != b, "a product with the same tile twice");
    check(rows(c) > 0 && rows(a) > 0 && rows(b) > 0, "a product of tiles that are not configured");
    check(rows(c) == rows(a) && row_bytes(c) == row_bytes(b) && row_bytes(a) == 4 * static_cast<size_t>(rows(b)),
          "a product of tiles whose shapes do not fit");
    check(row_bytes(c) % 4 == 0, "a product of tiles whose rows are not of 4-byte elements");
    for (int m = 0; m < rows(c); ++m) {
      if (kind == TileDot::kInt8) {
        add_int8_row(m, tiles_[c], tiles_[a], tiles_[b], row_bytes(c) / 4, row_bytes(a) / 4);
      } else {
        add_bfloat16_row(m, tiles_[c], tiles_[a], tiles_[b], row_bytes(c) / 4, row_bytes(a) / 4);
      }
    }
  }

 private:
  static void check(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
  }

  int rows(int tile) const { return config_.rows[tile]; }
  size_t row_bytes(int tile) const { return config_.row_bytes[tile]; }

  using Tile = uint8_t[kTileRows][kTileRowBytes];

  static void add_int8_row(int m, Tile& c, const Tile& a, const Tile& b, size_t columns, size_t steps) {
    for (size_t n = 0; n < columns; ++n) {
      // the instruction wraps around, as unsigned numbers do
      uint32_t sum;
      memcpy(&sum, c[m] + 4 * n, 4);
      for (size_t k = 0; k < steps; ++k) {
        for (size_t i = 0; i < 4; ++i) {
          sum += static_cast<uint32_t>(static_cast<int8_t>(a[m][4 * k + i]) * b[k][4 * n + i]);
        }
      }
      memcpy(c[m] + 4 * n, &sum, 4);
    }
  }

  // what is subnormal is zero, before and after each operation
  static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

  static float element(const uint8_t* bytes) {
    uint32_t bits = static_cast<uint32_t>(bytes[0]) << 16 | static_cast<uint32_t>(bytes[1]) << 24;
    float x;
    memcpy(&x, &bits, 4);
    return flushed(x);
  }

  // the even and the odd elements of k are two chains of fused multiply-adds from 0; their sum is added to C
  static void add_bfloat16_row(int m, Tile& c, const Tile& a, const Tile& b, size_t columns, size_t steps) {
    for (size_t n = 0; n < columns; ++n) {
      float chain[2] = {0.0f, 0.0f};
      for (size_t k = 0; k < steps; ++k) {
        for (size_t i = 0; i < 2; ++i) {
          const float factor = element(a[m] + 4 * k + 2 * i);
          chain[i] = flushed(fmaf(factor, element(b[k] + 4 * n + 2 * i), chain[i]));
        }
      }
      float sum;
      memcpy(&sum, c[m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(chain[0] + chain[1]));
      memcpy(c[m] + 4 * n, &sum, 4);
    }
  }

  TileConfig config_;
  Tile tiles_[kNumTiles];
};

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
