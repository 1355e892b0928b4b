// paged_prefill_attention, paged_decode_attention and step_attention: kernels/attention*.h hold the maths.
#include "paged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "thread_pool.h"

namespace gpt2rt {

DType check_cache_dtype(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Char) return DType::kInt8;
  GPT2RT_CHECK(is_storage(t.scalar_type()), op, ": ", name, " is ", dtype_text(t.scalar_type()),
               ", expected float32, bfloat16, float16 or int8");
  return check_storage(op, name, t);
}

void check_scales(const char* op, const Tensor& key_cache, const std::optional<Tensor>& key_scales,
                  const std::optional<Tensor>& value_scales) {
  const bool scaled = key_cache.scalar_type() == ScalarType::Char;
  for (const bool value : {false, true}) {
    const char* name = value ? "value_scales" : "key_scales";
    const std::optional<Tensor>& scales = value ? value_scales : key_scales;
    GPT2RT_CHECK(scales.has_value() == scaled, op, ": ", name, scaled ? " is missing" : " was given",
                 ", but the cache is ", dtype_text(key_cache.scalar_type()),
                 "; an int8 cache has scales, no other does");
    if (!scaled) continue;
    check_dtype(op, name, *scales, ScalarType::Float);
    check_dim(op, name, *scales, 3, "[num_blocks, n_head, block_size]");
    for (int64_t i = 0; i < 3; ++i) check_size(op, name, *scales, i, key_cache.size(i), "as key_cache");
    check_contiguous(op, name, *scales);
  }
}

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

namespace {

int64_t num_splits(const AttentionTile& tile) { return (tile.first_position + tile.rows + kSplit - 1) / kSplit; }

// rows times the tokens that they look at, about
int64_t tile_work(const AttentionTile& tile) {
  const int64_t tokens = tile.first_position + tile.rows;
  return tile.rows * (tile.split < 0 ? tokens : std::min(kSplit, tokens - tile.split * kSplit));
}

}  // namespace

AttentionWork::AttentionWork(const PagedBatch& b, int64_t num_heads, int64_t head_dim, int num_threads) {
  int64_t longest = 0;
  for (int64_t s = 0; s < b.num_seqs; ++s) longest = std::max(longest, b.query_len(s));
  std::vector<AttentionTile> tiles;
  tiles.reserve(static_cast<size_t>(b.num_seqs * num_heads * ((longest + kQueryTile - 1) / kQueryTile)));
  for (int64_t s = 0; s < b.num_seqs; ++s) {
    const int64_t query_len = b.query_len(s);
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t row = 0; row < query_len; row += kQueryTile) {
        AttentionTile tile{};
        tile.seq = static_cast<int32_t>(s);
        tile.head = static_cast<int32_t>(head);
        tile.first_query = b.query_begin(s) + row;
        tile.first_position = b.seq_lens[s] - query_len + row;
        tile.rows = std::min(kQueryTile, query_len - row);
        tiles.push_back(tile);
      }
    }
  }
  // four tasks a thread even out tasks of unequal length and threads that were held up
  const bool few = static_cast<int64_t>(tiles.size()) < 4 * int64_t{num_threads} && num_threads > 1;
  std::vector<int32_t> splits;
  int64_t floats = 0;
  for (AttentionTile& tile : tiles) {
    const int64_t count = num_splits(tile);
    if (!few || count == 1) {
      tiles_.push_back(tile);
      continue;
    }
    tile.shared = static_cast<int32_t>(splits.size());
    tile.partials = floats;
    splits.push_back(static_cast<int32_t>(count));
    floats += count * attention_partial_floats(tile.rows, head_dim);
    for (tile.split = 0; tile.split < count; ++tile.split) tiles_.push_back(tile);
  }
  left_ = std::vector<std::atomic<int32_t>>(splits.size());
  for (size_t i = 0; i < splits.size(); ++i) left_[i].store(splits[i], std::memory_order_relaxed);
  partials_.resize(static_cast<size_t>(floats));
  std::stable_sort(tiles_.begin(), tiles_.end(),
                   [](const AttentionTile& a, const AttentionTile& c) { return tile_work(a) > tile_work(c); });
}

int64_t AttentionWork::longest() const { return tiles_.empty() ? 0 : tile_work(tiles_.front()); }

void AttentionWork::part(const Kernels& k, const AttentionArgs& base, bool fast, int64_t query_head_stride,
                         int64_t out_head_stride, const PagedBatch& batch, std::atomic<int64_t>& counter) {
  const bool pairs = fast && base.cache_dtype == DType::kBFloat16 && k.attention_bfloat16 != nullptr;
  const auto attention = pairs ? k.attention_bfloat16 : k.attention;
  AttentionArgs args = base;
  args.scratch = thread_scratch_floats(k.attention_scratch_floats(base.head_dim));
  const int64_t count = static_cast<int64_t>(tiles_.size());
  for (int64_t i; (i = counter.fetch_add(1, std::memory_order_relaxed)) < count;) {
    const AttentionTile& tile = tiles_[static_cast<size_t>(i)];
    const int64_t head_rows = tile.head * base.block_size;
    args.query = at(base.query, tile.first_query * base.query_stride + tile.head * query_head_stride, base.query_dtype);
    args.key = at(base.key, head_rows * base.head_dim, base.cache_dtype);
    args.value = at(base.value, head_rows * base.head_dim, base.cache_dtype);
    if (base.key_scales != nullptr) {
      args.key_scales = base.key_scales + head_rows;
      args.value_scales = base.value_scales + head_rows;
    }
    args.block_table = batch.block_table + tile.seq * batch.table_stride;
    args.first_position = tile.first_position;
    args.rows = tile.rows;
    args.out = at(base.out, tile.first_query * base.out_stride + tile.head * out_head_stride, base.out_dtype);
    args.split = tile.split;
    args.partials = partials_.data() + tile.partials;
    attention(args);
    if (tile.split < 0) continue;
    std::atomic<int32_t>& left = left_[static_cast<size_t>(tile.shared)];
    // acquire: the partials of the other threads; release: this one's
    if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    k.attention_merge(args);
    left.store(static_cast<int32_t>(num_splits(tile)), std::memory_order_relaxed);
  }
}

namespace {

// checks of what both ops share; fills the batch but for query_start_loc
PagedBatch check_paged(const char* op, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& block_table, const Tensor& seq_lens, double scale) {
  check_storage(op, "query", query);
  check_dim(op, "query", query, 3, "[num_tokens, n_head, head_dim]");
  check_rows(op, "query", query);
  check_cache_dtype(op, "key_cache", key_cache);
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
                     double scale, const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales,
                     bool fast) {
  const int64_t num_heads = query.size(1), head_dim = query.size(2);
  Tensor out = new_like(query, {query.size(0), num_heads, head_dim});
  AttentionArgs args{};
  args.query = query.const_data_ptr();
  args.query_dtype = args.out_dtype = check_storage("attention", "query", query);
  args.query_stride = query.stride(0);
  args.key = key_cache.const_data_ptr();
  args.value = value_cache.const_data_ptr();
  args.cache_dtype = check_cache_dtype("attention", "key_cache", key_cache);
  if (args.cache_dtype == DType::kInt8) {
    args.key_scales = data<float>(*key_scales);
    args.value_scales = data<float>(*value_scales);
  }
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
  AttentionWork work(batch, num_heads, head_dim, default_num_threads());
  std::atomic<int64_t> counter{0};
  const Kernels& k = kernels();
  parallel_rows(static_cast<int64_t>(work.tiles().size()), work.longest() * head_dim + 1,
                [&](int64_t, int64_t) { work.part(k, args, fast, query.stride(1), head_dim, batch, counter); });
  return out;
}

// check_paged and the scales, for ragged rows of queries
PagedBatch check_ragged(const char* op, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc, double scale,
                        const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
  PagedBatch batch = check_paged(op, query, key_cache, value_cache, block_table, seq_lens, scale);
  check_scales(op, key_cache, key_scales, value_scales);
  check_dtype(op, "query_start_loc", query_start_loc, ScalarType::Int);
  check_dim(op, "query_start_loc", query_start_loc, 1, "[num_seqs + 1]");
  check_size(op, "query_start_loc", query_start_loc, 0, batch.num_seqs + 1, "num_seqs + 1");
  check_contiguous(op, "query_start_loc", query_start_loc);
  batch.query_start_loc = data<int32_t>(query_start_loc);
  check_batch(op, batch);
  return batch;
}

Tensor paged_prefill_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                               const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                               int64_t max_query_len, double scale, const std::optional<Tensor>& key_scales,
                               const std::optional<Tensor>& value_scales) {
  const char* op = "paged_prefill_attention";
  const PagedBatch batch = check_ragged(op, query, key_cache, value_cache, block_table, seq_lens, query_start_loc,
                                        scale, key_scales, value_scales);
  // not used here, but a wrong value would hide a query from the kernels that size their grid by it
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    GPT2RT_CHECK(batch.query_len(s) <= max_query_len, op, ": max_query_len is ", max_query_len, ", but sequence ", s,
                 " has ", batch.query_len(s), " tokens in this step");
  }
  return run_attention(batch, query, key_cache, value_cache, scale, key_scales, value_scales, false);
}

Tensor paged_decode_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                              const Tensor& block_table, const Tensor& seq_lens, int64_t max_seq_len, double scale,
                              const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
  const char* op = "paged_decode_attention";
  const PagedBatch batch = check_paged(op, query, key_cache, value_cache, block_table, seq_lens, scale);
  check_scales(op, key_cache, key_scales, value_scales);
  GPT2RT_CHECK(batch.num_seqs == batch.num_tokens, op, ": query has ", batch.num_tokens, " rows, expected ",
               batch.num_seqs, ", one for each of seq_lens");
  check_batch(op, batch);
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    GPT2RT_CHECK(batch.seq_lens[s] <= max_seq_len, op, ": max_seq_len is ", max_seq_len, ", but seq_lens[", s, "] is ",
                 batch.seq_lens[s]);
  }
  return run_attention(batch, query, key_cache, value_cache, scale, key_scales, value_scales, false);
}

Tensor step_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                      const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc, double scale) {
  const PagedBatch batch = check_ragged("step_attention", query, key_cache, value_cache, block_table, seq_lens,
                                        query_start_loc, scale, std::nullopt, std::nullopt);
  return run_attention(batch, query, key_cache, value_cache, scale, std::nullopt, std::nullopt, true);
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("paged_prefill_attention", TORCH_BOX(&gpt2rt::paged_prefill_attention));
  m.impl("paged_decode_attention", TORCH_BOX(&gpt2rt::paged_decode_attention));
  m.impl("step_attention", TORCH_BOX(&gpt2rt::step_attention));
}
