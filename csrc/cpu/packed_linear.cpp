// packed_linear and unpack_linear: the matrix products of csrc/step by themselves, on packed weights of every format.
#include <atomic>
#include <vector>

#include "checks.h"
#include "linear.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

PackedWeight check_packed(const char* op, const Tensor& packed, const std::optional<Tensor>& codebook, int64_t n,
                          int64_t k, int64_t format, int64_t group, bool zeros) {
  GPT2RT_CHECK(n >= 1 && k >= 1, op, ": the weight has ", n, " x ", k, " elements, expected at least 1 x 1");
  GPT2RT_CHECK(format >= 0 && format < kNumWeightFormats, op, ": weight format is ", format,
               ", expected 0 (float32), 1 (bfloat16), 2 (float16), 3 (int8), 4 (int4) or 5 (4-bit codes)");
  PackedWeight w{};
  w.n = n;
  w.k = k;
  w.format = static_cast<WeightFormat>(format);
  if (is_4bit(w.format)) {
    GPT2RT_CHECK(group >= kMinGroup && group <= kMaxGroup && group % kMinGroup == 0, op, ": group_size is ", group,
                 ", expected a multiple of ", kMinGroup, " up to ", kMaxGroup);
    w.group = group;
  }
  GPT2RT_CHECK(!zeros || w.format == WeightFormat::kInt4, op, ": zero points belong to int4 weights; pass False");
  w.zeros = zeros;
  GPT2RT_CHECK(codebook.has_value() == (w.format == WeightFormat::kCode4), op,
               ": a codebook belongs to 4-bit codes, and they need one");
  if (codebook.has_value()) {
    check_dtype(op, "codebook", *codebook, ScalarType::Float);
    check_dim(op, "codebook", *codebook, 1, "[16]");
    check_size(op, "codebook", *codebook, 0, 16, "the values of a 4-bit code");
    check_contiguous(op, "codebook", *codebook);
    GPT2RT_CHECK(k % group == 0, op, ": in_features ", k, " is no multiple of group_size ", group);
    w.codebook = data<float>(*codebook);
  }
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_dim(op, "packed", packed, 1, "one dimension of bytes");
  check_contiguous(op, "packed", packed);
  check_size(op, "packed", packed, 0, num_panels(n) * panel_bytes(w), "the size of the panels");
  w.data = packed.const_data_ptr();
  GPT2RT_CHECK(reinterpret_cast<uintptr_t>(w.data) % 64 == 0, op, ": packed must start at a multiple of 64 bytes");
  return w;
}

void packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& codebook,
                   const std::optional<Tensor>& bias, int64_t out_features, int64_t format, int64_t group_size,
                   bool has_zeros, bool fast, int64_t num_threads, const Tensor& out) {
  const char* op = "packed_linear";
  check_dtype(op, "x", x, ScalarType::Float);
  check_dim(op, "x", x, 2, "[num_tokens, K]");
  check_rows(op, "x", x);
  const int64_t m = x.size(0), k = x.size(1);
  const Kernels& kernel = kernels();
  GemmArgs args{};
  args.weight = check_packed(op, packed, codebook, out_features, k, format, group_size, has_zeros);
  args.weight.rows = row_format(kernel, args.weight.format, fast);
  if (bias.has_value()) {
    check_vector(op, "bias", *bias, out_features, "x", x);
    args.bias = data<float>(*bias);
  }
  check_dtype(op, "out", out, ScalarType::Float);
  check_dim(op, "out", out, 2, "[num_tokens, N]");
  check_rows(op, "out", out);
  check_size(op, "out", out, 0, m, "the rows of x");
  check_size(op, "out", out, 1, out_features, "out_features");
  const int threads = resolve_num_threads(num_threads);
  if (m == 0) return;
  args.m = m;
  args.y = out.mutable_data_ptr();
  args.y_dtype = DType::kFloat32;
  args.ldy = out.stride(0) * 4;
  const char* px = static_cast<const char*>(x.const_data_ptr());
  const int64_t ldx = x.stride(0) * 4;
  args.x = px;
  args.ldx = ldx;
  // rows a multiple of 4 KiB apart would compete for the same sets of the L1 cache
  const bool prepares = args.weight.rows != RowFormat::kFloat32;
  const int64_t bytes = round_up(row_bytes(args.weight), 64);
  const int64_t stride = bytes % 4096 == 0 ? bytes + 64 : bytes;
  std::vector<char> rows(static_cast<size_t>(prepares ? m * stride + 63 : 0));
  char* prepared = rows.data() + (64 - reinterpret_cast<uintptr_t>(rows.data()) % 64) % 64;
  if (prepares) {
    args.x = prepared;
    args.ldx = stride;
  }
  std::atomic<int64_t> counter{0};
  run_phases(threads, prepares ? 2 : 1, [&](int phase, int thread, int parts) {
    if (prepares && phase == 0) {
      const Range range = thread_range(m, thread, parts);
      for (int64_t t = range.begin; t < range.end; ++t) {
        kernel.prepare_row(args.weight, reinterpret_cast<const float*>(px + t * ldx), prepared + t * stride);
      }
      return;
    }
    gemm_part(kernel, args, thread, parts, counter, [](int64_t, int64_t, int64_t, int64_t) {});
  });
}

void unpack_linear(const Tensor& packed, const std::optional<Tensor>& codebook, int64_t format, int64_t group_size,
                   bool has_zeros, const Tensor& out) {
  const char* op = "unpack_linear";
  check_dtype(op, "out", out, ScalarType::Float);
  check_dim(op, "out", out, 2, "[N, K]");
  check_contiguous(op, "out", out);
  const int64_t n = out.size(0), k = out.size(1);
  const PackedWeight w = check_packed(op, packed, codebook, n, k, format, group_size, has_zeros);
  float* y = mutable_data<float>(out);
  const Kernels& kernel = kernels();
  parallel_rows(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernel.unpack_row(w, row, y + row * k);
  });
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&gpt2rt::packed_linear));
  m.impl("unpack_linear", TORCH_BOX(&gpt2rt::unpack_linear));
}
