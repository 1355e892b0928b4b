// uniforms: the numbers that tokens are drawn with, by Philox4x32-10.
//
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3. The definition is
// uniforms_ref in kernels/sampling_refs.py; the bits are equal.
#include "score_rows.h"
#include "thread_pool.h"

namespace gpt2rt {
namespace {

struct Words {
  uint32_t low;
  uint32_t high;
};

Words halves(uint64_t word) { return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)}; }

double uniform(int64_t seed, int64_t request, int64_t choice, int64_t position) {
  auto [k0, k1] = halves(static_cast<uint64_t>(seed));
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(choice);
  auto [c2, c3] = halves(static_cast<uint64_t>(request));
  for (int round = 0; round < 10; ++round) {
    const Words first = halves(uint64_t{c0} * 0xD2511F53u), second = halves(uint64_t{c2} * 0xCD9E8D57u);
    c0 = second.high ^ c1 ^ k0;
    c1 = second.low;
    c2 = first.high ^ c3 ^ k1;
    c3 = first.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // 27 and 26 bits
  return static_cast<double>((uint64_t{c0 >> 5} << 26) + (c1 >> 6)) * 0x1p-53;
}

Tensor uniforms(const Tensor& seeds, const Tensor& requests, const Tensor& choices, const Tensor& positions) {
  const char* op = "uniforms";
  check_dim(op, "seeds", seeds, 1, "[num_rows]");
  const int64_t rows = seeds.size(0);
  const int64_t* seed = check_per_row<int64_t>(op, "seeds", seeds, ScalarType::Long, rows);
  const int64_t* request = check_per_row<int64_t>(op, "requests", requests, ScalarType::Long, rows);
  const int64_t* choice = check_per_row<int64_t>(op, "choices", choices, ScalarType::Long, rows);
  const int64_t* position = check_per_row<int64_t>(op, "positions", positions, ScalarType::Long, rows);
  Tensor numbers = new_rows(seeds, {rows}, ScalarType::Double);
  double* out = mutable_data<double>(numbers);
  parallel_rows(rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) out[r] = uniform(seed[r], request[r], choice[r], position[r]);
  });
  return numbers;
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) { m.impl("uniforms", TORCH_BOX(&gpt2rt::uniforms)); }
