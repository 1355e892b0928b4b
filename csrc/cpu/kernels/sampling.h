// What the sampler (sampler.cpp) reads a row of scores with: block maxima, and the weights that tokens are drawn by.
//
// The weight of a score s is exp((s - maximum of its row)) in units of 2^-42, rounded down to an integer: sums of
// weights are exact, so they do not depend on order, threads, instruction set or on which tokens were left out before.
// The exponential is a fixed chain of separate multiplications and additions in float32 (no fused ones, which the
// portable form lacks), so its bits are the same everywhere; kernels/sampling_refs.py (the definition) has the same
// chain in torch.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

constexpr int kScoreVecs = static_cast<int>(kScoreBlock) / kLanes;

// maximum of each block of scores, and whether all of them may be there
bool block_maxima(const float* scores, int64_t n, bool finite, float* maxima) {
  // a bad score leaves a NaN here: infinity minus itself, or NaN minus anything
  Vec bad[4] = {zero(), zero(), zero(), zero()};
  const Vec lowest = set1(finite ? -__builtin_inff() : -3.402823466e38f);
  const auto maximum_of = [&bad, lowest](const float* block) {
    Vec best = set1(-__builtin_inff());
#pragma GCC unroll 16
    for (int j = 0; j < kScoreVecs; ++j) {
      const Vec score = load(block + j * kLanes);
      // in this order a NaN passes the first and is left out by the second
      const Vec allowed = max(lowest, score);
      best = max(score, best);
      bad[j % 4] = add(bad[j % 4], sub(allowed, allowed));
    }
    return reduce_max(best);
  };
  int64_t i = 0;
  for (; i + kScoreBlock <= n; i += kScoreBlock) maxima[i / kScoreBlock] = maximum_of(scores + i);
  if (i < n) {
    float rest[kScoreBlock];
    for (int64_t j = 0; j < kScoreBlock; ++j) rest[j] = i + j < n ? scores[i + j] : scores[i];
    maxima[i / kScoreBlock] = maximum_of(rest);
  }
  const float sum = reduce_add(add(add(bad[0], bad[1]), add(bad[2], bad[3])));
  return sum == sum;
}

// exp(x) for x in [-87, 0] as mantissa * 2^exponent: the chain of exp() in math.h with every step rounded
inline void weight_parts(Vec x, Vec& mantissa, Vec& exponent) {
  const Vec n = round_to_int(mul(x, set1(1.44269504088896341f)));
  Vec r = sub(x, mul(n, set1(0.693359375f)));
  r = add(r, mul(n, set1(2.12194440054690583e-4f)));
  Vec p = set1(1.0f / 5040.0f);
  p = add(mul(p, r), set1(1.0f / 720.0f));
  p = add(mul(p, r), set1(1.0f / 120.0f));
  p = add(mul(p, r), set1(1.0f / 24.0f));
  p = add(mul(p, r), set1(1.0f / 6.0f));
  p = add(mul(p, r), set1(0.5f));
  p = add(mul(p, r), set1(1.0f));
  mantissa = add(mul(p, r), set1(1.0f));
  exponent = n;
}

// weights of the block of kScoreBlock scores at `scores`, after (score - shift) / divisor, against `maximum`
inline void block_of_weights(const float* scores, const Temper& temper, float maximum, int64_t* weights) {
  alignas(64) float mantissas[kScoreBlock];
  alignas(64) float exponents[kScoreBlock];
  for (int j = 0; j < kScoreVecs; ++j) {
    Vec s = load(scores + j * kLanes);
    if (temper.active) s = div(sub(s, set1(temper.shift)), set1(temper.divisor));
    // exp(-40) is less than one unit
    const Vec x = max(set1(-40.0f), sub(s, set1(maximum)));
    Vec mantissa, exponent;
    weight_parts(x, mantissa, exponent);
    store(mantissas + j * kLanes, mul(mantissa, set1(16777216.0f)));
    store(exponents + j * kLanes, exponent);
  }
  for (int64_t j = 0; j < kScoreBlock; ++j) {
    // the mantissa has 24 bits, so it is an integer now
    const uint64_t units = static_cast<uint64_t>(static_cast<int32_t>(mantissas[j])) << 18;
    weights[j] = static_cast<int64_t>(units >> static_cast<uint64_t>(static_cast<int32_t>(-exponents[j])));
  }
}

// calls f(offset, count, weights) for each block
template <typename F>
inline void for_weights(const float* scores, int64_t n, const Temper& temper, float maximum, F f) {
  alignas(64) int64_t weights[kScoreBlock];
  int64_t i = 0;
  for (; i + kScoreBlock <= n; i += kScoreBlock) {
    block_of_weights(scores + i, temper, maximum, weights);
    f(i, kScoreBlock, weights);
  }
  if (i < n) {
    float rest[kScoreBlock];
    for (int64_t j = 0; j < kScoreBlock; ++j) rest[j] = i + j < n ? scores[i + j] : -__builtin_inff();
    block_of_weights(rest, temper, maximum, weights);
    f(i, n - i, weights);
  }
}

void score_weights(const float* scores, int64_t n, const Temper& temper, float maximum, int64_t* out) {
  for_weights(scores, n, temper, maximum, [out](int64_t i, int64_t count, const int64_t* weights) {
    std::memcpy(out + i, weights, static_cast<size_t>(count) * sizeof(int64_t));
  });
}

void block_weight_sums(const float* scores, int64_t n, const Temper& temper, float maximum, int64_t* sums) {
  for_weights(scores, n, temper, maximum, [sums](int64_t i, int64_t, const int64_t* weights) {
    int64_t sum = 0;
    // past the end of the row weights are 0
    for (int64_t j = 0; j < kScoreBlock; ++j) sum += weights[j];
    sums[i / kScoreBlock] = sum;
  });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
