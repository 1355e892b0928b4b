// What log_probabilities.cpp and penalties.cpp do with every score of a row.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// sums of exponentials that are kept beside each other: whole vectors of every instruction set
constexpr int kExpSums = 16;

// Sum of exp(score - maximum). The exponentials are those of the sampling weights; column j goes to sum j modulo 16, in
// float64, and the 16 sums are added in one order, so the bits are the same everywhere. Fused operations, which the
// portable form lacks, would save 6 of 20 us for 50257 scores (Zen 4, AVX-512).
double exp_sum(const float* scores, int64_t n, float maximum) {
  constexpr int kVecs = kExpSums / kLanes;
  Doubles sums[2 * kVecs] = {};
  const auto add_block = [&sums, maximum](const float* block) {
#pragma GCC unroll 16
    for (int j = 0; j < kScoreVecs; ++j) {
      // exp(-87) is about the smallest normal number, and nothing beside the 1 of the maximum
      const Vec x = max(set1(-87.0f), sub(load(block + j * kLanes), set1(maximum)));
      Vec mantissa, exponent;
      weight_parts(x, mantissa, exponent);
      const Vec value = scale_pow2(mantissa, exponent);
      sums[2 * (j % kVecs)] += widen_low(value);
      sums[2 * (j % kVecs) + 1] += widen_high(value);
    }
  };
  int64_t i = 0;
  for (; i + kScoreBlock <= n; i += kScoreBlock) add_block(scores + i);
  if (i < n) {
    float rest[kScoreBlock];
    for (int64_t j = 0; j < kScoreBlock; ++j) rest[j] = i + j < n ? scores[i + j] : -__builtin_inff();
    add_block(rest);
  }
  double columns[kExpSums];
  std::memcpy(columns, sums, sizeof(columns));
  for (int half = kExpSums / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) columns[j] += columns[j + half];
  }
  return columns[0];
}

// how many scores are larger than `bound`; maxima: of their blocks (sampling.h)
int64_t count_larger(const float* scores, int64_t n, const float* maxima, float bound) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kScoreBlock) {
    if (!(maxima[begin / kScoreBlock] > bound)) continue;
    int32_t larger = 0;
    if (begin + kScoreBlock <= n) {
      for (int64_t j = 0; j < kScoreBlock; ++j) larger += scores[begin + j] > bound ? 1 : 0;
    } else {
      for (int64_t i = begin; i < n; ++i) larger += scores[i] > bound ? 1 : 0;
    }
    count += larger;
  }
  return count;
}

// kernels/score_refs.py has the formulas; every operation rounds to float32
inline Vec penalised(Vec score, Ints count, const Penalties& p) {
  const Vec repetition = set1(p.repetition);
  const Vec factored = score < zero() ? mul(score, repetition) : div(score, repetition);
  const Vec repeated = count != 0 ? factored : score;
  const Ints said = count >> 1;
  const Vec less = sub(sub(repeated, mul(to_float(said), set1(p.frequency))), set1(p.presence));
  return said > 0 ? less : repeated;
}

// y = scores after the penalties for what counts holds
void penalties_row(const float* scores, const int32_t* counts, int64_t n, const Penalties& penalties, float* y) {
  // no store to y can change it
  const Penalties p = penalties;
  int64_t i = 0;
  for (; i + kScoreBlock <= n; i += kScoreBlock) {
    int32_t any = 0;
    for (int64_t j = 0; j < kScoreBlock; ++j) any |= counts[i + j];
    // most tokens were never said
    if (any == 0) {
      std::memcpy(y + i, scores + i, kScoreBlock * sizeof(float));
      continue;
    }
    for (int64_t j = i; j < i + kScoreBlock; j += kLanes) {
      store(y + j, penalised(load(scores + j), load_ints(counts + j), p));
    }
  }
  for (; i < n; i += kLanes) {
    const int rest = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    int32_t last[kLanes] = {};
    std::memcpy(last, counts + i, static_cast<size_t>(rest) * sizeof(int32_t));
    store_first(y + i, penalised(load_first(scores + i, rest), load_ints(last), p), rest);
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
