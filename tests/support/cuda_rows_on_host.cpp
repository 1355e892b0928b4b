// The kernel of csrc/cuda/rows.cuh on the host, block by block: what tests/kernels/test_cuda_rows_host.py loads.
#include "cuda_on_host.h"

#include "rows.cuh"

namespace {

using namespace gpt2rt::cuda;

template <typename T, Format format, int parts>
void launch(const RowsParams& p) {
  const int threads = 32 * warps_for(p.k);
  hostBlockDim.x = threads;
  for (int i = 0; i * kTile * tiles_for(p.n, p.k) < p.n; ++i) {
    hostBlockIdx.x = i;
    on_host::run(threads, shared_bytes(p.n, p.k, p.num_rows, parts, format == Format::code4),
                 [&p] { fused_linear_rows<T, format, parts>(p, on_host::block.shared.data()); });
  }
}

template <typename T, Format format>
void launch(const RowsParams& p) {
  p.group_shift == 5 ? launch<T, format, 4>(p) : launch<T, format, 2>(p);
}

template <typename T>
void launch(const RowsParams& p, Format format) {
  switch (format) {
    case Format::int4:
      return launch<T, Format::int4>(p);
    case Format::int4_zeros:
      return launch<T, Format::int4_zeros>(p);
    case Format::code4:
      return launch<T, Format::code4>(p);
  }
}

template <typename Unpack>
void unpack_word(const Unpack& unpack, uint32_t word, uint16_t* values) {
  uint32_t pairs[4];
  unpack.unpack(word, pairs);
  for (int reg = 0; reg < 4; ++reg) {
    values[Unpack::Planes::low(reg)] = static_cast<uint16_t>(pairs[reg]);
    values[Unpack::Planes::high(reg)] = static_cast<uint16_t>(pairs[reg] >> 16);
  }
}

}  // namespace

extern "C" {

int size_of_params() { return sizeof(RowsParams); }
int max_elements() { return kMaxSteps * kStep; }

void run_rows(const RowsParams* params, int format, int compute) {
  const auto which = static_cast<Format>(format);
  static_cast<Type>(compute) == Type::bfloat16 ? launch<BFloat>(*params, which) : launch<Half>(*params, which);
}

// the values of a word's nibbles 0 to 7: bits of float16 or bfloat16
void unpack_integers(uint32_t word, int low, int high, int bfloat, uint16_t* values) {
  bfloat ? unpack_word(Integers<BFloat>(low, high), word, values)
         : unpack_word(Integers<Half>(low, high), word, values);
}

void unpack_codes(uint32_t word, const float* codebook, int bfloat, uint16_t* values) {
  uint32_t table[256 * 32];
  for (int byte = 0; byte < 256; ++byte) {
    table[byte * 32] = bfloat ? Codes<BFloat>::entry(codebook, byte) : Codes<Half>::entry(codebook, byte);
  }
  bfloat ? unpack_word(Codes<BFloat>{table}, word, values) : unpack_word(Codes<Half>{table}, word, values);
}
}
