// penalties for what a sequence has said, and the counts that they read.
//
// counts [num_slots, vocab_size] holds twice the number of times that a token stands in the output, plus 1 if it stands
// in the prompt. The definitions are in kernels/score_refs.py; all results are equal to the bit.
#include <algorithm>
#include <cstring>

#include "score_rows.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

void check_counts(const char* op, const Tensor& counts) {
  check_dtype(op, "counts", counts, ScalarType::Int);
  check_dim(op, "counts", counts, 2, "[num_slots, vocab_size]");
  check_contiguous(op, "counts", counts);
}

// a negative slot stands for none
const int64_t* check_slots(const char* op, const Tensor& slots, int64_t rows, const Tensor& counts) {
  const int64_t* p = check_per_row<int64_t>(op, "slots", slots, ScalarType::Long, rows);
  const int64_t num_slots = counts.size(0);
  for (int64_t r = 0; r < rows; ++r) {
    GPT2RT_CHECK_INDEX(p[r] < num_slots, op, ": slots[", r, "] is ", p[r], ", but counts has ", num_slots,
                       " slots; expected 0 to ", num_slots - 1, ", or -1 for none");
  }
  return p;
}

Tensor penalties(const Tensor& scores, const Tensor& counts, const Tensor& slots,
                 const std::optional<Tensor>& repetition, const std::optional<Tensor>& frequency,
                 const std::optional<Tensor>& presence) {
  const char* op = "penalties";
  check_score_rows(op, scores);
  check_counts(op, counts);
  const int64_t rows = scores.size(0), n = scores.size(1), stride = scores.stride(0);
  check_size(op, "counts", counts, 1, n, "the tokens of scores");
  const int64_t* slot_of = check_slots(op, slots, rows, counts);
  const double* repetitions = check_per_row<double>(op, "repetition", repetition, ScalarType::Double, rows);
  const double* frequencies = check_per_row<double>(op, "frequency", frequency, ScalarType::Double, rows);
  const double* presences = check_per_row<double>(op, "presence", presence, ScalarType::Double, rows);
  Tensor y = new_rows(scores, {rows, n}, ScalarType::Float);
  float* out = mutable_data<float>(y);
  const float* p = data<float>(scores);
  const int32_t* c = data<int32_t>(counts);
  const Kernels& k = kernels();
  parallel_rows(rows, 4 * n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (slot_of[r] < 0) {
        std::copy(p + r * stride, p + r * stride + n, out + r * n);
        continue;
      }
      // what is off has the value that changes nothing, to the bit
      const Penalties row{repetitions == nullptr ? 1.0f : static_cast<float>(repetitions[r]),
                          frequencies == nullptr ? 0.0f : static_cast<float>(frequencies[r]),
                          presences == nullptr ? 0.0f : static_cast<float>(presences[r])};
      k.penalties_row(p + r * stride, c + slot_of[r] * n, n, row, out + r * n);
    }
  });
  return y;
}

void count_tokens(Tensor counts, const Tensor& slots, const Tensor& token_ids) {
  const char* op = "count_tokens";
  check_counts(op, counts);
  check_dim(op, "slots", slots, 1, "[num_rows]");
  const int64_t rows = slots.size(0), n = counts.size(1);
  const int64_t* slot_of = check_slots(op, slots, rows, counts);
  const int64_t* tokens = check_per_row<int64_t>(op, "token_ids", token_ids, ScalarType::Long, rows);
  int32_t* c = mutable_data<int32_t>(counts);
  for (int64_t r = 0; r < rows; ++r) {
    if (slot_of[r] >= 0 && tokens[r] >= 0 && tokens[r] < n) c[slot_of[r] * n + tokens[r]] += 2;
  }
}

// max_len is for devices that cannot look into starts
void reset_counts(Tensor counts, const Tensor& slots, const Tensor& token_ids, const Tensor& starts,
                  const Tensor& prompt_lens, int64_t) {
  const char* op = "reset_counts";
  check_counts(op, counts);
  check_dim(op, "slots", slots, 1, "[num_seqs]");
  check_dim(op, "token_ids", token_ids, 1, "[total]");
  const int64_t num_seqs = slots.size(0), total = token_ids.size(0), n = counts.size(1);
  const int64_t* slot_of = check_slots(op, slots, num_seqs, counts);
  const int64_t* tokens = check_per_row<int64_t>(op, "token_ids", token_ids, ScalarType::Long, total);
  const int64_t* start = check_per_row<int64_t>(op, "starts", starts, ScalarType::Long, num_seqs + 1);
  const int64_t* prompt_len = check_per_row<int64_t>(op, "prompt_lens", prompt_lens, ScalarType::Long, num_seqs);
  for (int64_t i = 0; i <= num_seqs; ++i) {
    const int64_t least = i == 0 ? 0 : start[i - 1];
    GPT2RT_CHECK(start[i] >= least && start[i] <= total, op, ": starts[", i, "] is ", start[i], ", expected ", least,
                 " to ", total, ", the number of token_ids");
  }
  int32_t* c = mutable_data<int32_t>(counts);
  parallel_rows(num_seqs, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (slot_of[i] >= 0) std::fill(c + slot_of[i] * n, c + (slot_of[i] + 1) * n, 0);
    }
  });
  // few tokens beside the zeros; one after another, so that a slot that stands twice is no race
  for (int64_t i = 0; i < num_seqs; ++i) {
    if (slot_of[i] < 0) continue;
    int32_t* row = c + slot_of[i] * n;
    for (int64_t j = start[i]; j < start[i + 1]; ++j) {
      if (tokens[j] < 0 || tokens[j] >= n) continue;
      int32_t& count = row[tokens[j]];
      count = j - start[i] < prompt_len[i] ? count | 1 : count + 2;
    }
  }
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("penalties", TORCH_BOX(&gpt2rt::penalties));
  m.impl("count_tokens", TORCH_BOX(&gpt2rt::count_tokens));
  m.impl("reset_counts", TORCH_BOX(&gpt2rt::reset_counts));
}
