// Tiles in plain C++, after the operation sections of LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBSUD
// and TDPBF16PS in the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. What faults there ends
// the process here, with a message. For tests only; nothing that is shipped includes this file.
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

  template <int kTile>
  void zero() {
    check(rows(kTile) > 0, "TILEZERO: the tile is not configured");
    memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }

  template <int kTile>
  void load(const void* first_row, int64_t stride) {
    zero<kTile>();
    for (int r = 0; r < rows(kTile); ++r) {
      memcpy(tiles_[kTile][r], static_cast<const char*>(first_row) + r * stride, row_bytes(kTile));
    }
  }

  template <int kTile>
  void store(void* first_row, int64_t stride) const {
    check(rows(kTile) > 0, "TILESTORED: the tile is not configured");
    for (int r = 0; r < rows(kTile); ++r) {
      memcpy(static_cast<char*>(first_row) + r * stride, tiles_[kTile][r], row_bytes(kTile));
    }
  }

  template <TileDot kDot, int kC, int kA, int kB>
  void dot() {
    static_assert(kC != kA && kC != kB && kA != kB, "the instructions fault on equal operands");
    check(rows(kC) > 0 && rows(kA) > 0 && rows(kB) > 0, "a product of tiles that are not configured");
    check(rows(kC) == rows(kA) && row_bytes(kC) == row_bytes(kB) && row_bytes(kA) == 4 * static_cast<size_t>(rows(kB)),
          "a product of tiles whose shapes do not fit");
    check(row_bytes(kC) % 4 == 0, "a product of tiles whose rows are not of 4-byte elements");
    for (int m = 0; m < rows(kC); ++m) {
      if constexpr (kDot == TileDot::kInt8) {
        add_int8_row<kC, kA, kB>(m);
      } else {
        add_bfloat16_row<kC, kA, kB>(m);
      }
    }
  }

 private:
  static void check(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
  }

  static bool& in_use() {
    static thread_local bool flag = false;
    return flag;
  }

  int rows(int tile) const { return config_.rows[tile]; }
  size_t row_bytes(int tile) const { return config_.row_bytes[tile]; }

  template <int kC, int kA, int kB>
  void add_int8_row(int m) {
    for (size_t n = 0; n < row_bytes(kC) / 4; ++n) {
      // the instruction wraps around, as unsigned numbers do
      uint32_t sum;
      memcpy(&sum, tiles_[kC][m] + 4 * n, 4);
      for (size_t k = 0; k < row_bytes(kA) / 4; ++k) {
        for (size_t i = 0; i < 4; ++i) {
          const int a = static_cast<int8_t>(tiles_[kA][m][4 * k + i]), b = tiles_[kB][k][4 * n + i];
          sum += static_cast<uint32_t>(a * b);
        }
      }
      memcpy(tiles_[kC][m] + 4 * n, &sum, 4);
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
  template <int kC, int kA, int kB>
  void add_bfloat16_row(int m) {
    for (size_t n = 0; n < row_bytes(kC) / 4; ++n) {
      float chain[2] = {0.0f, 0.0f};
      for (size_t k = 0; k < row_bytes(kA) / 4; ++k) {
        for (size_t i = 0; i < 2; ++i) {
          const float a = element(tiles_[kA][m] + 4 * k + 2 * i), b = element(tiles_[kB][k] + 4 * n + 2 * i);
          chain[i] = flushed(fmaf(a, b, chain[i]));
        }
      }
      float c;
      memcpy(&c, tiles_[kC][m] + 4 * n, 4);
      c = flushed(flushed(c) + flushed(chain[0] + chain[1]));
      memcpy(tiles_[kC][m] + 4 * n, &c, 4);
    }
  }

  TileConfig config_;
  uint8_t tiles_[kNumTiles][kTileRows][kTileRowBytes];
};

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
