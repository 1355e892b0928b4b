// log_probabilities: of one token of each row, with its rank, and of the k best tokens.
//
//     log p_i = (s_i - m) - log(sum_j exp(s_j - m)),   m = max_j s_j
//
// A row is read once for the maxima of its blocks, which say whether it is fine, and once for the sum. The k-th largest
// maximum is a bound that at least k scores reach, so the best are found among few; only blocks with a larger score
// than the token's are counted for its rank. The definition is log_probabilities_ref in kernels/score_refs.py.
#include <algorithm>
#include <cmath>
#include <functional>
#include <tuple>
#include <vector>

#include "score_rows.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

constexpr int64_t kMaxBest = 128;

struct Candidate {
  float score;
  int32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

// Memory of one row, kept for the next.
struct Scratch {
  std::vector<float> maxima, best_maxima;
  std::vector<Candidate> candidates;
};

// where the results of a row go
struct Results {
  float* chosen;
  int64_t* rank;
  float* best;  // [k]
  int64_t* best_ids;
};

// candidates[..k] = the k best of the row, in order
void find_best(const float* scores, int64_t n, size_t k, Scratch& s) {
  float bound = kExcluded;
  if (k <= s.maxima.size()) {
    s.best_maxima.resize(k);
    std::partial_sort_copy(s.maxima.begin(), s.maxima.end(), s.best_maxima.begin(), s.best_maxima.end(),
                           std::greater<float>());
    bound = s.best_maxima.back();
  }
  s.candidates.clear();
  for (size_t block = 0; block < s.maxima.size(); ++block) {
    if (!(s.maxima[block] >= bound)) continue;
    const int64_t begin = static_cast<int64_t>(block) * kScoreBlock;
    const int64_t end = std::min(n, begin + kScoreBlock);
    for (int64_t i = begin; i < end; ++i) {
      if (scores[i] >= bound) s.candidates.push_back({scores[i], static_cast<int32_t>(i)});
    }
  }
  std::partial_sort(s.candidates.begin(), s.candidates.begin() + static_cast<std::ptrdiff_t>(k), s.candidates.end(),
                    better);
}

void row_log_probabilities(const Kernels& kernel, const float* scores, int64_t n, int64_t token, size_t k, Scratch& s,
                           const Results& out) {
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  *out.chosen = kNone;
  *out.rank = -1;
  s.maxima.resize(static_cast<size_t>(num_score_blocks(n)));
  bool fine = kernel.block_maxima(scores, n, false, s.maxima.data());
  const float maximum = *std::max_element(s.maxima.begin(), s.maxima.end());
  fine = fine && maximum != kExcluded;
  if (!fine) {
    std::fill(out.best, out.best + k, kNone);
    std::fill(out.best_ids, out.best_ids + k, int64_t{-1});
    return;
  }
  const bool known = token >= 0 && token < n;
  if (!known && k == 0) return;
  const double log_sum = std::log(kernel.exp_sum(scores, n, maximum));
  const auto log_probability = [maximum, log_sum](float score) {
    return static_cast<float>((static_cast<double>(score) - static_cast<double>(maximum)) - log_sum);
  };
  if (known) {
    *out.chosen = log_probability(scores[token]);
    *out.rank = 1 + kernel.count_larger(scores, n, s.maxima.data(), scores[token]);
  }
  if (k == 0) return;
  find_best(scores, n, k, s);
  for (size_t place = 0; place < k; ++place) {
    out.best[place] = log_probability(s.candidates[place].score);
    out.best_ids[place] = s.candidates[place].id;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_probabilities(const Tensor& scores, const Tensor& token_ids, int64_t k) {
  const char* op = "log_probabilities";
  check_scores(op, scores);
  const int64_t rows = scores.size(0), n = scores.size(1), stride = scores.stride(0);
  const int64_t* tokens = check_per_row<int64_t>(op, "token_ids", token_ids, ScalarType::Long, rows);
  const int64_t most = std::min(kMaxBest, n);
  GPT2RT_CHECK(k >= 0 && k <= most, op, ": k is ", k, ", expected 0 to ", most);
  Tensor chosen = new_rows(scores, {rows}, ScalarType::Float);
  Tensor ranks = new_rows(scores, {rows}, ScalarType::Long);
  Tensor best = new_rows(scores, {rows, k}, ScalarType::Float);
  Tensor best_ids = new_rows(scores, {rows, k}, ScalarType::Long);
  const Results out{mutable_data<float>(chosen), mutable_data<int64_t>(ranks), mutable_data<float>(best),
                    mutable_data<int64_t>(best_ids)};
  const float* p = data<float>(scores);
  const Kernels& kernel = kernels();
  parallel_rows(rows, 16 * n, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t r = begin; r < end; ++r) {
      row_log_probabilities(kernel, p + r * stride, n, tokens[r], static_cast<size_t>(k), scratch,
                            {out.chosen + r, out.rank + r, out.best + r * k, out.best_ids + r * k});
    }
  });
  return {chosen, ranks, best, best_ids};
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) { m.impl("log_probabilities", TORCH_BOX(&gpt2rt::log_probabilities)); }
