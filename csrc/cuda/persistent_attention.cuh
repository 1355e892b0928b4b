// The attention phase of the persistent kernel: one query a head over the paged cache, split over the context.
//
// A block takes whole splits of 64 tokens; eight lanes share a token (sixteen where head_dim is above 64), so that all
// keys and values of a split are under way at once.
#pragma once

#include "persistent_lanes.cuh"

namespace gpt2rt::cuda {

// tokens in a split of attention; SPLIT of kernels/merge_splits.py
constexpr int kSplitTokens = 64;

// where head `head` of a token stands in the keys of a layer, or in its values
__device__ inline int64_t in_cache(const PersistentParams& p, int layer, int which, int64_t block, int head,
                                   int offset) {
  return ((((2LL * layer + which) * p.num_blocks + block) * p.n_head + head) * p.block_size + offset) * p.head_dim;
}

__device__ inline int wanted_splits(const PersistentParams& p) {
  return (*p.seq_len + kSplitTokens - 1) / kSplitTokens;
}
__device__ inline int used_splits(const PersistentParams& p) { return min(wanted_splits(p), p.num_splits); }

template <typename T, int groups>
class Attention {
 public:
  // `floats`: attention_floats(groups) of shared memory
  __device__ Attention(const PersistentParams& params, float* floats)
      : p(params),
        scores(floats),
        sums(floats + kSplitTokens),
        thread(threadIdx.x),
        warp(thread / 32),
        lane(thread % 32),
        share(p.head_dim <= 64 ? 8 : 16),
        at_once(kThreads / share) {}

  // bring this block's keys and values to L2 while other blocks still write the new token's
  __device__ void prefetch_cache(int layer) const {
    const int part = thread % share, items = p.n_head * used_splits(p);
    // two lanes: one for the keys, one for the values
    if (part > 1) return;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      for (int at = thread / share; at < kSplitTokens; at += at_once) {
        const int token = item / p.n_head * kSplitTokens + at;
        const int64_t block = token < *p.seq_len ? block_of(token) : -1;
        if (block >= 0) prefetch(p.cache + in_cache(p, layer, part, block, item % p.n_head, token % p.block_size));
      }
    }
  }

  // softmax averages of this block's splits, and the logarithms to base 2 of their sums of weights
  __device__ void run(int layer) {
    const int items = p.n_head * used_splits(p);
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) attend_to(layer, item % p.n_head, item / p.n_head);
  }

 private:
  static constexpr int kThreads = consumer_threads(groups), kWarps = kTileRows * groups;

  const PersistentParams& p;
  // [64], and for each warp the sums of the values [128]
  float* const scores;
  float* const sums;
  const int thread, warp, lane;
  // lanes that share a token, eight dimensions each, and tokens that all threads take at once
  const int share, at_once;

  // the physical block of a token, -1 if there is none
  __device__ int64_t block_of(int token) const {
    const int at = token / p.block_size;
    const int64_t block = at < p.max_blocks ? p.block_table[at] : -1;
    return block < p.num_blocks ? block : -1;
  }

  __device__ void attend_to(int layer, int head, int split) {
    const int part = thread % share;
    const int seq_len = *p.seq_len;
    const bool active = 8 * part < p.head_dim;
    constexpr int kRounds = kSplitTokens * 16 / kThreads;
    float query[8] = {};
    if (active) {
      const float4* from = reinterpret_cast<const float4*>(p.query + head * p.head_dim + 8 * part);
      const float4 low = load_fresh(from), high = load_fresh(from + 1);
      query[0] = low.x, query[1] = low.y, query[2] = low.z, query[3] = low.w;
      query[4] = high.x, query[5] = high.y, query[6] = high.z, query[7] = high.w;
    }
    const float scale = p.scales[layer];
    uint4 keys[kRounds], values[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int at = round * at_once + thread / share, token = split * kSplitTokens + at;
      keys[round] = values[round] = make_uint4(0, 0, 0, 0);
      const int64_t block = at < kSplitTokens && token < seq_len ? block_of(token) : -1;
      if (!active || block < 0) continue;
      const int offset = token % p.block_size;
      keys[round] =
          load_fresh(reinterpret_cast<const uint4*>(p.cache + in_cache(p, layer, 0, block, head, offset)) + part);
      values[round] =
          load_fresh(reinterpret_cast<const uint4*>(p.cache + in_cache(p, layer, 1, block, head, offset)) + part);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int at = round * at_once + thread / share, token = split * kSplitTokens + at;
      float key[8], score = 0.0f;
      unpack_eight<T>(keys[round], key);
#pragma unroll
      for (int i = 0; i < 8; ++i) score = fmaf(query[i], key[i], score);
      for (int distance = share / 2; distance > 0; distance /= 2) score += shuffle_xor(score, distance);
      // a key that should be there and is not poisons the row
      score = token < seq_len ? (block_of(token) < 0 ? NAN : score * scale) : -INFINITY;
      if (part == 0 && at < kSplitTokens) scores[at] = score;
    }
    consumers_meet<kThreads>();
    // every warp the same: the highest score and the sum of weights
    const float first = scores[lane], second = scores[lane + 32];
    const float highest = lanes_max(fmaxf(first, second));
    const float weight_sum = lanes_sum(exp2f(first - highest) + exp2f(second - highest));
    float total[8] = {};
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int at = round * at_once + thread / share;
      if (at >= kSplitTokens) continue;
      float value[8];
      unpack_eight<T>(values[round], value);
      const float weight = exp2f(scores[at] - highest);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] = fmaf(weight, value[i], total[i]);
    }
    // over the tokens of this warp
    for (int distance = share; distance < 32; distance *= 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += shuffle_xor(total[i], distance);
    }
    if (lane < share) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[warp * kMaxHeadDim + 8 * part + i] = total[i];
    }
    consumers_meet<kThreads>();
    const int64_t at = static_cast<int64_t>(head) * p.num_splits + split;
    if (thread < p.head_dim) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += sums[i * kMaxHeadDim + thread];
      p.values[at * p.head_dim + thread] = sum / weight_sum;
    }
    if (thread == 0) p.lse[at] = highest + log2f(weight_sum);
    // the scores and sums may be written again
    consumers_meet<kThreads>();
  }
};

}  // namespace gpt2rt::cuda
