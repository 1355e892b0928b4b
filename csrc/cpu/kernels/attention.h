// Causal attention of a tile of query rows over a paged cache.
//
// The cache is walked in splits of 256 tokens by absolute position, each in groups of up to 16 tokens that lie in one
// block. Within a split: all scores, their maximum m, p = exp(s - m), l = sum p, o = sum p v; splits are merged in
// index order by log-sum-exp (Dao, FlashAttention-2, arXiv:2307.08691; the split form is Flash-Decoding). A row's
// operations depend on its position only: not on the rows beside it in the tile, nor on where the blocks lie. Prefill
// and decode therefore agree to the bit.
//
// Scores: the sum over the head dimension runs in four interleaved chains. For many rows a group of keys is transposed
// once, and lanes are keys; for one row that would cost more than the score itself, so there the lanes are keys and
// chains, as the keys lie in memory, and the result is the same to the bit. Values: lanes are the head dimension and
// the sum runs over tokens. int8 caches: scores and weights are multiplied by the tokens' scales.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

constexpr int kGroupVecs = static_cast<int>(kGroup) / kLanes;
// a group may start anywhere in a split and always writes 16 scores
constexpr int64_t kScoreStride = kSplit + kGroup;
// rows that share the loads of keys and values
constexpr int kAttentionRows = 4;
// tokens by which the fetching of keys and values runs ahead of a single row
constexpr int64_t kFewRowsAhead = 4 * kGroup;

struct AttentionScratch {
  int64_t ld;          // head_dim rounded up to 64 bytes
  float* query;        // [kQueryTile][ld], scaled
  float* keys;         // [head_dim][kGroup]
  float* values;       // [kGroup][ld]
  float* scores;       // [kQueryTile][kScoreStride]
  float* partial;      // [kQueryTile][ld]
  float* total;        // [kQueryTile][ld]
  float* partial_max;  // [kQueryTile], and so on
  float* partial_sum;
  float* total_max;
  float* total_sum;
};

int64_t attention_scratch_floats(int64_t head_dim) {
  const int64_t ld = attention_row_floats(head_dim);
  return ld * (3 * kQueryTile + 2 * kGroup) + kQueryTile * kScoreStride + 4 * kQueryTile;
}

inline AttentionScratch attention_scratch(float* p, int64_t head_dim) {
  AttentionScratch s;
  s.ld = attention_row_floats(head_dim);
  const auto take = [&p](int64_t floats) {
    float* taken = p;
    p += floats;
    return taken;
  };
  s.query = take(kQueryTile * s.ld);
  s.keys = take(kGroup * s.ld);
  s.values = take(kGroup * s.ld);
  s.partial = take(kQueryTile * s.ld);
  s.total = take(kQueryTile * s.ld);
  s.scores = take(kQueryTile * kScoreStride);
  s.partial_max = take(kQueryTile);
  s.partial_sum = take(kQueryTile);
  s.total_max = take(kQueryTile);
  s.total_sum = take(kQueryTile);
  return s;
}

// where one split of a tile lies in memory
struct AttentionPartial {
  float* rows;  // [rows][ld], not divided by the sum
  float* max;   // [rows]
  float* sum;   // [rows]
};

inline AttentionPartial attention_partial(const AttentionArgs& args, int64_t split) {
  const int64_t ld = attention_row_floats(args.head_dim);
  float* start = args.partials + split * attention_partial_floats(args.rows, args.head_dim);
  return {start, start + args.rows * ld, start + args.rows * (ld + 1)};
}

// keys[d][t] = key[t][d] for t < tokens; the lanes past tokens are zero
template <typename T>
inline void transpose_keys(const T* key, int64_t tokens, int64_t head_dim, float* keys) {
  for (int64_t t = 0; t < kGroup; t += kLanes) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int lanes = static_cast<int>(head_dim - d < kLanes ? head_dim - d : kLanes);
      Vec tile[kLanes];
      if (lanes == kLanes && tokens - t >= kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) tile[j] = load(key + (t + j) * head_dim + d);
        transpose(tile);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(keys + (d + j) * kGroup + t, tile[j]);
        continue;
      }
      for (int j = 0; j < kLanes; ++j) {
        tile[j] = t + j < tokens ? load_lanes(key + (t + j) * head_dim + d, lanes) : zero();
      }
      transpose(tile);
      for (int j = 0; j < lanes; ++j) store(keys + (d + j) * kGroup + t, tile[j]);
    }
  }
}

// scores[r][0..16] = query[r] . keys, for kRows rows
template <int kRows>
inline void score_rows(const float* query, int64_t ld, const float* keys, int64_t head_dim, float* scores) {
  for (int g = 0; g < kGroupVecs; ++g) {
    Vec chain[kRows][4];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) chain[r][c] = zero();
    }
    const float* column = keys + g * kLanes;
    int64_t d = 0;
    for (; d + 4 <= head_dim; d += 4, column += 4 * kGroup) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const Vec key = load(column + c * kGroup);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) chain[r][c] = fma(set1(query[r * ld + d + c]), key, chain[r][c]);
      }
    }
    for (; d < head_dim; ++d, column += kGroup) {
      const Vec key = load(column);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) chain[r][0] = fma(set1(query[r * ld + d]), key, chain[r][0]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      store(scores + r * kScoreStride + g * kLanes, add(add(chain[r][0], chain[r][1]), add(chain[r][2], chain[r][3])));
    }
  }
}

// scores[0..16] = query . key[0..16], to the bit as score_rows<1>; head_dim is a multiple of 16
template <typename T>
inline void score_one_row(const float* query, const T* key, int64_t head_dim, float* scores) {
  constexpr int kQuads = kLanes / 4;
  for (int g = 0; g < kGroupVecs; ++g, key += kLanes * head_dim) {
    // quad L of sum[j] has the four chains of key j + 4 L
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec quad[kQuads];
#pragma GCC unroll 4
      for (int i = 0; i < kQuads; ++i) quad[i] = set_quads(query + d + 4 * i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vec keys[kQuads];
#pragma GCC unroll 4
        for (int i = 0; i < kQuads; ++i) keys[i] = load(key + (j + 4 * i) * head_dim + d);
        transpose_quads(keys);
#pragma GCC unroll 4
        for (int i = 0; i < kQuads; ++i) sum[j] = fma(quad[i], keys[i], sum[j]);
      }
    }
    // sum[c] has chain c of all keys
    transpose_in_quads(sum);
    store(scores + g * kLanes, add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
}

// out[r] += sum over t < tokens of p[r][t] value[t], for kRows rows and kVecs vectors of the head dimension
template <int kRows, int kVecs, typename T>
inline void add_values(const float* p, const T* value, int64_t value_stride, int64_t tokens, int64_t ld, float* out) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sum[r][j] = load(out + r * ld + j * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Vec v[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) v[j] = load(value + t * value_stride + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = set1(p[r * kScoreStride + t]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[r][j] = fma(weight, v[j], sum[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(out + r * ld + j * kLanes, sum[r][j]);
  }
}

// value rows have ld floats (or head_dim, where that is the same), so whole vectors may be read
template <int kRows, typename T>
inline void add_values_rows(const float* p, const T* value, int64_t value_stride, int64_t tokens, int64_t ld,
                            float* out) {
  // 4 rows x 4 vectors fit 32 registers, 4 rows x 2 vectors fit 16
  constexpr int kVecs = kLanes == 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= ld; d += kVecs * kLanes) {
    add_values<kRows, kVecs>(p, value + d, value_stride, tokens, ld, out + d);
  }
  for (; d < ld; d += kLanes) add_values<kRows, 1>(p, value + d, value_stride, tokens, ld, out + d);
}

// partial[r] += sum of weights[r][t] value[t] over the n tokens of a group, for rows r.. of the tile; row `i` sees the
// tokens up to i - start. What lies beyond may be anything, NaN included.
template <typename T>
inline void add_group(const float* weights, const T* values, int64_t stride, int64_t n, int64_t start, int64_t r,
                      int64_t rows, const AttentionScratch& s) {
  const auto row = [&](int64_t i, int64_t from, int64_t to) {
    add_values_rows<1>(weights + i * kScoreStride + from, values + from * stride, stride, to - from, s.ld,
                       s.partial + i * s.ld);
  };
  for (; r + kAttentionRows <= rows; r += kAttentionRows) {
    // what the first of the rows sees together, the rest alone
    const int64_t common = r + 1 - start < n ? r + 1 - start : n;
    add_values_rows<kAttentionRows>(weights + r * kScoreStride, values, stride, common, s.ld, s.partial + r * s.ld);
    for (int64_t i = r + 1; common < n && i < r + kAttentionRows; ++i)
      row(i, common, i + 1 - start < n ? i + 1 - start : n);
  }
  for (; r < rows; ++r) row(r, 0, r + 1 - start < n ? r + 1 - start : n);
}

// scores of one row become p = 2^(s - max); returns their sum
inline float softmax_row(float* scores, int64_t n, float& maximum) {
  Vec m = set1(-__builtin_inff());
  for_vectors(n, [&](int64_t i, int lanes) {
    const Vec s = load(scores + i);
    m = max(lanes == kLanes ? s : select_first(s, m, lanes), m);
  });
  maximum = reduce_max(m);
  const Vec shift = set1(maximum);
  Vec sum = zero();
  for_vectors(n, [&](int64_t i, int lanes) {
    Vec p = exp2_nonpositive(sub(load(scores + i), shift));
    if (lanes < kLanes) p = select_first(p, zero(), lanes);
    store(scores + i, p);
    sum = add(sum, p);
  });
  return reduce_add(sum);
}

// scores[i] *= scales[i] for i < n <= kGroup
inline void scale_scores(float* scores, const float* scales, int64_t n) {
  // what lies behind belongs to the next group
  for_vectors(n, [=](int64_t i, int lanes) {
    store_lanes(scores + i, mul(load(scores + i), load_lanes(scales + i, lanes)), lanes);
  });
}

// (total, max, sum) <- merge of (total, max, sum) and of a split's
inline void merge_row(float* total, float& total_max, float& total_sum, const float* partial, float partial_max,
                      float partial_sum, int64_t ld) {
  const float m = total_max > partial_max ? total_max : partial_max;
  const Vec a = exp2_nonpositive(set1(total_max - m));
  const Vec b = exp2_nonpositive(set1(partial_max - m));
  total_max = m;
  total_sum = first(fma(set1(total_sum), a, mul(set1(partial_sum), b)));
  for (int64_t d = 0; d < ld; d += kLanes) {
    store(total + d, fma(load(total + d), a, mul(load(partial + d), b)));
  }
}

// row `row` of the result: total / sum
inline void write_row(const AttentionArgs& args, int64_t row, const float* total, float sum) {
  const Vec inverse = set1(1.0f / sum);
  with_type(args.out_dtype, [&](auto t) {
    auto* out = static_cast<decltype(t)*>(args.out) + row * args.out_stride;
    for_vectors(args.head_dim,
                [&](int64_t i, int lanes) { store_lanes(out + i, mul(load(total + i), inverse), lanes); });
  });
}

// tokens of the group that starts at position p and ends before end: one block, one run of 16
inline int64_t group_tokens(int64_t p, int64_t block_size, int64_t end) {
  const int64_t in_block = p % block_size;
  const int64_t run = kGroup - in_block % kGroup;
  const int64_t n = block_size - in_block < run ? block_size - in_block : run;
  // the end depends on the tile, but only on tokens that no row before it sees
  return end - p < n ? end - p : n;
}

inline void load_queries(const AttentionArgs& args, const AttentionScratch& s) {
  // scores are kept in units of log 2, so that softmax takes powers of 2
  const Vec scale = set1(args.scale * 1.44269504088896341f);
  with_type(args.query_dtype, [&](auto t) {
    const auto* query = static_cast<const decltype(t)*>(args.query);
    for (int64_t r = 0; r < args.rows; ++r) {
      for_vectors(args.head_dim, [&](int64_t i, int lanes) {
        store(s.query + r * s.ld + i, mul(load_lanes(query + r * args.query_stride + i, lanes), scale));
      });
    }
  });
}

// one split of the tile: partial, partial_max and partial_sum of the rows that see a token of begin..begin + kSplit
template <typename T>
void attention_split(const AttentionArgs& args, const AttentionScratch& s, int64_t begin) {
  constexpr bool kScaled = sizeof(T) == 1;
  const int64_t head_dim = args.head_dim, rows = args.rows, block_size = args.block_size;
  const int64_t end = args.first_position + rows;
  const int64_t split_end = begin + kSplit < end ? begin + kSplit : end;
  const T* key_cache = static_cast<const T*>(args.key);
  const T* value_cache = static_cast<const T*>(args.value);
  const int64_t block_rows = args.block_stride / head_dim;
  const auto row_offset = [&](int64_t position) {
    return args.block_table[position / block_size] * block_rows + position % block_size;
  };
  // rows whose position lies before p take no part
  const auto first_row = [&](int64_t p) { return p > args.first_position ? p - args.first_position : 0; };

  // groups lie anywhere in memory, so they are fetched before they are needed: keys, then values, then the next split's
  // keys. With few rows there is little to compute in the meantime, so further ahead.
  const int64_t ahead = rows < kAttentionRows ? kFewRowsAhead : kGroup;
  const auto fetch = [&](const T* cache, const float* scales, int64_t p) {
    const char* bytes = reinterpret_cast<const char*>(cache + row_offset(p) * head_dim);
    for (int64_t i = 0; i < kGroup * head_dim * static_cast<int64_t>(sizeof(T)); i += 64) prefetch_l2(bytes + i);
    if constexpr (kScaled) prefetch_l2(scales + row_offset(p));
  };
  const auto fetch_after_keys = [&](int64_t p) {
    if (p < split_end) return fetch(key_cache, args.key_scales, p);
    p -= split_end - begin;
    if (p < split_end) fetch(value_cache, args.value_scales, p);
  };
  const auto fetch_after_values = [&](int64_t p) {
    if (p < split_end) return fetch(value_cache, args.value_scales, p);
    if (p < end) fetch(key_cache, args.key_scales, p);
  };

  if (begin == 0 || args.split >= 0) {
    for (int64_t p = begin; p < split_end && p < begin + ahead; p += kGroup) fetch(key_cache, args.key_scales, p);
  }

  // one row takes whole groups as they lie in the cache, beyond the last token too: those scores are not looked at
  const bool in_place = s.ld == head_dim && block_size % kGroup == 0;
  for (int64_t p = begin, n; p < split_end; p += n) {
    n = group_tokens(p, block_size, split_end);
    fetch_after_keys(p + ahead);
    const T* keys = key_cache + row_offset(p) * head_dim;
    float* scores = s.scores + (p - begin);
    int64_t r = first_row(p);
    if (in_place && rows - r == 1) {
      score_one_row(s.query + r * s.ld, keys, head_dim, scores + r * kScoreStride);
    } else {
      transpose_keys(keys, n, head_dim, s.keys);
      for (; r + kAttentionRows <= rows; r += kAttentionRows) {
        score_rows<kAttentionRows>(s.query + r * s.ld, s.ld, s.keys, head_dim, scores + r * kScoreStride);
      }
      for (; r < rows; ++r) {
        score_rows<1>(s.query + r * s.ld, s.ld, s.keys, head_dim, scores + r * kScoreStride);
      }
    }
    if constexpr (kScaled) {
      const float* scales = args.key_scales + row_offset(p);
      for (r = first_row(p); r < rows; ++r) scale_scores(scores + r * kScoreStride, scales, n);
    }
  }

  for (int64_t r = first_row(begin); r < rows; ++r) {
    const int64_t position = args.first_position + r;
    const int64_t visible = (position + 1 < split_end ? position + 1 : split_end) - begin;
    s.partial_sum[r] = softmax_row(s.scores + r * kScoreStride, visible, s.partial_max[r]);
    float* partial = s.partial + r * s.ld;
    for (int64_t d = 0; d < s.ld; d += kLanes) store(partial + d, zero());
  }

  for (int64_t p = begin, n; p < split_end; p += n) {
    n = group_tokens(p, block_size, split_end);
    fetch_after_values(p + ahead);
    const int64_t r = first_row(p);
    float* weights = s.scores + (p - begin);
    if constexpr (kScaled) {
      const float* scales = args.value_scales + row_offset(p);
      for (int64_t i = r; i < rows; ++i) scale_scores(weights + i * kScoreStride, scales, n);
    }
    const T* values = value_cache + row_offset(p) * head_dim;
    if (s.ld == head_dim && (std::is_same_v<T, float> || rows - r == 1)) {
      add_group(weights, values, head_dim, n, p - args.first_position, r, rows, s);
    } else {
      for (int64_t t = 0; t < n; ++t) convert_row(values + t * head_dim, head_dim, s.values + t * s.ld);
      add_group(weights, s.values, s.ld, n, p - args.first_position, r, rows, s);
    }
  }
}

// all splits of the tile, merged, or the one that is asked for, which goes to memory; split(begin) computes one into
// the partials of s
template <typename Split>
inline void attention_tile(const AttentionArgs& args, AttentionScratch& s, Split split) {
  if (args.split >= 0) {
    const AttentionPartial out = attention_partial(args, args.split);
    s.partial = out.rows;
    s.partial_max = out.max;
    s.partial_sum = out.sum;
    split(args.split * kSplit);
    return;
  }
  const int64_t end = args.first_position + args.rows;
  for (int64_t begin = 0; begin < end; begin += kSplit) {
    split(begin);
    for (int64_t r = begin > args.first_position ? begin - args.first_position : 0; r < args.rows; ++r) {
      float* total = s.total + r * s.ld;
      const float* partial = s.partial + r * s.ld;
      if (begin == 0) {
        s.total_max[r] = s.partial_max[r];
        s.total_sum[r] = s.partial_sum[r];
        std::memcpy(total, partial, static_cast<size_t>(s.ld) * sizeof(float));
      } else {
        merge_row(total, s.total_max[r], s.total_sum[r], partial, s.partial_max[r], s.partial_sum[r], s.ld);
      }
    }
  }
  for (int64_t r = 0; r < args.rows; ++r) write_row(args, r, s.total + r * s.ld, s.total_sum[r]);
}

void attention(const AttentionArgs& args) {
  AttentionScratch s = attention_scratch(args.scratch, args.head_dim);
  load_queries(args, s);
  for (int64_t i = 0; i < kGroup * s.ld; ++i) s.values[i] = 0.0f;
  with_cache_type(args.cache_dtype, [&](auto t) {
    attention_tile(args, s, [&](int64_t begin) { attention_split<decltype(t)>(args, s, begin); });
  });
}

// the splits of a tile that lie in memory, merged in their order
void attention_merge(const AttentionArgs& args) {
  const int64_t ld = attention_row_floats(args.head_dim);
  for (int64_t r = 0; r < args.rows; ++r) {
    const AttentionPartial first_split = attention_partial(args, 0);
    float* total = first_split.rows + r * ld;
    float max = first_split.max[r], sum = first_split.sum[r];
    for (int64_t split = 1; split * kSplit <= args.first_position + r; ++split) {
      const AttentionPartial next = attention_partial(args, split);
      merge_row(total, max, sum, next.rows + r * ld, next.max[r], next.sum[r], ld);
    }
    write_row(args, r, total, sum);
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
