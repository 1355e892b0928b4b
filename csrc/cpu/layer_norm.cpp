// layer_norm and add_layer_norm: kernels/rows.h holds the maths.
#include <cmath>
#include <tuple>

#include "checks.h"
#include "kernels.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

// about the float operations of one row per element
constexpr int64_t kWorkPerElement = 8;

DType check_norm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const DType dtype = check_storage(op, "x", x);
  check_dim(op, "x", x, 2, "[num_tokens, n]");
  check_rows(op, "x", x);
  GPT2RT_CHECK(x.size(1) > 0, op, ": x has shape ", shape_text(x), "; rows must have at least one element");
  check_vector(op, "weight", weight, x.size(1), "x", x);
  check_vector(op, "bias", bias, x.size(1), "x", x);
  GPT2RT_CHECK(std::isfinite(eps) && eps >= 0.0, op, ": eps is ", eps, ", expected a finite number >= 0, such as 1e-5");
  return dtype;
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const DType dtype = check_norm("layer_norm", x, weight, bias, eps);
  const int64_t num_tokens = x.size(0), n = x.size(1), stride = x.stride(0);
  Tensor y = new_like(x, {num_tokens, n});
  const Kernels& k = kernels();
  const void *px = x.const_data_ptr(), *pw = weight.const_data_ptr(), *pb = bias.const_data_ptr();
  void* py = y.mutable_data_ptr();
  parallel_rows(num_tokens, kWorkPerElement * n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      k.layer_norm_row(dtype, at(px, t * stride, dtype), pw, pb, static_cast<float>(eps), n, at(py, t * n, dtype));
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                          const Tensor& bias, double eps) {
  const DType dtype = check_norm("add_layer_norm", x, weight, bias, eps);
  check_same_dtype("add_layer_norm", "residual", residual, "x", x);
  check_dim("add_layer_norm", "residual", residual, 2, "[num_tokens, n]");
  check_size("add_layer_norm", "residual", residual, 0, x.size(0), "the rows of x");
  check_size("add_layer_norm", "residual", residual, 1, x.size(1), "the columns of x");
  check_rows("add_layer_norm", "residual", residual);
  const int64_t num_tokens = x.size(0), n = x.size(1), stride = x.stride(0), residual_stride = residual.stride(0);
  Tensor y = new_like(x, {num_tokens, n});
  Tensor sum = new_like(x, {num_tokens, n});
  const Kernels& k = kernels();
  const void *px = x.const_data_ptr(), *pr = residual.const_data_ptr();
  const void *pw = weight.const_data_ptr(), *pb = bias.const_data_ptr();
  void *py = y.mutable_data_ptr(), *ps = sum.mutable_data_ptr();
  parallel_rows(num_tokens, kWorkPerElement * n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      void* s = at(ps, t * n, dtype);
      k.add_row(dtype, at(px, t * stride, dtype), at(pr, t * residual_stride, dtype), n, s);
      k.layer_norm_row(dtype, s, pw, pb, static_cast<float>(eps), n, at(py, t * n, dtype));
    }
  });
  return {y, sum};
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&gpt2rt::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&gpt2rt::add_layer_norm));
}
