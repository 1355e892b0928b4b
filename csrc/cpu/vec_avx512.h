// Vec on AVX-512 (F, BW, DQ, VL): 16 float32 lanes. The same functions exist in vec_avx2.h and vec_portable.h; the
// kernels in kernels/ are written against them.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "types.h"

namespace gpt2rt::GPT2RT_ISA {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
// rows of the matrix microkernel: 6 rows x 4 vectors are 24 accumulators, which leaves 8 registers for a panel row
constexpr int kMaxRows = 6;
// vectors of a panel row that the microkernel takes at once, by its number of rows
constexpr int vectors_at_once(int) { return 4; }

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// of two operands one of which is NaN, the second is returned
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round_to_int(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for integral n; overflows to infinity and goes through the subnormals to 0
inline Vec scale_pow2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
// lanes 0..n of a, the others of b
inline Vec select_first(Vec a, Vec b, int n) { return _mm512_mask_blend_ps(first_lanes(n), b, a); }

inline float reduce_add(Vec v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}

inline float reduce_max(Vec v) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

// the lower and the upper half of the lanes as float64
typedef double Doubles __attribute__((vector_size(64)));
inline Doubles widen_low(Vec v) { return (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
inline Doubles widen_high(Vec v) { return (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }

inline float first(Vec v) { return _mm512_cvtss_f32(v); }

inline Vec widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }

// round to nearest even; a NaN becomes the quiet NaN 0x7fc0, as torch writes it
inline __m256i narrow_bf16(Vec v) {
  const __m512i x = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0)));
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
// with a full mask: GCC 12 warns of the undefined operand inside the plain intrinsic
inline Vec load(const f16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// the first n lanes, zero in the others; reads nothing past p[n - 1]
inline Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Vec load_first(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline Vec load_first(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

inline __m256i narrow_f16(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
inline void store(f16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v)); }
inline void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline void store_first(bf16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(v)); }
inline void store_first(f16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_f16(v)); }

// the first n lanes, integers of -128..127
inline void store_int8(int8_t* p, Vec v, int n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

// kLanes packed 32-bit words of bf16 (pack_panel): the low halves and the high halves
inline void load_bf16_words(const void* p, Vec& low, Vec& high) {
  const __m512i w = _mm512_loadu_si512(p);
  low = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// kLanes 32-bit integers, with the operators of the vector extension; as __m512i, which is of 64-bit integers, GCC
// would keep accumulators twice
typedef int32_t Ints __attribute__((vector_size(64)));
// rows and vectors of columns that the integer microkernel sums at once (kernels/gemm_int8.h)
#if defined(__AVX512VNNI__)
constexpr int kIntRows = 6;
#else
constexpr int kIntRows = 4;
#endif
constexpr int kIntVectors = 4;
// the same for float rows and codes that become floats in registers (kernels/gemm_codes.h)
constexpr int kCodeRows = 4;
constexpr int code_vectors(int) { return 4; }

inline Ints set1_int(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
inline Ints load_ints(const void* p) { return (Ints)_mm512_loadu_si512(p); }
inline void store_ints(void* p, Ints v) { _mm512_storeu_si512(p, (__m512i)v); }
typedef uint32_t Uints __attribute__((vector_size(64)));
inline Ints shift_right(Ints v, int bits) { return (Ints)((Uints)v >> static_cast<uint32_t>(bits)); }
inline Vec to_float(Ints v) { return __builtin_convertvector(v, Vec); }
inline Vec as_float(Ints v) { return _mm512_castsi512_ps((__m512i)v); }
inline Vec load_bytes(const uint8_t* p) {
  // with a full mask: GCC 12 warns of the undefined operand inside the plain intrinsic
  return to_float((Ints)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// sum + codes[0] x[0] + .. + codes[3] x[3] in each lane: unsigned bytes times signed bytes, exact
inline Ints dot4(Ints sum, Ints codes, Ints x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#else
  // as 16-bit integers, even and odd bytes: vpmaddubsw would saturate
  const __m512i c = (__m512i)codes, q = (__m512i)x;
  const __m512i even =
      _mm512_madd_epi16(_mm512_and_si512(c, _mm512_set1_epi16(0xff)), _mm512_srai_epi16(_mm512_slli_epi16(q, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(c, 8), _mm512_srai_epi16(q, 8));
  return sum + (Ints)even + (Ints)odd;
#endif
}

// 16 values, looked up by the lowest 4 bits of each lane
struct Table16 {
  Vec values;
};
inline Table16 load_table(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec lookup(const Table16& t, Ints codes) {
  return _mm512_maskz_permutexvar_ps(0xffff, (__m512i)codes, t.values);
}

// rows r[i] of a 16 x 16 matrix become its columns
inline void transpose(Vec* r) {
  Vec t[16];
  for (int i = 0; i < 16; i += 4) {
    const Vec a = _mm512_unpacklo_ps(r[i], r[i + 1]);
    const Vec b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const Vec c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
    const Vec d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    // 128-bit lane j of t[i + 4 * g] holds rows 4g..4g+3 of column 4j + i
    const Vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
    const Vec b = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const Vec c = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const Vec d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

// r[i] becomes quads (4 neighbouring lanes) number i of r[0], r[1], r[2] and r[3]
inline void transpose_quads(Vec* r) {
  const Vec a = _mm512_shuffle_f32x4(r[0], r[1], 0x88);
  const Vec b = _mm512_shuffle_f32x4(r[0], r[1], 0xdd);
  const Vec c = _mm512_shuffle_f32x4(r[2], r[3], 0x88);
  const Vec d = _mm512_shuffle_f32x4(r[2], r[3], 0xdd);
  r[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  r[1] = _mm512_shuffle_f32x4(b, d, 0x88);
  r[2] = _mm512_shuffle_f32x4(a, c, 0xdd);
  r[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

// each quad of r[0..4] is a row of a 4 x 4 matrix, which is transposed
inline void transpose_in_quads(Vec* r) {
  const Vec a = _mm512_unpacklo_ps(r[0], r[1]);
  const Vec b = _mm512_unpackhi_ps(r[0], r[1]);
  const Vec c = _mm512_unpacklo_ps(r[2], r[3]);
  const Vec d = _mm512_unpackhi_ps(r[2], r[3]);
  r[0] = _mm512_shuffle_ps(a, c, 0x44);
  r[1] = _mm512_shuffle_ps(a, c, 0xee);
  r[2] = _mm512_shuffle_ps(b, d, 0x44);
  r[3] = _mm512_shuffle_ps(b, d, 0xee);
}

// p[0..4] in every quad
inline Vec set_quads(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

inline Vec widen_i8(__m128i b) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); }
inline Vec load(const i8* p) { return widen_i8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load_first(const i8* p, int n) { return widen_i8(_mm_maskz_loadu_epi8(first_lanes(n), p)); }

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
