#include "head.h"

#include <algorithm>
#include <limits>

namespace gpt2rt {

TopOutput check_top(const char* op, const std::optional<Tensor>& ids, const std::optional<Tensor>& logits,
                    int64_t num_logits, int64_t vocab_size) {
  GPT2RT_CHECK(ids.has_value() == logits.has_value(), op, ": of top_ids and top_logits only one was given");
  if (!ids.has_value()) return {0, nullptr, nullptr};
  check_dtype(op, "top_ids", *ids, ScalarType::Long);
  check_dtype(op, "top_logits", *logits, ScalarType::Float);
  check_dim(op, "top_ids", *ids, 2, "[num_logits, k]");
  check_dim(op, "top_logits", *logits, 2, "[num_logits, k]");
  check_size(op, "top_ids", *ids, 0, num_logits, "the length of logits_indices");
  check_size(op, "top_logits", *logits, 0, num_logits, "the length of logits_indices");
  check_size(op, "top_logits", *logits, 1, ids->size(1), "the columns of top_ids");
  check_contiguous(op, "top_ids", *ids);
  check_contiguous(op, "top_logits", *logits);
  const int64_t largest = vocab_size < kMaxTop ? vocab_size : kMaxTop;
  GPT2RT_CHECK(ids->size(1) >= 1 && ids->size(1) <= largest, op, ": top_ids has ", ids->size(1),
               " columns, expected 1 to ", largest, ", the vocabulary or ", kMaxTop);
  return {ids->size(1), mutable_data<int64_t>(*ids), mutable_data<float>(*logits)};
}

HeadSelection::HeadSelection(const Kernels& kernels, const TopOutput& output, int64_t rows, int threads)
    : k_(kernels),
      output_(output),
      rows_(rows),
      // room for a block after each cut, and for as many again as are kept, so that cuts are rare
      capacity_(2 * output.count + kScoreBlock) {
  const size_t count = static_cast<size_t>(threads * rows);
  candidates_.resize(count * static_cast<size_t>(capacity_));
  lists_.resize(count);
  for (size_t i = 0; i < count; ++i) {
    lists_[i] = {candidates_.data() + static_cast<int64_t>(i) * capacity_, 0, -std::numeric_limits<float>::infinity(),
                 true};
  }
}

void HeadSelection::shrink(List& list) const {
  if (list.size < output_.count) return;
  Candidate* last = list.candidates + output_.count - 1;
  std::nth_element(list.candidates, last, list.candidates + list.size, better);
  list.size = output_.count;
  // what comes later has a higher id, so an equal logit loses
  list.threshold = last->logit;
}

void HeadSelection::add(int thread, const float* logits, int64_t stride, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  float maxima[kMaxColumns / kScoreBlock];
  for (int64_t row = 0; row < rows_; ++row) {
    List& kept = list(thread, row);
    const float* values = logits + row * stride;
    kept.finite = k_.block_maxima(values, n, true, maxima) && kept.finite;
    for (int64_t i = 0; i < n; i += kScoreBlock) {
      if (!(maxima[i / kScoreBlock] > kept.threshold)) continue;
      const int64_t stop = std::min(n, i + kScoreBlock);
      for (int64_t j = i; j < stop; ++j) {
        kept.candidates[kept.size] = {values[j], static_cast<int32_t>(begin + j)};
        kept.size += values[j] > kept.threshold ? 1 : 0;
      }
      if (kept.size > capacity_ - kScoreBlock) shrink(kept);
    }
  }
}

void HeadSelection::finish(int64_t begin, int64_t end, int threads) {
  std::vector<Candidate> all;
  for (int64_t row = begin; row < end; ++row) {
    all.clear();
    bool finite = true;
    for (int thread = 0; thread < threads; ++thread) {
      const List& part = list(thread, row);
      finite = finite && part.finite;
      all.insert(all.end(), part.candidates, part.candidates + part.size);
    }
    int64_t* ids = output_.ids + row * output_.count;
    float* logits = output_.logits + row * output_.count;
    if (!finite) {
      std::fill(ids, ids + output_.count, int64_t{-1});
      std::fill(logits, logits + output_.count, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    std::partial_sort(all.begin(), all.begin() + output_.count, all.end(), better);
    for (int64_t i = 0; i < output_.count; ++i) {
      ids[i] = all[static_cast<size_t>(i)].id;
      logits[i] = all[static_cast<size_t>(i)].logit;
    }
  }
}

}  // namespace gpt2rt
