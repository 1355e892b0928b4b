// What log_probabilities.cpp and penalties.cpp do with every score of a row.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// scores whose exponentials are added at once: whole vectors of every instruction set
constexpr int kExpColumns = 16;

// Sum of exp(score - maximum). The exponentials are those of the sampling weights; column j goes to sum j modulo 16, in
// float64, and the 16 sums are added in one order, so the bits are the same everywhere.
double exp_sum(const float* scores, int64_t n, float maximum) {
  constexpr int kVecs = kExpColumns / kLanes;
  Doubles sums[2 * kVecs] = {};
  const auto add_columns = [&sums, maximum](const float* columns) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      // exp(-87) is about the smallest normal number, and nothing beside the 1 of the maximum
      const Vec x = max(set1(-87.0f), sub(load(columns + j * kLanes), set1(maximum)));
      Vec mantissa, exponent;
      weight_parts(x, mantissa, exponent);
      const Vec value = scale_pow2(mantissa, exponent);
      sums[2 * j] += widen_low(value);
      sums[2 * j + 1] += widen_high(value);
    }
  };
  int64_t i = 0;
  for (; i + kExpColumns <= n; i += kExpColumns) add_columns(scores + i);
  if (i < n) {
    float rest[kExpColumns];
    for (int64_t j = 0; j < kExpColumns; ++j) rest[j] = i + j < n ? scores[i + j] : -__builtin_inff();
    add_columns(rest);
  }
  double columns[kExpColumns];
  std::memcpy(columns, sums, sizeof(columns));
  for (int half = kExpColumns / 2; half > 0; half /= 2) {
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

// kernels/score_refs.py has the formulas; every operation rounds to float32. Both arms of the choice are computed, so
// that the loops around this become vectors
inline float penalised(float score, int32_t count, const Penalties& p) {
  const int32_t said = count >> 1;
  const float product = score * p.repetition, quotient = score / p.repetition;
  const float factored = score < 0.0f ? product : quotient;
  const float repeated = count != 0 ? factored : score;
  const float less = repeated - static_cast<float>(said) * p.frequency - p.presence;
  return said > 0 ? less : repeated;
}

// y = scores after the penalties for what counts holds
void penalties_row(const float* scores, const int32_t* counts, int64_t n, const Penalties& p, float* y) {
  int64_t i = 0;
  for (; i + kScoreBlock <= n; i += kScoreBlock) {
    int32_t any = 0;
    for (int64_t j = 0; j < kScoreBlock; ++j) any |= counts[i + j];
    // most tokens were never said
    if (any == 0) {
      std::memcpy(y + i, scores + i, kScoreBlock * sizeof(float));
    } else {
      for (int64_t j = 0; j < kScoreBlock; ++j) y[i + j] = penalised(scores[i + j], counts[i + j], p);
    }
  }
  for (; i < n; ++i) y[i] = penalised(scores[i], counts[i], p);
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
