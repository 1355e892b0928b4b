// Attention over the paged cache: the checks of a batch and its tasks, shared by the ops and by the step.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace gpt2rt {

// the batch, as it lies in the caller's tensors
struct PagedBatch {
  int64_t num_seqs;
  int64_t num_tokens;
  const int32_t* query_start_loc;  // [num_seqs + 1], or nullptr for one token a sequence
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* block_table;      // [num_seqs, table_stride]
  int64_t max_blocks_per_seq;
  int64_t table_stride;
  int64_t num_blocks;
  int64_t block_size;

  int64_t query_begin(int64_t seq) const { return query_start_loc == nullptr ? seq : query_start_loc[seq]; }
  int64_t query_len(int64_t seq) const {
    return query_start_loc == nullptr ? (seq_lens[seq] > 0 ? 1 : 0) : query_start_loc[seq + 1] - query_start_loc[seq];
  }
};

// raises if an index of the batch leads outside the cache or the tokens
void check_batch(const char* op, const PagedBatch& batch);

struct AttentionTile {
  int32_t seq;
  int32_t head;
  int64_t first_query;  // row of the query matrix
  int64_t first_position;
  int64_t rows;
};

// every (sequence, head, tile of query rows); the longest first, so that threads end together
std::vector<AttentionTile> attention_tiles(const PagedBatch& batch, int64_t num_heads);

// query, key, value, out and their dtypes and strides as of head 0; block_table, first_position, rows and scratch are
// filled in. Called by every thread of a phase with a counter that starts at 0.
void attention_part(const Kernels& k, const AttentionArgs& base, int64_t query_head_stride, int64_t out_head_stride,
                    const PagedBatch& batch, const std::vector<AttentionTile>& tiles, std::atomic<int64_t>& counter);

}  // namespace gpt2rt
