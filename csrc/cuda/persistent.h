// A whole decode step of one sequence in one launch: what the kernel of persistent.cuh gets, how its weights are laid
// out, and the launcher that persistent_ops.cpp calls. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "params.h"

#ifndef __CUDACC__
#ifndef __host__
#define __host__
#define __device__
#endif
#endif

namespace gpt2rt::cuda {

// rows of a weight in a tile: one for each warp of a group of consumers
constexpr int kTileRows = 8;
// bytes before the first chunk of a tile: the biases of its rows, float32
constexpr int kTileHeader = 4 * kTileRows;
// elements of a row in a chunk, at most; a multiple of what a warp multiplies in one go, as is every choice below it
constexpr int kMaxChunk = 1024;
constexpr int kWarpElements = 256;

__host__ __device__ constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

// elements of a row in a chunk: the same for all weights of a model, so that a stage of the ring holds any chunk
__host__ __device__ constexpr int chunk_elements(int n_embd) {
  return n_embd < kMaxChunk ? round_up(n_embd, kWarpElements) : kMaxChunk;
}

// A weight [n, k] in the stream. Tile t has rows 8t to 8t + 7: header, then its chunks one after another, each with the
// elements [c * chunk, min(padded, (c + 1) * chunk)) of the eight rows. Rows are padded with zeros to a multiple of
// eight elements, the last tile to eight rows.
struct Matrix {
  int32_t n = 0;
  int32_t k = 0;
  int32_t padded = 0;
  int32_t chunk = 0;
  int32_t chunks = 0;
  int32_t tiles = 0;
  int64_t tile_bytes = 0;
};

inline Matrix matrix_of(int n, int k, int chunk) {
  Matrix m;
  m.n = n, m.k = k, m.chunk = chunk;
  m.padded = round_up(k, 8);
  m.chunks = (m.padded + chunk - 1) / chunk;
  m.tiles = (n + kTileRows - 1) / kTileRows;
  m.tile_bytes = kTileHeader + 2LL * kTileRows * m.padded;
  return m;
}
inline int64_t bytes_of(const Matrix& m) { return m.tiles * m.tile_bytes; }

// the weights of a step by their use, in the order of that
enum Product : int32_t { kQkv, kProj, kFc, kDown, kHead };

struct PersistentParams {
  // the layers one after another, each with the first four of the weights; then the head
  const uint8_t* stream = nullptr;
  Matrix weights[5];
  // [2 * n_layer + 1][weight, bias][n_embd]: of attention, of the inner layer, ..., the final one
  const float* norms = nullptr;
  // [n_layer]: of the scores, times log2(e)
  const float* scales = nullptr;
  float eps = 0.0f;
  Activation activation = Activation::linear;

  // [vocab, n_embd] and [n_positions, n_embd], rows at these strides
  const uint16_t* wte = nullptr;
  const uint16_t* wpe = nullptr;
  int64_t wte_stride = 0, wpe_stride = 0;
  int64_t vocab = 0, n_positions = 0;

  // of one token
  const int64_t* input_id = nullptr;
  const int64_t* position_id = nullptr;
  const int64_t* slot = nullptr;
  const int32_t* seq_len = nullptr;
  const int32_t* block_table = nullptr;
  int32_t max_blocks = 0;

  // [n_layer, 2, num_blocks, n_head, block_size, head_dim]
  uint16_t* cache = nullptr;
  int64_t num_blocks = 0;
  int32_t block_size = 0;

  // float32, written by some blocks and read by all after a barrier: [n_embd], [n_head * head_dim], [inner],
  // [n_head, num_splits, head_dim], [n_head, num_splits]
  float* x = nullptr;
  float* query = nullptr;
  float* inner = nullptr;
  float* values = nullptr;
  float* lse = nullptr;
  int32_t num_splits = 0;
  // of each block: its largest logit and where it stands, kNotFinite if one of them is not finite
  float* best = nullptr;
  int32_t* best_at = nullptr;
  // one word, zero before the first launch; every launch leaves it ready for the next
  uint32_t* barrier = nullptr;

  // [vocab], [n_embd] or null, [1] or null: the first of the largest logits, -1 unless all are finite
  float* logits = nullptr;
  float* hidden = nullptr;
  int64_t* chosen = nullptr;

  int32_t n_layer = 0;
  int32_t n_head = 0;
  int32_t head_dim = 0;
  int32_t n_embd = 0;
  // of each ring
  int32_t stages = 0;
};

// The weights of a model of these sizes; wide = n_head * head_dim.
inline void set_sizes(PersistentParams& p, int n_layer, int n_head, int head_dim, int n_embd, int inner, int vocab) {
  const int wide = n_head * head_dim, chunk = chunk_elements(n_embd);
  p.n_layer = n_layer, p.n_head = n_head, p.head_dim = head_dim, p.n_embd = n_embd, p.vocab = vocab;
  p.weights[kQkv] = matrix_of(3 * wide, n_embd, chunk);
  p.weights[kProj] = matrix_of(n_embd, wide, chunk);
  p.weights[kFc] = matrix_of(inner, n_embd, chunk);
  p.weights[kDown] = matrix_of(n_embd, inner, chunk);
  p.weights[kHead] = matrix_of(vocab, n_embd, chunk);
}
inline int64_t stream_bytes(const PersistentParams& p) {
  return p.n_layer * (bytes_of(p.weights[kQkv]) + bytes_of(p.weights[kProj]) + bytes_of(p.weights[kFc]) +
                      bytes_of(p.weights[kDown])) +
         bytes_of(p.weights[kHead]);
}

// of a grid, at most
constexpr int kMaxBlocks = 1024;

// floats of the workspace, and its parts: x, query, inner, values, lse, best, best_at. The first four begin at
// multiples of four
inline int64_t workspace_floats(const PersistentParams& p) {
  const int64_t wide = p.weights[kProj].k, splits = static_cast<int64_t>(p.n_head) * p.num_splits;
  return p.n_embd + wide + round_up(p.weights[kFc].n, 4) + splits * p.head_dim + splits + 2 * kMaxBlocks;
}
inline void set_workspace(PersistentParams& p, float* from) {
  p.x = from;
  p.query = p.x + p.n_embd;
  p.inner = p.query + p.weights[kProj].k;
  p.values = p.inner + round_up(p.weights[kFc].n, 4);
  p.lse = p.values + static_cast<int64_t>(p.n_head) * p.num_splits * p.head_dim;
  p.best = p.lse + static_cast<int64_t>(p.n_head) * p.num_splits;
  // of the same size
  p.best_at = reinterpret_cast<int32_t*>(p.best + kMaxBlocks);
}

constexpr int kMaxHeadDim = 128;
// groups of eight warps that multiply; they take tiles in turn, each from a ring of its own. One more warp fetches
constexpr int kGroups = 2;
// of each ring; more would not be filled between two barriers of a layer of any GPT-2
constexpr int kMaxStages = 16;

inline int longest_row(const PersistentParams& p) {
  const int wide = p.weights[kProj].padded > p.n_embd ? p.weights[kProj].padded : p.n_embd;
  return wide > p.weights[kDown].padded ? wide : p.weights[kDown].padded;
}
__host__ __device__ constexpr int stage_bytes(int chunk) { return round_up(kTileHeader + 2 * kTileRows * chunk, 128); }
// floats that attention needs of shared memory: scores of a split, and a sum for each warp
__host__ __device__ constexpr int attention_floats(int groups) { return 64 + kTileRows * groups * kMaxHeadDim; }
// bytes of shared memory before the stages: activations (or attention), norm, scratch of sums, mbarriers
inline int fixed_bytes(const PersistentParams& p, int groups) {
  const int row = longest_row(p), attention = attention_floats(groups);
  const int floats = (row > attention ? row : attention) + 2 * p.n_embd + 2 * kTileRows * groups;
  return round_up(4 * floats + 16 * kMaxStages * groups, 128);
}
// stages of each ring that fit so many bytes, 0: none do
inline int stages_in(const PersistentParams& p, int groups, int bytes) {
  const int stages = (bytes - fixed_bytes(p, groups)) / (groups * stage_bytes(p.weights[kQkv].chunk));
  return stages < 0 ? 0 : stages < kMaxStages ? stages : kMaxStages;
}
inline int persistent_bytes(const PersistentParams& p, int groups) {
  return fixed_bytes(p, groups) + groups * p.stages * stage_bytes(p.weights[kQkv].chunk);
}

// Blocks that a launch on the current device would have and the stages of their rings, by what a multiprocessor holds.
// Returns nullptr, or why there can be none.
const char* persistent_grid(const PersistentParams& params, Type type, int* blocks, int* stages);

// Launch on a stream (a cudaStream_t) of the current device with so many blocks, 0: as persistent_grid says. Nothing is
// allocated and nothing waits for the device. Returns nullptr, or what CUDA says went wrong.
const char* launch_persistent(PersistentParams params, Type type, int blocks, void* stream);

}  // namespace gpt2rt::cuda
