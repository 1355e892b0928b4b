// paged_prefill_attention and paged_decode_attention: kernels/attention.h holds the maths.
#include "paged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "thread_pool.h"

namespace gpt2rt {

void check_batch(const char* op, const PagedBatch& b) {
  if (b.query_start_loc != nullptr) {
    GPT2RT_CHECK(b.query_start_loc[0] == 0, op, ": query_start_loc[0] is ", b.query_start_loc[0], ", expected 0");
    GPT2RT_CHECK(b.query_start_loc[b.num_seqs] == b.num_tokens, op, ": query_start_loc ends with ",
                 b.query_start_loc[b.num_seqs], ", expected ", b.num_tokens, ", the number of tokens");
  }
  for (int64_t s = 0; s < b.num_seqs; ++s) {
    if (b.query_start_loc != nullptr) {
      GPT2RT_CHECK(b.query_start_loc[s + 1] >= b.query_start_loc[s], op, ": query_start_loc falls from ",
                   b.query_start_loc[s], " to ", b.query_start_loc[s + 1], " at sequence ", s,
                   "; expected prefix sums of the query lengths");
    }
    const int64_t query_len = b.query_len(s), seq_len = b.seq_lens[s];
    GPT2RT_CHECK(seq_len >= query_len, op, ": seq_lens[", s, "] is ", seq_len, ", expected at least ", query_len,
                 ", the tokens that sequence ", s, " has in this step");
    if (query_len == 0) continue;
    const int64_t used = (seq_len + b.block_size - 1) / b.block_size;
    GPT2RT_CHECK(used <= b.max_blocks_per_seq, op, ": seq_lens[", s, "] is ", seq_len, ", which needs ", used,
                 " blocks of ", b.block_size, ", but block_table has ", b.max_blocks_per_seq, " columns");
    const int32_t* table = b.block_table + s * b.table_stride;
    for (int64_t i = 0; i < used; ++i) {
      GPT2RT_CHECK_INDEX(table[i] >= 0 && table[i] < b.num_blocks, op, ": block_table[", s, ", ", i, "] is ", table[i],
                         ", but the cache has ", b.num_blocks, " blocks; expected 0 to ", b.num_blocks - 1);
    }
  }
}

std::vector<AttentionTile> attention_tiles(const PagedBatch& b, int64_t num_heads) {
  std::vector<AttentionTile> tiles;
  int64_t longest = 0;
  for (int64_t s = 0; s < b.num_seqs; ++s) longest = std::max(longest, b.query_len(s));
  tiles.reserve(static_cast<size_t>(b.num_seqs * num_heads * ((longest + kQueryTile - 1) / kQueryTile)));
  for (int64_t s = 0; s < b.num_seqs; ++s) {
    const int64_t query_len = b.query_len(s);
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t row = 0; row < query_len; row += kQueryTile) {
        tiles.push_back({static_cast<int32_t>(s), static_cast<int32_t>(head), b.query_begin(s) + row,
                         b.seq_lens[s] - query_len + row, std::min(kQueryTile, query_len - row)});
      }
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const AttentionTile& a, const AttentionTile& c) {
    return (a.first_position + a.rows) * a.rows > (c.first_position + c.rows) * c.rows;
  });
  return tiles;
}

void attention_part(const Kernels& k, const AttentionArgs& base, int64_t query_head_stride, int64_t out_head_stride,
                    const PagedBatch& batch, const std::vector<AttentionTile>& tiles, std::atomic<int64_t>& counter) {
  AttentionArgs args = base;
  args.scratch = thread_scratch_floats(k.attention_scratch_floats(base.head_dim));
  const int64_t count = static_cast<int64_t>(tiles.size());
  for (int64_t i; (i = counter.fetch_add(1, std::memory_order_relaxed)) < count;) {
    const AttentionTile& tile = tiles[static_cast<size_t>(i)];
    const int64_t cache_offset = tile.head * base.block_size * base.head_dim;
    args.query = at(base.query, tile.first_query * base.query_stride + tile.head * query_head_stride, base.query_dtype);
    args.key = at(base.key, cache_offset, base.cache_dtype);
    args.value = at(base.value, cache_offset, base.cache_dtype);
    args.block_table = batch.block_table + tile.seq * batch.table_stride;
    args.first_position = tile.first_position;
    args.rows = tile.rows;
    args.out = at(base.out, tile.first_query * base.out_stride + tile.head * out_head_stride, base.out_dtype);
    k.attention(args);
  }
}

namespace {

// checks of what both ops share; fills the batch but for query_start_loc
PagedBatch check_paged(const char* op, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& block_table, const Tensor& seq_lens, double scale) {
  check_storage(op, "query", query);
  check_dim(op, "query", query, 3, "[num_tokens, n_head, head_dim]");
  check_rows(op, "query", query);
  check_storage(op, "key_cache", key_cache);
  check_same_dtype(op, "value_cache", value_cache, "key_cache", key_cache);
  check_dim(op, "key_cache", key_cache, 4, "[num_blocks, n_head, block_size, head_dim]");
  check_dim(op, "value_cache", value_cache, 4, "[num_blocks, n_head, block_size, head_dim]");
  for (int64_t i = 0; i < 4; ++i) check_size(op, "value_cache", value_cache, i, key_cache.size(i), "as key_cache");
  check_size(op, "key_cache", key_cache, 1, query.size(1), "the heads of query");
  check_size(op, "key_cache", key_cache, 3, query.size(2), "the head_dim of query");
  GPT2RT_CHECK(query.size(2) >= 1 && query.size(2) <= kMaxHeadDim, op, ": head_dim is ", query.size(2),
               ", expected 1 to ", kMaxHeadDim);
  GPT2RT_CHECK(key_cache.size(2) >= 1, op, ": key_cache ", shape_text(key_cache), " has blocks of 0 tokens");
  check_contiguous(op, "key_cache", key_cache);
  check_contiguous(op, "value_cache", value_cache);
  check_dtype(op, "block_table", block_table, ScalarType::Int);
  check_dim(op, "block_table", block_table, 2, "[num_seqs, max_blocks_per_seq]");
  check_rows(op, "block_table", block_table);
  check_dtype(op, "seq_lens", seq_lens, ScalarType::Int);
  check_dim(op, "seq_lens", seq_lens, 1, "[num_seqs]");
  check_size(op, "seq_lens", seq_lens, 0, block_table.size(0), "the rows of block_table");
  check_contiguous(op, "seq_lens", seq_lens);
  GPT2RT_CHECK(std::isfinite(scale), op, ": scale is ", scale, ", expected a finite number such as 1/sqrt(head_dim)");

  PagedBatch batch{};
  batch.num_seqs = seq_lens.size(0);
  batch.num_tokens = query.size(0);
  batch.seq_lens = data<int32_t>(seq_lens);
  batch.block_table = data<int32_t>(block_table);
  batch.max_blocks_per_seq = block_table.size(1);
  batch.table_stride = block_table.stride(0);
  batch.num_blocks = key_cache.size(0);
  batch.block_size = key_cache.size(2);
  return batch;
}

Tensor run_attention(const PagedBatch& batch, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                     double scale) {
  const int64_t num_heads = query.size(1), head_dim = query.size(2);
  Tensor out = new_like(query, {query.size(0), num_heads, head_dim});
  AttentionArgs args{};
  args.query = query.const_data_ptr();
  args.query_dtype = args.out_dtype = check_storage("attention", "query", query);
  args.query_stride = query.stride(0);
  args.key = key_cache.const_data_ptr();
  args.value = value_cache.const_data_ptr();
  args.cache_dtype = check_storage("attention", "key_cache", key_cache);
  args.block_size = batch.block_size;
  args.block_stride = num_heads * batch.block_size * head_dim;
  args.head_dim = head_dim;
  args.scale = static_cast<float>(scale);
  args.out = out.mutable_data_ptr();
  args.out_stride = num_heads * head_dim;
  // rows without a token (padding of a decode batch) are zero
  if (batch.query_start_loc == nullptr) {
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
      if (batch.seq_lens[s] == 0) {
        std::memset(at(args.out, s * args.out_stride, args.out_dtype), 0,
                    static_cast<size_t>(args.out_stride * item_size(args.out_dtype)));
      }
    }
  }
  const std::vector<AttentionTile> tiles = attention_tiles(batch, num_heads);
  int64_t work = 0;
  for (const AttentionTile& tile : tiles) work += (tile.first_position + tile.rows) * tile.rows * head_dim;
  const int64_t count = static_cast<int64_t>(tiles.size());
  std::atomic<int64_t> counter{0};
  const Kernels& k = kernels();
  parallel_rows(count, count > 0 ? work / count + 1 : 0,
                [&](int64_t, int64_t) { attention_part(k, args, query.stride(1), head_dim, batch, tiles, counter); });
  return out;
}

Tensor paged_prefill_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                               const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                               int64_t max_query_len, double scale) {
  const char* op = "paged_prefill_attention";
  PagedBatch batch = check_paged(op, query, key_cache, value_cache, block_table, seq_lens, scale);
  check_dtype(op, "query_start_loc", query_start_loc, ScalarType::Int);
  check_dim(op, "query_start_loc", query_start_loc, 1, "[num_seqs + 1]");
  check_size(op, "query_start_loc", query_start_loc, 0, batch.num_seqs + 1, "num_seqs + 1");
  check_contiguous(op, "query_start_loc", query_start_loc);
  batch.query_start_loc = data<int32_t>(query_start_loc);
  check_batch(op, batch);
  // not used here, but a wrong value would hide a query from the kernels that size their grid by it
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    GPT2RT_CHECK(batch.query_len(s) <= max_query_len, op, ": max_query_len is ", max_query_len, ", but sequence ", s,
                 " has ", batch.query_len(s), " tokens in this step");
  }
  return run_attention(batch, query, key_cache, value_cache, scale);
}

Tensor paged_decode_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                              const Tensor& block_table, const Tensor& seq_lens, int64_t max_seq_len, double scale) {
  const char* op = "paged_decode_attention";
  const PagedBatch batch = check_paged(op, query, key_cache, value_cache, block_table, seq_lens, scale);
  GPT2RT_CHECK(batch.num_seqs == batch.num_tokens, op, ": query has ", batch.num_tokens, " rows, expected ",
               batch.num_seqs, ", one for each of seq_lens");
  check_batch(op, batch);
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    GPT2RT_CHECK(batch.seq_lens[s] <= max_seq_len, op, ": max_seq_len is ", max_seq_len, ", but seq_lens[", s, "] is ",
                 batch.seq_lens[s]);
  }
  return run_attention(batch, query, key_cache, value_cache, scale);
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("paged_prefill_attention", TORCH_BOX(&gpt2rt::paged_prefill_attention));
  m.impl("paged_decode_attention", TORCH_BOX(&gpt2rt::paged_decode_attention));
}
