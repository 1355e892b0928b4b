// The few operations that differ between a GPU and the tests, which run the same source on the host.
//
// On the host tests/support/cuda_on_host.h stands in for the device: it defines GPT2RT_ON_HOST, threadIdx, blockIdx,
// blockDim, __syncthreads, shared memory, the shuffle and the tensor core product, and includes the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "params.h"

namespace gpt2rt::cuda {

// storage types of the activations as tensor cores multiply them, two in a register
struct Half {
  static __host__ __device__ uint16_t bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __host__ __device__ float value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
};
struct BFloat {
  static __host__ __device__ uint16_t bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
  static __host__ __device__ float value(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
};

// the first value in the low half
template <typename T>
__host__ __device__ uint32_t pair(float low, float high) {
  return T::bits(low) | static_cast<uint32_t>(T::bits(high)) << 16;
}

// a * b + c in both halves of a register, each rounded once
template <typename T>
__host__ __device__ inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  if constexpr (std::is_same_v<T, Half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
#else
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    return T::value(static_cast<uint16_t>(x)) * T::value(static_cast<uint16_t>(y)) + T::value(static_cast<uint16_t>(z));
  };
  return pair<T>(one(a, b, c), one(a >> 16, b >> 16, c >> 16));
#endif
}

// (a & b) | c, in one instruction: with two constants the compiler takes two
__host__ __device__ inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return (a & b) | c;
#endif
}

#ifndef GPT2RT_ON_HOST

// c += a * b on tensor cores for a [16, 16], b [16, 8], float32 c [16, 8] spread over a warp: with g = lane / 4 and
// t = lane % 4, a lane holds rows g and g + 8 of a, column g of b, and of c these two rows and columns 2t, 2t + 1
// (PTX ISA, "Matrix Fragments for mma.m16n8k16")
template <typename T>
__device__ inline void matrix_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// of all 32 lanes; the order is that of a tree, the same in every lane
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
  return value;
}

// programmatic dependent launch: kernels/fusion.py has the rules. Targets before sm_90 do not know it
__device__ inline void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// weights are read once: past L1, and evicted first
__device__ inline uint4 load_once(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// the compiler may not move what follows from these values to before this place
__device__ inline void keep_here(uint4& words) {
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

// start to bring a line that will be read after the wait
__device__ inline void prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

#define GPT2RT_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

#endif  // GPT2RT_ON_HOST

__host__ __device__ inline int size_of(Type type) { return type == Type::float32 ? 4 : 2; }

__device__ inline float load(const Any& tensor, int64_t index) {
  if (tensor.type == Type::float32) return static_cast<const float*>(tensor.data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(tensor.data)[index];
  return tensor.type == Type::float16 ? Half::value(bits) : BFloat::value(bits);
}

__device__ inline void store(const Any& tensor, int64_t index, float value) {
  if (tensor.type == Type::float32) {
    static_cast<float*>(tensor.data)[index] = value;
  } else {
    static_cast<uint16_t*>(tensor.data)[index] = tensor.type == Type::float16 ? Half::bits(value) : BFloat::bits(value);
  }
}

// four neighbouring elements whose place is a multiple of four elements and aligned to that
__device__ inline void load_four(const Any& tensor, int64_t index, float (&value)[4]) {
  if (tensor.type == Type::float32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(tensor.data) + index);
    value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
    return;
  }
  const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(tensor.data) + index);
  const uint32_t bits[4] = {four.x & 0xffff, four.x >> 16, four.y & 0xffff, four.y >> 16};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t half = static_cast<uint16_t>(bits[i]);
    value[i] = tensor.type == Type::float16 ? Half::value(half) : BFloat::value(half);
  }
}

}  // namespace gpt2rt::cuda
