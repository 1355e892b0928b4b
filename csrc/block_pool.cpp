// The block pool's state: which blocks of the KV cache are free, and how often each of the others is used.
//
// state int32 [2 + 2 N]: N, number of free blocks, the stack of free blocks (its top at index 2 + num_free - 1), the
// reference counts. Each op either does all it was asked or changes nothing.
#include <limits>
#include <vector>

#include "cpu/checks.h"

namespace gpt2rt {
namespace {

struct PoolState {
  int32_t* data;
  int64_t num_blocks;
  int32_t& num_free() const { return data[1]; }
  int32_t* stack() const { return data + 2; }
  int32_t* counts() const { return data + 2 + num_blocks; }
};

PoolState check_state(const char* op, const Tensor& state) {
  check_dtype(op, "state", state, ScalarType::Int);
  check_dim(op, "state", state, 1, "[2 + 2 * num_blocks]");
  check_contiguous(op, "state", state);
  GPT2RT_CHECK_STATE(state.size(0) >= 2, op, ": state has ", state.size(0), " elements, expected 2 + 2 * num_blocks");
  int32_t* p = mutable_data<int32_t>(state);
  GPT2RT_CHECK_STATE(p[0] >= 0 && state.size(0) == 2 + 2 * static_cast<int64_t>(p[0]), op, ": state says ", p[0],
                     " blocks, which needs ", 2 + 2 * static_cast<int64_t>(p[0]), " elements, but has ", state.size(0));
  GPT2RT_CHECK_STATE(p[1] >= 0 && p[1] <= p[0], op, ": state says ", p[1], " of ", p[0],
                     " blocks are free; it is damaged");
  return {p, p[0]};
}

// block ids as int64, each within the pool
std::vector<int64_t> check_ids(const char* op, const Tensor& block_ids, const PoolState& pool) {
  check_dim(op, "block_ids", block_ids, 1, "[num_ids]");
  check_contiguous(op, "block_ids", block_ids);
  const ScalarType type = block_ids.scalar_type();
  GPT2RT_CHECK_STATE(type == ScalarType::Int || type == ScalarType::Long, op, ": block_ids is ", dtype_text(type),
                     ", expected int32 or int64");
  std::vector<int64_t> ids(static_cast<size_t>(block_ids.size(0)));
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = type == ScalarType::Int ? data<int32_t>(block_ids)[i] : data<int64_t>(block_ids)[i];
    GPT2RT_CHECK_STATE(ids[i] >= 0 && ids[i] < pool.num_blocks, op, ": block_ids[", i, "] is ", ids[i],
                       ", but the pool has ", pool.num_blocks, " blocks; expected 0 to ", pool.num_blocks - 1);
  }
  return ids;
}

Tensor block_pool_allocate(const Tensor& state, int64_t num_blocks) {
  const char* op = "block_pool_allocate";
  const PoolState pool = check_state(op, state);
  GPT2RT_CHECK_STATE(num_blocks >= 0, op, ": num_blocks is ", num_blocks, ", expected 0 or more");
  GPT2RT_CHECK_STATE(num_blocks <= pool.num_free(), op, ": ", num_blocks, " blocks asked for, ", pool.num_free(),
                     " of ", pool.num_blocks, " are free; free some or make the cache larger");
  const int32_t* top = pool.stack() + pool.num_free();
  // before anything changes: a damaged stack must not lead outside the counts
  for (int64_t i = 1; i <= num_blocks; ++i) {
    GPT2RT_CHECK_STATE(top[-i] >= 0 && top[-i] < pool.num_blocks, op, ": the stack of free blocks holds ", top[-i],
                       ", but the pool has ", pool.num_blocks, " blocks; state is damaged");
  }
  Tensor ids = new_like(state, {num_blocks});
  int32_t* out = mutable_data<int32_t>(ids);
  for (int64_t i = 0; i < num_blocks; ++i) {
    out[i] = top[-1 - i];
    pool.counts()[out[i]] = 1;
  }
  pool.num_free() -= static_cast<int32_t>(num_blocks);
  return ids;
}

void block_pool_incref(const Tensor& state, const Tensor& block_ids) {
  const char* op = "block_pool_incref";
  const PoolState pool = check_state(op, state);
  const std::vector<int64_t> ids = check_ids(op, block_ids, pool);
  for (size_t i = 0; i < ids.size(); ++i) {
    const int32_t count = pool.counts()[ids[i]];
    GPT2RT_CHECK_STATE(count > 0, op, ": block ", ids[i], " is free; only allocated blocks can be shared");
    GPT2RT_CHECK_STATE(count <= std::numeric_limits<int32_t>::max() - static_cast<int64_t>(ids.size()), op, ": block ",
                       ids[i], " has ", count, " references, no more can be counted");
  }
  for (const int64_t id : ids) ++pool.counts()[id];
}

void block_pool_free(const Tensor& state, const Tensor& block_ids) {
  const char* op = "block_pool_free";
  const PoolState pool = check_state(op, state);
  const std::vector<int64_t> ids = check_ids(op, block_ids, pool);
  int32_t* counts = pool.counts();
  // tried out first and undone: one call may name a block several times
  size_t tried = 0;
  int64_t became_free = 0;
  while (tried < ids.size() && counts[ids[tried]] > 0) became_free += --counts[ids[tried++]] == 0 ? 1 : 0;
  for (size_t i = 0; i < tried; ++i) ++counts[ids[i]];
  GPT2RT_CHECK_STATE(tried == ids.size(), op, ": block ", ids[tried], " (block_ids[", tried,
                     "]) is freed more often than it is used");
  GPT2RT_CHECK_STATE(pool.num_free() + became_free <= pool.num_blocks, op, ": ", pool.num_free(), " of ",
                     pool.num_blocks, " blocks are free already, ", became_free, " more cannot be; state is damaged");
  for (const int64_t id : ids) {
    if (--counts[id] == 0) pool.stack()[pool.num_free()++] = static_cast<int32_t>(id);
  }
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("block_pool_allocate", TORCH_BOX(&gpt2rt::block_pool_allocate));
  m.impl("block_pool_incref", TORCH_BOX(&gpt2rt::block_pool_incref));
  m.impl("block_pool_free", TORCH_BOX(&gpt2rt::block_pool_free));
}
