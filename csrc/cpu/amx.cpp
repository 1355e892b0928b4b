#include "amx.h"

#if defined(__x86_64__)

#include <cpuid.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gpt2rt {
namespace {

std::string missing_in_processor() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) edx = 0;
  const struct {
    unsigned bit;
    const char* name;
  } features[] = {{24, "amx-tile"}, {25, "amx-int8"}, {22, "amx-bf16"}};
  for (const auto& feature : features) {
    if ((edx >> feature.bit & 1) == 0) {
      return std::string("this processor does not support (it has no ") + feature.name + ")";
    }
  }
  // XCR0: what the system saves at a switch of context; bits 17 and 18 are the tiles' configuration and data. The
  // callers have found AVX-512, hence xgetbv is there
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return "the system does not support (it does not save the tile registers)";
  return "";
}

std::string ask_system() {
#if defined(__linux__)
  // of asm/prctl.h, which older systems have without this
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0) return "";
  return std::string("the system does not permit (arch_prctl: ") + std::strerror(errno) + ")";
#else
  return "is known to work on Linux only";
#endif
}

}  // namespace

std::string use_amx(Kernels& table, bool has_avx512_bf16) {
  if (!amx::built()) return "this build leaves out, because its compiler did not know AMX";
  std::string missing = has_avx512_bf16 ? missing_in_processor() : "this processor does not support";
  if (missing.empty()) missing = ask_system();
  if (!missing.empty() || amx::replace(table)) return missing;
  static bool warned = false;
  if (!warned) {
    std::fputs(
        "gpt2rt: the AMX kernels computed wrong numbers in their self-check, so they are not used; "
        "GPT2RT_CPU_ISA=avx512_bf16 avoids the attempt\n",
        stderr);
    warned = true;
  }
  return "failed its self-check";
}

}  // namespace gpt2rt

#endif
