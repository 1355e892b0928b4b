// Multiply-adds a second of one instruction in registers, on N threads at once: the ceiling over a matrix product.
// Prints a JSON object; built and run by cpu_gemm.py with -march=native.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 12;

template <typename T, typename F>
void loop(long rounds, T start, F step) {
  T sum[kChains];
  for (T& s : sum) s = start;
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      sum[j] = step(sum[j]);
      // keeps every operation, in a register
      asm volatile("" : "+v"(sum[j]));
    }
  }
}

// the best of several turns, all threads together
template <typename F>
double best(int threads, long rounds, int width, F run) {
  double rate = 0.0;
  for (int turn = 0; turn < 5; ++turn) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 0; t < threads; ++t) others.emplace_back(run);
    for (std::thread& other : others) other.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    rate = std::max(rate, static_cast<double>(rounds) * kChains * width * threads / seconds);
  }
  return rate;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const long rounds = argc > 2 ? std::atol(argv[2]) : 10000000;
#if defined(__AVX512F__)
  const __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-9f);
  const double fma = best(threads, rounds, 16, [=] {
    loop(rounds, _mm512_setzero_ps(), [=](__m512 s) { return _mm512_fmadd_ps(a, b, s); });
  });
#elif defined(__FMA__)
  const __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-9f);
  const double fma = best(threads, rounds, 8, [=] {
    loop(rounds, _mm256_setzero_ps(), [=](__m256 s) { return _mm256_fmadd_ps(a, b, s); });
  });
#else
#error "this processor has no fused multiply-add"
#endif
  std::printf("{\"float32\": %.4g", fma);
#if defined(__AVX512VNNI__)
  const __m512i c = _mm512_set1_epi32(0x01010101);
  std::printf(", \"int8\": %.4g", best(threads, rounds, 64, [=] {
                loop(rounds, _mm512_setzero_si512(), [=](__m512i s) { return _mm512_dpbusd_epi32(s, c, c); });
              }));
#endif
#if defined(__AVX512BF16__)
  const __m512bh d = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  std::printf(", \"bfloat16\": %.4g", best(threads, rounds, 32, [=] {
                loop(rounds, _mm512_setzero_ps(), [=](__m512 s) { return _mm512_dpbf16_ps(s, d, d); });
              }));
#endif
  std::printf("}\n");
}
