// The kernels on AMX tiles as a library for ctypes; built by tests/support/emulated_tiles.py in two forms:
//   emulated: the tiles are plain C++ (csrc/cpu/kernels/tiles_emulated.h), with the flags of a level that this
//     processor has; defines GPT2RT_EMULATE_TILES
//   trapped: the very instructions of the level amx, with its flags; where the processor has none of them,
//     trapped_tiles.cpp does what they should
#define GPT2RT_ISA emulated
#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif
// most kernels of the table are not used here
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/table.h"

#include "kernels/tiles.h"
#include "kernels/gemm_tiles.h"
#include "kernels/tiles_check.h"

using namespace gpt2rt;
using namespace gpt2rt::emulated;

namespace {

// what the check must notice: a kernel that leaves the last row as it was, one that forgets the last element of k
void one_row_less(const GemmArgs& args) {
  GemmArgs fewer = args;
  --fewer.m;
  (args.weight.rows == RowFormat::kInt8 ? gemm_int8_tiles : gemm_bfloat16_tiles)(fewer);
}

void shorter_k(const GemmArgs& args) {
  GemmArgs shorter = args;
  --shorter.weight.k;
  gemm_bfloat16_tiles(shorter);
}

}  // namespace

extern "C" {

GemmArgs* new_args() { return new GemmArgs{}; }
void delete_args(GemmArgs* args) { delete args; }

void set_weight(GemmArgs* args, const void* panels, int format, int64_t n, int64_t k, int64_t group, int zeros) {
  const auto as = static_cast<WeightFormat>(format);
  const RowFormat rows = as == WeightFormat::kBFloat16 ? RowFormat::kBFloat16 : RowFormat::kInt8;
  args->weight = {panels, as, n, k, group, zeros != 0, nullptr, rows};
  args->panel_end = num_panels(n);
}

void set_rows(GemmArgs* args, const void* x, int64_t m, int64_t ldx) {
  args->x = x;
  args->m = m;
  args->ldx = ldx;
}

void set_epilogue(GemmArgs* args, const float* bias, int activation, const void* residual, int64_t ld_residual) {
  args->bias = bias;
  args->activation = static_cast<Activation>(activation);
  args->residual = residual;
  args->ld_residual = ld_residual;
}

void set_result(GemmArgs* args, void* y, int dtype, int64_t ldy, int64_t group) {
  args->y = y;
  args->y_dtype = static_cast<DType>(dtype);
  args->ldy = ldy;
  args->y_group = group;
}

void set_panels(GemmArgs* args, int64_t begin, int64_t end) {
  args->panel_begin = begin;
  args->panel_end = end;
}

void prepare(const GemmArgs* args, const float* x, void* row) { prepare_row(args->weight, x, row); }
int64_t prepared_bytes(const GemmArgs* args) { return row_bytes(args->weight); }

void multiply_tiles(const GemmArgs* args) {
  (args->weight.rows == RowFormat::kInt8 ? gemm_int8_tiles : gemm_bfloat16_tiles)(*args);
}
void multiply_int8_without_tiles(const GemmArgs* args) { gemm_int8(*args); }

int check(int damage) {
  switch (damage) {
    case 0:
      return tiles_are_right(gemm_bfloat16_tiles, gemm_int8_tiles, gemm_int8);
    case 1:
      return tiles_are_right(one_row_less, gemm_int8_tiles, gemm_int8);
    case 2:
      return tiles_are_right(gemm_bfloat16_tiles, one_row_less, gemm_int8);
    default:
      return tiles_are_right(shorter_k, gemm_int8_tiles, gemm_int8);
  }
}

// C += A B on tiles of these shapes, as they are stored; ends the process if they do not fit
void product(int bfloat16, const void* shapes, const void* a, const void* b, void* c) {
  TileConfig config;
  memcpy(&config, shapes, sizeof(config));
  Tiles tiles(config);
  tiles.load<0>(c, 64);
  tiles.load<4>(a, 64);
  tiles.load<6>(b, 64);
  if (bfloat16 != 0) {
    tiles.dot<TileDot::kBFloat16, 0, 4, 6>();
  } else {
    tiles.dot<TileDot::kInt8, 0, 4, 6>();
  }
  tiles.store<0>(c, 64);
}

#if defined(GPT2RT_EMULATE_TILES)
int tiles_in_use() { return Tiles::in_use(); }
#endif

}  // extern "C"
