// Attention over a bfloat16 cache with products of bfloat16 pairs, on VDPBF16PS: two products and two additions to
// float32 for each lane.
//
// Queries are rounded to bfloat16; so are the weights p = exp(s - m), and it is the rounded ones that are added up to
// l, so that a row's weights still sum to 1. Splits, their order and their merging are those of attention.h.
//
// Scores: a row of head_dim elements is head_dim / 2 words of a pair each, which four interleaved chains go through.
// Values: the sums run over pairs of tokens, an even position and the next; a row whose last token is the first of a
// pair takes that pair with zeros in place of the second value, whatever lies there. As in attention.h the operations
// of a row depend on its position only, and one row, which reads keys and values as they lie in the cache, gives the
// same bits as many, for which they are packed once. Heads are filled up with zeros to whole vectors of 32 elements and
// runs of 16 tokens that do not lie together are gathered, so any head_dim and block size will do.
//
// Where the instruction starts once a cycle (Zen 4, Cascade Lake's successors) this is twice the products of float32.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// elements of bfloat16 in a vector
constexpr int64_t kPairLanes = 2 * kLanes;
// keys whose scores are computed at once, and values that are packed at once
constexpr int64_t kKeys = 2 * kGroup;
constexpr int64_t kValues = 4 * kGroup;
static_assert(kGroup == kLanes && kSplit % kKeys == 0 && kSplit % kValues == 0);
// weights take the place of the scores of their row
constexpr int64_t kWeightStride = 2 * kScoreStride;

struct PairScratch {
  AttentionScratch base;  // ld, scores, partial.., total..; the rest is not used
  int64_t width;          // head_dim rounded up to 32
  bf16* query;            // [kQueryTile][width]
  bf16* run;              // [kGroup][width], tokens that were gathered
  bf16* keys;             // [width / 2][kKeys][2]
  bf16* values;           // [kValues / 2][ld][2]
};

int64_t pair_width(int64_t head_dim) { return (head_dim + kPairLanes - 1) / kPairLanes * kPairLanes; }

int64_t attention_scratch_floats_bfloat16(int64_t head_dim) {
  return attention_scratch_floats(head_dim) + pair_width(head_dim) / 2 * (kQueryTile + kGroup + kKeys + kValues);
}

inline PairScratch pair_scratch(float* p, int64_t head_dim) {
  PairScratch s;
  s.base = attention_scratch(p, head_dim);
  s.width = pair_width(head_dim);
  bf16* next = reinterpret_cast<bf16*>(p + attention_scratch_floats(head_dim));
  const auto take = [&next, &s](int64_t rows) {
    bf16* taken = next;
    next += rows * s.width;
    return taken;
  };
  s.query = take(kQueryTile);
  s.run = take(kGroup);
  s.keys = take(kKeys);
  s.values = take(kValues);
  return s;
}

inline __m512i load_words(const bf16* p) { return _mm512_loadu_si512(p); }
inline __m512bh as_pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }
inline __m512bh as_pairs(Vec words) { return reinterpret_cast<__m512bh>(words); }
inline Vec as_vec(__m512i words) { return _mm512_castsi512_ps(words); }
inline Vec dot_pairs(Vec sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }

inline __m256i round_to_bf16(Vec v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

// 16 tokens' words w.., as they lie in `rows`, become keys[w..][g of kKeys]
inline void pack_keys(const bf16* rows, int64_t width, bf16* keys) {
  for (int64_t d = 0; d < width; d += kPairLanes, keys += kLanes * kKeys * 2) {
    Vec words[kLanes];
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t) words[t] = as_vec(load_words(rows + t * width + d));
    transpose(words);
#pragma GCC unroll 16
    for (int w = 0; w < kLanes; ++w) _mm512_storeu_ps(keys + w * kKeys * 2, words[w]);
  }
}

// scores[r][0..32] = scale * query[r] . keys, for kRows rows
template <int kRows>
inline void score_rows_bfloat16(const bf16* query, int64_t width, const bf16* keys, Vec scale, float* scores) {
  Vec sum[kRows][2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    // chains 0 and 1, then 2 and 3: all of them at once would not fit the registers
    Vec chain[kRows][2][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) chain[r][i / 2][i % 2] = zero();
    }
    const bf16* q = query + 4 * half;
    const bf16* k = keys + 2 * half * kKeys * 2;
    for (int64_t d = 0; d < width; d += 8, q += 8, k += 4 * kKeys * 2) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const __m512bh low = as_pairs(load_words(k + c * kKeys * 2));
        const __m512bh high = as_pairs(load_words(k + c * kKeys * 2 + kPairLanes));
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const __m512bh pair = pair_from_memory(q + r * width + 2 * c);
          chain[r][c][0] = dot_pairs(chain[r][c][0], pair, low);
          chain[r][c][1] = dot_pairs(chain[r][c][1], pair, high);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const Vec both = add(chain[r][0][j], chain[r][1][j]);
        if (half == 0) {
          sum[r][j] = both;
        } else {
          store(scores + r * kScoreStride + j * kLanes, mul(add(sum[r][j], both), scale));
        }
      }
    }
  }
}

// scores[0..16] = scale * query . rows[0..16], to the bit as score_rows_bfloat16<1>
inline void score_one_row_bfloat16(const bf16* query, const bf16* rows, int64_t width, Vec scale, float* scores) {
  // quad L of sum[j] has the four chains of key j + 4 L
  Vec sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t d = 0; d < width; d += kPairLanes) {
    __m512bh quad[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(query + d + 8 * i));
      quad[i] = as_pairs(_mm512_broadcast_i32x4(words));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec keys[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) keys[i] = as_vec(load_words(rows + (j + 4 * i) * width + d));
      transpose_quads(keys);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[j] = dot_pairs(sum[j], quad[i], as_pairs(keys[i]));
    }
  }
  // sum[c] has chain c of all keys
  transpose_in_quads(sum);
  store(scores, mul(add(add(sum[0], sum[1]), add(sum[2], sum[3])), scale));
}

// the scores of one row become weights 2^(s - max), rounded; returns the sum of these
inline float softmax_row_bfloat16(float* scores, int64_t n, float& maximum) {
  Vec m = set1(-__builtin_inff());
  for_vectors(n, [&](int64_t i, int lanes) {
    const Vec s = load(scores + i);
    m = max(lanes == kLanes ? s : select_first(s, m, lanes), m);
  });
  maximum = reduce_max(m);
  const Vec shift = set1(maximum);
  Vec sum = zero();
  // half as large as the scores, so they are written behind what is still to be read
  __m256i* weights = reinterpret_cast<__m256i*>(scores);
  for_vectors(n, [&](int64_t i, int lanes) {
    Vec p = exp2_nonpositive(sub(load(scores + i), shift));
    if (lanes < kLanes) p = select_first(p, zero(), lanes);
    const __m256i rounded = round_to_bf16(p);
    _mm256_storeu_si256(weights + i / kLanes, rounded);
    sum = add(sum, widen_bf16(rounded));
  });
  return reduce_add(sum);
}

// of two tokens' 32 elements: the pairs of the first 16 and of the last
inline __m512i first_pairs(__m512i even, __m512i odd) {
  const __m512i order =
      _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a, 0x00290009, 0x00280008,
                       0x00270007, 0x00260006, 0x00250005, 0x00240004, 0x00230003, 0x00220002, 0x00210001, 0x00200000);
  return _mm512_permutex2var_epi16(even, order, odd);
}
inline __m512i last_pairs(__m512i even, __m512i odd) {
  const __m512i order =
      _mm512_set_epi32(0x003f001f, 0x003e001e, 0x003d001d, 0x003c001c, 0x003b001b, 0x003a001a, 0x00390019, 0x00380018,
                       0x00370017, 0x00360016, 0x00350015, 0x00340014, 0x00330013, 0x00320012, 0x00310011, 0x00300010);
  return _mm512_permutex2var_epi16(even, order, odd);
}

// values[i][d] = (row 2 i, row 2 i + 1) at element d < ld, for 16 tokens
inline void pack_values(const bf16* rows, int64_t width, int64_t ld, bf16* values) {
  for (int64_t t = 0; t < kGroup; t += 2, rows += 2 * width, values += 2 * ld) {
    for (int64_t d = 0; d < width; d += kPairLanes) {
      const __m512i even = load_words(rows + d), odd = load_words(rows + width + d);
      _mm512_storeu_si512(values + 2 * d, first_pairs(even, odd));
      if (d + kLanes < ld) _mm512_storeu_si512(values + 2 * (d + kLanes), last_pairs(even, odd));
    }
  }
}

// out[r] += sum over `pairs` pairs of weights[r] and values, for kRows rows and kVecs vectors of the head dimension;
// with `half`, which is for one row, of one more pair its even token alone
template <int kRows, int kVecs>
inline void add_pairs(const bf16* weights, const bf16* values, int64_t pairs, bool half, int64_t ld, float* out) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[r][j] = load(out + r * ld + j * kLanes);
  }
  for (int64_t i = 0; i < pairs; ++i, weights += 2, values += 2 * ld) {
    __m512bh v[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) v[j] = as_pairs(load_words(values + j * kPairLanes));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh weight = pair_from_memory(weights + r * kWeightStride);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[r][j] = dot_pairs(sum[r][j], weight, v[j]);
    }
  }
  if (kRows == 1 && half) {
    const __m512bh weight = pair_from_memory(weights);
    const __m512i even = _mm512_set1_epi32(0xffff);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const __m512i v = _mm512_and_si512(load_words(values + j * kPairLanes), even);
      sum[0][j] = dot_pairs(sum[0][j], weight, as_pairs(v));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(out + r * ld + j * kLanes, sum[r][j]);
  }
}

template <int kRows>
inline void add_pairs_rows(const bf16* weights, const bf16* values, int64_t pairs, bool half, int64_t ld, float* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= ld; d += 4 * kLanes) {
    add_pairs<kRows, 4>(weights, values + 2 * d, pairs, half, ld, out + d);
  }
  for (; d < ld; d += kLanes) add_pairs<kRows, 1>(weights, values + 2 * d, pairs, half, ld, out + d);
}

// partial[r] += the n values at positions p.., which are packed, for rows r.. of the tile; row i sees those up to
// i - start
inline void add_packed_values(const bf16* weights, const bf16* values, int64_t n, int64_t start, int64_t r,
                              int64_t rows, const AttentionScratch& s) {
  const auto visible = [=](int64_t i) { return i + 1 - start < n ? i + 1 - start : n; };
  const auto row = [&](int64_t i, int64_t from) {
    const int64_t pairs = visible(i) / 2 - from;
    const bool half = visible(i) % 2 != 0;
    if (pairs == 0 && !half) return;
    add_pairs_rows<1>(weights + i * kWeightStride + 2 * from, values + 2 * from * s.ld, pairs, half, s.ld,
                      s.partial + i * s.ld);
  };
  for (; r + kAttentionRows <= rows; r += kAttentionRows) {
    // the pairs that the first of the rows sees together, the rest alone
    const int64_t common = visible(r) / 2;
    add_pairs_rows<kAttentionRows>(weights + r * kWeightStride, values, common, false, s.ld, s.partial + r * s.ld);
    for (int64_t i = r; i < r + kAttentionRows; ++i) row(i, common);
  }
  for (; r < rows; ++r) row(r, 0);
}

// sums[0..kHalves][2] += weights . rows over n <= 16 tokens, to the bit as add_pairs; rows at some element of the head
template <int kHalves>
inline void add_values_in_place(const bf16* weights, const bf16* rows, int64_t width, int64_t n, Vec (*sums)[2]) {
  for (int64_t t = 0; t < n; t += 2, rows += 2 * width) {
    const __m512bh weight = pair_from_memory(weights + t);
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      const __m512i even = load_words(rows + h * kPairLanes);
      const __m512i odd = t + 1 < n ? load_words(rows + width + h * kPairLanes) : _mm512_setzero_si512();
      // within 128 bits, see in_order
      sums[h][0] = dot_pairs(sums[h][0], weight, as_pairs(_mm512_unpacklo_epi16(even, odd)));
      sums[h][1] = dot_pairs(sums[h][1], weight, as_pairs(_mm512_unpackhi_epi16(even, odd)));
    }
  }
}

// the sums over the low and high halves of each 128 bits of 32 elements become those of elements 0..16 and 16..32
inline void in_order(Vec* sums) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const Vec low = _mm512_permutex2var_ps(sums[0], first, sums[1]);
  sums[1] = _mm512_permutex2var_ps(sums[0], last, sums[1]);
  sums[0] = low;
}

inline void load_queries_bfloat16(const AttentionArgs& args, const PairScratch& s) {
  with_type(args.query_dtype, [&](auto t) {
    const auto* query = static_cast<const decltype(t)*>(args.query);
    for (int64_t r = 0; r < args.rows; ++r) {
      for (int64_t d = 0; d < s.width; d += kLanes) {
        const int64_t left = args.head_dim - d;
        const Vec v =
            left <= 0 ? zero()
                      : load_lanes(query + r * args.query_stride + d, left < kLanes ? static_cast<int>(left) : kLanes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.query + r * s.width + d), round_to_bf16(v));
      }
    }
  });
}

// one split of the tile: partial, partial_max and partial_sum of the rows that see a token of begin..begin + kSplit
void attention_split_bfloat16(const AttentionArgs& args, const PairScratch& pairs, int64_t begin) {
  const AttentionScratch& s = pairs.base;
  const int64_t head_dim = args.head_dim, width = pairs.width, rows = args.rows, block_size = args.block_size;
  const int64_t end = args.first_position + rows;
  const int64_t split_end = begin + kSplit < end ? begin + kSplit : end;
  const bf16* key_cache = static_cast<const bf16*>(args.key);
  const bf16* value_cache = static_cast<const bf16*>(args.value);
  const int64_t block_rows = args.block_stride / head_dim;
  const auto row_offset = [&](int64_t position) {
    return (args.block_table[position / block_size] * block_rows + position % block_size) * head_dim;
  };
  const auto first_row = [&](int64_t p) { return p > args.first_position ? p - args.first_position : 0; };
  const auto tokens_from = [&](int64_t p) { return split_end - p < kGroup ? split_end - p : kGroup; };

  // 16 tokens from position p on, a multiple of 16. Of the last run some may be past the end, where anything may lie.
  const bool in_place = width == head_dim && block_size % kGroup == 0;
  const auto run = [&](const bf16* cache, int64_t p) -> const bf16* {
    if (in_place) return cache + row_offset(p);
    const int64_t n = tokens_from(p);
    for (int64_t t = 0; t < n; ++t) {
      std::memcpy(pairs.run + t * width, cache + row_offset(p + t), static_cast<size_t>(head_dim) * sizeof(bf16));
    }
    return pairs.run;
  };
  // as in attention_split, for runs that lie together
  const int64_t ahead = rows < kAttentionRows ? kFewRowsAhead : kGroup;
  const auto fetch = [&](const bf16* cache, int64_t p) {
    const char* bytes = reinterpret_cast<const char*>(cache + row_offset(p));
    for (int64_t i = 0; i < kGroup * head_dim * static_cast<int64_t>(sizeof(bf16)); i += 64) prefetch_l2(bytes + i);
  };
  const auto fetch_after_keys = [&](int64_t p) {
    if (p < split_end) return fetch(key_cache, p);
    p -= split_end - begin;
    if (p < split_end) fetch(value_cache, p);
  };
  const auto fetch_after_values = [&](int64_t p) {
    if (p < split_end) return fetch(value_cache, p);
    if (p < end) fetch(key_cache, p);
  };
  if (begin == 0 || args.split >= 0) {
    for (int64_t p = begin; p < split_end && p < begin + ahead; p += kGroup) fetch(key_cache, p);
  }

  // scores are kept in units of log 2, so that softmax takes powers of 2
  const Vec scale = set1(args.scale * 1.44269504088896341f);
  if (rows == 1) {
    for (int64_t p = begin; p < split_end; p += kGroup) {
      fetch_after_keys(p + ahead);
      score_one_row_bfloat16(pairs.query, run(key_cache, p), width, scale, s.scores + (p - begin));
    }
  } else {
    for (int64_t p = begin; p < split_end; p += kKeys) {
      for (int64_t g = 0; g < kKeys && p + g < split_end; g += kGroup) {
        fetch_after_keys(p + g + ahead);
        pack_keys(run(key_cache, p + g), width, pairs.keys + 2 * g);
      }
      float* scores = s.scores + (p - begin);
      int64_t r = first_row(p);
      for (; r + kAttentionRows <= rows; r += kAttentionRows) {
        score_rows_bfloat16<kAttentionRows>(pairs.query + r * width, width, pairs.keys, scale,
                                            scores + r * kScoreStride);
      }
      for (; r < rows; ++r) {
        score_rows_bfloat16<1>(pairs.query + r * width, width, pairs.keys, scale, scores + r * kScoreStride);
      }
    }
  }

  for (int64_t r = first_row(begin); r < rows; ++r) {
    const int64_t position = args.first_position + r;
    const int64_t visible = (position + 1 < split_end ? position + 1 : split_end) - begin;
    s.partial_sum[r] = softmax_row_bfloat16(s.scores + r * kScoreStride, visible, s.partial_max[r]);
    float* partial = s.partial + r * s.ld;
    for (int64_t d = 0; d < s.ld; d += kLanes) store(partial + d, zero());
  }

  const bf16* weights = reinterpret_cast<const bf16*>(s.scores);
  if (rows == 1) {
    for (int64_t d = 0; d < width; d += 2 * kPairLanes) {
      const bool both = width - d > kPairLanes;
      Vec sums[2][2] = {{zero(), zero()}, {zero(), zero()}};
      for (int64_t p = begin; p < split_end; p += kGroup) {
        if (d == 0) fetch_after_values(p + ahead);
        const bf16* values = run(value_cache, p) + d;
        if (both) {
          add_values_in_place<2>(weights + (p - begin), values, width, tokens_from(p), sums);
        } else {
          add_values_in_place<1>(weights + (p - begin), values, width, tokens_from(p), sums);
        }
      }
      for (int64_t i = 0; i < 4 && d + i * kLanes < s.ld; ++i) {
        if (i % 2 == 0) in_order(sums[i / 2]);
        store(s.partial + d + i * kLanes, sums[i / 2][i % 2]);
      }
    }
    return;
  }
  for (int64_t p = begin; p < split_end; p += kValues) {
    const int64_t n = split_end - p < kValues ? split_end - p : kValues;
    for (int64_t g = 0; g < n; g += kGroup) {
      fetch_after_values(p + g + ahead);
      pack_values(run(value_cache, p + g), width, s.ld, pairs.values + g * s.ld);
    }
    add_packed_values(weights + (p - begin), pairs.values, n, p - args.first_position, first_row(p), rows, s);
  }
}

void attention_bfloat16(const AttentionArgs& args) {
  PairScratch s = pair_scratch(args.scratch, args.head_dim);
  load_queries_bfloat16(args, s);
  std::memset(s.run, 0, static_cast<size_t>(kGroup * s.width) * sizeof(bf16));
  attention_tile(args, s.base, [&](int64_t begin) { attention_split_bfloat16(args, s, begin); });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
