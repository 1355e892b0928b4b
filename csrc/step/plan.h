// The plan of a forward step: what gpt2rt.graph writes as int64 rows of 16, decoded and checked.
//
// row = [opcode, f1..f15]. Offsets are bytes into the arena, -1 = absent; norm weights, biases and codebooks are
// float32 vectors.
//   0 EMBED            f1=V f2=P f3=E f4=packed table with f7 f11 f13 f14 as below, or -1: the tensor wte
//   1 NORM_QKV         f1=ln weight or -1 (no norm) f2=ln bias f3=packed weight f4=bias or -1 f5=K=E f6=N=3E
//                      f7=weight format f8=layer f9=eps (bits of a double)
//   2 ATTENTION        f1=layer f2=H f3=D f4=scale (bits of a double) f12=1: products of bfloat16 for a bfloat16 cache
//                      where there is the instruction, 0: float32
//   3 LINEAR_RESIDUAL  f3=packed weight f4=bias or -1 f5=K f6=N=E f7=weight format
//   4 NORM_LINEAR_ACT  f1..f7, f9 as NORM_QKV, f6=n_inner f10=activation
//   5 NORM             f1 f2 f5=E f9
//   6 HEAD             f1 (or -1) f2 f3 (or -1: no head) f4 f5=E f6=V f7 f9
// and with each weight: f11=group size (4-bit formats) f12=1 for the fast arithmetic of its format, 0 for float32
// activations f13=codebook (code4) f14=1 if there are zero points (int4)
#pragma once

#include <vector>

#include "../cpu/checks.h"
#include "../cpu/kernels.h"

namespace gpt2rt {

enum class Opcode : int64_t {
  kEmbed = 0,
  kNormQkv = 1,
  kAttention = 2,
  kLinearResidual = 3,
  kNormLinearAct = 4,
  kNorm = 5,
  kHead = 6
};

constexpr int64_t kPlanColumns = 16;

struct Node {
  Opcode opcode;
  // kEmbed
  int64_t vocab_size;
  int64_t n_positions;
  // norm before the linear, or by itself; the pointers are null without an arena
  bool has_norm;
  const float* norm_weight;
  const float* norm_bias;
  float eps;
  // linear [n, k], k alone for kNorm and a kHead without a linear; kEmbed: the packed table. data is null: none
  PackedWeight weight;
  const float* bias;
  Activation activation;
  // kLinearResidual: the node before has written the rows as this weight wants them; kAttention and kNormLinearAct: in
  // bfloat16, or (y_group > 0) in int8 groups
  bool rows_ready;
  DType y_dtype;
  int64_t y_group;
  // kNormQkv, kAttention
  int64_t layer;
  int64_t num_heads;
  int64_t head_dim;
  float scale;
  bool fast;
};

struct Plan {
  std::vector<Node> nodes;
  int64_t n_embd;
  int64_t row_bytes;  // the widest row prepared for a weight
  int64_t qkv_width;  // 3 n_embd, or 0 without attention
  int64_t buf_width;  // the widest result of kAttention and kNormLinearAct
  const Node* head;   // or nullptr
};

// Decodes and checks a plan: opcodes, their order, shapes that must agree, offsets against the arena. Without an arena
// (nullptr) offsets are left alone and the pointers of the nodes are null.
Plan read_plan(const char* op, const Tensor& plan, const Tensor* arena);

// Where the buffers of a step lie in the workspace; offsets and row strides in floats
struct WorkspaceLayout {
  int64_t x, x_stride;        // residual stream [num_tokens, n_embd]
  int64_t rows, rows_stride;  // rows as the next weight wants them (RowFormat) [num_tokens]
  int64_t qkv, qkv_stride;    // [num_tokens, 3 n_embd]
  int64_t buf;                // [num_tokens, width], row stride row_stride(width)
  int64_t head, head_stride;  // rows for the head [num_logits]
  int64_t bytes;              // of all, with room to align the start to 64 bytes
};

// whether the rows that a linear reads are written for it first: they go through its norm or have a format of their own
bool prepares_rows(const Node& node);

// row stride in floats for rows of `width`: whole cache lines, and no multiple of 4 KiB, at which all rows would
// compete for the same sets of the L1 cache
int64_t row_stride(int64_t width);

WorkspaceLayout workspace_layout(const char* op, const Plan& plan, int64_t num_tokens, int64_t num_logits);

}  // namespace gpt2rt
