// What the ops on rows of scores have in common: argmax, sampling, penalties, log_probabilities.
#pragma once

#include <limits>

#include "checks.h"
#include "kernels.h"

namespace gpt2rt {

// with more, sums of sampling weights of up to 2^42 would leave int64
constexpr int64_t kMaxScores = int64_t{1} << 20;
constexpr float kExcluded = -std::numeric_limits<float>::infinity();

inline int64_t num_score_blocks(int64_t n) { return (n + kScoreBlock - 1) / kScoreBlock; }

// [num_rows, vocab_size] float32, rows contiguous
inline void check_score_rows(const char* op, const Tensor& scores) {
  check_dtype(op, "scores", scores, ScalarType::Float);
  check_dim(op, "scores", scores, 2, "[num_rows, vocab_size]");
  check_rows(op, "scores", scores);
}

// the same with 1..kMaxScores tokens in a row
inline void check_scores(const char* op, const Tensor& scores) {
  check_score_rows(op, scores);
  GPT2RT_CHECK(scores.size(1) >= 1 && scores.size(1) <= kMaxScores, op, ": scores has shape ", shape_text(scores),
               ", expected rows of 1 to ", kMaxScores, " tokens");
}

// one value for each row
template <typename T>
const T* check_per_row(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t rows) {
  check_dtype(op, name, t, type);
  check_dim(op, name, t, 1, "[num_rows]");
  check_size(op, name, t, 0, rows, "the number of rows");
  check_contiguous(op, name, t);
  return data<T>(t);
}

// null for a tensor that was not given
template <typename T>
const T* check_per_row(const char* op, const char* name, const std::optional<Tensor>& t, ScalarType type,
                       int64_t rows) {
  return t.has_value() ? check_per_row<T>(op, name, *t, type, rows) : nullptr;
}

inline Tensor new_rows(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

}  // namespace gpt2rt
