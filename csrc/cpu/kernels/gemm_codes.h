// float32 rows and weights of 8 or 4 bits: exact arithmetic.
//
// Every output is a sum of chains of fused multiply-adds over k in increasing order from 0, each of 64 elements or of
// the group if that is smaller, of x with the integer codes minus their zero point (the codebook's values); a chain is
// multiplied by the scale of its group and added to the total. int8 has one scale for all of k, applied last.
//
// Few rows: the codes become floats in registers (Levels), once for each block of rows, and a panel is one sequential
// stream. Many rows: the floats of a chain are written to L1 first, once for all rows.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// rows up to which codes are expanded in registers
constexpr int64_t kDirectRows = 8;
// rows whose totals are kept at a time
constexpr int64_t kCodesTileRows = 48;

// Where the floats of a chain come from: each has kStep elements of k in one vector of 32-bit words a column, word(..)
// loads them and at<e>(..) gives those of element e.

// int8: an unsigned byte is put into the mantissa of 2^23, from which 2^23 + 128 is subtracted
struct Int8Levels {
  static constexpr int kStep = 4;
  const uint8_t* codes;
  Ints word(int64_t step, int vector) const { return load_ints(codes + (step * kPanel + vector * kLanes) * 4); }
  Vec at(Ints word, int e, int) const {
    return sub(as_float((shift_right(word, 8 * e) & set1_int(0xff)) | set1_int(0x4b000000)), set1(8388736.0f));
  }
};

// 4 bits: a table of 16 values
template <bool kZeros>
struct Int4Levels {
  static constexpr int kStep = 8;
  const uint8_t* codes;
  Table16 table;
  const uint8_t* zeros;
  Ints word(int64_t step, int vector) const { return load_ints(codes + (step * kPanel + vector * kLanes) * 4); }
  Vec at(Ints word, int e, int vector) const {
    const Vec level = lookup(table, shift_right(word, 8 * (e % 4) + 4 * (e / 4)));
    return kZeros ? sub(level, load_bytes(zeros + vector * kLanes)) : level;
  }
};

// expanded before: [k][64]
struct FloatLevels {
  static constexpr int kStep = 1;
  const float* levels;
  Vec word(int64_t step, int vector) const { return load(levels + step * kPanel + vector * kLanes); }
  Vec at(Vec word, int, int) const { return word; }
};

// One chain of kRows rows: totals += chain * scale, or += chain for scales == nullptr
template <typename Levels, int kRows>
[[gnu::noinline]] void add_chain(const Levels& from, int64_t count, const float* x, int64_t ldx, const char* ahead,
                                 int lines, const Vec* scales, float* totals) {
  constexpr int kStep = Levels::kStep;
  constexpr int kAtOnce = code_vectors(kRows);
  const Levels levels = from;
  const int64_t steps = count / kStep;
  for (int first = 0; first < kPanelVecs; first += kAtOnce) {
    Vec sum[kRows][kAtOnce];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int j = 0; j < kAtOnce; ++j) sum[r][j] = zero();
    }
    const auto add_element = [&](const auto* words, int e, const float* element) {
      Vec w[kAtOnce];
#pragma GCC unroll 16
      for (int j = 0; j < kAtOnce; ++j) w[j] = levels.at(words[j], e, first + j);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec a = set1(element[r * ldx]);
#pragma GCC unroll 16
        for (int j = 0; j < kAtOnce; ++j) sum[r][j] = fma(a, w[j], sum[r][j]);
      }
    };
    const float* element = x;
    for (int64_t s = 0; s < steps; ++s) {
      if (first == 0) {
        for (int line = 0; line < lines; ++line, ahead += 64) prefetch(ahead);
      }
      decltype(levels.word(0, 0)) words[kAtOnce];
#pragma GCC unroll 16
      for (int j = 0; j < kAtOnce; ++j) words[j] = levels.word(s, first + j);
#pragma GCC unroll 8
      for (int e = 0; e < kStep; ++e, ++element) add_element(words, e, element);
    }
    // the end of k, within a word
    for (int e = 0; e < static_cast<int>(count % kStep); ++e, ++element) {
      decltype(levels.word(0, 0)) words[kAtOnce];
      for (int j = 0; j < kAtOnce; ++j) words[j] = levels.word(steps, first + j);
      add_element(words, e, element);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kAtOnce; ++j) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* total = totals + r * kPanel + (first + j) * kLanes;
        store(total, scales == nullptr ? add(load(total), sum[r][j]) : fma(sum[r][j], scales[first + j], load(total)));
      }
    }
  }
}

template <typename Levels, int kRows>
inline void add_chain_rows(int rows, const Levels& levels, int64_t count, const float* x, int64_t ldx,
                           const char* ahead, int lines, const Vec* scales, float* totals) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return add_chain_rows<Levels, kRows - 1>(rows, levels, count, x, ldx, ahead, lines, scales, totals);
    }
  }
  add_chain<Levels, kRows>(levels, count, x, ldx, ahead, lines, scales, totals);
}

// all rows of a tile in blocks of up to kRows, as even as possible
template <int kRows, typename Levels>
inline void add_chain_blocks(const Levels& levels, int64_t count, const float* x, int64_t ldx, int64_t m,
                             const char* ahead, const Vec* scales, float* totals) {
  const int64_t blocks = (m + kRows - 1) / kRows;
  const int lines = ahead == nullptr ? 0 : blocks == 1 ? 4 : 2;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t left = blocks - block;
    const int rows = static_cast<int>((m - row + left - 1) / left);
    const int64_t first = block * (count / Levels::kStep) * lines * 64;
    add_chain_rows<Levels, kRows>(rows, levels, count, x + row * ldx, ldx, lines > 0 ? ahead + first : nullptr,
                                  block < 2 ? lines : 0, scales, totals + row * kPanel);
    row += rows;
  }
}

// [count][64] floats
template <typename Levels>
[[gnu::noinline]] void expand(const Levels& from, int64_t count, const char* ahead, float* out) {
  const Levels levels = from;
  for (int64_t i = 0; i < count; i += Levels::kStep) {
    for (int vector = 0; vector < kPanelVecs; ++vector) {
      if (vector * kLanes % 16 == 0) prefetch(ahead + (i / Levels::kStep * kPanel + vector * kLanes) * 4);
      const Ints word = levels.word(i / Levels::kStep, vector);
#pragma GCC unroll 8
      for (int e = 0; e < Levels::kStep; ++e) {
        store(out + (i + e) * kPanel + vector * kLanes, levels.at(word, e, vector));
      }
    }
  }
}

struct FloatRows {
  const float* x;
  int64_t ldx;
  int64_t m;
  float* totals;    // [m, 64]
  float* expanded;  // [kChain][64]
};

template <typename Levels>
inline void add_chain_tile(const Levels& levels, int64_t count, int64_t k, const FloatRows& rows, const Vec* scales) {
  const char* ahead = reinterpret_cast<const char*>(levels.codes) + kCodesAhead;
  if (rows.m <= kDirectRows) {
    return add_chain_blocks<kCodeRows>(levels, count, rows.x + k, rows.ldx, rows.m, ahead, scales, rows.totals);
  }
  expand(levels, count, ahead, rows.expanded);
  add_chain_blocks<kMaxRows>(FloatLevels{rows.expanded}, count, rows.x + k, rows.ldx, rows.m, nullptr, scales,
                             rows.totals);
}

inline void sum_int8_codes(const PackedWeight& w, const char* panel, const FloatRows& rows) {
  Int8Levels levels{reinterpret_cast<const uint8_t*>(panel)};
  for (int64_t k = 0; k < w.k; k += kChain, levels.codes += kChain * kPanel) {
    add_chain_tile(levels, w.k - k < kChain ? w.k - k : kChain, k, rows, nullptr);
  }
  const float* scales = reinterpret_cast<const float*>(panel + round_up(w.k, kInt8Group) * kPanel);
  for (int64_t i = 0; i < rows.m * kPanel; i += kLanes) {
    store(rows.totals + i, mul(load(rows.totals + i), load(scales + i % kPanel)));
  }
}

template <bool kZeros>
inline void sum_4bit_codes(const PackedWeight& w, const char* panel, const FloatRows& rows) {
  alignas(64) float table[16];
  for (int i = 0; i < 16; ++i)
    table[i] = w.codebook != nullptr ? w.codebook[i] : static_cast<float>(kZeros ? i : i - 8);
  Int4Levels<kZeros> levels{nullptr, load_table(table), nullptr};
  Vec scales[kPanelVecs];
  for (int64_t begin = 0; begin < w.k; begin += w.group, panel += group_bytes(w.format, w.group, w.zeros)) {
    const Group4 group = group4(w, panel);
    levels.codes = group.codes;
    levels.zeros = group.zeros;
    for (const char* line = panel; line < reinterpret_cast<const char*>(group.codes); line += 64) {
      prefetch(line + kCodesAhead);
    }
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      scales[c / kLanes] =
          group.scales != nullptr ? load(group.scales + c) : load(reinterpret_cast<const f16*>(group.half_scales) + c);
    }
    const int64_t end = w.k - begin < w.group ? w.k : begin + w.group;
    for (int64_t k = begin; k < end; k += kChain, levels.codes += kChain / 2 * kPanel) {
      add_chain_tile(levels, end - k < kChain ? end - k : kChain, k, rows, scales);
    }
  }
}

void gemm_codes(const GemmArgs& args) {
  const PackedWeight& w = args.weight;
  alignas(64) float tile[kCodesTileRows * kPanel], expanded[kChain * kPanel];
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const char* panel = static_cast<const char*>(w.data) + p * panel_bytes(w);
    const int64_t columns = w.n - p * kPanel < kPanel ? w.n - p * kPanel : kPanel;
    for (int64_t row = 0; row < args.m; row += kCodesTileRows) {
      const int64_t m = args.m - row < kCodesTileRows ? args.m - row : kCodesTileRows;
      const char* x = static_cast<const char*>(args.x) + row * args.ldx;
      const FloatRows rows{reinterpret_cast<const float*>(x), args.ldx / 4, m, tile, expanded};
      std::memset(tile, 0, static_cast<size_t>(m * kPanel) * sizeof(float));
      if (w.format == WeightFormat::kInt8) {
        sum_int8_codes(w, panel, rows);
      } else if (w.zeros) {
        sum_4bit_codes<true>(w, panel, rows);
      } else {
        sum_4bit_codes<false>(w, panel, rows);
      }
      finish_rows(args, tile, row, static_cast<int>(m), p * kPanel, columns);
    }
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
