// float32 rows and weights of 8 or 4 bits: exact arithmetic.
//
// Every output is a sum of chains of fused multiply-adds over k in increasing order from 0, each of 64 elements or of
// the group if that is smaller, of x with the integer codes (the codebook's values); a chain is multiplied by the scale
// of its group and added to the total. int8 has one scale for all of k, applied last.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

inline void sum_int8_row(const PackedWeight& w, const char* panel, const float* x, float* sums) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(panel);
  const float* scales = reinterpret_cast<const float*>(panel + round_up(w.k, kInt8Group) * kPanel);
  for (int64_t c = 0; c < kPanel; ++c) {
    float total = 0.0f;
    for (int64_t begin = 0; begin < w.k; begin += kChain) {
      const int64_t end = w.k - begin < kChain ? w.k : begin + kChain;
      Vec chain = zero();
      for (int64_t i = begin; i < end; ++i) {
        chain = fma(set1(x[i]), set1(static_cast<float>(codes[(i / 4 * kPanel + c) * 4 + i % 4] - 128)), chain);
      }
      total += first(chain);
    }
    sums[c] = total * scales[c];
  }
}

inline void sum_codes4_row(const PackedWeight& w, const char* panel, const float* x, float* sums) {
  for (int64_t c = 0; c < kPanel; ++c) {
    Vec total = zero();
    for (int64_t begin = 0; begin < w.k; begin += w.group) {
      const Group4 g = group4(w, panel + begin / w.group * group_bytes(w.format, w.group, w.zeros));
      const int64_t count = w.k - begin < w.group ? w.k - begin : w.group;
      for (int64_t part = 0; part < count; part += kChain) {
        Vec chain = zero();
        for (int64_t i = part; i < count && i < part + kChain; ++i) {
          chain = fma(set1(x[begin + i]), set1(level_at(w, g, i, c)), chain);
        }
        total = fma(chain, set1(scale_at(g, c)), total);
      }
    }
    sums[c] = first(total);
  }
}

void gemm_codes(const GemmArgs& args) {
  const PackedWeight& w = args.weight;
  alignas(64) float sums[kPanel];
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const char* panel = static_cast<const char*>(w.data) + p * panel_bytes(w);
    const int64_t columns = w.n - p * kPanel < kPanel ? w.n - p * kPanel : kPanel;
    for (int64_t row = 0; row < args.m; ++row) {
      const float* x = reinterpret_cast<const float*>(static_cast<const char*>(args.x) + row * args.ldx);
      if (w.format == WeightFormat::kInt8) {
        sum_int8_row(w, panel, x, sums);
      } else {
        sum_codes4_row(w, panel, x, sums);
      }
      finish_rows(args, sums, row, 1, p * kPanel, columns);
    }
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
