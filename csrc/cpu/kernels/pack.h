// Packed panels: a weight [N, K] becomes ceil(N / 64) panels [K][64], so that the 64 outputs of a panel are computed
// from one sequential stream.
//
// float32 and float16 keep the natural order of columns. bf16 holds two groups of 32 columns; in each, 32-bit word j
// (0..15) has column j in its low half and column j + 16 in its high half, so that one load gives two vectors of
// neighbouring columns by a shift and a mask.
//
// The matrix kernel works on pairs of vectors. Pair p of a panel row covers the columns first_column(p).. and
// second_column(p)..; in float32 they could lie anywhere, in bf16 they are given by the layout.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// elements of k in one chain of multiply-adds; changing it changes results in the last bits
constexpr int64_t kChain = 64;

constexpr int kPairs = static_cast<int>(kPanel) / (2 * kLanes);

template <typename T>
constexpr int first_column(int pair) {
  if constexpr (is_bf16<T>) return 32 * (pair * kLanes / 16) + pair * kLanes % 16;
  return pair * 2 * kLanes;
}

template <typename T>
constexpr int second_column(int pair) {
  return first_column<T>(pair) + (is_bf16<T> ? 16 : kLanes);
}

template <typename T>
inline void load_pair(const T* panel_row, int pair, Vec& a, Vec& b) {
  if constexpr (is_bf16<T>) {
    load_bf16_words(panel_row + 2 * pair * kLanes, a, b);
  } else {
    a = load(panel_row + first_column<T>(pair));
    b = load(panel_row + second_column<T>(pair));
  }
}

// position of column c in a panel row
template <typename T>
constexpr int64_t packed_position(int64_t c) {
  if constexpr (is_bf16<T>) return c / 32 * 32 + c % 16 * 2 + c % 32 / 16;
  return c;
}

// float32 panel from a weight whose rows (output features) are contiguous: tiles of kLanes x kLanes are transposed
template <typename T>
void pack_rows_f32(const T* w, int64_t stride_n, int64_t num_columns, int64_t k, float* out) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    for (int64_t i = 0; i < k; i += kLanes) {
      const int lanes = static_cast<int>(k - i < kLanes ? k - i : kLanes);
      Vec tile[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        tile[j] = c + j < num_columns ? load_lanes(w + (c + j) * stride_n + i, lanes) : zero();
      }
      transpose(tile);
      for (int j = 0; j < lanes; ++j) store(out + (i + j) * kPanel + c, tile[j]);
    }
  }
}

template <typename T, typename TOut>
void pack_panel(const T* w, int64_t stride_n, int64_t stride_k, int64_t num_columns, int64_t k, TOut* out) {
  if constexpr (!is_bf16<TOut>) {
    if (stride_n == 1) {
      for (int64_t i = 0; i < k; ++i) {
        convert_row(w + i * stride_k, num_columns, out + i * kPanel);
        for (int64_t c = num_columns; c < kPanel; ++c) out[i * kPanel + c] = TOut{};
      }
      return;
    }
  }
  if constexpr (sizeof(TOut) == 4) {
    pack_rows_f32(w, stride_n, num_columns, k, out);
  } else {
    // storage keeps its 16 bits, so this only moves them
    static_assert(sizeof(T) == sizeof(TOut));
    for (int64_t c = 0; c < kPanel; ++c) {
      TOut* column = out + packed_position<TOut>(c);
      for (int64_t i = 0; i < k; ++i) {
        column[i * kPanel] = c < num_columns ? w[c * stride_n + i * stride_k] : TOut{};
      }
    }
  }
}

void pack_panel_any(DType dtype, const void* w, int64_t stride_n, int64_t stride_k, int64_t num_columns, int64_t k,
                    DType out_dtype, void* out) {
  with_type(dtype, [=](auto t) {
    using T = decltype(t);
    if (out_dtype == DType::kFloat32) {
      pack_panel(static_cast<const T*>(w), stride_n, stride_k, num_columns, k, static_cast<float*>(out));
    } else {
      pack_panel(static_cast<const T*>(w), stride_n, stride_k, num_columns, k, static_cast<T*>(out));
    }
  });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
