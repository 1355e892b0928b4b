// argmax, sampling_weights and sample: the next token of each row of scores.
//
// A row is read once for the maxima of its blocks. They bound what top_k or min_p can keep, so that only blocks with a
// chance are looked into again; the few tokens found there are tempered and sorted out exactly. What is drawn is
// defined in kernels/sampling_refs.py: sums are of integers, so any way to gather them gives the same token.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "score_rows.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

constexpr double kUnit = 4398046511104.0;  // 2^42
// a score this far below the largest weighs nothing: exp(-30) is less than 2^-42
constexpr float kReach = 30.0f;
// lists up to this length are sorted as they are
constexpr size_t kShortList = 256;

struct Settings {
  double temperature;
  int64_t top_k;
  double top_p;
  double min_p;
};

// The tokens of a row that can still be drawn, in the order of their columns.
struct Survivors {
  size_t count;
  std::vector<int32_t> columns;
  std::vector<float> scores;  // tempered
  std::vector<int64_t> weights;

  // room for n; what is there is lost
  void reserve(size_t n) {
    count = 0;
    if (n <= columns.size()) return;
    columns.resize(n);
    scores.resize(n);
    weights.resize(n);
  }
};

struct Ranked {
  float score;
  int64_t measure;
};

// Memory of one row, kept for the next.
struct Scratch {
  std::vector<float> maxima, sorted_maxima;
  std::vector<int64_t> block_sums, bins;
  std::vector<int32_t> bin_of;
  std::vector<Ranked> ranked;
  Survivors survivors;
};

Temper temper_of(double temperature, float maximum) {
  // a plain quotient could overflow; only differences to the largest score matter. Below the smallest normal float32
  // the divisor itself would vanish
  if (temperature < 1e-4) return {true, maximum, static_cast<float>(std::max(temperature, 1e-37))};
  return {temperature != 1.0, 0.0f, static_cast<float>(temperature)};
}

float tempered(const Temper& temper, float score) {
  return temper.active ? (score - temper.shift) / temper.divisor : score;
}

// How far below a score another can lie that is equal to it after the temperature: some units in the last place of
// whatever was subtracted, and of quotients among the subnormals.
double slack(const Temper& temper, float score) {
  return (std::fabs(score) + std::fabs(temper.shift)) * 0x1p-22 + temper.divisor * 0x1p-148;
}

int64_t first_maximum(const float* scores, int64_t n, const std::vector<float>& maxima, float maximum) {
  const int64_t block = std::find(maxima.begin(), maxima.end(), maximum) - maxima.begin();
  const int64_t end = std::min(n, (block + 1) * kScoreBlock);
  return std::find(scores + block * kScoreBlock, scores + end, maximum) - scores;
}

// a number that at least `count` scores of the row reach; -infinity if the maxima are too few to say
float bound_of_largest(Scratch& s, int64_t count) {
  if (count > static_cast<int64_t>(s.maxima.size())) return kExcluded;
  s.sorted_maxima = s.maxima;
  const auto place = s.sorted_maxima.begin() + (count - 1);
  std::nth_element(s.sorted_maxima.begin(), place, s.sorted_maxima.end(), std::greater<float>());
  return *place;
}

// survivors = the columns with scores from `bound` on
void gather(const float* scores, int64_t n, const Temper& temper, double bound, Scratch& s) {
  // toward -infinity, so that nothing is lost
  float lowest = static_cast<float>(std::max(bound, double{std::numeric_limits<float>::lowest()}));
  if (lowest > bound) lowest = std::nextafterf(lowest, kExcluded);
  Survivors& kept = s.survivors;
  size_t room = 0;
  for (const float maximum : s.maxima) room += maximum >= lowest ? kScoreBlock : 0;
  kept.reserve(room);
  size_t found = 0;
  for (size_t block = 0; block < s.maxima.size(); ++block) {
    if (!(s.maxima[block] >= lowest)) continue;
    const int64_t begin = static_cast<int64_t>(block) * kScoreBlock;
    const int64_t end = std::min(n, begin + kScoreBlock);
    for (int64_t i = begin; i < end; ++i) {
      kept.columns[found] = static_cast<int32_t>(i);
      kept.scores[found] = scores[i];
      found += scores[i] >= lowest ? 1 : 0;
    }
  }
  kept.count = found;
  if (temper.active) {
    for (size_t i = 0; i < found; ++i) kept.scores[i] = (kept.scores[i] - temper.shift) / temper.divisor;
  }
}

template <typename Keep>
void filter(Survivors& s, Keep keep) {
  size_t found = 0;
  for (size_t i = 0; i < s.count; ++i) {
    const bool kept = keep(i);
    s.columns[found] = s.columns[i];
    s.scores[found] = s.scores[i];
    s.weights[found] = s.weights[i];
    found += kept ? 1 : 0;
  }
  s.count = found;
}

// Of `ranked`, in falling order of scores, the last whose predecessors (and `before`) sum to less than `target`; at
// least the first.
float last_of_sorted(std::vector<Ranked>& ranked, int64_t before, double target) {
  std::sort(ranked.begin(), ranked.end(), [](const Ranked& a, const Ranked& b) { return a.score > b.score; });
  size_t last = 0;
  for (; last + 1 < ranked.size(); ++last) {
    before += ranked[last].measure;
    if (!(static_cast<double>(before) < target)) break;
  }
  return ranked[last].score;
}

// The score of the last survivor that stays when those with larger ones sum to less than `target`: in weights, or in
// numbers of tokens. -infinity: all that weigh anything stay. Long lists are first counted into bins of 1/64.
float last_kept(Scratch& s, float maximum, double target, bool by_weight) {
  constexpr float kBinsPerUnit = 64.0f;
  constexpr int32_t kBins = static_cast<int32_t>(kReach * kBinsPerUnit);
  const Survivors& kept = s.survivors;
  const size_t n = kept.count;
  const auto measure = [&](size_t i) { return by_weight ? kept.weights[i] : int64_t{1}; };
  s.ranked.clear();
  if (n <= kShortList) {
    for (size_t i = 0; i < n; ++i) s.ranked.push_back({kept.scores[i], measure(i)});
    return last_of_sorted(s.ranked, 0, target);
  }
  if (s.bin_of.size() < n) s.bin_of.resize(n);
  for (size_t i = 0; i < n; ++i) {
    s.bin_of[i] = static_cast<int32_t>(std::min((maximum - kept.scores[i]) * kBinsPerUnit, float{kBins}));
  }
  s.bins.assign(kBins + 1, 0);
  for (size_t i = 0; i < n; ++i) s.bins[static_cast<size_t>(s.bin_of[i])] += measure(i);
  int64_t before = 0;
  int32_t bin = 0;
  for (; bin < kBins; ++bin) {
    const int64_t with = before + s.bins[static_cast<size_t>(bin)];
    if (!(static_cast<double>(with) < target)) break;
    before = with;
  }
  if (bin == kBins) return kExcluded;
  for (size_t i = 0; i < n; ++i) {
    if (s.bin_of[i] == bin) s.ranked.push_back({kept.scores[i], measure(i)});
  }
  return last_of_sorted(s.ranked, before, target);
}

// what of the total a uniform number points at; the first token whose cumulative weight exceeds it is drawn
int64_t target_of(double uniform, int64_t total) {
  const int64_t target = static_cast<int64_t>(uniform * static_cast<double>(total));
  // the product can round up to the total, which no sum exceeds
  return std::min(target, total - 1);
}

// the column drawn from all tokens of a row
int64_t draw_any(const Kernels& k, const float* scores, int64_t n, const Temper& temper, float maximum, double uniform,
                 Scratch& s) {
  k.block_weight_sums(scores, n, temper, maximum, s.block_sums.data());
  int64_t total = 0;
  for (const int64_t sum : s.block_sums) total += sum;
  int64_t target = target_of(uniform, total);
  int64_t block = 0;
  while (target >= s.block_sums[static_cast<size_t>(block)]) target -= s.block_sums[static_cast<size_t>(block++)];
  int64_t weights[kScoreBlock];
  const int64_t begin = block * kScoreBlock;
  k.score_weights(scores + begin, std::min(kScoreBlock, n - begin), temper, maximum, weights);
  int64_t place = 0;
  while (target >= weights[place]) target -= weights[place++];
  return begin + place;
}

// of the survivors with scores from `least` on
int64_t total_weight(const Survivors& s, float least = kExcluded) {
  int64_t total = 0;
  for (size_t i = 0; i < s.count; ++i) total += s.scores[i] >= least ? s.weights[i] : 0;
  return total;
}

// the weights of the survivors, which are tempered already
void weigh(const Kernels& k, float maximum, Survivors& s) {
  k.score_weights(s.scores.data(), static_cast<int64_t>(s.count), {false, 0.0f, 1.0f}, maximum, s.weights.data());
}

// The likeliest tokens that may reach top_p without top_k, found without looking at all; returns the weight of all.
int64_t gather_top_p(const Kernels& k, const float* scores, int64_t n, const Temper& temper, float maximum,
                     double top_p, double reach, Scratch& s) {
  k.block_weight_sums(scores, n, temper, maximum, s.block_sums.data());
  int64_t total = 0;
  for (const int64_t sum : s.block_sums) total += sum;
  for (int64_t count = 32;; count *= 8) {
    const float bound = bound_of_largest(s, count);
    const bool all = bound == kExcluded;
    gather(scores, n, temper, all ? reach : std::max(reach, bound - slack(temper, bound)), s);
    weigh(k, maximum, s.survivors);
    // no token that was left out reaches the bound, or equals one that does
    const int64_t reached = all ? total : total_weight(s.survivors, tempered(temper, bound));
    if (!(static_cast<double>(reached) < top_p * static_cast<double>(total))) return total;
  }
}

// The column that a row's number draws; -1 if the row holds what it may not.
int64_t sample_row(const Kernels& k, const float* scores, int64_t n, const Settings& set, double uniform, bool finite,
                   const int64_t* token_ids, bool partial, Scratch& s) {
  s.maxima.resize(static_cast<size_t>(num_score_blocks(n)));
  s.block_sums.resize(s.maxima.size());
  if (!k.block_maxima(scores, n, finite, s.maxima.data())) return -1;
  const float largest = *std::max_element(s.maxima.begin(), s.maxima.end());
  if (largest == kExcluded) return -1;
  const Temper temper = temper_of(set.temperature, largest);
  const float maximum = tempered(temper, largest);
  if (!std::isfinite(maximum)) return -1;

  const bool has_k = set.top_k > 0 && set.top_k < n;
  // only top_k can say that the rest of a longer row does not matter
  if (partial && !has_k) return -1;
  const bool has_p = set.top_p < 1.0;
  if (!has_k && !has_p && set.min_p == 0.0 && token_ids == nullptr) {
    return draw_any(k, scores, n, temper, maximum, uniform, s);
  }
  // tokens with smaller scores weigh nothing
  const double reach = largest - (double{kReach} * temper.divisor) * (1.0 + 0x1p-20) - 2.0 * slack(temper, largest);
  Survivors& kept = s.survivors;
  int64_t total = 0;
  if (has_k) {
    const float bound = bound_of_largest(s, set.top_k);
    gather(scores, n, temper, bound == kExcluded ? reach : std::max(reach, bound - slack(temper, bound)), s);
    if (static_cast<int64_t>(kept.count) > set.top_k) {
      const float last = last_kept(s, maximum, static_cast<double>(set.top_k), false);
      filter(kept, [&](size_t i) { return kept.scores[i] >= last; });
    }
    weigh(k, maximum, kept);
    const size_t end = kept.count - 1;
    if (partial && kept.columns[end] == n - 1 && kept.weights[end] > 0) return -1;
    total = total_weight(kept);
  } else if (has_p) {
    total = gather_top_p(k, scores, n, temper, maximum, set.top_p, reach, s);
  } else {
    // a weight's error is some units in the last place
    const double least = set.min_p > 0.0 ? std::log(set.min_p) - 1e-5 : -double{kReach};
    gather(scores, n, temper, std::max(reach, largest + least * temper.divisor - 2.0 * slack(temper, largest)), s);
    weigh(k, maximum, kept);
  }
  if (has_p) {
    const float last = last_kept(s, maximum, set.top_p * static_cast<double>(total), true);
    filter(kept, [&](size_t i) { return kept.scores[i] >= last; });
  }
  if (set.min_p > 0.0) {
    const double least = set.min_p * kUnit;
    filter(kept, [&](size_t i) { return !(static_cast<double>(kept.weights[i]) < least); });
  }
  int64_t target = target_of(uniform, total_weight(kept));
  if (token_ids == nullptr) {
    size_t place = 0;
    while (target >= kept.weights[place]) target -= kept.weights[place++];
    return kept.columns[place];
  }
  // draws go through the vocabulary in its own order
  std::vector<size_t> order(kept.count);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return token_ids[kept.columns[a]] < token_ids[kept.columns[b]]; });
  size_t place = 0;
  while (target >= kept.weights[order[place]]) target -= kept.weights[order[place++]];
  return kept.columns[order[place]];
}

// ---- the ops

Tensor argmax(const Tensor& scores, bool finite) {
  check_scores("argmax", scores);
  const int64_t rows = scores.size(0), n = scores.size(1), stride = scores.stride(0);
  Tensor ids = new_rows(scores, {rows}, ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(ids);
  const float* p = data<float>(scores);
  const Kernels& k = kernels();
  parallel_rows(rows, n, [&](int64_t begin, int64_t end) {
    std::vector<float> maxima(static_cast<size_t>(num_score_blocks(n)));
    for (int64_t r = begin; r < end; ++r) {
      const bool fine = k.block_maxima(p + r * stride, n, finite, maxima.data());
      const float maximum = *std::max_element(maxima.begin(), maxima.end());
      out[r] = fine && maximum != kExcluded ? first_maximum(p + r * stride, n, maxima, maximum) : -1;
    }
  });
  return ids;
}

Tensor sampling_weights(const Tensor& scores) {
  check_scores("sampling_weights", scores);
  const int64_t rows = scores.size(0), n = scores.size(1), stride = scores.stride(0);
  Tensor weights = new_rows(scores, {rows, n}, ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(weights);
  const float* p = data<float>(scores);
  const Kernels& k = kernels();
  parallel_rows(rows, 16 * n, [&](int64_t begin, int64_t end) {
    std::vector<float> maxima(static_cast<size_t>(num_score_blocks(n)));
    for (int64_t r = begin; r < end; ++r) {
      const bool fine = k.block_maxima(p + r * stride, n, false, maxima.data());
      const float maximum = *std::max_element(maxima.begin(), maxima.end());
      if (fine && maximum != kExcluded) {
        k.score_weights(p + r * stride, n, {false, 0.0f, 1.0f}, maximum, out + r * n);
      } else {
        std::fill(out + r * n, out + (r + 1) * n, int64_t{0});
      }
    }
  });
  return weights;
}

void check_range(const char* name, const double* values, int64_t rows, const char* expected, bool (*fine)(double)) {
  if (values == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    GPT2RT_CHECK(fine(values[r]), "sample: ", name, "[", r, "] is ", values[r], ", expected ", expected);
  }
}

Tensor sample(const Tensor& scores, const Tensor& uniforms, const std::optional<Tensor>& temperature,
              const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
              const std::optional<Tensor>& min_p, const std::optional<Tensor>& token_ids, bool partial, bool finite) {
  const char* op = "sample";
  check_scores(op, scores);
  const int64_t rows = scores.size(0), n = scores.size(1), stride = scores.stride(0);
  const double* numbers = check_per_row<double>(op, "uniforms", uniforms, ScalarType::Double, rows);
  const double* temperatures = check_per_row<double>(op, "temperature", temperature, ScalarType::Double, rows);
  const int64_t* ks = check_per_row<int64_t>(op, "top_k", top_k, ScalarType::Long, rows);
  const double* top_ps = check_per_row<double>(op, "top_p", top_p, ScalarType::Double, rows);
  const double* min_ps = check_per_row<double>(op, "min_p", min_p, ScalarType::Double, rows);
  check_range("uniforms", numbers, rows, "a number from 0 to below 1", [](double v) { return v >= 0.0 && v < 1.0; });
  check_range("temperature", temperatures, rows, "a number above 0 that float32 can hold",
              [](double v) { return v > 0.0 && v <= std::numeric_limits<float>::max(); });
  const auto is_share = [](double v) { return v >= 0.0 && v <= 1.0; };
  check_range("top_p", top_ps, rows, "a number from 0 to 1; 1 keeps all tokens", is_share);
  check_range("min_p", min_ps, rows, "a number from 0 to 1; 0 keeps all tokens", is_share);
  const int64_t* ids = nullptr;
  if (token_ids.has_value()) {
    check_dtype(op, "token_ids", *token_ids, ScalarType::Long);
    check_dim(op, "token_ids", *token_ids, 2, "the shape of scores");
    check_size(op, "token_ids", *token_ids, 0, rows, "the rows of scores");
    check_size(op, "token_ids", *token_ids, 1, n, "the columns of scores");
    check_contiguous(op, "token_ids", *token_ids);
    ids = data<int64_t>(*token_ids);
  }
  Tensor chosen = new_rows(scores, {rows}, ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(chosen);
  const float* p = data<float>(scores);
  const Kernels& k = kernels();
  parallel_rows(rows, 16 * n, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t r = begin; r < end; ++r) {
      const Settings set{temperatures == nullptr ? 1.0 : temperatures[r], ks == nullptr ? 0 : ks[r],
                         top_ps == nullptr ? 1.0 : top_ps[r], min_ps == nullptr ? 0.0 : min_ps[r]};
      const int64_t* row_ids = ids == nullptr ? nullptr : ids + r * n;
      const int64_t column = sample_row(k, p + r * stride, n, set, numbers[r], finite, row_ids, partial, scratch);
      out[r] = column < 0 || row_ids == nullptr ? column : row_ids[column];
    }
  });
  return chosen;
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("argmax", TORCH_BOX(&gpt2rt::argmax));
  m.impl("sampling_weights", TORCH_BOX(&gpt2rt::sampling_weights));
  m.impl("sample", TORCH_BOX(&gpt2rt::sample));
}
