// Storage types shared by every file of the CPU side. Arithmetic is always float32; these are how numbers lie in
// memory.
//
// The files compiled once per instruction set include this header too, so everything here is a plain type, a constant
// or has internal linkage: an inline function with external linkage could be emitted with AVX-512 code and then be
// picked by the linker for everybody.
#pragma once

#include <cstdint>

namespace gpt2rt {

// the codes are those of the plan (gpt2rt.graph), so they must not change; int8 is a dtype of the KV cache alone
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

struct i8 {
  int8_t bits;
};

// columns of one packed panel: a weight [N, K] is stored as ceil(N / 64) panels [K][64]
constexpr int64_t kPanel = 64;

// tokens of one attention split and of one group inside it, by absolute position; they fix the order of every sum, so
// changing one changes results in the last bits
constexpr int64_t kSplit = 256;
constexpr int64_t kGroup = 16;

// query rows that one attention task takes at most; does not influence results
constexpr int64_t kQueryTile = 64;

constexpr int64_t kMaxHeadDim = 256;

// floats of one row of head_dim inside the attention: whole vectors of every instruction set
static constexpr int64_t attention_row_floats(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

static constexpr int64_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2; }

}  // namespace gpt2rt
