// What follows the sums of a matrix multiplication, in one pass over a tile that is still in cache.
#pragma once

namespace gpt2rt::GPT2RT_ISA {
namespace {

// bias, activation, residual and store of one row of a tile
template <typename T>
inline void finish_row(const GemmArgs& args, const float* sums, int64_t row, int64_t column, int64_t columns) {
  T* y = static_cast<T*>(args.y) + row * args.ldy + column;
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

// rows of a tile [rows][64], the first of which is `row`
inline void finish_rows(const GemmArgs& args, const float* tile, int64_t row, int rows, int64_t column,
                        int64_t columns) {
  with_type(args.y_dtype, [&](auto t) {
    for (int r = 0; r < rows; ++r) finish_row<decltype(t)>(args, tile + r * kPanel, row + r, column, columns);
  });
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
