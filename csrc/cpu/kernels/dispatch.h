// From a run-time dtype to a compile-time type.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

template <typename F>
inline void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(f16{});
    case DType::kInt8:
      // rows of it need scales: with_cache_type
      __builtin_unreachable();
  }
}

// the same with the dtypes that a KV cache may have
template <typename F>
inline void with_cache_type(DType dtype, F f) {
  if (dtype == DType::kInt8) return f(i8{});
  with_type(dtype, f);
}

template <typename T>
inline constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<bf16> = true;

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
