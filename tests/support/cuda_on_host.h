// A GPU's block on the host, for the kernels of csrc/cuda: each of its threads is a fiber, and fibers switch where the
// device synchronises. Slow, exact about who reads what when: a missing barrier or a wrong index gives wrong numbers.
//
// Stands in for: threadIdx, blockIdx, blockDim, __syncthreads, shared memory (NaN at first), the sum of a warp, the
// tensor core product. A barrier that not all threads reach, and a warp that does not meet as a whole, end the program.
#pragma once

#define GPT2RT_ON_HOST

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "device.cuh"

namespace on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

struct Block {
  int threads = 0;
  int current = 0;
  // how often a thread, a warp's thread has arrived at a barrier
  std::vector<int> arrived, arrived_warp;
  std::vector<bool> done;
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  ucontext_t scheduler;
  std::vector<uint4> shared;
  // what each thread brings to its warp's operation
  std::vector<float> floats;
  std::vector<uint32_t> registers;
  std::function<void()> body;
};
inline Block block;

struct Index {
  operator unsigned() const { return static_cast<unsigned>(block.current); }
};

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void yield() { swapcontext(&block.fibers[block.current], &block.scheduler); }

// wait until threads begin .. end - 1 have arrived as often as this one
inline void meet(std::vector<int>& arrived, int begin, int end) {
  const int mine = ++arrived[block.current];
  for (;;) {
    bool all = true;
    for (int i = begin; i < end; ++i) {
      if (arrived[i] < mine) {
        all = false;
        if (block.done[i]) fail("a thread ended before a barrier that others wait at");
      }
    }
    if (all) return;
    yield();
  }
}

inline void meet_warp() {
  const int begin = block.current / kWarp * kWarp;
  meet(block.arrived_warp, begin, begin + kWarp);
}

inline void entry() {
  block.body();
  block.done[block.current] = true;
  yield();
}

// Run one block of so many threads.
inline void run(int threads, size_t shared_bytes, const std::function<void()>& body) {
  block.threads = threads;
  block.body = body;
  block.arrived.assign(threads, 0);
  block.arrived_warp.assign(threads, 0);
  block.done.assign(threads, false);
  block.floats.assign(threads, 0.0f);
  block.registers.assign(6 * threads, 0);
  block.fibers.resize(threads);
  while (block.stacks.size() < static_cast<size_t>(threads)) block.stacks.push_back(std::make_unique<char[]>(kStack));
  // all bits set is NaN in every dtype; one more element notices what is written behind
  block.shared.assign(shared_bytes / sizeof(uint4) + 1, uint4{~0u, ~0u, ~0u, ~0u});
  for (int i = 0; i < threads; ++i) {
    getcontext(&block.fibers[i]);
    block.fibers[i].uc_stack.ss_sp = block.stacks[i].get();
    block.fibers[i].uc_stack.ss_size = kStack;
    block.fibers[i].uc_link = nullptr;
    makecontext(&block.fibers[i], entry, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (block.current = 0; block.current < threads; ++block.current) {
      if (block.done[block.current]) continue;
      running = true;
      swapcontext(&block.scheduler, &block.fibers[block.current]);
    }
  }
  if (block.shared.back().x != ~0u) fail("shared memory was written behind its end");
}

}  // namespace on_host

struct ThreadIndex {
  on_host::Index x;
};
struct GridIndex {
  unsigned x;
};
inline ThreadIndex hostThreadIdx;
inline GridIndex hostBlockIdx, hostBlockDim;
#define threadIdx hostThreadIdx
#define blockIdx hostBlockIdx
#define blockDim hostBlockDim
#define __syncthreads() on_host::meet(on_host::block.arrived, 0, on_host::block.threads)

namespace gpt2rt::cuda {

using std::max;
using std::min;

// the product of the lane's fragments with those of its warp, in the order of k
template <typename T>
void matrix_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& all = on_host::block.registers;
  const int thread = on_host::block.current, lane = thread % 32, warp = thread - lane;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(&all[6 * thread], mine, sizeof mine);
  on_host::meet_warp();
  const auto half = [](uint32_t pair, int which) { return T::value(static_cast<uint16_t>(pair >> (16 * which))); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, low = i / 2, column = 2 * (lane % 4) + i % 2;
    for (int quarter = 0; quarter < 2; ++quarter) {
      for (int t = 0; t < 4; ++t) {
        const uint32_t from_a = all[6 * (warp + 4 * row + t) + low + 2 * quarter];
        const uint32_t from_b = all[6 * (warp + 4 * column + t) + 4 + quarter];
        for (int which = 0; which < 2; ++which) c[i] += half(from_a, which) * half(from_b, which);
      }
    }
  }
  // nobody may write its next fragments while others read these
  on_host::meet_warp();
}

inline float warp_sum(float value) {
  auto& all = on_host::block.floats;
  const int thread = on_host::block.current, lane = thread % 32;
  for (int distance = 16; distance > 0; distance /= 2) {
    all[thread] = value;
    on_host::meet_warp();
    value += all[thread - lane + (lane ^ distance)];
    on_host::meet_warp();
  }
  return value;
}

inline void let_dependents_start() {}
inline void wait_for_inputs() {}
inline uint4 load_once(const uint4* from) { return *from; }
inline void keep_here(uint4&) {}
inline void prefetch(const void*) {}

}  // namespace gpt2rt::cuda
