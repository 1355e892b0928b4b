#include "plan.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "../cpu/linear.h"

namespace gpt2rt {
namespace {

constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();

// a product of sizes, or the error of a step that no memory could hold
int64_t product(const char* op, std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    GPT2RT_CHECK(!__builtin_mul_overflow(result, factor, &result), op,
                 ": sizes multiply to more than 2^63; the plan or the number of tokens is damaged");
  }
  return result;
}

// reads one row, naming what it reads in errors
class RowReader {
 public:
  RowReader(const char* op, const int64_t* row, int64_t index, const Tensor* arena)
      : op_(op), row_(row), index_(index) {
    if (arena != nullptr) {
      base_ = data<char>(*arena);
      size_ = arena->size(0);
    }
  }

  [[noreturn]] void fail(const std::string& what) const { raise<std::invalid_argument>(where(), what); }

  std::string where() const { return std::string(op_) + ": plan row " + std::to_string(index_) + ": "; }

  int64_t size(int field, const char* name) const {
    GPT2RT_CHECK(row_[field] >= 1 && row_[field] <= kMaxSize, where(), name, " is ", row_[field], ", expected 1 to ",
                 kMaxSize);
    return row_[field];
  }

  float real(int field, const char* name) const {
    double value;
    std::memcpy(&value, &row_[field], sizeof(value));
    GPT2RT_CHECK(std::isfinite(value), where(), name, " is ", value, ", expected a finite number");
    return static_cast<float>(value);
  }

  float eps() const {
    const float value = real(9, "eps");
    GPT2RT_CHECK(value >= 0.0f, where(), "eps is ", value, ", expected 0 or more");
    return value;
  }

  bool absent(int field) const { return row_[field] == -1; }

  // bytes at an offset of the arena; null without an arena
  const char* bytes(int field, const char* name, int64_t length, int64_t alignment) const {
    if (base_ == nullptr) return nullptr;
    const int64_t offset = row_[field];
    GPT2RT_CHECK(offset >= 0 && length <= size_ && offset <= size_ - length, where(), name, " lies at bytes ", offset,
                 " to ", offset, " + ", length, ", outside the arena of ", size_, " bytes");
    GPT2RT_CHECK(offset % alignment == 0, where(), name, " lies at byte ", offset, ", expected a multiple of ",
                 alignment);
    return base_ + offset;
  }

  const float* vector(int field, const char* name, int64_t n) const {
    return reinterpret_cast<const float*>(bytes(field, name, n * 4, 4));
  }

  void norm(Node& node, int64_t n) const {
    if (absent(1)) return;
    node.has_norm = true;
    node.eps = eps();
    node.norm_weight = vector(1, "the norm's weight", n);
    node.norm_bias = vector(2, "the norm's bias", n);
  }

  // the weight of n x k at the offset in `field`; without an arena its data is null
  void weight(Node& node, int field, int64_t n, int64_t k) const {
    PackedWeight& w = node.weight;
    w.n = n;
    w.k = k;
    GPT2RT_CHECK(row_[7] >= 0 && row_[7] < kNumWeightFormats, where(), "weight format is ", row_[7],
                 ", expected 0 (float32), 1 (bfloat16), 2 (float16), 3 (int8), 4 (int4) or 5 (4-bit codes)");
    w.format = static_cast<WeightFormat>(row_[7]);
    if (is_4bit(w.format)) {
      w.group = row_[11];
      GPT2RT_CHECK(w.group >= kMinGroup && w.group <= kMaxGroup && w.group % kMinGroup == 0, where(), "group size is ",
                   w.group, ", expected a multiple of ", kMinGroup, " up to ", kMaxGroup);
    }
    if (w.format == WeightFormat::kCode4) {
      GPT2RT_CHECK(k % w.group == 0, where(), "K is ", k, ", expected a multiple of the group size ", w.group);
      w.codebook = vector(13, "the codebook", 16);
    }
    w.zeros = w.format == WeightFormat::kInt4 && flag(14, "the flag of zero points");
    w.rows = row_format(kernels(), w.format, flag(12, "the arithmetic"));
    w.data = bytes(field, "the packed weight", product(op_, {num_panels(n), panel_bytes(w)}), 64);
  }

  void linear(Node& node) const {
    const int64_t k = size(5, "K"), n = size(6, "N");
    weight(node, 3, n, k);
    if (!absent(4)) node.bias = vector(4, "the bias", n);
  }

  bool flag(int field, const char* name) const {
    GPT2RT_CHECK(row_[field] == 0 || row_[field] == 1, where(), name, " is ", row_[field], ", expected 0 or 1");
    return row_[field] == 1;
  }

  int64_t field(int i) const { return row_[i]; }

  void expect(bool condition, const char* name, int64_t value, int64_t expected, const char* meaning) const {
    GPT2RT_CHECK(condition, where(), name, " is ", value, ", expected ", expected, ", ", meaning);
  }

 private:
  const char* op_;
  const int64_t* row_;
  int64_t index_;
  const char* base_ = nullptr;
  int64_t size_ = 0;
};

// whether `writer` can write its result as `reader` wants it; if so, it will. int8 groups must lie within the panels of
// 64 columns that a matrix multiplication finishes at once
bool write_rows_for(Node& writer, const PackedWeight& reader) {
  if (reader.rows == RowFormat::kBFloat16 && reader.k % 2 == 0) {
    writer.y_dtype = DType::kBFloat16;
    return true;
  }
  const int64_t group = row_group(reader.format, reader.group);
  if (reader.rows == RowFormat::kInt8 && writer.opcode == Opcode::kNormLinearAct && reader.k % kPanel == 0 &&
      kPanel % group == 0) {
    writer.y_group = group;
    return true;
  }
  return false;
}

}  // namespace

Plan read_plan(const char* op, const Tensor& tensor, const Tensor* arena) {
  check_dtype(op, "plan", tensor, ScalarType::Long);
  check_dim(op, "plan", tensor, 2, "[num_nodes, 16]");
  check_size(op, "plan", tensor, 1, kPlanColumns, "the fields of a node");
  check_contiguous(op, "plan", tensor);
  if (arena != nullptr) {
    check_dtype(op, "arena", *arena, ScalarType::Byte);
    check_dim(op, "arena", *arena, 1, "one dimension of bytes");
    check_contiguous(op, "arena", *arena);
    GPT2RT_CHECK(arena->size(0) == 0 || reinterpret_cast<uintptr_t>(arena->const_data_ptr()) % 64 == 0, op,
                 ": arena must start at a multiple of 64 bytes");
  }
  const int64_t num_nodes = tensor.size(0);
  const int64_t* rows = data<int64_t>(tensor);
  Plan plan{};
  plan.nodes.reserve(static_cast<size_t>(num_nodes));
  int64_t qkv_layer = -1;  // layer whose q, k, v the workspace holds
  int64_t buf_width = 0;   // width of what the buffer holds, 0: nothing
  size_t buf_node = 0;     // who wrote it
  for (int64_t i = 0; i < num_nodes; ++i) {
    const RowReader row(op, rows + i * kPlanColumns, i, arena);
    Node node{};
    node.opcode = static_cast<Opcode>(row.field(0));
    bool read_buffer = false;
    if ((i == 0) != (node.opcode == Opcode::kEmbed)) row.fail("EMBED (opcode 0) must be the first row and no other");
    if (plan.head != nullptr) row.fail("nothing may follow HEAD (opcode 6)");
    switch (node.opcode) {
      case Opcode::kEmbed:
        node.vocab_size = row.size(1, "V");
        node.n_positions = row.size(2, "P");
        plan.n_embd = row.size(3, "E");
        if (!row.absent(4)) row.weight(node, 4, node.vocab_size, plan.n_embd);
        break;
      case Opcode::kNormQkv:
        row.linear(node);
        row.expect(node.weight.k == plan.n_embd, "K", node.weight.k, plan.n_embd, "n_embd of EMBED");
        row.expect(node.weight.n == 3 * plan.n_embd, "N", node.weight.n, 3 * plan.n_embd, "3 n_embd");
        row.norm(node, node.weight.k);
        node.layer = qkv_layer = row.field(8);
        GPT2RT_CHECK(node.layer >= 0, row.where(), "layer is ", node.layer, ", expected 0 or more");
        plan.qkv_width = node.weight.n;
        break;
      case Opcode::kAttention:
        node.layer = row.field(1);
        row.expect(node.layer == qkv_layer && qkv_layer >= 0, "layer", node.layer, qkv_layer,
                   "the layer of the NORM_QKV before it");
        node.num_heads = row.size(2, "H");
        node.head_dim = row.size(3, "D");
        GPT2RT_CHECK(node.head_dim <= kMaxHeadDim, row.where(), "D is ", node.head_dim, ", expected at most ",
                     kMaxHeadDim);
        row.expect(node.num_heads * node.head_dim == plan.n_embd, "H * D", node.num_heads * node.head_dim, plan.n_embd,
                   "n_embd of EMBED");
        node.scale = row.real(4, "scale");
        node.fast = row.flag(12, "the arithmetic");
        buf_width = plan.n_embd;
        buf_node = plan.nodes.size();
        break;
      case Opcode::kLinearResidual:
        row.linear(node);
        row.expect(node.weight.k == buf_width, "K", node.weight.k, buf_width,
                   "the width of the ATTENTION or NORM_LINEAR_ACT before it (0: there is none)");
        node.rows_ready = write_rows_for(plan.nodes[buf_node], node.weight);
        read_buffer = true;
        row.expect(node.weight.n == plan.n_embd, "N", node.weight.n, plan.n_embd, "n_embd of EMBED");
        break;
      case Opcode::kNormLinearAct:
        row.linear(node);
        row.expect(node.weight.k == plan.n_embd, "K", node.weight.k, plan.n_embd, "n_embd of EMBED");
        row.norm(node, node.weight.k);
        GPT2RT_CHECK(row.field(10) >= 0 && row.field(10) < kNumActivations, row.where(), "activation is ",
                     row.field(10), ", expected 0 to ", kNumActivations - 1);
        node.activation = static_cast<Activation>(row.field(10));
        buf_width = node.weight.n;
        buf_node = plan.nodes.size();
        break;
      case Opcode::kNorm:
        node.weight.k = row.size(5, "E");
        row.expect(node.weight.k == plan.n_embd, "E", node.weight.k, plan.n_embd, "n_embd of EMBED");
        if (row.absent(1)) row.fail("NORM needs a weight, its offset is -1");
        row.norm(node, node.weight.k);
        break;
      case Opcode::kHead:
        node.weight.k = row.size(5, "E");
        row.expect(node.weight.k == plan.n_embd, "E", node.weight.k, plan.n_embd, "n_embd of EMBED");
        row.norm(node, node.weight.k);
        // a plan without a head has no weight and no N
        if (!row.absent(3)) row.linear(node);
        break;
      default:
        GPT2RT_CHECK(false, row.where(), "opcode is ", row.field(0), ", expected 0 to 6");
    }
    if (prepares_rows(node)) {
      const int64_t bytes = row_bytes(node.weight);
      plan.row_bytes = bytes > plan.row_bytes ? bytes : plan.row_bytes;
    }
    plan.buf_width = buf_width > plan.buf_width ? buf_width : plan.buf_width;
    // what was read once is gone: it may have been written in the reader's own format
    if (read_buffer) buf_width = 0;
    // room was reserved, so this pointer stays
    plan.nodes.push_back(node);
    if (node.opcode == Opcode::kHead) plan.head = &plan.nodes.back();
  }
  GPT2RT_CHECK(num_nodes > 0, op, ": plan has no rows, expected at least EMBED");
  return plan;
}

bool prepares_rows(const Node& node) {
  const bool linear = node.opcode == Opcode::kNormQkv || node.opcode == Opcode::kLinearResidual ||
                      node.opcode == Opcode::kNormLinearAct;
  return linear && !node.rows_ready && (node.has_norm || node.weight.rows != RowFormat::kFloat32);
}

int64_t row_stride(int64_t width) {
  const int64_t lines = (width + 15) / 16 * 16;
  return lines % 1024 == 0 ? lines + 16 : lines;
}

WorkspaceLayout workspace_layout(const char* op, const Plan& plan, int64_t num_tokens, int64_t num_logits) {
  GPT2RT_CHECK(num_tokens >= 0, op, ": num_tokens is ", num_tokens, ", expected 0 or more");
  GPT2RT_CHECK(num_logits >= 0, op, ": num_logits is ", num_logits, ", expected 0 or more");
  WorkspaceLayout layout{};
  int64_t floats = 0;
  const auto take = [&](int64_t rows, int64_t stride) {
    const int64_t offset = floats;
    GPT2RT_CHECK(!__builtin_add_overflow(floats, product(op, {rows, stride}), &floats), op, ": ", num_tokens,
                 " tokens and ", num_logits, " rows of logits need more than 2^63 bytes");
    return offset;
  };
  layout.x_stride = row_stride(plan.n_embd);
  // the head's rows may be wanted as they are beside their prepared form
  layout.rows_stride = row_stride((plan.row_bytes + 3) / 4);
  layout.head_stride = row_stride(plan.head == nullptr ? 0 : (row_bytes(plan.head->weight) + 3) / 4);
  layout.qkv_stride = row_stride(plan.qkv_width);
  layout.x = take(num_tokens, layout.x_stride);
  layout.rows = take(num_tokens, layout.rows_stride);
  layout.qkv = take(num_tokens, plan.qkv_width == 0 ? 0 : layout.qkv_stride);
  layout.buf = take(num_tokens, plan.buf_width == 0 ? 0 : row_stride(plan.buf_width));
  layout.head = take(num_logits, layout.head_stride);
  // a start of any alignment is moved to the next multiple of 64
  take(1, 16);
  layout.bytes = product(op, {floats, 4});
  return layout;
}

}  // namespace gpt2rt
