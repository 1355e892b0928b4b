// linear, its forms with an epilogue, and pack_linear. The maths is in kernels/gemm.h, the panels in kernels/pack.h.
#include "linear.h"

#include <cstring>
#include <vector>

#include "checks.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

struct Weight {
  const void* data;
  DType dtype;
  int64_t n, k;
  int64_t stride_n, stride_k;
};

// [N, K] with either dimension contiguous
Weight check_weight(const char* op, const Tensor& weight) {
  const DType dtype = check_storage(op, "weight", weight);
  check_dim(op, "weight", weight, 2, "[N, K] (out_features, in_features)");
  const int64_t n = weight.size(0), k = weight.size(1);
  GPT2RT_CHECK((k <= 1 || weight.stride(1) == 1) || (n <= 1 || weight.stride(0) == 1), op, ": weight ",
               shape_text(weight), " has strides [", weight.stride(0), ", ", weight.stride(1),
               "], expected 1 in one of its dimensions; call .contiguous() on it");
  return {weight.const_data_ptr(), dtype, n, k, weight.stride(0), weight.stride(1)};
}

void pack_one(const Kernels& kernel, const Weight& w, int64_t panel, DType out_dtype, void* out) {
  const int64_t column = panel * kPanel;
  kernel.pack_panel(w.dtype, at(w.data, column * w.stride_n, w.dtype), w.stride_n, w.stride_k,
                    w.n - column < kPanel ? w.n - column : kPanel, w.k, out_dtype, out);
}

void pack_linear(const Tensor& weight, const Tensor& out) {
  const Weight w = check_weight("pack_linear", weight);
  check_dtype("pack_linear", "out", out, ScalarType::Byte);
  check_dim("pack_linear", "out", out, 1, "one dimension of bytes");
  check_contiguous("pack_linear", "out", out);
  const int64_t panels = num_panels(w.n);
  const int64_t panel_bytes = gpt2rt::panel_bytes(static_cast<WeightFormat>(w.dtype), w.k, 0, false);
  GPT2RT_CHECK(out.size(0) == panels * panel_bytes, "pack_linear: out has ", out.size(0), " bytes, expected ",
               panels * panel_bytes, " for weight ", shape_text(weight), ", see packed_linear_bytes");
  char* bytes = mutable_data<char>(out);
  GPT2RT_CHECK(reinterpret_cast<uintptr_t>(bytes) % 64 == 0,
               "pack_linear: out must start at a multiple of 64 bytes; slice it from an aligned buffer at multiples "
               "of 64");
  const Kernels& kernel = kernels();
  parallel_rows(panels, w.k * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_one(kernel, w, p, w.dtype, bytes + p * panel_bytes);
  });
}

// residual (or nothing) + act(x w^T + bias)
Tensor run_linear(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  Activation activation, const std::optional<Tensor>& residual) {
  const DType dtype = check_storage(op, "x", x);
  check_dim(op, "x", x, 2, "[num_tokens, K]");
  check_rows(op, "x", x);
  const Weight w = check_weight(op, weight);
  check_same_dtype(op, "weight", weight, "x", x);
  GPT2RT_CHECK(w.k == x.size(1), op, ": weight ", shape_text(weight), " expects rows of ", w.k, ", x is ",
               shape_text(x), "; weight is [out_features, in_features], a Conv1D weight must be passed as w.t()");
  if (bias.has_value()) {
    check_same_dtype(op, "bias", *bias, "x", x);
    GPT2RT_CHECK(bias->dim() == 1 && bias->size(0) == w.n, op, ": bias has shape ", shape_text(*bias), ", expected [",
                 w.n, "], the out_features of weight ", shape_text(weight));
    check_contiguous(op, "bias", *bias);
  }
  const int64_t m = x.size(0);
  if (residual.has_value()) {
    check_same_dtype(op, "residual", *residual, "x", x);
    check_dim(op, "residual", *residual, 2, "[num_tokens, N]");
    check_rows(op, "residual", *residual);
    check_size(op, "residual", *residual, 0, m, "the rows of x");
    check_size(op, "residual", *residual, 1, w.n, "the out_features of weight");
  }
  Tensor y = new_like(x, {m, w.n});
  if (m == 0 || w.n == 0) return y;

  const Kernels& kernel = kernels();
  GemmArgs args{};
  args.x = x.const_data_ptr();
  args.ldx = x.stride(0) * 4;
  args.m = m;
  // bfloat16 stays what it is where its products have an instruction, other inputs of 16 bits are widened once
  const RowFormat rows = row_format(kernel, static_cast<WeightFormat>(dtype), true);
  const bool pairs = rows == RowFormat::kBFloat16;
  args.weight.rows = rows;
  args.weight.format = pairs ? WeightFormat::kBFloat16 : WeightFormat::kFloat32;
  args.weight.k = w.k;
  args.activation = activation;
  args.y_dtype = dtype;
  args.ldy = w.n * item_size(dtype);
  std::vector<float> wide_x, wide_bias;
  std::vector<bf16> padded_x;
  if (pairs) {
    args.ldx = x.stride(0) * 2;
    if (w.k % 2 != 0) {
      args.ldx = (w.k + 1) * 2;
      padded_x.resize(static_cast<size_t>(m * (w.k + 1)));
      for (int64_t t = 0; t < m; ++t) {
        std::memcpy(padded_x.data() + t * (w.k + 1), at(args.x, t * x.stride(0), dtype), static_cast<size_t>(w.k) * 2);
      }
      args.x = padded_x.data();
    }
  } else if (dtype != DType::kFloat32) {
    wide_x.resize(static_cast<size_t>(m * w.k));
    const void* px = x.const_data_ptr();
    const int64_t stride = x.stride(0);
    parallel_rows(m, w.k, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        kernel.convert_row(dtype, at(px, t * stride, dtype), DType::kFloat32, wide_x.data() + t * w.k, w.k);
      }
    });
    args.x = wide_x.data();
    args.ldx = w.k * 4;
  }
  if (bias.has_value()) {
    args.bias = data<float>(*bias);
    if (dtype != DType::kFloat32) {
      wide_bias.resize(static_cast<size_t>(w.n));
      kernel.convert_row(dtype, bias->const_data_ptr(), DType::kFloat32, wide_bias.data(), w.n);
      args.bias = wide_bias.data();
    }
  }
  const void* add = residual.has_value() ? residual->const_data_ptr() : nullptr;
  if (add != nullptr) args.ld_residual = residual->stride(0);
  void* py = y.mutable_data_ptr();
  parallel_rows(num_panels(w.n), 2 * (m + 1) * w.k * kPanel, [&](int64_t begin, int64_t end) {
    GemmArgs part = args;
    char* panel = static_cast<char*>(thread_scratch(static_cast<size_t>(panel_bytes(args.weight))));
    part.weight.data = panel;
    part.panel_begin = 0;
    part.panel_end = 1;
    for (int64_t p = begin; p < end; ++p) {
      pack_one(kernel, w, p, static_cast<DType>(args.weight.format), panel);
      part.weight.n = w.n - p * kPanel < kPanel ? w.n - p * kPanel : kPanel;
      part.bias = args.bias == nullptr ? nullptr : args.bias + p * kPanel;
      part.y = at(py, p * kPanel, dtype);
      if (add != nullptr) part.residual = at(add, p * kPanel, dtype);
      gemm(kernel, part);
    }
  });
  return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return run_linear("linear", x, weight, bias, Activation::kNone, std::nullopt);
}

Tensor linear_gelu_new(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return run_linear("linear_gelu_new", x, weight, bias, Activation::kGeluNew, std::nullopt);
}

Tensor linear_residual(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& residual) {
  return run_linear("linear_residual", x, weight, bias, Activation::kNone, residual);
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("linear", TORCH_BOX(&gpt2rt::linear));
  m.impl("linear_gelu_new", TORCH_BOX(&gpt2rt::linear_gelu_new));
  m.impl("linear_residual", TORCH_BOX(&gpt2rt::linear_residual));
  m.impl("pack_linear", TORCH_BOX(&gpt2rt::pack_linear));
}
