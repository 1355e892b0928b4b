// What follows the sums of a matrix multiplication, in one pass over a tile that is still in cache.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// bias, activation, residual and store of one row of a tile
template <typename T>
inline void finish_row(const GemmArgs& args, const float* sums, int64_t row, int64_t column, int64_t columns) {
  T* y = reinterpret_cast<T*>(static_cast<char*>(args.y) + row * args.ldy) + column;
  const T* residual = static_cast<const T*>(args.residual);
  if (residual != nullptr) residual += row * args.ld_residual + column;
  for_vectors(columns, [&](int64_t i, int lanes) {
    Vec v = load(sums + i);
    if (args.bias != nullptr) v = add(v, load_lanes(args.bias + column + i, lanes));
    v = apply(args.activation, v);
    if (residual != nullptr) v = add(load_lanes(residual + i, lanes), v);
    store_lanes(y + i, v, lanes);
  });
}

// bias and activation of one row of a whole tile, then its groups in int8, as prepare_row would write them
inline void finish_int8_row(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  alignas(64) float values[kPanel];
  for (int64_t i = 0; i < kPanel; i += kLanes) {
    Vec v = load(sums + i);
    if (args.bias != nullptr) v = add(v, load(args.bias + column + i));
    store(values + i, apply(args.activation, v));
  }
  char* y = static_cast<char*>(args.y) + row * args.ldy;
  const Int8Row layout = int8_row(args.weight.n, args.y_group);
  for (int64_t i = 0; i < kPanel; i += args.y_group) {
    const int64_t group = (column + i) / args.y_group;
    quantize_group(values + i, args.y_group, reinterpret_cast<int8_t*>(y) + column + i,
                   reinterpret_cast<float*>(y + layout.scales) + group,
                   reinterpret_cast<int32_t*>(y + layout.sums) + group);
  }
}

// rows of a tile [rows][64], the first of which is `row`
inline void finish_rows(const GemmArgs& args, const float* tile, int64_t row, int rows, int64_t column,
                        int64_t columns) {
  if (args.y_group > 0) {
    for (int r = 0; r < rows; ++r) finish_int8_row(args, tile + r * kPanel, row + r, column);
    return;
  }
  with_type(args.y_dtype, [&](auto t) {
    for (int r = 0; r < rows; ++r) finish_row<decltype(t)>(args, tile + r * kPanel, row + r, column, columns);
  });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
