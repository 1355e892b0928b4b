// write_kv: puts the keys and values of new tokens into the paged cache.
#include "checks.h"
#include "kernels.h"
#include "paged_attention.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

void write_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
              const Tensor& slot_mapping, const std::optional<Tensor>& key_scales,
              const std::optional<Tensor>& value_scales) {
  const char* op = "write_kv";
  const DType dtype = check_storage(op, "key", key);
  check_same_dtype(op, "value", value, "key", key);
  check_dim(op, "key", key, 3, "[num_tokens, n_head, head_dim]");
  check_dim(op, "value", value, 3, "[num_tokens, n_head, head_dim]");
  for (int64_t i = 0; i < 3; ++i) check_size(op, "value", value, i, key.size(i), "as key");
  check_rows(op, "key", key);
  check_rows(op, "value", value);
  const DType cache_dtype = check_cache_dtype(op, "key_cache", key_cache);
  check_same_dtype(op, "value_cache", value_cache, "key_cache", key_cache);
  check_dim(op, "key_cache", key_cache, 4, "[num_blocks, n_head, block_size, head_dim]");
  check_dim(op, "value_cache", value_cache, 4, "[num_blocks, n_head, block_size, head_dim]");
  for (int64_t i = 0; i < 4; ++i) check_size(op, "value_cache", value_cache, i, key_cache.size(i), "as key_cache");
  check_size(op, "key_cache", key_cache, 1, key.size(1), "the heads of key");
  check_size(op, "key_cache", key_cache, 3, key.size(2), "the head_dim of key");
  check_contiguous(op, "key_cache", key_cache);
  check_contiguous(op, "value_cache", value_cache);
  check_scales(op, key_cache, key_scales, value_scales);
  check_dtype(op, "slot_mapping", slot_mapping, ScalarType::Long);
  check_dim(op, "slot_mapping", slot_mapping, 1, "[num_tokens]");
  check_size(op, "slot_mapping", slot_mapping, 0, key.size(0), "the tokens of key");
  check_contiguous(op, "slot_mapping", slot_mapping);

  check_apart(op,
              {{"key_cache", &key_cache},
               {"value_cache", &value_cache},
               {"key_scales", given(key_scales)},
               {"value_scales", given(value_scales)}},
              {{"key", &key}, {"value", &value}, {"slot_mapping", &slot_mapping}});

  const int64_t num_tokens = key.size(0), num_heads = key.size(1), head_dim = key.size(2);
  const int64_t block_size = key_cache.size(2);
  const int64_t num_slots = key_cache.size(0) * block_size;
  const int64_t* slots = data<int64_t>(slot_mapping);
  for (int64_t t = 0; t < num_tokens; ++t) {
    GPT2RT_CHECK_INDEX(slots[t] >= -1 && slots[t] < num_slots, op, ": slot_mapping[", t, "] is ", slots[t],
                       ", but the cache has ", num_slots, " slots (", key_cache.size(0), " blocks of ", block_size,
                       "); expected -1 to ", num_slots - 1);
  }
  const Kernels& k = kernels();
  const void* sources[2] = {key.const_data_ptr(), value.const_data_ptr()};
  void* targets[2] = {key_cache.mutable_data_ptr(), value_cache.mutable_data_ptr()};
  float* scales[2] = {};
  if (cache_dtype == DType::kInt8) {
    scales[0] = mutable_data<float>(*key_scales);
    scales[1] = mutable_data<float>(*value_scales);
  }
  const int64_t token_strides[2] = {key.stride(0), value.stride(0)};
  const int64_t head_strides[2] = {key.stride(1), value.stride(1)};
  // by heads, so that of two tokens with one slot the later wins whatever the number of threads
  parallel_rows(2 * num_heads, 2 * num_tokens * head_dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t which = i / num_heads, head = i % num_heads;
      for (int64_t t = 0; t < num_tokens; ++t) {
        if (slots[t] < 0) continue;
        const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        const int64_t row = (block * num_heads + head) * block_size + offset;
        write_cache_row(k, dtype, at(sources[which], t * token_strides[which] + head * head_strides[which], dtype),
                        head_dim, cache_dtype, targets[which], scales[which], row);
      }
    }
  });
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) { m.impl("write_kv", TORCH_BOX(&gpt2rt::write_kv)); }
