// The best logits of each row without the rest: what the head's threads keep of the panels that they compute.
//
// Every thread walks a range of the vocabulary in order and keeps, for each row, the k best so far, the larger logit
// first and of equal ones the lower id. That order is total, so the k best of all threads' lists are the k best of the
// row, whatever the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "../cpu/checks.h"
#include "../cpu/kernels.h"

namespace gpt2rt {

// a few times what is usual for top_k; lists of more would be slower than a pass over the logits
constexpr int64_t kMaxTop = 512;

// where the best of a step go
struct TopOutput {
  int64_t count;  // of each row, 1 to kMaxTop; 0: none are wanted
  int64_t* ids;   // [num_logits, count], best first; all -1 in a row with a logit that is not finite
  float* logits;  // [num_logits, count]; NaN in such a row
};

// the outputs that were given, checked; a count of 0 where both are left out
TopOutput check_top(const char* op, const std::optional<Tensor>& ids, const std::optional<Tensor>& logits,
                    int64_t num_logits, int64_t vocab_size);

class HeadSelection {
 public:
  // for `rows` rows on up to `threads` threads
  HeadSelection(const Kernels& kernels, const TopOutput& output, int64_t rows, int threads);

  // Logits of `rows` rows, row stride `stride`, for columns begin..end (a whole number of blocks of kScoreBlock, except
  // at the end of the vocabulary); a thread's calls come in order of columns.
  void add(int thread, const float* logits, int64_t stride, int64_t begin, int64_t end);
  // columns of one call of add
  static constexpr int64_t kMaxColumns = 32 * kPanel;

  // writes the output of rows begin..end, when all threads have added theirs
  void finish(int64_t begin, int64_t end, int threads);

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };

  // of one row in one thread
  struct List {
    Candidate* candidates;
    int64_t size;
    float threshold;  // smaller or equal logits that come now are not among the best
    bool finite;
  };

  static bool better(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  }
  List& list(int thread, int64_t row) { return lists_[static_cast<size_t>(thread * rows_ + row)]; }
  void shrink(List& list) const;

  const Kernels& k_;
  TopOutput output_;
  int64_t rows_;
  int64_t capacity_;
  std::vector<Candidate> candidates_;
  std::vector<List> lists_;
};

}  // namespace gpt2rt
