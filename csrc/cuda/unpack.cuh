// 4-bit codes to pairs of float16 or bfloat16, by bit operations: no conversion instruction, no rounding.
//
// A word holds in its nibble j the code of element 8j + w of a chunk of 64 (kernels/weights.py). Its eight codes become
// four registers of two values; element() says which elements those are, and stage.cuh lays x out to match.
#pragma once

#include "device.cuh"

namespace gpt2rt::cuda {

// which plane (nibble of a word) stands in the low and the high half of register 0 to 3
struct PlanesApart {
  // nibbles four apart, so that one mask takes both: the low halves are in the first 32 elements of the chunk
  static __host__ __device__ int low(int reg) { return reg; }
  static __host__ __device__ int high(int reg) { return reg + 4; }
};
struct PlanesTogether {
  // nibbles of one byte, which looks both up at once: registers 0 and 1 are in the first 32 elements
  static __host__ __device__ int low(int reg) { return 2 * reg; }
  static __host__ __device__ int high(int reg) { return 2 * reg + 1; }
};

// Integers less their zero points. Or-ed into the mantissa of 2^10 (float16) or 2^7 (bfloat16) a code is that number
// plus the code; subtracting is exact (Kim et al., "Who Says Elephants Can't Run", arXiv:2211.10017, section 3).
template <typename T>
struct Integers {
  using Planes = PlanesApart;
  // -(2^10 + zero) and -(2^6 + zero), or -(2^7 + zero) alone, for both halves
  uint32_t minus, minus_high;

  Integers() = default;
  // zero points of the first and of the second 32 elements of the chunk
  __host__ __device__ Integers(int low, int high) {
    if constexpr (std::is_same_v<T, Half>) {
      // integers to 1039 and 79: the bits of 2^10 and 2^6 plus the zero point in units of their last place
      minus = (0xe400u + low) | (0xe400u + high) << 16;
      minus_high = (0xd400u + (low << 4)) | (0xd400u + (high << 4)) << 16;
    } else {
      minus = (0xc300u + low) | (0xc300u + high) << 16;
      minus_high = 0;
    }
  }

  __host__ __device__ void unpack(uint32_t word, uint32_t (&value)[4]) const {
    if constexpr (std::is_same_v<T, Half>) {
      constexpr uint32_t low = 0x000f000f, high = 0x00f000f0, magic = 0x64006400, one = 0x3c003c00;
      // 1/16: codes in the upper nibble count 16
      constexpr uint32_t sixteenth = 0x2c002c00;
      const uint32_t later = word >> 8;
      value[0] = multiply_add<T>(and_or(word, low, magic), one, minus);
      value[1] = multiply_add<T>(and_or(word, high, magic), sixteenth, minus_high);
      value[2] = multiply_add<T>(and_or(later, low, magic), one, minus);
      value[3] = multiply_add<T>(and_or(later, high, magic), sixteenth, minus_high);
    } else {
      constexpr uint32_t low = 0x000f000f, magic = 0x43004300, one = 0x3f803f80;
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) value[reg] = multiply_add<T>(and_or(word >> (4 * reg), low, magic), one, minus);
    }
  }
};

// Codes of a table: pairs by the byte that holds two codes. Each lane has a copy of the 256 pairs in its own bank of
// shared memory, so that 32 lookups are one access whatever the codes are.
template <typename T>
struct Codes {
  using Planes = PlanesTogether;
  static constexpr int pairs = 256, copies = 32;
  // the first entry of this lane
  const uint32_t* table;

  __host__ __device__ void unpack(uint32_t word, uint32_t (&value)[4]) const {
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) value[reg] = table[((word >> (8 * reg)) & 0xff) * copies];
  }

  // the pair of a byte, the lower nibble in the low half; entries of the codebook are rounded to T
  static __host__ __device__ uint32_t entry(const float* codebook, int byte) {
    return pair<T>(codebook[byte & 15], codebook[byte >> 4]);
  }
};

}  // namespace gpt2rt::cuda
