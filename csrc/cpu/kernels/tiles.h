// The tile registers of AMX: eight matrices of up to 16 rows of 64 bytes, and the products of two that are added to a
// third.
//
// Tiles has two forms: the instructions; and, with GPT2RT_EMULATE_TILES, plain C++ (tiles_emulated.h) with which the
// kernels are tested on any processor.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kNumTiles = 8;

// The operand of LDTILECFG: the shapes of the tiles. Those of a product C += A B must fit: A has the rows of C, B its
// bytes in a row, and B has one row for each 4 bytes of a row of A.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // the last 8 of these and of the rows are reserved
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// what a product multiplies; every 4 bytes of a row of A meet 4 bytes of B, one below the other in k
enum class TileDot {
  kInt8,      // signed bytes of A times unsigned bytes of B, exact in int32
  kBFloat16,  // pairs of bfloat16; float32 sums
};

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA

#if defined(GPT2RT_EMULATE_TILES)
#include "tiles_emulated.h"
#else

namespace gpt2rt::GPT2RT_ISA {
namespace {

// The registers of this thread, configured as long as the object lives; then they are released: a thread that keeps
// them in use pays for 8 KiB at every switch of context. Loading a configuration sets all tiles to zero.
//
// Inline assembly rather than the intrinsics: those of GCC 12 name neither the 64 bytes of the configuration nor the
// rows of a tile as memory that they read, so the optimiser drops or delays the stores that fill them.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  inline void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }

  // rows `stride` bytes apart
  template <int kTile>
  inline void load(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }

  template <int kTile>
  inline void store(void* rows, int64_t stride) const {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }

  template <TileDot kDot, int kC, int kA, int kB>
  inline void dot() {
    if constexpr (kDot == TileDot::kInt8) {
      __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
    } else {
      __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
    }
  }
};

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA

#endif
