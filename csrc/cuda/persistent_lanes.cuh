// What a warp of the persistent kernel computes with: 16-bit numbers, sums over lanes, the first of the largest.
#pragma once

#include "persistent.h"
#include "ring.cuh"

namespace gpt2rt::cuda {

__host__ __device__ constexpr int consumer_threads(int groups) { return 32 * kTileRows * groups; }

// eight neighbouring 16-bit numbers
template <typename T>
__device__ inline void unpack_eight(const uint4& words, float (&value)[8]) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = T::value(static_cast<uint16_t>(word[i]));
    value[2 * i + 1] = T::value(static_cast<uint16_t>(word[i] >> 16));
  }
}

// over all 32 lanes, the same in each
__device__ inline float lanes_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}
__device__ inline float lanes_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, shuffle_xor(value, distance));
  return value;
}

// The first of the largest of some numbers: no number yet, or one that is not finite, by its place.
struct Best {
  static constexpr int kNone = 0x7fffffff, kNotFinite = -1;
  float value = -INFINITY;
  int at = kNone;

  // what is not finite has the lowest place and the highest value
  __device__ void add(float other, int place) {
    if (place != kNone && !(fabsf(other) < INFINITY)) other = INFINITY, place = kNotFinite;
    if (other > value || (other == value && place < at)) value = other, at = place;
  }
  // over all 32 lanes, the same in each
  __device__ void reduce() {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = shuffle_xor(value, distance);
      add(other, shuffle_xor(at, distance));
    }
  }
};

}  // namespace gpt2rt::cuda
