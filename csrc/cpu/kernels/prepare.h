// A float32 row made ready for a weight that wants another format (packed.h).
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// For each group: scale = max |x| / 127, codes = x * (127 / max |x|) rounded to even, their sum. A group that holds a
// NaN or an infinity has the scale NaN, so that the results show it; one below kSmallestGroup is zero, for 127 / max
// |x| would overflow.
constexpr float kSmallestGroup = 1e-30f;

inline void quantize_group(const float* x, int64_t count, int8_t* codes, float* scale, int32_t* code_sum) {
  Vec largest = zero(), damage = zero();
  for_vectors(count, [&](int64_t i, int lanes) {
    const Vec v = load_lanes(x + i, lanes);
    largest = max(max(v, sub(zero(), v)), largest);
    damage = fma(v, zero(), damage);
  });
  const float amax = reduce_max(largest);
  const bool finite = reduce_add(damage) == 0.0f;
  const bool some = finite && amax >= kSmallestGroup;
  *scale = finite ? (some ? amax / 127.0f : 0.0f) : __builtin_nanf("");
  const Vec factor = set1(some ? 127.0f / amax : 0.0f);
  Vec sum = zero();
  for_vectors(count, [&](int64_t i, int lanes) {
    const Vec q = some ? round_to_int(mul(load_lanes(x + i, lanes), factor)) : zero();
    sum = add(sum, q);
    store_int8(codes + i, q, lanes);
  });
  *code_sum = static_cast<int32_t>(reduce_add(sum));
}

inline void quantize_row(const float* x, int64_t k, int64_t group, char* row) {
  const Int8Row layout = int8_row(k, group);
  int8_t* codes = reinterpret_cast<int8_t*>(row);
  for (int64_t g = 0, begin = 0; g < layout.groups; ++g, begin += group) {
    const int64_t count = k - begin < group ? k - begin : group;
    quantize_group(x + begin, count, codes + begin, reinterpret_cast<float*>(row + layout.scales) + g,
                   reinterpret_cast<int32_t*>(row + layout.sums) + g);
    for (int64_t i = count; i < group; ++i) codes[begin + i] = 0;
  }
}

void prepare_row(const PackedWeight& w, const float* x, void* row) {
  switch (w.rows) {
    case RowFormat::kBFloat16:
      convert_row(x, w.k, static_cast<bf16*>(row));
      if (w.k % 2 != 0) static_cast<bf16*>(row)[w.k] = bf16{0};
      return;
    case RowFormat::kInt8:
      return quantize_row(x, w.k, row_group(w.format, w.group), static_cast<char*>(row));
    default:
      std::memcpy(row, x, static_cast<size_t>(w.k) * sizeof(float));
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
