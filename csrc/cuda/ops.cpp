// The op of the kernel for few rows: it checks what would make the kernel read or write outside its tensors.
#include "op.h"
#include "rows.h"

namespace gpt2rt::cuda {
namespace {

constexpr const char* kOp = "fused_linear_rows_cuda";

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  check_that(kOp, condition, parts...);
}

Type type_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    default:
      check(false, name, " must be float32, float16 or bfloat16");
      return Type::float32;
  }
}

void check_dtype(const char* name, const Tensor& t, ScalarType type, const char* expected) {
  check(t.scalar_type() == type && t.is_contiguous(), name, " must be ", expected, " and contiguous");
}

// rows of `columns` contiguous elements
Any matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (t.stride(1) == 1 || columns == 1), name,
        " must be [", rows, ", ", columns, "] with contiguous rows");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), type_of(name, t)};
}

Any vector(const char* name, const MaybeTensor& t, int64_t length) {
  if (!t) return {};
  check(t->dim() == 1 && t->size(0) == length && t->is_contiguous(), name, " must be [", length, "], contiguous");
  return {const_cast<void*>(t->const_data_ptr()), 0, type_of(name, *t)};
}

// four elements can be read at once
bool aligned(const Any& t) { return reinterpret_cast<uintptr_t>(t.data) % (t.type == Type::float32 ? 16 : 8) == 0; }

template <typename T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

void set_weight(RowsParams& p, const Tensor& words, const Tensor& scales, const MaybeTensor& zeros,
                const MaybeTensor& codebook, int64_t k, int64_t group_size) {
  check(group_size == 32 || group_size == 64 || group_size == 128, "group_size is ", group_size,
        ", expected 32, 64 or 128");
  check(k >= 1 && k <= max_elements(), "rows of ", k, " elements, expected 1 to ", max_elements());
  const int64_t groups = (k + group_size - 1) / group_size;
  check_dtype("words", words, ScalarType::Int, "int32");
  check(words.dim() == 2 && words.size(1) == (k + 63) / 64 * 8, "words must be [n, ", (k + 63) / 64 * 8, "] for ", k,
        " elements");
  if (codebook) {
    check(!zeros, "a table has no zero points");
    check_dtype("codebook", *codebook, ScalarType::Float, "float32");
    check(codebook->numel() == 16, "codebook must have 16 entries, got ", codebook->numel());
    check_dtype("scales", scales, ScalarType::Float, "float32 with a codebook");
    p.codebook = pointer<float>(*codebook);
  } else {
    check_dtype("scales", scales, ScalarType::Half, "float16");
  }
  check(scales.dim() == 2 && scales.size(0) == words.size(0) && scales.size(1) == groups, "scales must be [",
        words.size(0), ", ", groups, "]");
  if (zeros) {
    check_dtype("zeros", *zeros, ScalarType::Byte, "uint8");
    check(zeros->dim() == 2 && zeros->size(0) == words.size(0) && zeros->size(1) == groups, "zeros must be [",
          words.size(0), ", ", groups, "]");
    p.zeros = pointer<uint8_t>(*zeros);
  }
  check(reinterpret_cast<uintptr_t>(words.const_data_ptr()) % 16 == 0, "words must start at a multiple of 16 bytes");
  p.words = pointer<uint32_t>(words);
  p.scales = scales.const_data_ptr();
  p.num_groups = static_cast<int32_t>(groups);
  p.group_shift = group_size == 32 ? 5 : group_size == 64 ? 6 : 7;
  p.n = static_cast<int32_t>(words.size(0));
  p.k = static_cast<int32_t>(k);
}

void set_partials(RowsParams& p, const Tensor& values, const MaybeTensor& lse, const MaybeTensor& seq_lens) {
  check(lse.has_value() && seq_lens.has_value(), "values need lse and seq_lens");
  check_dtype("values", values, ScalarType::Float, "float32");
  check_dtype("lse", *lse, ScalarType::Float, "float32");
  check_dtype("seq_lens", *seq_lens, ScalarType::Int, "int32");
  check(values.dim() == 4 && values.size(0) == p.num_rows && values.size(1) * values.size(3) == p.k &&
            values.size(3) % 4 == 0,
        "values must be [", p.num_rows, ", n_head, num_splits, head_dim] with n_head * head_dim = ", p.k,
        " and head_dim a multiple of 4");
  check(lse->numel() * values.size(3) == values.numel() && seq_lens->numel() == p.num_rows,
        "lse must be [num_rows, n_head, num_splits] and seq_lens [num_rows]");
  p.values = pointer<float>(values);
  p.lse = pointer<float>(*lse);
  p.seq_lens = pointer<int32_t>(*seq_lens);
  p.num_splits = static_cast<int32_t>(values.size(2));
  p.head_dim = static_cast<int32_t>(values.size(3));
}

Any cache(const char* name, const Tensor& t, const Tensor& like) {
  check(t.dim() == 4 && t.is_contiguous() && t.numel() == like.numel() && t.size(2) == like.size(2), name,
        " must be [num_blocks, n_head, block_size, head_dim], contiguous");
  return {const_cast<void*>(t.const_data_ptr()), 0, type_of(name, t)};
}

void set_append(RowsParams& p, const Tensor& key_cache, const MaybeTensor& value_cache, const MaybeTensor& slots) {
  check(value_cache.has_value() && slots.has_value(), "key_cache needs value_cache and slots");
  p.key_cache = cache("key_cache", key_cache, key_cache);
  p.value_cache = cache("value_cache", *value_cache, key_cache);
  check(key_cache.size(1) * key_cache.size(3) * 3 == p.n, "caches of ", key_cache.size(1), " heads of ",
        key_cache.size(3), " do not take a third of ", p.n, " columns");
  check_dtype("slots", *slots, ScalarType::Long, "int64");
  check(slots->numel() == p.num_rows, "slots must be [", p.num_rows, "]");
  p.slots = pointer<int64_t>(*slots);
  p.block_size = static_cast<int32_t>(key_cache.size(2));
  p.head_dim = static_cast<int32_t>(key_cache.size(3));
  p.num_slots = key_cache.size(0) * key_cache.size(2);
}

void fused_linear_rows_op(const MaybeTensor& x, const MaybeTensor& values, const MaybeTensor& lse,
                          const MaybeTensor& seq_lens, const Tensor& words, const Tensor& scales,
                          const MaybeTensor& zeros, const MaybeTensor& codebook, int64_t k, int64_t group_size,
                          bool bfloat16, const MaybeTensor& bias, const MaybeTensor& norm_weight,
                          const MaybeTensor& norm_bias, double eps, int64_t activation, const MaybeTensor& residual,
                          const Tensor& out, const MaybeTensor& key_cache, const MaybeTensor& value_cache,
                          const MaybeTensor& slots, bool pdl) {
  RowsParams p;
  set_weight(p, words, scales, zeros, codebook, k, group_size);
  check(out.dim() == 2, "out must be a matrix");
  p.num_rows = static_cast<int32_t>(out.size(0));
  check(x.has_value() != values.has_value(), "expected either x or values");
  if (x) {
    p.x = matrix("x", *x, p.num_rows, k);
    p.x_aligned = aligned(p.x) && p.x.stride % 4 == 0;
  } else {
    set_partials(p, *values, lse, seq_lens);
  }
  check(norm_weight.has_value() == norm_bias.has_value(), "a norm has a weight and a bias");
  check(!norm_weight || x, "a norm of merged attention is not built");
  p.norm_weight = vector("norm_weight", norm_weight, k);
  p.norm_bias = vector("norm_bias", norm_bias, k);
  p.norm_aligned = aligned(p.norm_weight) && aligned(p.norm_bias);
  p.eps = static_cast<float>(eps);
  p.bias = vector("bias", bias, p.n);
  check(activation >= 0 && activation <= static_cast<int64_t>(Activation::quick_gelu), "there is no activation ",
        activation);
  p.activation = static_cast<Activation>(activation);
  if (key_cache) {
    check(x && !residual, "an append goes with x, and without a residual");
    set_append(p, *key_cache, value_cache, slots);
  }
  p.out = matrix("out", out, p.num_rows, key_cache ? p.n / 3 : p.n);
  if (residual) p.residual = matrix("residual", *residual, p.num_rows, p.n);
  for (const Tensor& each : {words, scales}) {
    check(each.get_device_index() == out.get_device_index(), "weight and out are on different devices");
  }
  if (p.num_rows == 0 || p.n == 0) return;

  const OnDevice on(kOp, out);
  const Format format = codebook ? Format::code4 : zeros ? Format::int4_zeros : Format::int4;
  const char* error = launch_rows(p, format, bfloat16 ? Type::bfloat16 : Type::float16, pdl, on.stream());
  if (error != nullptr) throw std::runtime_error(std::string(kOp) + ": the launch failed: " + error);
}

}  // namespace
}  // namespace gpt2rt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(gpt2rt, m) {
  m.def(
      "fused_linear_rows_cuda(Tensor? x, Tensor? values, Tensor? lse, Tensor? seq_lens, Tensor words, Tensor scales, "
      "Tensor? zeros, Tensor? codebook, int k, int group_size, bool bfloat16, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps, int activation, Tensor? residual, Tensor(a!) out, Tensor(b!)? key_cache, "
      "Tensor(c!)? value_cache, Tensor? slots, bool pdl) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CUDA, m) {
  m.impl("fused_linear_rows_cuda", TORCH_BOX(&gpt2rt::cuda::fused_linear_rows_op));
}
