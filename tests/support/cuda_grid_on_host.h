// A whole grid of a GPU on the host, for the kernel of csrc/cuda/persistent.cuh, whose blocks wait for each other: each
// thread of each block is a fiber, and fibers switch where the device would wait.
//
// Stands in for: threadIdx, blockIdx, gridDim, __syncthreads, the barriers of some warps, shuffles, mbarriers,
// asynchronous copies into shared memory, atomics and loads of the grid's barrier. Shared memory is NaN at first. A
// copy makes its target NaN at once and brings the data some turns later, so that whoever does not wait for it, or whom
// it does not wait for, computes with NaN. In which order fibers and blocks go on is shuffled by a seed. A wait that
// nobody can end, a write behind shared memory, and an mbarrier that gets one arrival too many end the program with a
// message. What it cannot see is the memory model: every store is visible at once, as if all were ordered.
//
// `faults` leaves one of the waits out, or puts a stage where it does not belong: what a test must notice.
#pragma once

#define GPT2RT_ON_HOST

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#include "device.cuh"

namespace on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 32 * 1024;
// behind shared memory, to notice what is written there
constexpr size_t kGuard = 2048;

struct Faults {
  // the how manieth barrier of the grid nobody waits at, -1: none
  int grid_wait = -1;
  bool full_wait = false, empty_wait = false, consumers_meet = false, warp_meet = false;
  // bytes that stages are put behind their place
  int stage_shift = 0;
};

// threads that meet as a whole: a warp, the consumers, a block
struct Meeting {
  int arrived = 0;
  uint64_t round = 0;
};

struct Fiber {
  jmp_buf state;
  ucontext_t first;
  bool started = false, done = false;
  int block = 0, thread = 0;
  // what it waits for
  bool (*ready)(void*) = nullptr;
  void* argument = nullptr;
  int grid_waits = 0, shuffles = 0;
};

struct Block {
  std::vector<uint4> memory;
  uint4* shared = nullptr;
  std::vector<Meeting> warps;
  Meeting all, consumers;
  std::vector<float> exchanged;
};

// of eight bytes, as on the device
struct MBarrier {
  uint16_t missing;
  uint8_t expected, phase;
  int32_t bytes;
};
static_assert(sizeof(MBarrier) == 8);

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes, step;
  MBarrier* full;
  // bytes counts down, or one arrival
  bool bulk;
  uint64_t ready_at;
};

struct Grid {
  int blocks = 0, threads = 0;
  size_t shared_bytes = 0;
  bool bulk = true;
  Faults faults;
  std::vector<Fiber> fibers;
  std::vector<Block> each;
  std::deque<Copy> copies;
  std::function<void(uint4*)> body;
  std::mt19937 random;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  // anything that may end a wait counts as an event
  uint64_t events = 0, turn = 0;
  // what went wrong
  const char* error = nullptr;
};
inline Grid grid;

// the run ends: at once if a thread says so
inline void fail(const char* what) {
  if (grid.error == nullptr) grid.error = what;
  if (grid.current != nullptr) _longjmp(grid.scheduler, 1);
}

template <typename Ready>
void wait_until(Ready ready) {
  if (!ready()) {
    Fiber& fiber = *grid.current;
    fiber.ready = [](void* which) { return (*static_cast<Ready*>(which))(); };
    fiber.argument = &ready;
    if (_setjmp(fiber.state) == 0) _longjmp(grid.scheduler, 1);
    fiber.ready = nullptr;
  }
  ++grid.events;
}

inline void meet(Meeting& meeting, int threads) {
  const uint64_t round = meeting.round;
  ++grid.events;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  wait_until([&meeting, round] { return meeting.round != round; });
}

inline Block& block() { return grid.each[grid.current->block]; }
inline Meeting& warp() { return block().warps[grid.current->thread / kWarp]; }

inline void ended(MBarrier& barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) barrier.missing = barrier.expected, barrier.phase ^= 1;
}
inline void arrive(MBarrier& barrier) {
  ++grid.events;
  if (barrier.missing == 0) return fail("an mbarrier got more arrivals than it expects");
  --barrier.missing;
  ended(barrier);
}

inline void entry() {
  grid.body(block().shared);
  grid.current->done = true;
  ++grid.events;
  _longjmp(grid.scheduler, 1);
}

// copies whose time has come, in any order
inline void finish_copies() {
  for (size_t i = 0; i < grid.copies.size();) {
    const Copy copy = grid.copies[i];
    if (copy.ready_at > grid.turn) {
      ++i;
      continue;
    }
    grid.copies.erase(grid.copies.begin() + static_cast<std::ptrdiff_t>(i));
    for (int at = 0; at < copy.bytes; at += copy.step) {
      std::memcpy(copy.to + at, copy.from + at, std::min(copy.bytes - at, copy.bulk ? copy.step : 16));
    }
    ++grid.events;
    if (copy.bulk) {
      copy.full->bytes -= copy.bytes;
      ended(*copy.full);
    } else {
      arrive(*copy.full);
    }
  }
}

// Run so many blocks of so many threads, of which all but the last warp are consumers. Returns nullptr, or what was
// wrong.
inline const char* run(int blocks, int threads, size_t shared_bytes, unsigned seed,
                       const std::function<void(uint4*)>& body) {
  grid.blocks = blocks, grid.threads = threads, grid.shared_bytes = shared_bytes, grid.body = body;
  grid.random.seed(seed);
  grid.events = grid.turn = 0;
  grid.error = nullptr;
  grid.current = nullptr;
  grid.copies.clear();
  grid.fibers = std::vector<Fiber>(static_cast<size_t>(blocks) * threads);
  grid.each = std::vector<Block>(blocks);
  const size_t bytes = kStack * grid.fibers.size();
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "there is no memory for the stacks of the threads";
  for (int b = 0; b < blocks; ++b) {
    Block& each = grid.each[b];
    // all bits set is NaN in every dtype; eight more for the alignment
    each.memory.assign(shared_bytes / sizeof(uint4) + kGuard + 8, uint4{~0u, ~0u, ~0u, ~0u});
    each.shared = reinterpret_cast<uint4*>((reinterpret_cast<uintptr_t>(each.memory.data()) + 127) / 128 * 128);
    each.warps.resize(threads / kWarp);
    each.exchanged.assign(2 * threads, 0.0f);
  }
  std::vector<int> order(grid.fibers.size());
  for (size_t i = 0; i < order.size(); ++i) {
    Fiber& fiber = grid.fibers[i];
    fiber.block = static_cast<int>(i) / threads, fiber.thread = static_cast<int>(i) % threads;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = static_cast<char*>(stacks) + kStack * i;
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, entry, 0);
    order[i] = static_cast<int>(i);
  }
  // whole blocks go on together, in shuffled order; so do the threads in each
  std::vector<int> places(blocks);
  for (int b = 0; b < blocks; ++b) places[b] = b;
  std::shuffle(places.begin(), places.end(), grid.random);
  for (int b = 0; b < blocks; ++b) {
    int* begin = order.data() + static_cast<std::ptrdiff_t>(b) * threads;
    for (int t = 0; t < threads; ++t) begin[t] = places[b] * threads + t;
    if (seed != 0) std::shuffle(begin, begin + threads, grid.random);
  }
  size_t left = order.size();
  while (left > 0 && grid.error == nullptr) {
    const uint64_t before = grid.events;
    ++grid.turn;
    finish_copies();
    for (int b = 0; b < blocks; ++b) {
      // a block runs until it waits for another, or for a copy
      for (uint64_t seen = ~grid.events; seen != grid.events && grid.error == nullptr;) {
        seen = grid.events;
        for (int t = 0; t < threads; ++t) {
          Fiber& fiber = grid.fibers[order[static_cast<size_t>(b) * threads + t]];
          if (fiber.done || (fiber.ready != nullptr && !fiber.ready(fiber.argument))) continue;
          grid.current = &fiber;
          if (_setjmp(grid.scheduler) == 0) {
            if (fiber.started) _longjmp(fiber.state, 1);
            fiber.started = true;
            setcontext(&fiber.first);
          }
          grid.current = nullptr;
          if (grid.error != nullptr) break;
          if (fiber.done) --left;
        }
      }
    }
    if (grid.events == before && grid.copies.empty()) fail("all threads wait, and nothing is under way");
  }
  if (grid.error == nullptr && !grid.copies.empty()) fail("the kernel ended with copies under way");
  for (const Block& each : grid.each) {
    const uint4* behind = each.shared + shared_bytes / sizeof(uint4);
    if (std::any_of(behind, behind + kGuard, [](const uint4& place) { return place.x != ~0u; })) {
      fail("shared memory was written behind its end");
    }
  }
  munmap(stacks, bytes);
  return grid.error;
}

struct Index {
  operator unsigned() const { return static_cast<unsigned>(grid.current->thread); }
};
struct BlockIndex {
  operator unsigned() const { return static_cast<unsigned>(grid.current->block); }
};
struct Size {
  operator unsigned() const { return static_cast<unsigned>(grid.blocks); }
};

}  // namespace on_host

struct ThreadIndex {
  on_host::Index x;
};
struct GridIndex {
  on_host::BlockIndex x;
};
struct GridSize {
  on_host::Size x;
};
inline ThreadIndex hostThreadIdx;
inline GridIndex hostBlockIdx;
inline GridSize hostGridDim;
#define threadIdx hostThreadIdx
#define blockIdx hostBlockIdx
#define gridDim hostGridDim
#define __syncthreads() on_host::meet(on_host::block().all, on_host::grid.threads)

namespace gpt2rt::cuda {

using std::max;
using std::min;

inline void prefetch(const void*) {}

inline int arrivals_when_full() { return on_host::grid.bulk ? 1 : on_host::kWarp; }

inline on_host::MBarrier& emulated(uint64_t* barrier) { return *reinterpret_cast<on_host::MBarrier*>(barrier); }
inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulated(barrier) = {static_cast<uint16_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
}
inline void mbarriers_ready() {}
inline void mbarrier_arrive(uint64_t* barrier) { on_host::arrive(emulated(barrier)); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  // the warp that fetches waits for stages to be empty
  const bool fetches = on_host::grid.current->thread >= on_host::grid.threads - on_host::kWarp;
  if (fetches ? on_host::grid.faults.empty_wait : on_host::grid.faults.full_wait) return;
  on_host::MBarrier& which = emulated(barrier);
  on_host::wait_until([&which, parity] { return which.phase != parity; });
}

inline void fetch(uint8_t* to, const uint8_t* from, int bytes, uint64_t* full) {
  auto& grid = on_host::grid;
  const int lane = grid.current->thread % on_host::kWarp;
  to += grid.faults.stage_shift;
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    on_host::fail("a copy that is not of whole 16 bytes");
  on_host::MBarrier& barrier = emulated(full);
  const uint64_t when = grid.turn + 1 + grid.random() % 4;
  if (grid.bulk) {
    if (lane != 0) return;
    std::memset(to, 0xff, bytes);
    barrier.bytes += bytes;
    on_host::arrive(barrier);
    grid.copies.push_back({to, from, bytes, bytes, &barrier, true, when});
    return;
  }
  const int own = 16 * lane;
  for (int at = own; at < bytes; at += 16 * on_host::kWarp) std::memset(to + at, 0xff, 16);
  grid.copies.push_back({to + own, from + own, max(bytes - own, 0), 16 * on_host::kWarp, &barrier, false, when});
}

inline uint32_t grid_word(const uint32_t* word) { return *word; }
inline void grid_add(uint32_t* word, uint32_t value) {
  *word += value;
  ++on_host::grid.events;
}
inline void grid_wait(const uint32_t* word, uint32_t sense) {
  if (on_host::grid.current->grid_waits++ == on_host::grid.faults.grid_wait) return;
  on_host::wait_until([word, sense] { return ((*word ^ sense) & 0x80000000u) != 0; });
}

template <int threads>
void consumers_meet() {
  if (!on_host::grid.faults.consumers_meet) on_host::meet(on_host::block().consumers, threads);
}
inline void warp_meet() {
  if (!on_host::grid.faults.warp_meet) on_host::meet(on_host::warp(), on_host::kWarp);
}

inline float shuffle_xor(float value, int distance) {
  on_host::Fiber& fiber = *on_host::grid.current;
  const int thread = fiber.thread, lane = thread % on_host::kWarp;
  // two halves in turn: nobody writes its next number over one that is still read
  float* all = on_host::block().exchanged.data() + (fiber.shuffles++ % 2) * on_host::grid.threads;
  all[thread] = value;
  on_host::meet(on_host::warp(), on_host::kWarp);
  return all[thread - lane + (lane ^ distance)];
}

inline int shuffle_xor(int value, int distance) {
  float bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = shuffle_xor(bits, distance);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

inline float4 load_fresh(const float4* from) { return *from; }
inline float load_fresh(const float* from) { return *from; }
inline int load_fresh(const int* from) { return *from; }
inline uint4 load_fresh(const uint4* from) { return *from; }

}  // namespace gpt2rt::cuda
