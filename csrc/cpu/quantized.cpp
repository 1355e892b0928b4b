// quantized_linear and pack_quantized: weights of 8 and 4 bits as checkpoints store them. The layout of the panels is
// in packed.h, the maths in kernels/gemm_int8.h and kernels/gemm_codes.h.
#include <cstring>
#include <vector>

#include "checks.h"
#include "linear.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

// codes as gpt2rt.quantization keeps them: int8 [N, K]; or uint8 [N, ceil(K / 2)], the first of a pair in the high half
struct Quantized {
  const void* codes;
  int64_t codes_stride;  // bytes from a row to the next
  const void* scales;    // int8: float32 [N]; int4: float16, code4: float32 [N, groups]
  const uint8_t* zeros;  // int4: [N, groups] or nullptr
  const float* codebook;
  WeightFormat format;
  int64_t n;
  int64_t k;
  int64_t group;
  int64_t groups;
};

Quantized check_quantized(const char* op, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                          const std::optional<Tensor>& codebook, int64_t k, int64_t group) {
  Quantized w{};
  GPT2RT_CHECK(k >= 1, op, ": in_features is ", k, ", expected at least 1");
  check_contiguous(op, "codes", codes);
  check_contiguous(op, "scales", scales);
  w.codes = codes.const_data_ptr();
  w.scales = scales.const_data_ptr();
  w.k = k;
  w.group = group;
  check_dim(op, "codes", codes, 2, "[N, K] of int8, or [N, ceil(K / 2)] of uint8 with two codes a byte");
  w.n = codes.size(0);
  if (codes.scalar_type() == ScalarType::Char) {
    w.format = WeightFormat::kInt8;
    w.codes_stride = k;
    check_size(op, "codes", codes, 1, k, "in_features");
    check_dtype(op, "scales", scales, ScalarType::Float);
    check_dim(op, "scales", scales, 1, "[N], one for each output of an int8 weight");
    check_size(op, "scales", scales, 0, w.n, "the rows of codes");
    GPT2RT_CHECK(!zeros.has_value() && !codebook.has_value(), op,
                 ": int8 codes have neither zeros nor a codebook; pass None");
    return w;
  }
  check_dtype(op, "codes", codes, ScalarType::Byte);
  w.codes_stride = (k + 1) / 2;
  check_size(op, "codes", codes, 1, w.codes_stride, "in_features / 2, rounded up");
  GPT2RT_CHECK(group >= kMinGroup && group <= kMaxGroup && group % kMinGroup == 0, op, ": group_size is ", group,
               ", expected a multiple of ", kMinGroup, " up to ", kMaxGroup);
  w.groups = (k + group - 1) / group;
  w.format = codebook.has_value() ? WeightFormat::kCode4 : WeightFormat::kInt4;
  check_dtype(op, "scales", scales, codebook.has_value() ? ScalarType::Float : ScalarType::Half);
  check_dim(op, "scales", scales, 2, "[N, ceil(K / group_size)]");
  check_size(op, "scales", scales, 0, w.n, "the rows of codes");
  check_size(op, "scales", scales, 1, w.groups, "in_features / group_size, rounded up");
  if (codebook.has_value()) {
    check_dtype(op, "codebook", *codebook, ScalarType::Float);
    check_dim(op, "codebook", *codebook, 1, "[16]");
    check_size(op, "codebook", *codebook, 0, 16, "the values of a 4-bit code");
    check_contiguous(op, "codebook", *codebook);
    GPT2RT_CHECK(!zeros.has_value(), op, ": a codebook and zeros exclude each other");
    GPT2RT_CHECK(k % group == 0, op, ": in_features ", k, " is no multiple of group_size ", group,
                 "; blocks that straddle rows have no kernel, use the dequantised weight");
    w.codebook = data<float>(*codebook);
  }
  if (zeros.has_value()) {
    check_dtype(op, "zeros", *zeros, ScalarType::Byte);
    check_dim(op, "zeros", *zeros, 2, "[N, ceil(K / group_size)]");
    check_size(op, "zeros", *zeros, 0, w.n, "the rows of codes");
    check_size(op, "zeros", *zeros, 1, w.groups, "in_features / group_size, rounded up");
    check_contiguous(op, "zeros", *zeros);
    w.zeros = data<uint8_t>(*zeros);
  }
  return w;
}

int64_t panel_bytes(const Quantized& w) { return panel_bytes(w.format, w.k, w.group, w.zeros != nullptr); }

void pack_int8_panel(const Quantized& w, int64_t first, int64_t columns, char* out) {
  const int64_t padded = round_up(w.k, kInt8Group);
  std::memset(out, 128, static_cast<size_t>(padded * kPanel));
  float* scales = reinterpret_cast<float*>(out + padded * kPanel);
  for (int64_t c = 0; c < kPanel; ++c) scales[c] = c < columns ? static_cast<const float*>(w.scales)[first + c] : 0.0f;
  // a cache line of every row at a time: columns are read in order and written 256 bytes apart, within 4 KiB
  for (int64_t block = 0; block < w.k; block += kInt8Group) {
    const int64_t end = w.k - block < kInt8Group ? w.k : block + kInt8Group;
    for (int64_t c = 0; c < columns; ++c) {
      const char* codes = static_cast<const char*>(w.codes) + (first + c) * w.codes_stride;
      for (int64_t i = block; i < end; i += 4) {
        uint32_t word = 0;
        std::memcpy(&word, codes + i, static_cast<size_t>(w.k - i < 4 ? w.k - i : 4));
        // signed codes and the zeros past K become unsigned ones around 128
        word ^= 0x80808080u;
        std::memcpy(out + (i / 4 * kPanel + c) * 4, &word, 4);
      }
    }
  }
}

// the eight codes i..i+7 of a row as a packed word: nibbles of elements 0, 4, 1, 5, 2, 6, 3, 7 from the lowest up
uint32_t pack_word(const uint8_t* codes, int64_t i, int64_t k) {
  uint8_t pairs[4] = {};
  const int64_t count = k - i < 8 ? k - i : 8;
  std::memcpy(pairs, codes + i / 2, static_cast<size_t>((count + 1) / 2));
  // the low half of the last byte of an odd row belongs to no element
  if (count % 2 != 0) pairs[count / 2] &= 0xf0;
  const auto join = [](int low, int high) { return static_cast<uint32_t>(low | high << 4); };
  return join(pairs[0] >> 4, pairs[2] >> 4) | join(pairs[0] & 15, pairs[2] & 15) << 8 |
         join(pairs[1] >> 4, pairs[3] >> 4) << 16 | join(pairs[1] & 15, pairs[3] & 15) << 24;
}

void pack_4bit_panel(const Quantized& w, int64_t first, int64_t columns, char* out) {
  const bool zeros = w.zeros != nullptr;
  for (int64_t g = 0; g < w.groups; ++g) {
    char* group = out + g * group_bytes(w.format, w.group, zeros);
    uint32_t* words = reinterpret_cast<uint32_t*>(group + group_header_bytes(w.format, zeros));
    std::memset(group, 0, static_cast<size_t>(group_bytes(w.format, w.group, zeros)));
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t index = (first + c) * w.groups + g;
      if (w.format == WeightFormat::kCode4) {
        reinterpret_cast<float*>(group)[c] = static_cast<const float*>(w.scales)[index];
      } else {
        reinterpret_cast<uint16_t*>(group)[c] = static_cast<const uint16_t*>(w.scales)[index];
        if (zeros) reinterpret_cast<uint8_t*>(group + kPanel * 2)[c] = w.zeros[index];
      }
      const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + (first + c) * w.codes_stride;
      const int64_t end = w.k - g * w.group < w.group ? w.k - g * w.group : w.group;
      for (int64_t i = 0; i < end; i += 8) words[i / 8 * kPanel + c] = pack_word(codes, g * w.group + i, w.k);
    }
  }
}

void pack_one(const Quantized& w, int64_t panel, char* out) {
  const int64_t first = panel * kPanel;
  const int64_t columns = w.n - first < kPanel ? w.n - first : kPanel;
  if (w.format == WeightFormat::kInt8) {
    pack_int8_panel(w, first, columns, out);
  } else {
    pack_4bit_panel(w, first, columns, out);
  }
}

void pack_quantized(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& codebook, int64_t in_features, int64_t group_size, const Tensor& out) {
  const char* op = "pack_quantized";
  const Quantized w = check_quantized(op, codes, scales, zeros, codebook, in_features, group_size);
  check_dtype(op, "out", out, ScalarType::Byte);
  check_dim(op, "out", out, 1, "one dimension of bytes");
  check_contiguous(op, "out", out);
  const int64_t bytes = panel_bytes(w);
  check_size(op, "out", out, 0, num_panels(w.n) * bytes, "the size of the panels, see packed_quantized_bytes");
  char* target = mutable_data<char>(out);
  GPT2RT_CHECK(reinterpret_cast<uintptr_t>(target) % 64 == 0, op,
               ": out must start at a multiple of 64 bytes; slice it from an aligned buffer at multiples of 64");
  parallel_rows(num_panels(w.n), w.k * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_one(w, p, target + p * bytes);
  });
}

Tensor quantized_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                        const std::optional<Tensor>& codebook, const std::optional<Tensor>& bias, int64_t in_features,
                        int64_t group_size, bool int8_activations) {
  const char* op = "quantized_linear";
  const Quantized w = check_quantized(op, codes, scales, zeros, codebook, in_features, group_size);
  GPT2RT_CHECK(!int8_activations || w.codebook == nullptr, op,
               ": int8_activations with a codebook: the codes are no integers; pass False");
  const DType dtype = check_storage(op, "x", x);
  check_dim(op, "x", x, 2, "[num_tokens, K]");
  check_rows(op, "x", x);
  check_size(op, "x", x, 1, w.k, "in_features");
  if (bias.has_value()) check_vector(op, "bias", *bias, w.n, "x", x);
  const int64_t m = x.size(0);
  Tensor y = new_like(x, {m, w.n});
  if (m == 0 || w.n == 0) return y;

  const Kernels& kernel = kernels();
  GemmArgs args{};
  args.m = m;
  args.weight = {nullptr, w.format, w.n, w.k, w.group, w.zeros != nullptr, w.codebook, RowFormat::kFloat32};
  args.weight.rows = row_format(kernel, w.format, int8_activations);
  args.panel_end = 1;
  args.y_dtype = dtype;
  args.ldy = w.n * item_size(dtype);
  args.ldx = round_up(row_bytes(args.weight), 64);
  std::vector<char> rows(static_cast<size_t>(m * args.ldx + 63));
  char* prepared = rows.data() + (64 - reinterpret_cast<uintptr_t>(rows.data()) % 64) % 64;
  args.x = prepared;
  const void* px = x.const_data_ptr();
  const int64_t stride = x.stride(0);
  parallel_rows(m, w.k, [&](int64_t begin, int64_t end) {
    float* wide = thread_scratch_floats(w.k);
    for (int64_t t = begin; t < end; ++t) {
      kernel.convert_row(dtype, at(px, t * stride, dtype), DType::kFloat32, wide, w.k);
      kernel.prepare_row(args.weight, wide, prepared + t * args.ldx);
    }
  });
  std::vector<float> wide_bias(static_cast<size_t>(bias.has_value() ? w.n : 0));
  if (bias.has_value()) {
    kernel.convert_row(dtype, bias->const_data_ptr(), DType::kFloat32, wide_bias.data(), w.n);
    args.bias = wide_bias.data();
  }
  void* py = y.mutable_data_ptr();
  const int64_t bytes = panel_bytes(w);
  parallel_rows(num_panels(w.n), (m + 1) * w.k * kPanel, [&](int64_t begin, int64_t end) {
    GemmArgs part = args;
    char* panel = static_cast<char*>(thread_scratch(static_cast<size_t>(bytes)));
    part.weight.data = panel;
    for (int64_t p = begin; p < end; ++p) {
      pack_one(w, p, panel);
      part.weight.n = w.n - p * kPanel < kPanel ? w.n - p * kPanel : kPanel;
      part.bias = args.bias == nullptr ? nullptr : args.bias + p * kPanel;
      part.y = at(py, p * kPanel, dtype);
      gemm(kernel, part);
    }
  });
  return y;
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) {
  m.impl("pack_quantized", TORCH_BOX(&gpt2rt::pack_quantized));
  m.impl("quantized_linear", TORCH_BOX(&gpt2rt::quantized_linear));
}
