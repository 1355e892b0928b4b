// Which instruction set the kernels use: the best that the processor and the system support, or GPT2RT_CPU_ISA.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "amx.h"
#include "checks.h"
#include "kernels.h"

namespace gpt2rt {
namespace {

// a level, and what is to be said of one that cannot be had: "which .."; empty if it can
struct Level {
  const Kernels* kernels;
  std::string missing;
};

// from best to plainest; __builtin_cpu_supports asks cpuid and, for registers wider than SSE's, whether the system
// saves them (xgetbv)
#if defined(__x86_64__)
constexpr int kNumLevels = 6;
constexpr const char* kNames[kNumLevels] = {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"};

void find_levels(Level* levels, bool with_amx) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  // each level is the one below with some entries replaced, by code that itself needs the level
  static Kernels with_vnni = kKernelsAvx512;
  with_vnni.name = kNames[2];
  if (vnni) avx512_vnni::replace(with_vnni);
  static Kernels with_bf16 = with_vnni;
  with_bf16.name = kNames[1];
  if (bf16) avx512_bf16::replace(with_bf16);
  static Kernels with_tiles = with_bf16;
  with_tiles.name = kNames[0];
  const auto unless = [](bool has) { return has ? "" : "this processor does not support"; };
  levels[0] = {&with_tiles, with_amx ? use_amx(with_tiles, bf16) : unless(bf16)};
  levels[1] = {&with_bf16, unless(bf16)};
  levels[2] = {&with_vnni, unless(vnni)};
  levels[3] = {&kKernelsAvx512, unless(avx512)};
  levels[4] = {&kKernelsAvx2, unless(avx2)};
  levels[5] = {&kKernelsPortable, ""};
}
#else
constexpr int kNumLevels = 1;
constexpr const char* kNames[kNumLevels] = {"portable"};
void find_levels(Level* levels, bool) { levels[0] = {&kKernelsPortable, ""}; }
#endif

struct Choice {
  const Kernels* kernels;
  std::string limit;  // why it is not the level above, see cpu_isa_limit
};

Choice choose() {
  const char* forced = std::getenv("GPT2RT_CPU_ISA");
  const std::string wanted = forced == nullptr ? "" : forced;
  int index = 0;
  while (index < kNumLevels && wanted != kNames[index]) ++index;
  Level levels[kNumLevels];
  // another level than amx must be had without touching the tiles
  find_levels(levels, index == 0 || index == kNumLevels);
  std::string supported;
  int best = -1;
  for (int i = 0; i < kNumLevels; ++i) {
    if (!levels[i].missing.empty()) continue;
    if (best < 0) best = i;
    supported += (supported.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  if (wanted.empty()) {
    if (best == 0) return {levels[0].kernels, ""};
    return {levels[best].kernels,
            std::string(kNames[best - 1]) + ", the level above, is one that " + levels[best - 1].missing};
  }
  GPT2RT_CHECK_STATE(index < kNumLevels, "GPT2RT_CPU_ISA is '", wanted, "', expected one of: ", supported,
                     "; unset it for the best of them");
  GPT2RT_CHECK_STATE(levels[index].missing.empty(), "GPT2RT_CPU_ISA is ", wanted, ", which ", levels[index].missing,
                     "; use one of: ", supported, ", or unset it for the best of them");
  return {levels[index].kernels, index == 0 ? "" : "GPT2RT_CPU_ISA=" + wanted + " forces it"};
}

const Choice& choice() {
  // if choose() throws, the next call tries again
  static const Choice chosen = choose();
  return chosen;
}

std::string cpu_isa() { return kernels().name; }

std::string cpu_isa_limit() { return choice().limit; }

}  // namespace

const Kernels& kernels() { return *choice().kernels; }

}  // namespace gpt2rt

// no tensor arguments, hence no backend to dispatch on
STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&gpt2rt::cpu_isa));
  m.impl("cpu_isa_limit", TORCH_BOX(&gpt2rt::cpu_isa_limit));
}
