// What the persistent kernel waits with: rings of stages in shared memory that one warp fills by asynchronous copies
// (mbarriers say when a stage is full and when it is empty again), and a barrier of all blocks.
//
// Sources: PTX ISA, "mbarrier", "cp.async.bulk", "cp.async.mbarrier.arrive"; CUDA programming guide, "Cooperative
// Groups, Grid Synchronization": the launch must be cooperative, so that all blocks run at the same time.
#pragma once

#include "device.cuh"

namespace gpt2rt::cuda {

#ifndef GPT2RT_ON_HOST

__device__ inline uint32_t in_shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// how many arrivals make a stage full: the one that announces the bytes, or where there are no bulk copies each lane's
__device__ constexpr int arrivals_when_full() {
#if __CUDA_ARCH__ >= 900
  return 1;
#else
  return 32;
#endif
}

__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(in_shared(barrier)), "r"(arrivals) : "memory");
}
// before anybody uses what was initialised, also the unit that copies; all threads meet afterwards
__device__ inline void mbarriers_ready() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}
__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(in_shared(barrier)) : "memory");
}
// until the phase of this parity has ended
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(in_shared(barrier)), "r"(parity)
                 : "memory");
#else
    asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(in_shared(barrier)), "r"(parity)
                 : "memory");
#endif
  }
}

// Start to copy into a stage; called by all lanes of a warp. `bytes` and both places are multiples of 16. The stage is
// full when all has arrived. Weights are read once: they leave the L2 cache before anything else does.
__device__ inline void fetch(uint8_t* to, const uint8_t* from, int bytes, uint64_t* full) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(in_shared(full)), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(in_shared(to)),
        "l"(from), "r"(bytes), "r"(in_shared(full)), "l"(policy)
        : "memory");
  }
#else
#pragma unroll 4
  for (int at = 16 * lane; at < bytes; at += 512) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(in_shared(to + at)), "l"(from + at) : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(in_shared(full)) : "memory");
#endif
}

// the sense of the grid's barrier: what its highest bit is until all blocks have arrived
__device__ inline uint32_t grid_word(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
// what the threads of this block wrote before they met is visible to who sees the barrier pass
__device__ inline void grid_add(uint32_t* word, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
// of one thread: until the highest bit is another
__device__ inline void grid_wait(const uint32_t* word, uint32_t sense) {
  while (((grid_word(word) ^ sense) & 0x80000000u) == 0) {
  }
}

// the warps that multiply, without the one that fetches
template <int threads>
__device__ inline void consumers_meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
}
__device__ inline void warp_meet() { __syncwarp(); }

__device__ inline float shuffle_xor(float value, int distance) { return __shfl_xor_sync(0xffffffff, value, distance); }

__device__ inline int shuffle_xor(int value, int distance) { return __shfl_xor_sync(0xffffffff, value, distance); }

// what other blocks have written: past L1
__device__ inline float4 load_fresh(const float4* from) { return __ldcg(from); }
__device__ inline float load_fresh(const float* from) { return __ldcg(from); }
__device__ inline int load_fresh(const int* from) { return __ldcg(from); }
__device__ inline uint4 load_fresh(const uint4* from) { return __ldcg(from); }

#endif  // GPT2RT_ON_HOST

constexpr uint32_t kSense = 0x80000000u;

// The barrier of all blocks, in one word of global memory. Of the arrivals of one round all but the first block's add
// one, and that one adds what makes the sum 2^31: the highest bit turns over when the last has arrived, and the others
// are zero again. So the word is ready for the next round, and for the next launch with any number of blocks.
struct GridBarrier {
  uint32_t* word;
  uint32_t sense;

  // `speaks`: of the thread of a block that arrives and waits. It has not arrived, so the bit cannot turn before it
  // reads
  __device__ GridBarrier(uint32_t* at, bool speaks) : word(at), sense(speaks ? grid_word(at) & kSense : 0u) {}
  __device__ void arrive() { grid_add(word, blockIdx.x == 0 ? kSense - (gridDim.x - 1) : 1u); }
  __device__ void wait() {
    grid_wait(word, sense);
    sense ^= kSense;
  }
};

// A place in the ring, and the parity of the round in which it is used.
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Shared memory of a ring: an mbarrier for full and one for empty a stage, then the stages. A parity tells a round from
// the one before it and no more, so who waits for a stage must be the one who emptied it: one ring for each group.
struct Ring {
  uint64_t* full;
  uint64_t* empty;
  uint8_t* data;
  int stages, bytes;

  __device__ uint8_t* at(int stage) const { return data + stage * bytes; }
};

}  // namespace gpt2rt::cuda
