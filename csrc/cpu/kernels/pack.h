// Packed panels of float32, bfloat16 and float16 weights (packed.h): a weight [N, K] becomes ceil(N / 64) panels, so
// that the 64 outputs of a panel are computed from one sequential stream.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// elements of k in one chain of multiply-adds; changing it changes results in the last bits
constexpr int64_t kChain = 64;

// vectors in a panel row
constexpr int kPanelVecs = static_cast<int>(kPanel) / kLanes;

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

// bfloat16: 32-bit words of two neighbours along K
inline void pack_pairs(const bf16* w, int64_t stride_n, int64_t stride_k, int64_t num_columns, int64_t k, bf16* out) {
  for (int64_t i = 0; i < k; i += 2, out += 2 * kPanel) {
    const bf16* pair = w + i * stride_k;
    const bool both = i + 1 < k;
    for (int64_t c = 0; c < num_columns; ++c) {
      out[2 * c] = pair[c * stride_n];
      out[2 * c + 1] = both ? pair[c * stride_n + stride_k] : bf16{};
    }
    for (int64_t c = 2 * num_columns; c < 2 * kPanel; ++c) out[c] = bf16{};
  }
}

template <typename T, typename TOut>
void pack_panel(const T* w, int64_t stride_n, int64_t stride_k, int64_t num_columns, int64_t k, TOut* out) {
  if constexpr (is_bf16<TOut>) {
    static_assert(is_bf16<T>);
    pack_pairs(w, stride_n, stride_k, num_columns, k, out);
  } else if (stride_n == 1) {
    for (int64_t i = 0; i < k; ++i) {
      convert_row(w + i * stride_k, num_columns, out + i * kPanel);
      for (int64_t c = num_columns; c < kPanel; ++c) out[i * kPanel + c] = TOut{};
    }
  } else if constexpr (sizeof(TOut) == 4) {
    pack_rows_f32(w, stride_n, num_columns, k, out);
  } else {
    // storage keeps its 16 bits, so this only moves them
    static_assert(sizeof(T) == sizeof(TOut));
    for (int64_t c = 0; c < kPanel; ++c) {
      for (int64_t i = 0; i < k; ++i) {
        out[i * kPanel + c] = c < num_columns ? w[c * stride_n + i * stride_k] : TOut{};
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
