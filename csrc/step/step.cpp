// cpu_step: the checks of a whole forward step in one call, and the call (run.h).
#include "run.h"

namespace gpt2rt {
namespace {

constexpr const char* kOp = "cpu_step";

void check_index_tensor(const char* name, const Tensor& t, ScalarType type, int64_t size, const char* meaning) {
  check_dtype(kOp, name, t, type);
  check_dim(kOp, name, t, 1, "one dimension");
  check_size(kOp, name, t, 0, size, meaning);
  check_contiguous(kOp, name, t);
}

void check_indices(const char* name, const int64_t* values, int64_t count, int64_t lowest, int64_t end,
                   const char* meaning) {
  for (int64_t i = 0; i < count; ++i) {
    GPT2RT_CHECK_INDEX(values[i] >= lowest && values[i] < end, kOp, ": ", name, "[", i, "] is ", values[i],
                       ", expected ", lowest, " to ", end - 1, ", ", meaning);
  }
}

DType check_table(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  const DType dtype = check_storage(kOp, name, t);
  check_dim(kOp, name, t, 2, "[rows, n_embd]");
  check_size(kOp, name, t, 0, rows, "as in the plan's EMBED");
  check_size(kOp, name, t, 1, columns, "as in the plan's EMBED");
  check_contiguous(kOp, name, t);
  return dtype;
}

// the cache fits every layer of the plan
Cache check_cache(const Tensor& t, const std::optional<Tensor>& scales, const Plan& plan) {
  Cache cache{};
  cache.dtype = check_cache_dtype(kOp, "kv_cache", t);
  check_dim(kOp, "kv_cache", t, 6, "[n_layer, 2, num_blocks, n_head, block_size, head_dim]");
  check_size(kOp, "kv_cache", t, 1, 2, "keys and values");
  check_contiguous(kOp, "kv_cache", t);
  cache.num_heads = t.size(3);
  cache.head_dim = t.size(5);
  GPT2RT_CHECK(t.size(4) >= 1, kOp, ": kv_cache ", shape_text(t), " has blocks of 0 tokens");
  cache.half = t.size(2) * t.size(3) * t.size(4) * t.size(5);
  cache.data = mutable_data<char>(t);
  const bool scaled = cache.dtype == DType::kInt8;
  GPT2RT_CHECK(scales.has_value() == scaled, kOp, ": kv_scales ", scaled ? "is missing" : "was given",
               ", but kv_cache is ", dtype_text(t.scalar_type()), "; an int8 cache has scales, no other does");
  if (scaled) {
    check_dtype(kOp, "kv_scales", *scales, ScalarType::Float);
    check_dim(kOp, "kv_scales", *scales, 5, "[n_layer, 2, num_blocks, n_head, block_size]");
    for (int64_t i = 0; i < 5; ++i) check_size(kOp, "kv_scales", *scales, i, t.size(i), "as kv_cache");
    check_contiguous(kOp, "kv_scales", *scales);
    cache.scales = mutable_data<float>(*scales);
  }
  for (const Node& node : plan.nodes) {
    if (node.opcode == Opcode::kNormQkv) {
      GPT2RT_CHECK(node.layer < t.size(0), kOp, ": the plan has a layer ", node.layer, ", but kv_cache ", shape_text(t),
                   " has ", t.size(0), " layers");
      GPT2RT_CHECK(cache.num_heads * cache.head_dim == plan.n_embd, kOp, ": kv_cache ", shape_text(t), " has ",
                   cache.num_heads, " heads of ", cache.head_dim, ", the plan has n_embd ", plan.n_embd);
    } else if (node.opcode == Opcode::kAttention) {
      GPT2RT_CHECK(node.num_heads == cache.num_heads && node.head_dim == cache.head_dim, kOp, ": the plan has ",
                   node.num_heads, " heads of ", node.head_dim, ", kv_cache ", shape_text(t), " has ", cache.num_heads,
                   " of ", cache.head_dim);
    }
  }
  return cache;
}

// a result [num_logits, columns], or null for [0, anything]
float* check_result(const char* name, const Tensor& t, int64_t num_logits, int64_t columns) {
  check_dtype(kOp, name, t, ScalarType::Float);
  check_dim(kOp, name, t, 2, "two dimensions");
  check_contiguous(kOp, name, t);
  if (t.size(0) == 0) return nullptr;
  check_size(kOp, name, t, 0, num_logits, "the length of logits_indices, or 0 for none");
  check_size(kOp, name, t, 1, columns, "as in the plan");
  return mutable_data<float>(t);
}

// [rows, 3] float64 with room for every phase
void check_times(const Tensor& times, size_t phases) {
  check_dtype(kOp, "times", times, ScalarType::Double);
  check_dim(kOp, "times", times, 2, "[rows, 3]");
  check_size(kOp, "times", times, 1, 3, "node, kind of phase, seconds");
  check_contiguous(kOp, "times", times);
  GPT2RT_CHECK(times.size(0) >= static_cast<int64_t>(phases), kOp, ": times has ", times.size(0),
               " rows, expected at least ", phases, ", one for each phase of this step");
}

// a row for each phase: index of its node, kind, seconds; the node is -1 in the rows past the last
void write_times(const Tensor& times, const Plan& plan, const std::vector<Phase>& phases, const Profile& profile) {
  const auto end = std::chrono::steady_clock::now();
  double* row = mutable_data<double>(times);
  for (int64_t i = 0; i < times.size(0); ++i, row += 3) {
    const size_t phase = static_cast<size_t>(i);
    const bool ran = phase < phases.size();
    row[0] = ran ? static_cast<double>(phases[phase].node - plan.nodes.data()) : -1.0;
    row[1] = ran ? static_cast<double>(phases[phase].kind) : -1.0;
    row[2] = ran ? profile.seconds(phase, end) : 0.0;
  }
}

void cpu_step(const Tensor& plan_rows, const Tensor& arena, const Tensor& wte, const Tensor& wpe,
              const Tensor& input_ids, const Tensor& position_ids, const Tensor& query_start_loc,
              const Tensor& seq_lens, const Tensor& block_table, const Tensor& slot_mapping,
              const Tensor& logits_indices, const Tensor& kv_cache, const Tensor& workspace, const Tensor& logits,
              const Tensor& hidden, int64_t num_threads, const std::optional<Tensor>& times,
              const std::optional<Tensor>& kv_scales, const std::optional<Tensor>& top_ids,
              const std::optional<Tensor>& top_logits) {
  const Plan plan = read_plan(kOp, plan_rows, &arena);
  const int threads = resolve_num_threads(num_threads);
  const Node& embed = plan.nodes.front();
  Tables tables{};
  if (embed.weight.data == nullptr) {
    tables.wte_dtype = check_table("wte", wte, embed.vocab_size, plan.n_embd);
    tables.wte = wte.const_data_ptr();
  }
  tables.wpe_dtype = check_table("wpe", wpe, embed.n_positions, plan.n_embd);
  tables.wpe = wpe.const_data_ptr();
  const Cache cache = check_cache(kv_cache, kv_scales, plan);

  Batch batch{};
  check_dim(kOp, "input_ids", input_ids, 1, "[num_tokens]");
  check_dim(kOp, "seq_lens", seq_lens, 1, "[num_seqs]");
  check_dim(kOp, "logits_indices", logits_indices, 1, "[num_logits]");
  const int64_t num_tokens = batch.num_tokens = input_ids.size(0);
  const int64_t num_logits = batch.num_logits = logits_indices.size(0);
  const int64_t num_seqs = seq_lens.size(0);
  check_index_tensor("input_ids", input_ids, ScalarType::Long, num_tokens, "num_tokens");
  check_index_tensor("position_ids", position_ids, ScalarType::Long, num_tokens, "the length of input_ids");
  check_index_tensor("slot_mapping", slot_mapping, ScalarType::Long, num_tokens, "the length of input_ids");
  check_index_tensor("logits_indices", logits_indices, ScalarType::Long, num_logits, "num_logits");
  check_index_tensor("seq_lens", seq_lens, ScalarType::Int, num_seqs, "num_seqs");
  check_index_tensor("query_start_loc", query_start_loc, ScalarType::Int, num_seqs + 1, "num_seqs + 1");
  check_dtype(kOp, "block_table", block_table, ScalarType::Int);
  check_dim(kOp, "block_table", block_table, 2, "[num_seqs, max_blocks_per_seq]");
  check_size(kOp, "block_table", block_table, 0, num_seqs, "the length of seq_lens");
  check_rows(kOp, "block_table", block_table);
  batch.input_ids = data<int64_t>(input_ids);
  batch.position_ids = data<int64_t>(position_ids);
  batch.slots = data<int64_t>(slot_mapping);
  batch.logits_indices = data<int64_t>(logits_indices);
  PagedBatch& paged = batch.paged;
  paged.num_seqs = num_seqs;
  paged.num_tokens = num_tokens;
  paged.query_start_loc = data<int32_t>(query_start_loc);
  paged.seq_lens = data<int32_t>(seq_lens);
  paged.block_table = data<int32_t>(block_table);
  paged.max_blocks_per_seq = block_table.size(1);
  paged.table_stride = block_table.stride(0);
  paged.num_blocks = kv_cache.size(2);
  paged.block_size = kv_cache.size(4);
  check_batch(kOp, paged);
  check_indices("input_ids", batch.input_ids, num_tokens, 0, embed.vocab_size, "a row of wte");
  check_indices("position_ids", batch.position_ids, num_tokens, 0, embed.n_positions, "a row of wpe");
  check_indices("slot_mapping", batch.slots, num_tokens, -1, paged.num_blocks * paged.block_size,
                "a slot of the cache, or -1 for none");
  check_indices("logits_indices", batch.logits_indices, num_logits, 0, num_tokens, "a token of this step");

  const bool has_head = plan.head != nullptr && plan.head->weight.n > 0;
  float* logits_out = check_result("logits", logits, num_logits, has_head ? plan.head->weight.n : logits.size(1));
  float* hidden_out = check_result("hidden", hidden, num_logits, plan.n_embd);
  GPT2RT_CHECK(logits_out == nullptr || has_head, kOp, ": logits has ", logits.size(0),
               " rows, but the plan has no head; pass [0, V]");
  const TopOutput top = check_top(kOp, top_ids, top_logits, num_logits, has_head ? plan.head->weight.n : 0);
  GPT2RT_CHECK(top.count == 0 || logits_out == nullptr, kOp,
               ": both logits and top_ids are wanted; pass logits [0, V]");
  GPT2RT_CHECK(hidden_out == nullptr || plan.head != nullptr, kOp, ": hidden has ", hidden.size(0),
               " rows, but the plan has no HEAD; pass [0, E]");

  const WorkspaceLayout layout = workspace_layout(kOp, plan, num_tokens, num_logits);
  check_contiguous(kOp, "workspace", workspace);
  const int64_t workspace_bytes = workspace.numel() * static_cast<int64_t>(workspace.element_size());
  GPT2RT_CHECK(workspace_bytes >= layout.bytes, kOp, ": workspace has ", workspace_bytes, " bytes, expected at least ",
               layout.bytes, "; ask cpu_step_workspace_bytes for ", num_tokens, " tokens and ", num_logits,
               " rows of logits");
  check_apart(kOp,
              {{"kv_cache", &kv_cache},
               {"kv_scales", given(kv_scales)},
               {"workspace", &workspace},
               {"logits", &logits},
               {"hidden", &hidden},
               {"times", given(times)},
               {"top_ids", given(top_ids)},
               {"top_logits", given(top_logits)}},
              {{"plan", &plan_rows},
               {"arena", &arena},
               {"wte", &wte},
               {"wpe", &wpe},
               {"input_ids", &input_ids},
               {"position_ids", &position_ids},
               {"query_start_loc", &query_start_loc},
               {"seq_lens", &seq_lens},
               {"block_table", &block_table},
               {"slot_mapping", &slot_mapping},
               {"logits_indices", &logits_indices}});
  if (num_tokens == 0) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  float* floats = reinterpret_cast<float*>((start + 63) / 64 * 64);

  Profile profile;
  std::optional<HeadSelection> selection;
  if (top.count > 0 && num_logits > 0) selection.emplace(kernels(), top, num_logits, threads);
  Step step(kernels(), plan, batch, cache, layout, floats, tables, logits_out,
            selection.has_value() ? &*selection : nullptr, hidden_out, times.has_value() ? &profile : nullptr, threads);
  if (times.has_value()) check_times(*times, step.phases().size());
  step.run();
  if (times.has_value()) write_times(*times, plan, step.phases(), profile);
}

int64_t cpu_step_workspace_bytes(const Tensor& plan_rows, int64_t num_tokens, int64_t num_logits) {
  const char* op = "cpu_step_workspace_bytes";
  return workspace_layout(op, read_plan(op, plan_rows, nullptr), num_tokens, num_logits).bytes;
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("cpu_step", TORCH_BOX(&gpt2rt::cpu_step));
  m.impl("cpu_step_workspace_bytes", TORCH_BOX(&gpt2rt::cpu_step_workspace_bytes));
}
