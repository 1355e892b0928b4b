// A whole forward step: the nodes of a plan as phases on the thread pool. Included by step.cpp alone, which has checked
// every argument.
//
// Everything is checked first; then the nodes run as phases on the thread pool with a barrier after each. A layer has
// five: norm + QKV + write to the cache | attention | projection + residual | norm + fc + activation | projection +
// residual. Rows that a weight wants normed, in bfloat16 or in int8 are prepared first: with few rows by every thread
// for itself (the same numbers), which is cheaper than a barrier, else in a phase of their own.
#pragma once

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
// bytes of the weight that a thread fetches to L2 for each row that it prepares so, while memory has nothing else to do
constexpr int64_t kFetchedBytes = 12288;

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

  // part number `part` of what this thread will read of the weight (gemm_part, head_top)
  static void fetch_weight(const PackedWeight& weight, int thread, int threads, int64_t part) {
    const Range panels = thread_range(num_panels(weight.n), thread, threads);
    const int64_t size = (panels.end - panels.begin) * panel_bytes(weight);
    const char* start = static_cast<const char*>(weight.data) + panels.begin * panel_bytes(weight);
    const int64_t end = std::min((part + 1) * kFetchedBytes, size);
    for (int64_t i = part * kFetchedBytes; i < end; i += 64) __builtin_prefetch(start + i, 0, 2);
  }

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
        for (int64_t t = 0; t < rows; ++t) {
          fetch_weight(node.weight, thread, threads, t);
          prepare_rows(node, buf_width, {t, t + 1}, own, scratch + rows * layout_.rows_stride);
        }
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
    attention_.part(k_, args, node.fast, cache_.head_dim, cache_.head_dim, batch_.paged, counter);
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
      for (int64_t r = 0; r < batch_.num_logits; ++r) {
        fetch_weight(node.weight, thread, threads, r);
        prepare_head_rows(node, {r, r + 1}, own, tile + tile_floats + own_floats);
      }
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

}  // namespace
}  // namespace gpt2rt
