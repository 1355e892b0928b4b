// Row kernels: layer norm, additions, bias + gelu_new, conversion. Each reads and writes a row once (layer norm: three
// times, from cache).
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// calls f(offset, lanes) for whole vectors and once for the rest, if there is one
template <typename F>
inline void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <typename T>
inline Vec load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_first(p, lanes);
}

template <typename T>
inline void store_lanes(T* p, Vec v, int lanes) {
  if (lanes == kLanes) {
    store(p, v);
  } else {
    store_first(p, v, lanes);
  }
}

// sum of f(offset, lanes) over the row in four interleaved chains, added in a fixed order
template <typename F>
inline float sum_vectors(int64_t n, F f) {
  Vec a = zero(), b = zero(), c = zero(), d = zero();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = add(a, f(i, kLanes));
    b = add(b, f(i + kLanes, kLanes));
    c = add(c, f(i + 2 * kLanes, kLanes));
    d = add(d, f(i + 3 * kLanes, kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) a = add(a, f(i, kLanes));
  if (i < n) b = add(b, f(i, static_cast<int>(n - i)));
  return reduce_add(add(add(a, b), add(c, d)));
}

// y = (x - mean) / sqrt(var + eps) * w + b with the biased variance, in two passes over x (arXiv:1607.06450)
template <typename T>
void layer_norm_row(const T* x, const T* weight, const T* bias, float eps, int64_t n, T* y) {
  const float size = static_cast<float>(n);
  const float mean = sum_vectors(n, [=](int64_t i, int lanes) { return load_lanes(x + i, lanes); }) / size;
  const Vec center = set1(mean);
  const float squares = sum_vectors(n, [=](int64_t i, int lanes) {
    const Vec d = sub(load_lanes(x + i, lanes), center);
    return lanes == kLanes ? mul(d, d) : select_first(mul(d, d), zero(), lanes);
  });
  const Vec scale = set1(1.0f / __builtin_sqrtf(squares / size + eps));
  for_vectors(n, [=](int64_t i, int lanes) {
    const Vec normal = mul(sub(load_lanes(x + i, lanes), center), scale);
    store_lanes(y + i, fma(normal, load_lanes(weight + i, lanes), load_lanes(bias + i, lanes)), lanes);
  });
}

template <typename T, typename TOut>
void add_row(const T* a, const T* b, int64_t n, TOut* y) {
  for_vectors(n, [=](int64_t i, int lanes) {
    store_lanes(y + i, add(load_lanes(a + i, lanes), load_lanes(b + i, lanes)), lanes);
  });
}

template <typename T>
void bias_gelu_new_row(const T* x, const T* bias, int64_t n, T* y) {
  for_vectors(n, [=](int64_t i, int lanes) {
    store_lanes(y + i, gelu_new(add(load_lanes(x + i, lanes), load_lanes(bias + i, lanes))), lanes);
  });
}

template <typename T, typename TOut>
inline void convert_row(const T* x, int64_t n, TOut* y) {
  for_vectors(n, [=](int64_t i, int lanes) { store_lanes(y + i, load_lanes(x + i, lanes), lanes); });
}

// ---- the entries of the table: void pointers and a dtype

void layer_norm_row_any(DType dtype, const void* x, const void* weight, const void* bias, float eps, int64_t n,
                        void* y) {
  with_type(dtype, [=](auto t) {
    using T = decltype(t);
    layer_norm_row(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias), eps, n,
                   static_cast<T*>(y));
  });
}

void add_row_any(DType dtype, const void* a, const void* b, int64_t n, void* y) {
  with_type(dtype, [=](auto t) {
    using T = decltype(t);
    add_row(static_cast<const T*>(a), static_cast<const T*>(b), n, static_cast<T*>(y));
  });
}

void add_row_f32_any(DType dtype, const void* a, const void* b, int64_t n, float* y) {
  with_type(dtype, [=](auto t) {
    using T = decltype(t);
    add_row(static_cast<const T*>(a), static_cast<const T*>(b), n, y);
  });
}

void bias_gelu_new_row_any(DType dtype, const void* x, const void* bias, int64_t n, void* y) {
  with_type(dtype, [=](auto t) {
    using T = decltype(t);
    bias_gelu_new_row(static_cast<const T*>(x), static_cast<const T*>(bias), n, static_cast<T*>(y));
  });
}

void convert_row_any(DType from, const void* x, DType to, void* y, int64_t n) {
  if (from == to) {
    std::memcpy(y, x, static_cast<size_t>(n * item_size(from)));
    return;
  }
  with_type(from, [=](auto t) {
    with_type(to, [=](auto u) { convert_row(static_cast<const decltype(t)*>(x), n, static_cast<decltype(u)*>(y)); });
  });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
