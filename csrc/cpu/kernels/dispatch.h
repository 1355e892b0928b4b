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
  }
}

template <typename T>
inline constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<bf16> = true;

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
