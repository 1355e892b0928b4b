// The plan of a forward step: what gpt2rt.graph writes as int64 rows of 16, decoded and checked.
//
// row = [opcode, f1..f15]. Offsets are bytes into the arena, -1 = absent; norm weights and biases are float32 vectors.
//   0 EMBED            f1=V f2=P f3=E
//   1 NORM_QKV         f1=ln weight or -1 (no norm) f2=ln bias f3=packed weight f4=bias or -1 f5=K=E f6=N=3E
//                      f7=weight dtype f8=layer f9=eps (bits of a double)
//   2 ATTENTION        f1=layer f2=H f3=D f4=scale (bits of a double)
//   3 LINEAR_RESIDUAL  f3=packed weight f4=bias or -1 f5=K f6=N=E f7=weight dtype
//   4 NORM_LINEAR_ACT  f1..f7, f9 as NORM_QKV, f6=n_inner f10=activation
//   5 NORM             f1 f2 f5=E f9
//   6 HEAD             f1 (or -1) f2 f3 (or -1: no head) f4 f5=E f6=V f7 f9
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
  // norm before the linear, or by itself; null: none
  const float* norm_weight;
  const float* norm_bias;
  float eps;
  // linear [n, k]; null: none (only kHead)
  const void* weight;
  DType weight_dtype;
  const float* bias;
  int64_t k;
  int64_t n;
  Activation activation;
  // kNormQkv, kAttention
  int64_t layer;
  int64_t num_heads;
  int64_t head_dim;
  float scale;
};

struct Plan {
  std::vector<Node> nodes;
  int64_t n_embd;
  int64_t qkv_width;  // 3 n_embd, or 0 without attention
  int64_t buf_width;  // the widest result of kAttention and kNormLinearAct
  const Node* head;   // or nullptr
};

// Decodes and checks a plan: opcodes, their order, shapes that must agree, offsets against the arena. Without an arena
// (nullptr) offsets are left alone and the pointers of the nodes are null.
Plan read_plan(const char* op, const Tensor& plan, const Tensor* arena);

// Where the float32 buffers of a step lie in the workspace; offsets and row strides in floats
struct WorkspaceLayout {
  int64_t x, x_stride;            // residual stream [num_tokens, n_embd]
  int64_t normed, normed_stride;  // [num_tokens, n_embd]
  int64_t qkv, qkv_stride;        // [num_tokens, 3 n_embd]
  int64_t buf;                    // [num_tokens, width], row stride row_stride(width)
  int64_t head, head_stride;      // [num_logits, n_embd]
  int64_t bytes;                  // of all, with room to align the start to 64 bytes
};

// row stride in floats for rows of `width`: whole cache lines, and no multiple of 4 KiB, at which all rows would
// compete for the same sets of the L1 cache
int64_t row_stride(int64_t width);

WorkspaceLayout workspace_layout(const char* op, const Plan& plan, int64_t num_tokens, int64_t num_logits);

}  // namespace gpt2rt
