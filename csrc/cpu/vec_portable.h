// Vec in the vector extension of GCC and clang, 4 float32 lanes: SSE2 on x86-64, NEON on aarch64, scalar code where
// there is nothing else. fma() is a multiplication and an addition, each rounded, so results differ from AVX2 and
// AVX-512 in the last bits; they are as reproducible. See vec_avx512.h for what each function means.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstring>

#include "types.h"

namespace gpt2rt::GPT2RT_ISA {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t VecInt __attribute__((vector_size(16)));
typedef uint32_t VecUint __attribute__((vector_size(16)));
typedef uint16_t VecHalf __attribute__((vector_size(8)));
constexpr int kLanes = 4;
// 4 rows x 2 vectors are 8 accumulators of the 16 registers of SSE2, whose multiplications need a copy
constexpr int kMaxRows = 4;
constexpr int vectors_at_once(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }

inline Vec zero() { return Vec{0.0f, 0.0f, 0.0f, 0.0f}; }
inline Vec set1(float x) { return Vec{x, x, x, x}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec blend(VecInt mask, Vec a, Vec b) { return (Vec)((mask & (VecInt)a) | (~mask & (VecInt)b)); }
inline Vec max(Vec a, Vec b) { return blend(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return blend(a < b, a, b); }

// adding 1.5 * 2^23 pushes the fraction out of the mantissa; right for |x| < 2^22
inline Vec round_to_int(Vec x) {
  const Vec magic = set1(12582912.0f);
  return (x + magic) - magic;
}

inline Vec scale_pow2(Vec x, Vec n) {
  const VecInt e = __builtin_convertvector(n, VecInt);
  const VecInt half = e >> 1;
  return x * (Vec)((half + 127) << 23) * (Vec)((e - half + 127) << 23);
}

inline VecInt first_lanes(int n) { return VecInt{n, n, n, n} > VecInt{0, 1, 2, 3}; }
inline Vec select_first(Vec a, Vec b, int n) { return blend(first_lanes(n), a, b); }

inline float reduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(Vec v) {
  const float a = v[0] > v[2] ? v[0] : v[2];
  const float b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
typedef double Doubles __attribute__((vector_size(16)));
inline Doubles widen_low(Vec v) { return Doubles{v[0], v[1]}; }
inline Doubles widen_high(Vec v) { return Doubles{v[2], v[3]}; }

inline float first(Vec v) { return v[0]; }

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline VecInt load_words(const void* p) {
  VecHalf h;
  std::memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, VecInt);
}

inline Vec widen(VecInt words, bf16) { return (Vec)(words << 16); }

// exponent and mantissa in place of float32's; the exponent biases differ by 112, which the multiplication mends, for
// subnormals too; infinity and NaN keep the highest exponent
inline Vec widen(VecInt words, f16) {
  const VecInt magnitude = (words & 0x7fff) << 13;
  const Vec scaled = (Vec)magnitude * set1(from_bits((127u + 112u) << 23));
  const VecInt special = magnitude >= (0x7c00 << 13);
  return (Vec)((VecInt)scaled | (special & 0x7f800000) | ((words & 0x8000) << 16));
}

inline void narrow(float x, bf16& h) {
  const uint32_t bits = to_bits(x);
  h.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float x, f16& h) {
  const uint32_t bits = to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    // rounding may carry into the exponent, up to infinity, which is right
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // adding 0.5 leaves the multiples of 2^-24 in the low bits, rounded to nearest even by the addition itself
    half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  }
  h.bits = static_cast<uint16_t>(sign | half);
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
inline Vec load(const T* p) {
  return widen(load_words(p), T{});
}
inline Vec load_first(const float* p, int n) {
  Vec v = zero();
  std::memcpy(&v, p, static_cast<size_t>(n) * 4);
  return v;
}
template <typename T>
inline Vec load_first(const T* p, int n) {
  T halves[kLanes] = {};
  std::memcpy(halves, p, static_cast<size_t>(n) * sizeof(T));
  return load(halves);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store_first(float* p, Vec v, int n) { std::memcpy(p, &v, static_cast<size_t>(n) * 4); }
template <typename T>
inline void store_first(T* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) narrow(v[i], p[i]);
}
template <typename T>
inline void store(T* p, Vec v) {
  store_first(p, v, kLanes);
}

// the first n lanes, integers of -128..127
inline void store_int8(int8_t* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = static_cast<int8_t>(v[i]);
}

inline void load_bf16_words(const void* p, Vec& low, Vec& high) {
  VecInt w;
  std::memcpy(&w, p, sizeof(w));
  low = (Vec)(w << 16);
  high = (Vec)(w & static_cast<int32_t>(0xffff0000u));
}

typedef VecInt Ints;
constexpr int kIntRows = 4;
constexpr int kIntVectors = 2;
constexpr int kCodeRows = 4;
constexpr int code_vectors(int rows) { return rows == 1 ? 4 : 2; }

inline Ints set1_int(int32_t x) { return Ints{x, x, x, x}; }
inline Ints load_ints(const void* p) {
  Ints v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store_ints(void* p, Ints v) { std::memcpy(p, &v, sizeof(v)); }
inline Ints shift_right(Ints v, int bits) { return (Ints)((VecUint)v >> static_cast<uint32_t>(bits)); }
inline Vec to_float(Ints v) { return __builtin_convertvector(v, Vec); }
inline Vec as_float(Ints v) { return (Vec)v; }
inline Vec load_bytes(const uint8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}

inline Ints dot4(Ints sum, Ints codes, Ints x) {
#if defined(__SSE2__)
  // SSE2 multiplies 16-bit integers only
  const __m128i c = (__m128i)codes, q = (__m128i)x;
  const __m128i even = _mm_madd_epi16(_mm_and_si128(c, _mm_set1_epi16(0xff)), _mm_srai_epi16(_mm_slli_epi16(q, 8), 8));
  return sum + (Ints)even + (Ints)_mm_madd_epi16(_mm_srli_epi16(c, 8), _mm_srai_epi16(q, 8));
#else
  const VecUint c = (VecUint)codes, q = (VecUint)x;
  for (uint32_t bits = 0; bits < 32; bits += 8) sum += (Ints)((c >> bits) & 255) * ((Ints)(q << (24 - bits)) >> 24);
  return sum;
#endif
}

struct Table16 {
  const float* values;
};
inline Table16 load_table(const float* p) { return {p}; }
inline Vec lookup(const Table16& t, Ints codes) {
  const Ints index = codes & 15;
  return Vec{t.values[index[0]], t.values[index[1]], t.values[index[2]], t.values[index[3]]};
}

inline void transpose(Vec* r) {
  Vec t[4];
  for (int i = 0; i < 4; ++i) t[i] = Vec{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < 4; ++i) r[i] = t[i];
}

inline void transpose_quads(Vec*) {}
inline void transpose_in_quads(Vec* r) { transpose(r); }
inline Vec set_quads(const float* p) { return load(p); }

inline Vec load(const i8* p) {
  return Vec{static_cast<float>(p[0].bits), static_cast<float>(p[1].bits), static_cast<float>(p[2].bits),
             static_cast<float>(p[3].bits)};
}
inline Vec load_first(const i8* p, int n) {
  Vec v = zero();
  for (int i = 0; i < n; ++i) v[i] = static_cast<float>(p[i].bits);
  return v;
}

// GCC takes a function that does nothing but prefetch for one without effect and drops calls of it; the empty statement
// is an effect
inline void prefetch(const void* p) {
  __builtin_prefetch(p);
  asm volatile("");
}
inline void prefetch_l2(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
