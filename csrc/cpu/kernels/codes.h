// Weights of 8 and 4 bits: one element of a panel as a number, and a row of the weight.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// bytes that the stream of a panel is prefetched ahead
constexpr int64_t kCodesAhead = 4096;

inline float half_to_float(uint16_t bits) {
  f16 h{bits};
  float lanes[kLanes];
  store(lanes, load_first(&h, 1));
  return lanes[0];
}

// A group of a 4-bit panel: its scales, zero points and codes
struct Group4 {
  const uint16_t* half_scales;  // int4
  const float* scales;          // code4
  const uint8_t* zeros;         // or nullptr
  const uint8_t* codes;
};

inline Group4 group4(const PackedWeight& w, const char* group) {
  Group4 g{};
  if (w.format == WeightFormat::kCode4) {
    g.scales = reinterpret_cast<const float*>(group);
  } else {
    g.half_scales = reinterpret_cast<const uint16_t*>(group);
    if (w.zeros) g.zeros = reinterpret_cast<const uint8_t*>(group + kPanel * 2);
  }
  g.codes = reinterpret_cast<const uint8_t*>(group + group_header_bytes(w.format, w.zeros));
  return g;
}

inline int code_at(const Group4& g, int64_t i, int64_t column) {
  const int byte = g.codes[(i / 8 * kPanel + column) * 4 + i % 4];
  return i % 8 < 4 ? byte & 15 : byte >> 4;
}

inline float scale_at(const Group4& g, int64_t column) {
  return g.scales != nullptr ? g.scales[column] : half_to_float(g.half_scales[column]);
}

// the code as the number that the scale multiplies
inline float level_at(const PackedWeight& w, const Group4& g, int64_t i, int64_t column) {
  const int code = code_at(g, i, column);
  if (w.format == WeightFormat::kCode4) return w.codebook[code];
  return static_cast<float>(code - (g.zeros != nullptr ? g.zeros[column] : 8));
}

void unpack_row(const PackedWeight& w, int64_t row, float* y) {
  const char* panel = static_cast<const char*>(w.data) + row / kPanel * panel_bytes(w);
  const int64_t column = row % kPanel;
  switch (w.format) {
    case WeightFormat::kFloat32:
      for (int64_t i = 0; i < w.k; ++i) y[i] = reinterpret_cast<const float*>(panel)[i * kPanel + column];
      return;
    case WeightFormat::kBFloat16:
      for (int64_t i = 0; i < w.k; ++i) {
        y[i] = first(load_first(reinterpret_cast<const bf16*>(panel) + (i / 2 * kPanel + column) * 2 + i % 2, 1));
      }
      return;
    case WeightFormat::kFloat16:
      for (int64_t i = 0; i < w.k; ++i) {
        y[i] = first(load_first(reinterpret_cast<const f16*>(panel) + i * kPanel + column, 1));
      }
      return;
    case WeightFormat::kInt8: {
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(panel);
      const float scale = reinterpret_cast<const float*>(panel + round_up(w.k, kInt8Group) * kPanel)[column];
      for (int64_t i = 0; i < w.k; ++i) {
        y[i] = static_cast<float>(codes[(i / 4 * kPanel + column) * 4 + i % 4] - 128) * scale;
      }
      return;
    }
    default:
      for (int64_t begin = 0; begin < w.k; begin += w.group) {
        const Group4 g = group4(w, panel + begin / w.group * group_bytes(w.format, w.group, w.zeros));
        const float scale = scale_at(g, column);
        const int64_t count = w.k - begin < w.group ? w.k - begin : w.group;
        for (int64_t i = 0; i < count; ++i) y[begin + i] = level_at(w, g, i, column) * scale;
      }
  }
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
