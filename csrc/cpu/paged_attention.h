// Attention over the paged cache: the checks of a batch and its tasks, shared by the ops and by the step.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace gpt2rt {

// float32, bfloat16, float16 or int8
DType check_cache_dtype(const char* op, const char* name, const Tensor& t);

// raises unless an int8 cache has scales [num_blocks, n_head, block_size] float32, and any other has none
void check_scales(const char* op, const Tensor& key_cache, const std::optional<Tensor>& key_scales,
                  const std::optional<Tensor>& value_scales);

// one head of one token goes to row `row` of a cache of rows of head_dim elements
inline void write_cache_row(const Kernels& k, DType dtype, const void* x, int64_t head_dim, DType cache_dtype,
                            void* cache, float* scales, int64_t row) {
  void* target = at(cache, row * head_dim, cache_dtype);
  if (cache_dtype == DType::kInt8) {
    k.quantize_head(dtype, x, head_dim, static_cast<int8_t*>(target), scales + row);
  } else {
    k.convert_row(dtype, x, cache_dtype, target, head_dim);
  }
}

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
  // the splits of one tile may be tasks of their own; then this is the number of one
  int32_t split = -1;    // -1: all of them
  int32_t shared = 0;    // index into AttentionWork::left
  int64_t partials = 0;  // where the tile's splits go, floats into AttentionWork::partials
};

// The tasks of an attention over a batch, the longest first, so that threads end together.
//
// A task is a sequence, a head and a tile of query rows. Where these are fewer than the threads could use, each split
// of 256 tokens becomes a task, and who computes the last one of a tile merges them in their order, which gives the
// same bits.
class AttentionWork {
 public:
  AttentionWork() = default;
  AttentionWork(const PagedBatch& batch, int64_t num_heads, int64_t head_dim, int num_threads);

  const std::vector<AttentionTile>& tiles() const { return tiles_; }
  // multiplications of the longest task, roughly
  int64_t longest() const;

  // query, key, value, scales, out and their dtypes and strides as of head 0; the rest is filled in. fast: products of
  // bfloat16 where the cache holds it and there is a kernel. Called by every thread of a phase with a counter that
  // starts at 0; may be run again, for the next layer.
  void part(const Kernels& k, const AttentionArgs& base, bool fast, int64_t query_head_stride, int64_t out_head_stride,
            const PagedBatch& batch, std::atomic<int64_t>& counter);

 private:
  std::vector<AttentionTile> tiles_;
  std::vector<std::atomic<int32_t>> left_;  // for each tile in splits, how many are not done
  std::vector<float> partials_;
};

}  // namespace gpt2rt
