// embedding: out[t] = wte[input_ids[t]] + wpe[position_ids[t]].
#include "checks.h"
#include "kernels.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

void check_ids(const char* name, const int64_t* ids, int64_t num_tokens, int64_t rows, const char* table) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    GPT2RT_CHECK_INDEX(ids[t] >= 0 && ids[t] < rows, "embedding: ", name, "[", t, "] is ", ids[t], ", but ", table,
                       " has ", rows, " rows; expected 0 to ", rows - 1);
  }
}

Tensor embedding(const Tensor& input_ids, const Tensor& position_ids, const Tensor& wte, const Tensor& wpe) {
  const char* op = "embedding";
  check_dtype(op, "input_ids", input_ids, ScalarType::Long);
  check_dtype(op, "position_ids", position_ids, ScalarType::Long);
  check_dim(op, "input_ids", input_ids, 1, "[num_tokens]");
  check_dim(op, "position_ids", position_ids, 1, "[num_tokens]");
  check_size(op, "position_ids", position_ids, 0, input_ids.size(0), "the length of input_ids");
  check_contiguous(op, "input_ids", input_ids);
  check_contiguous(op, "position_ids", position_ids);
  const DType dtype = check_storage(op, "wte", wte);
  check_same_dtype(op, "wpe", wpe, "wte", wte);
  check_dim(op, "wte", wte, 2, "[vocab_size, n_embd]");
  check_dim(op, "wpe", wpe, 2, "[n_positions, n_embd]");
  check_size(op, "wpe", wpe, 1, wte.size(1), "the width of wte");
  check_rows(op, "wte", wte);
  check_rows(op, "wpe", wpe);
  const int64_t num_tokens = input_ids.size(0), n = wte.size(1);
  const int64_t wte_stride = wte.stride(0), wpe_stride = wpe.stride(0);
  const int64_t *ids = data<int64_t>(input_ids), *positions = data<int64_t>(position_ids);
  check_ids("input_ids", ids, num_tokens, wte.size(0), "wte");
  check_ids("position_ids", positions, num_tokens, wpe.size(0), "wpe");
  Tensor out = new_like(wte, {num_tokens, n});
  const Kernels& k = kernels();
  const void *pt = wte.const_data_ptr(), *pp = wpe.const_data_ptr();
  void* po = out.mutable_data_ptr();
  parallel_rows(num_tokens, n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      k.add_row(dtype, at(pt, ids[t] * wte_stride, dtype), at(pp, positions[t] * wpe_stride, dtype), n,
                at(po, t * n, dtype));
    }
  });
  return out;
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) { m.impl("embedding", TORCH_BOX(&gpt2rt::embedding)); }
