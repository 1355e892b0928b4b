// Vec on AVX2 with FMA and F16C: 8 float32 lanes. See vec_avx512.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "types.h"

namespace gpt2rt::GPT2RT_ISA {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;
// 6 rows x 2 vectors are 12 accumulators of 16 registers
constexpr int kMaxRows = 6;
constexpr int vectors_at_once(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round_to_int(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// two factors, because 2^n itself may be out of range where x * 2^n is not
inline Vec scale_pow2(Vec x, Vec n) {
  const __m256i e = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(e, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}

inline Vec select_first(Vec a, Vec b, int n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first_lanes(n))); }

inline float reduce_add(Vec v) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}

inline float reduce_max(Vec v) {
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

typedef double Doubles __attribute__((vector_size(32)));
inline Doubles widen_low(Vec v) { return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
inline Doubles widen_high(Vec v) { return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }

inline float first(Vec v) { return _mm256_cvtss_f32(v); }

inline Vec widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }

inline __m128i narrow_bf16(Vec v) {
  const __m256i x = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline __m128i narrow_f16(Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __m128i load_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// AVX2 has no masked load of 16-bit elements
inline __m128i load_first_halves(const void* p, int n) {
  alignas(16) uint16_t halves[8] = {};
  std::memcpy(halves, p, static_cast<size_t>(n) * 2);
  return load_halves(halves);
}

inline void store_first_halves(void* p, __m128i v, int n) {
  alignas(16) uint16_t halves[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(halves), v);
  std::memcpy(p, halves, static_cast<size_t>(n) * 2);
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) { return widen_bf16(load_halves(p)); }
inline Vec load(const f16* p) { return _mm256_cvtph_ps(load_halves(p)); }
inline Vec load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline Vec load_first(const bf16* p, int n) { return widen_bf16(load_first_halves(p, n)); }
inline Vec load_first(const f16* p, int n) { return _mm256_cvtph_ps(load_first_halves(p, n)); }

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
inline void store(f16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v)); }
inline void store_first(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
inline void store_first(bf16* p, Vec v, int n) { store_first_halves(p, narrow_bf16(v), n); }
inline void store_first(f16* p, Vec v, int n) { store_first_halves(p, narrow_f16(v), n); }

// the first n lanes, integers of -128..127
inline void store_int8(int8_t* p, Vec v, int n) {
  const __m256i words = _mm256_cvtps_epi32(v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
  std::memcpy(p, &bytes, static_cast<size_t>(n));
}

inline void load_bf16_words(const void* p, Vec& low, Vec& high) {
  const __m256i w = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  low = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  high = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

typedef int32_t Ints __attribute__((vector_size(32)));
constexpr int kIntRows = 4;
constexpr int kIntVectors = 2;
constexpr int kCodeRows = 4;
constexpr int code_vectors(int rows) { return rows == 1 ? 4 : 2; }

inline Ints set1_int(int32_t x) { return (Ints)_mm256_set1_epi32(x); }
inline Ints load_ints(const void* p) { return (Ints)_mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_ints(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)v); }
inline Ints shift_right(Ints v, int bits) { return (Ints)_mm256_srli_epi32((__m256i)v, bits); }
inline Vec to_float(Ints v) { return _mm256_cvtepi32_ps((__m256i)v); }
inline Vec as_float(Ints v) { return _mm256_castsi256_ps((__m256i)v); }
inline Vec load_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Ints dot4(Ints sum, Ints codes, Ints x) {
  const __m256i c = (__m256i)codes, q = (__m256i)x;
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(q, 8));
  return sum + (Ints)even + (Ints)odd;
}

// permutations take 8 values, so there are two and bit 3 chooses
struct Table16 {
  Vec low;
  Vec high;
};
inline Table16 load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec lookup(const Table16& t, Ints codes) {
  const Vec bit3 = _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)codes, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, (__m256i)codes),
                          _mm256_permutevar8x32_ps(t.high, (__m256i)codes), bit3);
}

inline void transpose(Vec* r) {
  Vec t[8];
  for (int i = 0; i < 8; i += 4) {
    const Vec a = _mm256_unpacklo_ps(r[i], r[i + 1]);
    const Vec b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const Vec c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
    const Vec d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

inline void transpose_quads(Vec* r) {
  const Vec low = _mm256_permute2f128_ps(r[0], r[1], 0x20);
  r[1] = _mm256_permute2f128_ps(r[0], r[1], 0x31);
  r[0] = low;
}

inline void transpose_in_quads(Vec* r) {
  const Vec a = _mm256_unpacklo_ps(r[0], r[1]);
  const Vec b = _mm256_unpackhi_ps(r[0], r[1]);
  const Vec c = _mm256_unpacklo_ps(r[2], r[3]);
  const Vec d = _mm256_unpackhi_ps(r[2], r[3]);
  r[0] = _mm256_shuffle_ps(a, c, 0x44);
  r[1] = _mm256_shuffle_ps(a, c, 0xee);
  r[2] = _mm256_shuffle_ps(b, d, 0x44);
  r[3] = _mm256_shuffle_ps(b, d, 0xee);
}

inline Vec set_quads(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }

inline Vec load(const i8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_first(const i8* p, int n) {
  i8 bytes[8] = {};
  std::memcpy(bytes, p, static_cast<size_t>(n));
  return load(bytes);
}

// GCC takes a function that does nothing but prefetch for one without effect and drops calls of it; the empty statement
// is an effect
inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  asm volatile("");
}
inline void prefetch_l2(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  asm volatile("");
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
