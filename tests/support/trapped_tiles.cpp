// Carries out AMX instructions on a processor without them: it raises SIGILL at each, and the handler decodes it, does
// what it should with the registers of the thread, and goes on behind it. So machine code that was compiled for AMX
// runs, with what its compiler made of it; slowly, for tests. On a processor with AMX, in a process that may use it,
// the handler is never called.
//
// Encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, VEX.128.0F38.W0 in all cases.
#define GPT2RT_EMULATE_TILES
#define GPT2RT_ISA trapped
#include <signal.h>
#include <ucontext.h>

#include <cstring>
#include <optional>

#include "types.h"
#include "kernels/tiles.h"

namespace gpt2rt::trapped {
namespace {

thread_local std::optional<Tiles> tiles;
thread_local long count = 0;
struct sigaction before;

// general registers as instructions number them
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

enum Prefix { kNone = 0, k66 = 1, kF3 = 2, kF2 = 3 };

struct Instruction {
  int opcode;
  Prefix prefix;
  int reg;  // ModRM.reg
  int rm;   // ModRM.rm of a register
  int vvvv;
  bool memory;
  char* address;  // base + displacement
  int64_t index;  // index register * scale
  const uint8_t* end;
};

// false for what is no AMX instruction in this form
bool decode(const greg_t* registers, Instruction& in) {
  const uint8_t* p = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  // three-byte VEX, map 0F38, W0, 128 bits
  if (p[0] != 0xc4 || (p[1] & 31) != 2 || (p[2] & 0x84) != 0) return false;
  const int x = (p[1] & 0x40) == 0 ? 8 : 0, b = (p[1] & 0x20) == 0 ? 8 : 0;
  in.prefix = static_cast<Prefix>(p[2] & 3);
  in.vvvv = ~p[2] >> 3 & 15;
  in.opcode = p[3];
  const int mod = p[4] >> 6, rm = p[4] & 7;
  in.reg = p[4] >> 3 & 7;
  in.rm = rm;
  in.memory = mod != 3;
  p += 5;
  if (in.memory) {
    const auto value = [&](int number) { return registers[kRegisters[number]]; };
    int64_t base;
    bool no_base = false;
    if (rm == 4) {
      const int scale = *p >> 6, index = (*p >> 3 & 7) + x, base_number = *p & 7;
      in.index = index == 4 ? 0 : value(index) << scale;
      no_base = base_number == 5 && mod == 0;
      base = no_base ? 0 : value(base_number + b);
      ++p;
    } else {
      no_base = rm == 5 && mod == 0;
      base = no_base ? 0 : value(rm + b);
    }
    int64_t displacement = 0;
    if (mod == 1) {
      displacement = static_cast<int8_t>(*p++);
    } else if (mod == 2 || no_base) {
      int32_t wide;
      std::memcpy(&wide, p, 4);
      displacement = wide;
      p += 4;
    }
    // relative to the next instruction
    if (no_base && rm == 5) base = reinterpret_cast<int64_t>(p);
    in.address = reinterpret_cast<char*>(base + displacement);
  }
  in.end = p;
  return true;
}

bool execute(const Instruction& in) {
  if (in.opcode == 0x49 && in.prefix == kNone && in.memory) {
    // LDTILECFG
    TileConfig config;
    std::memcpy(&config, in.address, sizeof(config));
    tiles.emplace(config);
  } else if (in.opcode == 0x49 && in.prefix == kNone) {
    // TILERELEASE
    tiles.reset();
  } else if (!tiles.has_value()) {
    return false;
  } else if (in.opcode == 0x49 && in.prefix == kF2 && !in.memory) {
    tiles->zero(in.reg);
  } else if (in.opcode == 0x4b && in.prefix == kF2 && in.memory) {
    tiles->load(in.reg, in.address, in.index);
  } else if (in.opcode == 0x4b && in.prefix == kF3 && in.memory) {
    tiles->store(in.reg, in.address, in.index);
  } else if (in.opcode == 0x5e && in.prefix == kF3 && !in.memory) {
    // TDPBSUD
    tiles->dot(TileDot::kInt8, in.reg, in.rm, in.vvvv);
  } else if (in.opcode == 0x5c && in.prefix == kF3 && !in.memory) {
    // TDPBF16PS
    tiles->dot(TileDot::kBFloat16, in.reg, in.rm, in.vvvv);
  } else {
    return false;
  }
  return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction in{};
  if (decode(registers, in) && execute(in)) {
    registers[REG_RIP] = reinterpret_cast<greg_t>(in.end);
    ++count;
    return;
  }
  // the instruction is tried again and meets the handler that was there before
  sigaction(SIGILL, &before, nullptr);
}

}  // namespace
}  // namespace gpt2rt::trapped

extern "C" {

void trap_tiles() {
  struct sigaction action{};
  action.sa_sigaction = gpt2rt::trapped::on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &gpt2rt::trapped::before);
}

void untrap_tiles() { sigaction(SIGILL, &gpt2rt::trapped::before, nullptr); }

// instructions carried out for this thread
long trapped_instructions() { return gpt2rt::trapped::count; }
// whether this thread has left its tiles configured
int tiles_in_use() { return gpt2rt::trapped::tiles.has_value(); }

}  // extern "C"
