// cpu_step: a whole forward step in one call.
//
// Everything is checked first; then the nodes run as phases on the thread pool with a barrier after each. A layer has
// five: norm + QKV + write to the cache | attention | projection + residual | norm + fc + activation | projection +
// residual. With few rows every thread computes the norm itself (the same numbers), which is cheaper than a barrier.
#include <atomic>
#include <cstring>
#include <vector>

#include "../cpu/linear.h"
#include "../cpu/paged_attention.h"
#include "../cpu/thread_pool.h"
#include "plan.h"

namespace gpt2rt {
namespace {

// rows up to which each thread computes a norm for itself instead of sharing the work and waiting at a barrier: a row
// of 768 takes 0.14 us on Zen 4
constexpr int64_t kOwnNormRows = 8;

struct Batch {
  int64_t num_tokens;
  int64_t num_logits;
  const int64_t* input_ids;
  const int64_t* position_ids;
  const int64_t* slots;
  const int64_t* logits_indices;
  PagedBatch paged;
};

struct Cache {
  char* data;
  DType dtype;
  int64_t num_heads;
  int64_t head_dim;
  int64_t half;  // elements of the keys or of the values of one layer

  char* keys(int64_t layer) const { return static_cast<char*>(at(data, 2 * layer * half, dtype)); }
  char* values(int64_t layer) const { return static_cast<char*>(at(data, (2 * layer + 1) * half, dtype)); }
};

enum class PhaseKind { kEmbed, kNormRows, kNormInPlace, kLinear, kAttention, kHeadRows, kHeadLinear };

struct Phase {
  PhaseKind kind;
  const Node* node;
  int64_t buf_width;  // width of the buffer that a LINEAR_RESIDUAL reads
};

class Step {
 public:
  Step(const Kernels& kernels, const Plan& plan, const Batch& batch, const Cache& cache, const WorkspaceLayout& layout,
       float* workspace, const void* wte, const void* wpe, DType table_dtype, float* logits, float* hidden)
      : k_(kernels),
        plan_(plan),
        batch_(batch),
        cache_(cache),
        layout_(layout),
        x_(workspace + layout.x),
        normed_(workspace + layout.normed),
        qkv_(workspace + layout.qkv),
        buf_(workspace + layout.buf),
        head_rows_(hidden != nullptr ? hidden : workspace + layout.head),
        head_stride_(hidden != nullptr ? plan.n_embd : layout.head_stride),
        wte_(wte),
        wpe_(wpe),
        table_dtype_(table_dtype),
        logits_(logits),
        hidden_(hidden) {
    build_phases();
    counters_ = std::vector<std::atomic<int64_t>>(phases_.size());
    if (plan.qkv_width > 0) tiles_ = attention_tiles(batch.paged, cache.num_heads);
  }

  void run(int num_threads) {
    run_phases(num_threads, static_cast<int>(phases_.size()), [this](int phase, int thread, int threads) {
      run_phase(phases_[static_cast<size_t>(phase)], counters_[static_cast<size_t>(phase)], thread, threads);
    });
  }

 private:
  bool own_norm() const { return batch_.num_tokens <= kOwnNormRows; }
  // with a hidden tensor the rows are stored anyway
  bool own_head_rows() const { return batch_.num_logits <= kOwnNormRows && hidden_ == nullptr; }

  void build_phases() {
    int64_t buf_width = 0;
    for (const Node& node : plan_.nodes) {
      switch (node.opcode) {
        case Opcode::kEmbed:
          phases_.push_back({PhaseKind::kEmbed, &node, 0});
          break;
        case Opcode::kNormQkv:
        case Opcode::kNormLinearAct:
          if (node.norm_weight != nullptr && !own_norm()) phases_.push_back({PhaseKind::kNormRows, &node, 0});
          phases_.push_back({PhaseKind::kLinear, &node, 0});
          if (node.opcode == Opcode::kNormLinearAct) buf_width = node.n;
          break;
        case Opcode::kAttention:
          phases_.push_back({PhaseKind::kAttention, &node, 0});
          buf_width = plan_.n_embd;
          break;
        case Opcode::kLinearResidual:
          phases_.push_back({PhaseKind::kLinear, &node, buf_width});
          break;
        case Opcode::kNorm:
          phases_.push_back({PhaseKind::kNormInPlace, &node, 0});
          break;
        case Opcode::kHead:
          if (hidden_ != nullptr || (logits_ != nullptr && !own_head_rows())) {
            phases_.push_back({PhaseKind::kHeadRows, &node, 0});
          }
          if (logits_ != nullptr) phases_.push_back({PhaseKind::kHeadLinear, &node, 0});
          break;
      }
    }
  }

  void run_phase(const Phase& phase, std::atomic<int64_t>& counter, int thread, int threads) {
    const Node& node = *phase.node;
    switch (phase.kind) {
      case PhaseKind::kEmbed:
        return embed(thread_range(batch_.num_tokens, thread, threads));
      case PhaseKind::kNormRows:
        return norm_rows(node, thread_range(batch_.num_tokens, thread, threads), normed_, layout_.normed_stride);
      case PhaseKind::kNormInPlace:
        return norm_rows(node, thread_range(batch_.num_tokens, thread, threads), x_, layout_.x_stride);
      case PhaseKind::kLinear:
        return linear(node, phase.buf_width, counter, thread, threads);
      case PhaseKind::kAttention:
        return attention(node, counter);
      case PhaseKind::kHeadRows:
        return gather_head_rows(node, thread_range(batch_.num_logits, thread, threads), head_rows_, head_stride_);
      case PhaseKind::kHeadLinear:
        return head_linear(node, counter, thread, threads);
    }
  }

  void embed(Range rows) const {
    const int64_t n = plan_.n_embd;
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      k_.add_row_f32(table_dtype_, at(wte_, batch_.input_ids[t] * n, table_dtype_),
                     at(wpe_, batch_.position_ids[t] * n, table_dtype_), n, x_ + t * layout_.x_stride);
    }
  }

  void norm_row(const Node& node, int64_t row, float* y) const {
    k_.layer_norm_row(DType::kFloat32, x_ + row * layout_.x_stride, node.norm_weight, node.norm_bias, node.eps,
                      plan_.n_embd, y);
  }

  void norm_rows(const Node& node, Range rows, float* y, int64_t stride) const {
    for (int64_t t = rows.begin; t < rows.end; ++t) norm_row(node, t, y + t * stride);
  }

  // rows[r] = norm(x[logits_indices[r]])
  void gather_head_rows(const Node& node, Range rows, float* y, int64_t stride) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t row = batch_.logits_indices[r];
      if (node.norm_weight != nullptr) {
        norm_row(node, row, y + r * stride);
      } else {
        std::memcpy(y + r * stride, x_ + row * layout_.x_stride, static_cast<size_t>(plan_.n_embd) * sizeof(float));
      }
    }
  }

  static GemmArgs gemm_args(const Node& node, int64_t rows) {
    GemmArgs args{};
    args.m = rows;
    args.k = node.k;
    args.weight = node.weight;
    args.weight_dtype = node.weight_dtype;
    args.n = node.n;
    args.bias = node.bias;
    args.activation = node.activation;
    args.y_dtype = DType::kFloat32;
    return args;
  }

  void linear(const Node& node, int64_t buf_width, std::atomic<int64_t>& counter, int thread, int threads) const {
    const int64_t rows = batch_.num_tokens;
    GemmArgs args = gemm_args(node, rows);
    if (node.opcode == Opcode::kLinearResidual) {
      args.x = buf_;
      args.ldx = row_stride(buf_width);
      args.residual = args.y = x_;
      args.ld_residual = args.ldy = layout_.x_stride;
    } else {
      args.x = x_;
      args.ldx = layout_.x_stride;
      if (node.norm_weight != nullptr) {
        args.x = normed_;
        args.ldx = layout_.normed_stride;
        if (own_norm()) {
          float* own = thread_scratch_floats(rows * layout_.normed_stride);
          norm_rows(node, {0, rows}, own, layout_.normed_stride);
          args.x = own;
        }
      }
      const bool qkv = node.opcode == Opcode::kNormQkv;
      args.y = qkv ? qkv_ : buf_;
      args.ldy = qkv ? layout_.qkv_stride : row_stride(node.n);
    }
    gemm_part(k_, args, thread, threads, counter, [&](int64_t row, int64_t count, int64_t column, int64_t end) {
      if (node.opcode == Opcode::kNormQkv) write_cache(node.layer, row, count, column, end);
    });
  }

  // the part of the keys and values in columns column..end of the QKV rows goes to the tokens' slots
  void write_cache(int64_t layer, int64_t first_row, int64_t rows, int64_t column, int64_t end) const {
    const int64_t n = plan_.n_embd, head_dim = cache_.head_dim, block_size = batch_.paged.block_size;
    column = column > n ? column : n;
    while (column < end) {
      // a run of columns within one head of the keys or of the values
      const bool value = column >= 2 * n;
      const int64_t within = column - (value ? 2 * n : n);
      const int64_t head = within / head_dim, first = within % head_dim;
      const int64_t count = head_dim - first < end - column ? head_dim - first : end - column;
      char* target = value ? cache_.values(layer) : cache_.keys(layer);
      for (int64_t t = first_row; t < first_row + rows; ++t) {
        const int64_t slot = batch_.slots[t];
        if (slot < 0) continue;
        const int64_t row = ((slot / block_size) * cache_.num_heads + head) * block_size + slot % block_size;
        k_.convert_row(DType::kFloat32, qkv_ + t * layout_.qkv_stride + column, cache_.dtype,
                       at(target, row * head_dim + first, cache_.dtype), count);
      }
      column += count;
    }
  }

  void attention(const Node& node, std::atomic<int64_t>& counter) const {
    AttentionArgs args{};
    args.query = qkv_;
    args.query_dtype = args.out_dtype = DType::kFloat32;
    args.query_stride = layout_.qkv_stride;
    args.key = cache_.keys(node.layer);
    args.value = cache_.values(node.layer);
    args.cache_dtype = cache_.dtype;
    args.block_size = batch_.paged.block_size;
    args.block_stride = cache_.num_heads * args.block_size * cache_.head_dim;
    args.head_dim = cache_.head_dim;
    args.scale = node.scale;
    args.out = buf_;
    args.out_stride = row_stride(plan_.n_embd);
    attention_part(k_, args, cache_.head_dim, cache_.head_dim, batch_.paged, tiles_, counter);
  }

  void head_linear(const Node& node, std::atomic<int64_t>& counter, int thread, int threads) const {
    GemmArgs args = gemm_args(node, batch_.num_logits);
    args.x = head_rows_;
    args.ldx = head_stride_;
    args.y = logits_;
    args.ldy = node.n;
    if (own_head_rows()) {
      float* own = thread_scratch_floats(batch_.num_logits * head_stride_);
      gather_head_rows(node, {0, batch_.num_logits}, own, head_stride_);
      args.x = own;
    }
    gemm_part(k_, args, thread, threads, counter, [](int64_t, int64_t, int64_t, int64_t) {});
  }

  const Kernels& k_;
  const Plan& plan_;
  const Batch& batch_;
  const Cache& cache_;
  const WorkspaceLayout& layout_;
  float* x_;
  float* normed_;
  float* qkv_;
  float* buf_;
  float* head_rows_;
  int64_t head_stride_;
  const void* wte_;
  const void* wpe_;
  DType table_dtype_;
  float* logits_;
  float* hidden_;
  std::vector<Phase> phases_;
  std::vector<std::atomic<int64_t>> counters_;
  std::vector<AttentionTile> tiles_;
};

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
Cache check_cache(const Tensor& t, const Plan& plan) {
  Cache cache{};
  cache.dtype = check_storage(kOp, "kv_cache", t);
  check_dim(kOp, "kv_cache", t, 6, "[n_layer, 2, num_blocks, n_head, block_size, head_dim]");
  check_size(kOp, "kv_cache", t, 1, 2, "keys and values");
  check_contiguous(kOp, "kv_cache", t);
  cache.num_heads = t.size(3);
  cache.head_dim = t.size(5);
  GPT2RT_CHECK(t.size(4) >= 1, kOp, ": kv_cache ", shape_text(t), " has blocks of 0 tokens");
  cache.half = t.size(2) * t.size(3) * t.size(4) * t.size(5);
  cache.data = mutable_data<char>(t);
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

void cpu_step(const Tensor& plan_rows, const Tensor& arena, const Tensor& wte, const Tensor& wpe,
              const Tensor& input_ids, const Tensor& position_ids, const Tensor& query_start_loc,
              const Tensor& seq_lens, const Tensor& block_table, const Tensor& slot_mapping,
              const Tensor& logits_indices, const Tensor& kv_cache, const Tensor& workspace, const Tensor& logits,
              const Tensor& hidden, int64_t num_threads) {
  const Plan plan = read_plan(kOp, plan_rows, &arena);
  const int threads = resolve_num_threads(num_threads);
  const Node& embed = plan.nodes.front();
  const DType table_dtype = check_table("wte", wte, embed.vocab_size, plan.n_embd);
  check_table("wpe", wpe, embed.n_positions, plan.n_embd);
  check_same_dtype(kOp, "wpe", wpe, "wte", wte);
  const Cache cache = check_cache(kv_cache, plan);

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

  const bool has_head = plan.head != nullptr && plan.head->n > 0;
  float* logits_out = check_result("logits", logits, num_logits, has_head ? plan.head->n : logits.size(1));
  float* hidden_out = check_result("hidden", hidden, num_logits, plan.n_embd);
  GPT2RT_CHECK(logits_out == nullptr || has_head, kOp, ": logits has ", logits.size(0),
               " rows, but the plan has no head; pass [0, V]");
  GPT2RT_CHECK(hidden_out == nullptr || plan.head != nullptr, kOp, ": hidden has ", hidden.size(0),
               " rows, but the plan has no HEAD; pass [0, E]");

  const WorkspaceLayout layout = workspace_layout(kOp, plan, num_tokens, num_logits);
  check_contiguous(kOp, "workspace", workspace);
  const int64_t workspace_bytes = workspace.numel() * static_cast<int64_t>(workspace.element_size());
  GPT2RT_CHECK(workspace_bytes >= layout.bytes, kOp, ": workspace has ", workspace_bytes, " bytes, expected at least ",
               layout.bytes, "; ask cpu_step_workspace_bytes for ", num_tokens, " tokens and ", num_logits,
               " rows of logits");
  if (num_tokens == 0) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  float* floats = reinterpret_cast<float*>((start + 63) / 64 * 64);

  Step step(kernels(), plan, batch, cache, layout, floats, wte.const_data_ptr(), wpe.const_data_ptr(), table_dtype,
            logits_out, hidden_out);
  step.run(threads);
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
