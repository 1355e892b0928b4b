// The level amx: asked of the processor, then of the system, then checked.
#pragma once

#include <string>

#include "kernels.h"

namespace gpt2rt {

#if defined(__x86_64__)
// Makes a table of avx512_bf16, if the processor supports that, one of amx. Returns "" or, with the table unchanged,
// why not: the end of a sentence about the level that begins with "which". If its kernels compute something wrong,
// standard error gets a line, once.
//
// The system hands out the tile registers to processes that ask for them (arch_prctl, Linux 5.16), because they make
// the state of each thread 8 KiB larger. To ask once is enough: threads, those already running too, and forked children
// have the permission of their process.
std::string use_amx(Kernels& table, bool has_avx512_bf16);
#endif

}  // namespace gpt2rt
