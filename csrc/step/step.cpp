// cpu_step: a whole forward step in one call.
//
// Everything is checked first; then the nodes run as phases on the thread pool with a barrier after each. A layer has
// five: norm + QKV + write to the cache | attention | projection + residual | norm + fc + activation | projection +
// residual. Rows that a weight wants normed, in bfloat16 or in int8 are prepared first: with few rows by every thread
// for itself (the same numbers), which is cheaper than a barrier, else in a phase of their own.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "../cpu/linear.h"
#include "../cpu/paged_attention.h"
#include "../cpu/thread_pool.h"
#include "head.h"
#include "plan.h"

namespace gpt2rt {
namespace {

// rows up to which each thread prepares all of them for itself instead of sharing the work and waiting at a barrier:
// the norm of a row of 768 takes 0.14 us on Zen 4
constexpr int64_t kOwnRows = 8;

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
  int64_t half;   // elements of the keys or of the values of one layer
  float* scales;  // of an int8 cache, one for each row of head_dim elements, in the same order

  char* keys(int64_t layer) const { return static_cast<char*>(at(data, 2 * layer * half, dtype)); }
  char* values(int64_t layer) const { return static_cast<char*>(at(data, (2 * layer + 1) * half, dtype)); }
  float* key_scales(int64_t layer) const { return scales == nullptr ? nullptr : scales + 2 * layer * half / head_dim; }
  float* value_scales(int64_t layer) const {
    return scales == nullptr ? nullptr : scales + (2 * layer + 1) * half / head_dim;
  }
};

// the codes are those of the profile (gpt2rt.graph.cpu)
enum class PhaseKind {
  kEmbed,
  kRows,
  kNormInPlace,
  kLinear,
  kAttention,
  kHeadRows,
  kHeadLinear,
  kWriteCache,
  kHeadTop
};

struct Phase {
  PhaseKind kind;
  const Node* node;
  int64_t buf_width;  // width of the buffer that a LINEAR_RESIDUAL reads
};

struct Tables {
  const void* wte;  // unused where the plan has a packed table
  DType wte_dtype;
  const void* wpe;
  DType wpe_dtype;
};

// When each phase began, as thread 0 saw it.
class Profile {
 public:
  void start(int phase) {
    starts_.resize(static_cast<size_t>(phase) + 1);
    starts_.back() = std::chrono::steady_clock::now();
  }

  double seconds(size_t phase, std::chrono::steady_clock::time_point end) const {
    const auto stop = phase + 1 < starts_.size() ? starts_[phase + 1] : end;
    return std::chrono::duration<double>(stop - starts_[phase]).count();
  }

 private:
  std::vector<std::chrono::steady_clock::time_point> starts_;
};

class Step {
 public:
  Step(const Kernels& kernels, const Plan& plan, const Batch& batch, const Cache& cache, const WorkspaceLayout& layout,
       float* workspace, const Tables& tables, float* logits, HeadSelection* top, float* hidden, Profile* profile,
       int num_threads)
      : k_(kernels),
        plan_(plan),
        batch_(batch),
        cache_(cache),
        layout_(layout),
        x_(workspace + layout.x),
        rows_(reinterpret_cast<char*>(workspace + layout.rows)),
        qkv_(workspace + layout.qkv),
        buf_(workspace + layout.buf),
        head_rows_(reinterpret_cast<char*>(workspace + layout.head)),
        tables_(tables),
        logits_(logits),
        top_(top),
        hidden_(hidden),
        profile_(profile),
        num_threads_(num_threads) {
    build_phases();
    counters_ = std::vector<std::atomic<int64_t>>(phases_.size());
    if (plan.qkv_width > 0) {
      attention_ = AttentionWork(batch.paged, cache.num_heads, cache.head_dim, num_threads);
    }
  }

  const std::vector<Phase>& phases() const { return phases_; }

  void run() {
    run_phases(num_threads_, static_cast<int>(phases_.size()), [this](int phase, int thread, int threads) {
      if (profile_ != nullptr && thread == 0) profile_->start(phase);
      run_phase(phases_[static_cast<size_t>(phase)], counters_[static_cast<size_t>(phase)], thread, threads);
    });
  }

 private:
  bool own_rows() const { return batch_.num_tokens <= kOwnRows; }
  // with a hidden tensor the rows are stored anyway
  bool own_head_rows() const { return batch_.num_logits <= kOwnRows && hidden_ == nullptr; }
  bool wants_head() const { return logits_ != nullptr || top_ != nullptr; }

  void build_phases() {
    int64_t buf_width = 0;
    for (const Node& node : plan_.nodes) {
      switch (node.opcode) {
        case Opcode::kEmbed:
          phases_.push_back({PhaseKind::kEmbed, &node, 0});
          break;
        case Opcode::kNormQkv:
        case Opcode::kNormLinearAct:
          if (prepares_rows(node) && !own_rows()) phases_.push_back({PhaseKind::kRows, &node, 0});
          phases_.push_back({PhaseKind::kLinear, &node, 0});
          if (node.opcode == Opcode::kNormLinearAct) buf_width = node.weight.n;
          if (node.opcode == Opcode::kNormQkv && cache_.scales != nullptr) {
            phases_.push_back({PhaseKind::kWriteCache, &node, 0});
          }
          break;
        case Opcode::kAttention:
          phases_.push_back({PhaseKind::kAttention, &node, 0});
          buf_width = plan_.n_embd;
          break;
        case Opcode::kLinearResidual:
          if (prepares_rows(node) && !own_rows()) phases_.push_back({PhaseKind::kRows, &node, buf_width});
          phases_.push_back({PhaseKind::kLinear, &node, buf_width});
          break;
        case Opcode::kNorm:
          phases_.push_back({PhaseKind::kNormInPlace, &node, 0});
          break;
        case Opcode::kHead:
          if (hidden_ != nullptr || (wants_head() && !own_head_rows())) {
            phases_.push_back({PhaseKind::kHeadRows, &node, 0});
          }
          if (wants_head()) phases_.push_back({PhaseKind::kHeadLinear, &node, 0});
          if (top_ != nullptr) phases_.push_back({PhaseKind::kHeadTop, &node, 0});
          break;
      }
    }
  }

  void run_phase(const Phase& phase, std::atomic<int64_t>& counter, int thread, int threads) {
    const Node& node = *phase.node;
    switch (phase.kind) {
      case PhaseKind::kEmbed:
        return embed(thread_range(batch_.num_tokens, thread, threads));
      case PhaseKind::kRows:
        return prepare_rows(node, phase.buf_width, thread_range(batch_.num_tokens, thread, threads), rows_,
                            thread_scratch_floats(plan_.n_embd));
      case PhaseKind::kNormInPlace:
        return norm_in_place(node, thread_range(batch_.num_tokens, thread, threads));
      case PhaseKind::kLinear:
        return linear(node, phase.buf_width, counter, thread, threads);
      case PhaseKind::kWriteCache:
        return quantize_to_cache(node.layer, thread_range(batch_.num_tokens * cache_.num_heads, thread, threads));
      case PhaseKind::kAttention:
        return attention(node, counter);
      case PhaseKind::kHeadRows:
        return prepare_head_rows(node, thread_range(batch_.num_logits, thread, threads), head_rows_,
                                 thread_scratch_floats(plan_.n_embd));
      case PhaseKind::kHeadLinear:
        return head_linear(node, counter, thread, threads);
      case PhaseKind::kHeadTop: {
        const Range rows = thread_range(batch_.num_logits, thread, threads);
        return top_->finish(rows.begin, rows.end, threads);
      }
    }
  }

  void embed(Range rows) const {
    const int64_t n = plan_.n_embd;
    const PackedWeight& packed = plan_.nodes.front().weight;
    const DType wpe_dtype = tables_.wpe_dtype;
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      const int64_t id = batch_.input_ids[t];
      const void* position = at(tables_.wpe, batch_.position_ids[t] * n, wpe_dtype);
      float* x = x_ + t * layout_.x_stride;
      if (packed.data == nullptr && tables_.wte_dtype == wpe_dtype) {
        k_.add_row_f32(wpe_dtype, at(tables_.wte, id * n, wpe_dtype), position, n, x);
        continue;
      }
      float* wide = thread_scratch_floats(n);
      if (packed.data != nullptr) {
        k_.unpack_row(packed, id, x);
      } else {
        k_.convert_row(tables_.wte_dtype, at(tables_.wte, id * n, tables_.wte_dtype), DType::kFloat32, x, n);
      }
      k_.convert_row(wpe_dtype, position, DType::kFloat32, wide, n);
      k_.add_row_f32(DType::kFloat32, x, wide, n, x);
    }
  }

  void norm_row(const Node& node, int64_t row, float* y) const {
    k_.layer_norm_row(DType::kFloat32, x_ + row * layout_.x_stride, node.norm_weight, node.norm_bias, node.eps,
                      plan_.n_embd, y);
  }

  void norm_in_place(const Node& node, Range rows) const {
    for (int64_t t = rows.begin; t < rows.end; ++t) norm_row(node, t, x_ + t * layout_.x_stride);
  }

  int64_t rows_bytes() const { return layout_.rows_stride * 4; }
  int64_t head_bytes() const { return layout_.head_stride * 4; }

  // rows of the stream through the node's norm, or of the buffer, as its weight wants them; scratch holds n_embd floats
  void prepare_rows(const Node& node, int64_t buf_width, Range rows, char* out, float* scratch) const {
    const bool as_they_are = node.weight.rows == RowFormat::kFloat32;
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      char* target = out + t * rows_bytes();
      const float* x =
          node.opcode == Opcode::kLinearResidual ? buf_ + t * row_stride(buf_width) : x_ + t * layout_.x_stride;
      if (node.has_norm) {
        float* normed = as_they_are ? reinterpret_cast<float*>(target) : scratch;
        norm_row(node, t, normed);
        x = normed;
      }
      if (!as_they_are) k_.prepare_row(node.weight, x, target);
    }
  }

  // row r of the head is norm(x[logits_indices[r]]); scratch holds n_embd floats
  void prepare_head_rows(const Node& node, Range rows, char* out, float* scratch) const {
    const int64_t n = plan_.n_embd;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t row = batch_.logits_indices[r];
      float* normed = hidden_ != nullptr ? hidden_ + r * n : scratch;
      if (node.has_norm) {
        norm_row(node, row, normed);
      } else {
        std::memcpy(normed, x_ + row * layout_.x_stride, static_cast<size_t>(n) * sizeof(float));
      }
      if (wants_head()) k_.prepare_row(node.weight, normed, out + r * head_bytes());
    }
  }

  static GemmArgs gemm_args(const Node& node, int64_t rows) {
    GemmArgs args{};
    args.m = rows;
    args.weight = node.weight;
    args.bias = node.bias;
    args.activation = node.activation;
    args.y_dtype = DType::kFloat32;
    return args;
  }

  void linear(const Node& node, int64_t buf_width, std::atomic<int64_t>& counter, int thread, int threads) const {
    const int64_t rows = batch_.num_tokens;
    GemmArgs args = gemm_args(node, rows);
    const bool residual = node.opcode == Opcode::kLinearResidual, qkv = node.opcode == Opcode::kNormQkv;
    if (!prepares_rows(node)) {
      // float32 rows, or what the node before has written in the same place
      args.x = residual ? buf_ : x_;
      args.ldx = 4 * (residual ? row_stride(buf_width) : layout_.x_stride);
    } else {
      args.x = rows_;
      args.ldx = rows_bytes();
      if (own_rows()) {
        float* scratch = thread_scratch_floats(rows * layout_.rows_stride + plan_.n_embd);
        char* own = reinterpret_cast<char*>(scratch);
        prepare_rows(node, buf_width, {0, rows}, own, scratch + rows * layout_.rows_stride);
        args.x = own;
      }
    }
    if (residual) {
      args.residual = args.y = x_;
      args.ld_residual = layout_.x_stride;
      args.ldy = layout_.x_stride * 4;
    } else {
      args.y = qkv ? qkv_ : buf_;
      args.ldy = 4 * (qkv ? layout_.qkv_stride : row_stride(node.weight.n));
      args.y_dtype = node.y_dtype;
      args.y_group = node.y_group;
    }
    gemm_part(k_, args, thread, threads, counter, [&](int64_t row, int64_t count, int64_t column, int64_t end) {
      if (qkv && cache_.scales == nullptr) write_cache(node.layer, row, count, column, end);
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

  // int8 cache: a head's scale needs the whole head, which two threads may have computed, so this is a phase of its own
  void quantize_to_cache(int64_t layer, Range items) const {
    const int64_t n = plan_.n_embd, head_dim = cache_.head_dim, block_size = batch_.paged.block_size;
    for (int64_t i = items.begin; i < items.end; ++i) {
      const int64_t t = i / cache_.num_heads, head = i % cache_.num_heads, slot = batch_.slots[t];
      if (slot < 0) continue;
      const int64_t row = ((slot / block_size) * cache_.num_heads + head) * block_size + slot % block_size;
      const float* key = qkv_ + t * layout_.qkv_stride + n + head * head_dim;
      write_cache_row(k_, DType::kFloat32, key, head_dim, cache_.dtype, cache_.keys(layer), cache_.key_scales(layer),
                      row);
      write_cache_row(k_, DType::kFloat32, key + n, head_dim, cache_.dtype, cache_.values(layer),
                      cache_.value_scales(layer), row);
    }
  }

  void attention(const Node& node, std::atomic<int64_t>& counter) {
    AttentionArgs args{};
    args.query = qkv_;
    args.query_dtype = DType::kFloat32;
    args.out_dtype = node.y_dtype;
    args.query_stride = layout_.qkv_stride;
    args.key = cache_.keys(node.layer);
    args.value = cache_.values(node.layer);
    args.cache_dtype = cache_.dtype;
    args.key_scales = cache_.key_scales(node.layer);
    args.value_scales = cache_.value_scales(node.layer);
    args.block_size = batch_.paged.block_size;
    args.block_stride = cache_.num_heads * args.block_size * cache_.head_dim;
    args.head_dim = cache_.head_dim;
    args.scale = node.scale;
    args.out = buf_;
    // the buffer's rows lie as far apart in either dtype
    args.out_stride = row_stride(plan_.n_embd) * 4 / item_size(node.y_dtype);
    attention_.part(k_, args, cache_.head_dim, cache_.head_dim, batch_.paged, counter);
  }

  void head_linear(const Node& node, std::atomic<int64_t>& counter, int thread, int threads) const {
    GemmArgs args = gemm_args(node, batch_.num_logits);
    args.x = head_rows_;
    args.ldx = head_bytes();
    args.y = logits_;
    args.ldy = node.weight.n * 4;
    const int64_t tile_floats = top_ != nullptr ? batch_.num_logits * top_columns() : 0;
    const int64_t own_floats = own_head_rows() ? batch_.num_logits * layout_.head_stride : 0;
    float* tile = thread_scratch_floats(tile_floats + own_floats + plan_.n_embd);
    if (own_head_rows()) {
      // each row is a whole number of cache lines, so everything stays aligned
      char* own = reinterpret_cast<char*>(tile + tile_floats);
      prepare_head_rows(node, {0, batch_.num_logits}, own, tile + tile_floats + own_floats);
      args.x = own;
    }
    if (top_ != nullptr) return head_top(args, tile, thread, threads);
    gemm_part(k_, args, thread, threads, counter, [](int64_t, int64_t, int64_t, int64_t) {});
  }

  // columns of a tile of logits: a good part of the L1 cache for few rows, one panel for many
  int64_t top_columns() const {
    return kPanel * std::clamp(128 / (batch_.num_logits + 1), int64_t{1}, HeadSelection::kMaxColumns / kPanel);
  }

  // the head for a contiguous range of panels; logits live in the tile only, while they are looked at
  void head_top(GemmArgs args, float* tile, int thread, int threads) const {
    const int64_t columns = top_columns(), n = args.weight.n;
    const Range range = thread_range(num_panels(n), thread, threads);
    args.ldy = columns * 4;
    for (int64_t panel = range.begin; panel < range.end; panel = args.panel_end) {
      args.panel_begin = panel;
      args.panel_end = panel + columns / kPanel < range.end ? panel + columns / kPanel : range.end;
      const int64_t begin = panel * kPanel, end = args.panel_end * kPanel < n ? args.panel_end * kPanel : n;
      // the kernel writes column c of a row to y[c]
      args.y =
          reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(tile) - static_cast<uintptr_t>(begin) * sizeof(float));
      gemm(k_, args);
      top_->add(thread, tile, columns, begin, end);
    }
  }

  const Kernels& k_;
  const Plan& plan_;
  const Batch& batch_;
  const Cache& cache_;
  const WorkspaceLayout& layout_;
  float* x_;
  char* rows_;
  float* qkv_;
  float* buf_;
  char* head_rows_;
  const Tables& tables_;
  float* logits_;
  HeadSelection* top_;
  float* hidden_;
  Profile* profile_;
  int num_threads_;
  std::vector<Phase> phases_;
  std::vector<std::atomic<int64_t>> counters_;
  AttentionWork attention_;
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
