// Rows of an int8 KV cache: one head of one token is head_dim codes and one scale.
//
// scale = max|x| / 127, code = round_half_even(x * (127 / max|x|)), so that x is about code * scale. A row whose
// largest element is below kSmallestGroup is zero. A row with NaN or infinity has the scale NaN, so that it spoils what
// attends to it, as it does in the other dtypes.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

template <typename T>
float quantize_head(const T* x, int64_t n, int8_t* codes) {
  Vec largest = zero(), damage = zero();
  for_vectors(n, [&](int64_t i, int lanes) {
    // lanes past the end are zero
    const Vec v = load_lanes(x + i, lanes);
    largest = max(max(v, sub(zero(), v)), largest);
    // 0, but NaN where v is NaN or infinite
    damage = fma(v, zero(), damage);
  });
  const float amax = reduce_max(largest);
  const bool finite = reduce_add(damage) == 0.0f;
  if (!finite || amax < kSmallestGroup) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const Vec factor = set1(127.0f / amax);
  for_vectors(n, [&](int64_t i, int lanes) {
    store_int8(codes + i, round_to_int(mul(load_lanes(x + i, lanes), factor)), lanes);
  });
  return amax / 127.0f;
}

void quantize_head_any(DType dtype, const void* x, int64_t n, int8_t* codes, float* scale) {
  with_type(dtype, [=](auto t) { *scale = quantize_head(static_cast<const decltype(t)*>(x), n, codes); });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
