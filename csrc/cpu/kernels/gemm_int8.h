// int8 rows (quantised in groups, prepare.h) and weights of int8 or int4.
//
// The products of a group are summed in int32, which is exact: sum q (code - zero) = sum q code - zero sum q, and the
// row brings sum q. The sum, as float32, is multiplied by the scale of the row's group times the scale of the weight's
// and added to the total in the order of the groups. int8 weights have one scale for all of k, applied last.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

void gemm_int8(const GemmArgs& args) {
  const PackedWeight& w = args.weight;
  const bool int8 = w.format == WeightFormat::kInt8;
  const int64_t group = row_group(w.format, w.group);
  const Int8Row layout = int8_row(w.k, group);
  alignas(64) float sums[kPanel];
  for (int64_t p = args.panel_begin; p < args.panel_end; ++p) {
    const char* panel = static_cast<const char*>(w.data) + p * panel_bytes(w);
    const float* column_scales = reinterpret_cast<const float*>(panel + round_up(w.k, kInt8Group) * kPanel);
    const int64_t columns = w.n - p * kPanel < kPanel ? w.n - p * kPanel : kPanel;
    for (int64_t row = 0; row < args.m; ++row) {
      const char* x = static_cast<const char*>(args.x) + row * args.ldx;
      const int8_t* q = reinterpret_cast<const int8_t*>(x);
      const float* scales = reinterpret_cast<const float*>(x + layout.scales);
      const int32_t* q_sums = reinterpret_cast<const int32_t*>(x + layout.sums);
      for (int64_t c = 0; c < kPanel; ++c) {
        Vec total = zero();
        for (int64_t g = 0; g < layout.groups; ++g) {
          int32_t sum = 0;
          float scale = scales[g];
          if (int8) {
            const uint8_t* codes = reinterpret_cast<const uint8_t*>(panel) + g * group * kPanel;
            for (int64_t i = 0; i < group; ++i) sum += q[g * group + i] * codes[(i / 4 * kPanel + c) * 4 + i % 4];
            sum -= 128 * q_sums[g];
          } else {
            const Group4 group4_g = group4(w, panel + g * group_bytes(w.format, group, w.zeros));
            for (int64_t i = 0; i < group; ++i) sum += q[g * group + i] * code_at(group4_g, i, c);
            sum -= (w.zeros ? group4_g.zeros[c] : 8) * q_sums[g];
            scale *= scale_at(group4_g, c);
          }
          total = fma(set1(static_cast<float>(sum)), set1(scale), total);
        }
        sums[c] = first(total) * (int8 ? column_scales[c] : 1.0f);
      }
      finish_rows(args, sums, row, 1, p * kPanel, columns);
    }
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
