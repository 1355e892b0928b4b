// bias_gelu_new: kernels/math.h holds the maths.
#include "checks.h"
#include "kernels.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

Tensor bias_gelu_new(const Tensor& x, const Tensor& bias) {
  const DType dtype = check_storage("bias_gelu_new", "x", x);
  check_dim("bias_gelu_new", "x", x, 2, "[num_tokens, n]");
  check_rows("bias_gelu_new", "x", x);
  check_vector("bias_gelu_new", "bias", bias, x.size(1), "x", x);
  const int64_t num_tokens = x.size(0), n = x.size(1), stride = x.stride(0);
  Tensor y = new_like(x, {num_tokens, n});
  const Kernels& k = kernels();
  const void *px = x.const_data_ptr(), *pb = bias.const_data_ptr();
  void* py = y.mutable_data_ptr();
  // about 20 operations an element
  parallel_rows(num_tokens, 20 * n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      k.bias_gelu_new_row(dtype, at(px, t * stride, dtype), pb, n, at(py, t * n, dtype));
    }
  });
  return y;
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) { m.impl("bias_gelu_new", TORCH_BOX(&gpt2rt::bias_gelu_new)); }
