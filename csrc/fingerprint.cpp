// fingerprint_blocks: the keyed universal hash NH over blocks of 4 KiB, 16 bytes out of each.
//
// For words m and k of 64 bits, sums of 64 and of 128 bits:
//   NH(m) = sum over i of (m[2i] + k[2i] mod 2^64) * (m[2i+1] + k[2i+1] mod 2^64)  mod 2^128
//
// Source: Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and Secure Message Authentication", CRYPTO 1999,
// section 4. Without the key, two different blocks of one length have the same sum with probability at most 2^-64.
// The last block is filled up with zeros: who compares fingerprints compares lengths as well. One multiplication for
// 16 bytes, so reading memory takes the time; a cryptographic hash of the sums, 1/256 of the data, costs next to
// nothing.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/thread_pool.h"

namespace gpt2rt {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kSum = 16;

__extension__ using Word128 = unsigned __int128;

uint64_t word(const char* bytes, int64_t i) {
  uint64_t value;
  std::memcpy(&value, bytes + 8 * i, sizeof(value));
  return value;
}

Word128 nh(const char* block, const char* key) {
  // four sums: one alone would wait for its own carries
  Word128 sums[4] = {};
  for (int64_t i = 0; i < kBlock / 8; i += 8) {
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t at = i + 2 * j;
      sums[j] += static_cast<Word128>(word(block, at) + word(key, at)) * (word(block, at + 1) + word(key, at + 1));
    }
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

Tensor fingerprint_blocks(const Tensor& bytes, const Tensor& key) {
  const char* op = "fingerprint_blocks";
  check_dtype(op, "data", bytes, ScalarType::Byte);
  check_dim(op, "data", bytes, 1, "one dimension of bytes");
  check_contiguous(op, "data", bytes);
  check_dtype(op, "key", key, ScalarType::Byte);
  check_dim(op, "key", key, 1, "one dimension of bytes");
  check_size(op, "key", key, 0, kBlock, "the bytes of a block");
  check_contiguous(op, "key", key);
  const int64_t size = bytes.size(0);
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  Tensor sums = new_like(bytes, {blocks, kSum});
  const char* from = data<char>(bytes);
  const char* k = data<char>(key);
  char* to = mutable_data<char>(sums);
  parallel_rows(blocks, kBlock / 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t left = size - b * kBlock;
      char last[kBlock] = {};
      const char* block = from + b * kBlock;
      if (left < kBlock) block = static_cast<const char*>(std::memcpy(last, block, static_cast<size_t>(left)));
      const Word128 sum = nh(block, k);
      std::memcpy(to + b * kSum, &sum, sizeof(sum));
    }
  });
  return sums;
}

}  // namespace
}  // namespace gpt2rt

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CPU, m) { m.impl("fingerprint_blocks", TORCH_BOX(&gpt2rt::fingerprint_blocks)); }
