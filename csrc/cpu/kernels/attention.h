// Causal attention of a tile of query rows over a paged cache.
//
// The cache is walked in splits of 256 tokens by absolute position, each in groups of up to 16 tokens that lie in one
// block. Within a split: all scores, their maximum m, p = exp(s - m), l = sum p, o = sum p v; splits are merged in
// index order by log-sum-exp (Dao, FlashAttention-2, arXiv:2307.08691; the split form is Flash-Decoding). A row's
// operations depend on its position only: not on the rows beside it in the tile, nor on where the blocks lie. Prefill
// and decode therefore agree to the bit.
//
// Scores: a group of keys is transposed once for all rows of the tile, then lanes are keys and the sum runs over the
// head dimension in four interleaved chains. Values: lanes are the head dimension and the sum runs over tokens.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

constexpr int kGroupVecs = static_cast<int>(kGroup) / kLanes;
// a group may start anywhere in a split and always writes 16 scores
constexpr int64_t kScoreStride = kSplit + kGroup;
// rows that share the loads of keys and values
constexpr int kAttentionRows = 4;

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

inline int64_t attention_ld(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

int64_t attention_scratch_floats(int64_t head_dim) {
  const int64_t ld = attention_ld(head_dim);
  return ld * (3 * kQueryTile + 2 * kGroup) + kQueryTile * kScoreStride + 4 * kQueryTile;
}

inline AttentionScratch attention_scratch(float* p, int64_t head_dim) {
  AttentionScratch s;
  s.ld = attention_ld(head_dim);
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

// out[r] += sum over t < tokens of p[r][t] value[t], for kRows rows and kVecs vectors of the head dimension
template <int kRows, int kVecs>
inline void add_values(const float* p, const float* value, int64_t value_stride, int64_t tokens, int64_t ld,
                       float* out) {
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
template <int kRows>
inline void add_values_rows(const float* p, const float* value, int64_t value_stride, int64_t tokens, int64_t ld,
                            float* out) {
  // 4 rows x 4 vectors fit 32 registers, 4 rows x 2 vectors fit 16
  constexpr int kVecs = kLanes == 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= ld; d += kVecs * kLanes) {
    add_values<kRows, kVecs>(p, value + d, value_stride, tokens, ld, out + d);
  }
  for (; d < ld; d += kLanes) add_values<kRows, 1>(p, value + d, value_stride, tokens, ld, out + d);
}

// scores of one row become p = exp(s - max); returns their sum
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
    Vec p = exp(sub(load(scores + i), shift));
    if (lanes < kLanes) p = select_first(p, zero(), lanes);
    store(scores + i, p);
    sum = add(sum, p);
  });
  return reduce_add(sum);
}

// (total, m, l) <- merge of (total, m, l) and the split's (partial, m, l)
inline void merge_row(const AttentionScratch& s, int64_t row) {
  const float m = s.total_max[row] > s.partial_max[row] ? s.total_max[row] : s.partial_max[row];
  const Vec a = exp(set1(s.total_max[row] - m));
  const Vec b = exp(set1(s.partial_max[row] - m));
  s.total_max[row] = m;
  s.total_sum[row] = first(fma(set1(s.total_sum[row]), a, mul(set1(s.partial_sum[row]), b)));
  float* total = s.total + row * s.ld;
  const float* partial = s.partial + row * s.ld;
  for (int64_t d = 0; d < s.ld; d += kLanes) {
    store(total + d, fma(load(total + d), a, mul(load(partial + d), b)));
  }
}

// tokens of the group that starts at position p and ends before end: one block, one run of 16
inline int64_t group_tokens(int64_t p, int64_t block_size, int64_t end) {
  const int64_t in_block = p % block_size;
  const int64_t run = kGroup - in_block % kGroup;
  const int64_t n = block_size - in_block < run ? block_size - in_block : run;
  // the end depends on the tile, but only on tokens that no row before it sees
  return end - p < n ? end - p : n;
}

template <typename T>
inline void prefetch_group(const T* group, int64_t elements) {
  const char* bytes = reinterpret_cast<const char*>(group);
  for (int64_t i = 0; i < elements * static_cast<int64_t>(sizeof(T)); i += 64) prefetch_l2(bytes + i);
}

template <typename T>
void attention_tile(const AttentionArgs& args) {
  const AttentionScratch s = attention_scratch(args.scratch, args.head_dim);
  const int64_t head_dim = args.head_dim;
  const int64_t rows = args.rows;
  const T* key_cache = static_cast<const T*>(args.key);
  const T* value_cache = static_cast<const T*>(args.value);
  const bool values_in_place = std::is_same_v<T, float> && s.ld == head_dim;

  const auto offset = [&](int64_t position) {
    return args.block_table[position / args.block_size] * args.block_stride + position % args.block_size * head_dim;
  };
  const Vec scale = set1(args.scale);
  with_type(args.query_dtype, [&](auto t) {
    const auto* query = static_cast<const decltype(t)*>(args.query);
    for (int64_t r = 0; r < rows; ++r) {
      for_vectors(head_dim, [&](int64_t i, int lanes) {
        store(s.query + r * s.ld + i, mul(load_lanes(query + r * args.query_stride + i, lanes), scale));
      });
    }
  });
  for (int64_t i = 0; i < kGroup * s.ld; ++i) s.values[i] = 0.0f;

  const int64_t end = args.first_position + rows;
  for (int64_t begin = 0; begin < end; begin += kSplit) {
    const int64_t split_end = begin + kSplit < end ? begin + kSplit : end;
    // rows whose position lies before p take no part
    const auto first_row = [&](int64_t p) { return p > args.first_position ? p - args.first_position : 0; };

    // groups lie anywhere in memory, so each is fetched while the one before it is worked on
    for (int64_t p = begin, n; p < split_end; p += n) {
      n = group_tokens(p, args.block_size, split_end);
      prefetch_group(p + n < split_end ? key_cache + offset(p + n) : value_cache + offset(begin), n * head_dim);
      transpose_keys(key_cache + offset(p), n, head_dim, s.keys);
      float* scores = s.scores + (p - begin);
      int64_t r = first_row(p);
      for (; r + kAttentionRows <= rows; r += kAttentionRows) {
        score_rows<kAttentionRows>(s.query + r * s.ld, s.ld, s.keys, head_dim, scores + r * kScoreStride);
      }
      for (; r < rows; ++r) {
        score_rows<1>(s.query + r * s.ld, s.ld, s.keys, head_dim, scores + r * kScoreStride);
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
      n = group_tokens(p, args.block_size, split_end);
      if (p + n < split_end) {
        prefetch_group(value_cache + offset(p + n), n * head_dim);
      } else if (p + n < end) {
        prefetch_group(key_cache + offset(p + n), n * head_dim);
      }
      const float* values = s.values;
      int64_t value_stride = s.ld;
      if (values_in_place) {
        values = reinterpret_cast<const float*>(value_cache + offset(p));
      } else {
        for (int64_t t = 0; t < n; ++t)
          convert_row(value_cache + offset(p) + t * head_dim, head_dim, s.values + t * s.ld);
      }
      const float* weights = s.scores + (p - begin);
      int64_t r = first_row(p);
      // rows that see only a part of the group go alone: what they must not see may be anything, NaN included
      for (; r < rows && args.first_position + r < p + n - 1; ++r) {
        add_values_rows<1>(weights + r * kScoreStride, values, value_stride, args.first_position + r + 1 - p, s.ld,
                           s.partial + r * s.ld);
      }
      for (; r + kAttentionRows <= rows; r += kAttentionRows) {
        add_values_rows<kAttentionRows>(weights + r * kScoreStride, values, value_stride, n, s.ld,
                                        s.partial + r * s.ld);
      }
      for (; r < rows; ++r) {
        add_values_rows<1>(weights + r * kScoreStride, values, value_stride, n, s.ld, s.partial + r * s.ld);
      }
    }

    for (int64_t r = first_row(begin); r < rows; ++r) {
      if (begin == 0) {
        s.total_max[r] = s.partial_max[r];
        s.total_sum[r] = s.partial_sum[r];
        for (int64_t d = 0; d < s.ld; d += kLanes) store(s.total + r * s.ld + d, load(s.partial + r * s.ld + d));
      } else {
        merge_row(s, r);
      }
    }
  }

  with_type(args.out_dtype, [&](auto t) {
    auto* out = static_cast<decltype(t)*>(args.out);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec inverse = set1(1.0f / s.total_sum[r]);
      for_vectors(head_dim, [&](int64_t i, int lanes) {
        store_lanes(out + r * args.out_stride + i, mul(load(s.total + r * s.ld + i), inverse), lanes);
      });
    }
  });
}

void attention(const AttentionArgs& args) {
  with_type(args.cache_dtype, [&](auto t) { attention_tile<decltype(t)>(args); });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
