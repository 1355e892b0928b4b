// The kernels on the tiles of AMX (int8 and bfloat16) with everything that avx512_bf16 has (flags: setup.py); the
// others are those of isa_avx512_bf16.cpp. A compiler that does not know AMX leaves the level out: setup.py then passes
// no flags.
#include "kernels.h"

#if defined(__AMX_TILE__)
#define GPT2RT_ISA amx
#include "vec_avx512.h"
// the Vec comes first; the kernels that stay as they are are not used here
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/table.h"

#include "kernels/tiles.h"
#include "kernels/gemm_tiles.h"
#include "kernels/tiles_check.h"

namespace gpt2rt::amx {

bool built() { return true; }

bool replace(Kernels& table) {
  if (!tiles_are_right(gemm_bfloat16_tiles, gemm_int8_tiles, gemm_int8)) return false;
  table.gemm_bfloat16 = gemm_bfloat16_tiles;
  table.gemm_int8 = gemm_int8_tiles;
  return true;
}

}  // namespace gpt2rt::amx
#else
namespace gpt2rt::amx {

bool built() { return false; }
bool replace(Kernels&) { return false; }

}  // namespace gpt2rt::amx
#endif
