// Which instruction set the kernels use: the best that the processor and the system support, or GPT2RT_CPU_ISA.
#include <cstdlib>
#include <cstring>
#include <string>

#include "checks.h"
#include "kernels.h"

namespace gpt2rt {
namespace {

// from best to plainest
struct Candidate {
  const Kernels* kernels;
  bool supported;
};

// __builtin_cpu_supports asks cpuid and, for registers wider than SSE's, whether the system saves them (xgetbv)
#if defined(__x86_64__)
constexpr int kNumCandidates = 5;
void find_candidates(Candidate* c) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  // each level is the one below with some entries replaced, by code that itself needs the level
  static Kernels with_vnni = kKernelsAvx512;
  with_vnni.name = "avx512_vnni";
  if (vnni) avx512_vnni::replace(with_vnni);
  static Kernels with_bf16 = with_vnni;
  with_bf16.name = "avx512_bf16";
  if (bf16) avx512_bf16::replace(with_bf16);
  c[0] = {&with_bf16, bf16};
  c[1] = {&with_vnni, vnni};
  c[2] = {&kKernelsAvx512, avx512};
  c[3] = {&kKernelsAvx2, avx2};
  c[4] = {&kKernelsPortable, true};
}
#else
constexpr int kNumCandidates = 1;
void find_candidates(Candidate* c) { c[0] = {&kKernelsPortable, true}; }
#endif

const Kernels& choose() {
  Candidate candidates[kNumCandidates];
  find_candidates(candidates);
  std::string supported;
  const Kernels* best = nullptr;
  for (const Candidate& c : candidates) {
    if (!c.supported) continue;
    if (best == nullptr) best = c.kernels;
    supported += (supported.empty() ? "" : ", ") + std::string(c.kernels->name);
  }
  const char* wanted = std::getenv("GPT2RT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *best;
  for (const Candidate& c : candidates) {
    if (std::strcmp(wanted, c.kernels->name) != 0) continue;
    GPT2RT_CHECK_STATE(c.supported, "GPT2RT_CPU_ISA is ", wanted,
                       ", which this processor does not support; use one of: ", supported,
                       ", or unset it for the best of them");
    return *c.kernels;
  }
  GPT2RT_CHECK_STATE(false, "GPT2RT_CPU_ISA is '", wanted, "', expected one of: ", supported,
                     "; unset it for the best of them");
  return *best;
}

std::string cpu_isa() { return kernels().name; }

}  // namespace

const Kernels& kernels() {
  // if choose() throws, the next call tries again
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gpt2rt

// no tensor arguments, hence no backend to dispatch on
STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&gpt2rt::cpu_isa)); }
