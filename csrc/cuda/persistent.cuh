// A decode step of one sequence in one launch: embedding; per layer norm + QKV + KV append, attention over splits of 64
// tokens, merge + projection + residual, norm + fc + activation, projection + residual; final norm and output layer.
//
// A block a multiprocessor. One of its warps does nothing but fetch this block's share of the weights, in the order in
// which they will be used, into rings of stages in shared memory; it never waits for an activation, so the memory is
// busy while the other warps are between two barriers of the grid. Those multiply: a warp takes one row of a tile of
// eight from the first element to the last, so the order of a row's sum depends on its length alone, not on how many
// blocks there are or which of them has the row. Two groups of eight warps take the block's tiles in turn. Splits
// of attention go by absolute position, merges by their order, and no number is added by an atomic: the bits of a
// result depend on the weights' shapes and the token's position, not on the grid.
//
// Arithmetic in float32, weights, keys and values in float16 or bfloat16; what lies between two phases is float32.
// Sources: the plan of docs/gpu.md; online softmax: Milakov & Gimelshein, arXiv:1805.02867; splits of the context: Dao
// et al., "Flash-Decoding" (2023).
#pragma once

#include "finish.cuh"
#include "persistent_attention.cuh"

namespace gpt2rt::cuda {

// the ring of a group, out of that of the first
__device__ inline Ring ring_of(const Ring& first, int group) {
  const int before = group * first.stages;
  return {first.full + before, first.empty + before, first.at(before), first.stages, first.bytes};
}

// The warps that multiply, in one block.
template <typename T, int groups>
class Consumers {
 public:
  static constexpr int kThreads = consumer_threads(groups), kWarps = kTileRows * groups;

  __device__ Consumers(const PersistentParams& params, const Ring& own, float* floats, int row)
      : p(params),
        ring(own),
        activations(floats),
        // four elements of each eight in one plane, the other four in another: lanes read neighbouring places
        plane(row / 2),
        norm(floats + max(row, attention_floats(groups))),
        scratch(norm + 2 * p.n_embd),
        attention(params, floats),
        grid(p.barrier, threadIdx.x == 0),
        thread(threadIdx.x),
        warp(thread / 32),
        lane(thread % 32) {}

  // One loop over the products rather than a layer's phases one after another: the code of a phase stands there once,
  // and all of it stays in the instruction cache.
  __device__ void run() {
    load_norm(p.norms);
    meet();
    const int steps = kHead * p.n_layer;
    // which block has the first tile of the next weight
    uint32_t turn = 0;
#pragma unroll 1
    for (int step = 0; step <= steps; ++step) {
      const int layer = step / kHead;
      const Product product = step == steps ? kHead : static_cast<Product>(step % kHead);
      const Matrix& m = p.weights[product];
      // the first block keeps the embedding and the last hidden row, also if it has no tile
      const bool keeps = blockIdx.x == 0 && (step == 0 || step == steps);
      if (first_tile(turn) < m.tiles || keeps) load_input(product, step == 0);
      if (step == steps && keeps && p.hidden != nullptr) {
        for (int e = thread; e < p.n_embd; e += kThreads) p.hidden[e] = activations[place(e)];
      }
      if (step == steps) forget_best();
      multiply(product, layer, turn);
      turn = next_turn(m, turn);
      if (step == steps) break;
      arrive();
      // what needs nothing from other blocks, while they arrive
      if (product == kQkv) attention.prefetch_cache(layer);
      if (product == kProj || product == kDown) load_norm(p.norms + (step + 1) / 2 * 2 * p.n_embd);
      wait();
      if (product == kQkv) {
        attention.run(layer);
        arrive();
        wait();
      }
    }
    if (p.chosen != nullptr) choose();
  }

 private:
  const PersistentParams& p;
  const Ring ring;
  float* const activations;
  const int plane;
  float* const norm;
  float* const scratch;
  // in the place of the activations
  Attention<T, groups> attention;
  GridBarrier grid;
  Cursor cursor;
  const int thread, warp, lane;
  // which half of the scratch the next sum takes
  int half = 0;

  __device__ void meet() { consumers_meet<kThreads>(); }

  // all that this block wrote in this phase is on its way to the others
  __device__ void arrive() {
    meet();
    if (thread == 0) grid.arrive();
  }
  // all that all blocks wrote before they arrived is there
  __device__ void wait() {
    if (thread == 0) grid.wait();
    meet();
  }

 public:
  // tiles are dealt to the blocks in turn, from one weight to the next without a break
  __device__ static int first_tile(uint32_t turn) {
    return blockIdx.x >= turn ? blockIdx.x - turn : blockIdx.x + gridDim.x - turn;
  }
  __device__ static uint32_t next_turn(const Matrix& m, uint32_t turn) {
    return (turn + static_cast<uint32_t>(m.tiles)) % gridDim.x;
  }

 private:
  // where element e of a row stands in shared memory
  __device__ int place(int e) const { return (e % 8 / 4) * plane + e / 8 * 4 + e % 4; }
  __device__ float4* four(int item) const {
    return reinterpret_cast<float4*>(activations + item % 2 * plane) + item / 2;
  }

  // the sum of a number for each thread, the same in all; its order depends on the number of threads
  __device__ float sum_of_all(float value) {
    float* const sums = scratch + half * kWarps;
    // those who still read the sums of the call before have another half
    half ^= 1;
    value = lanes_sum(value);
    if (lane == 0) sums[warp] = value;
    meet();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += sums[i];
    return sum;
  }

  // weight and bias of the next norm, which no kernel writes: before the barrier that the row waits for
  __device__ void load_norm(const float* from) {
    for (int i = thread; i < 2 * p.n_embd / 4; i += kThreads) {
      reinterpret_cast<float4*>(norm)[i] = reinterpret_cast<const float4*>(from)[i];
    }
  }

  // the row that the next product multiplies
  __device__ void load_input(Product product, bool first) {
    if (product == kProj) return merge();
    if (first) {
      embed();
    } else {
      load_row(product == kDown ? p.inner : p.x, p.weights[product].k, p.weights[product].padded);
    }
    if (product != kDown) normalise(p.n_embd);
  }

  // wte[id] + wpe[position]; not a number where there is no such row
  __device__ void embed() {
    const int64_t id = *p.input_id, position = *p.position_id;
    const bool known = id >= 0 && id < p.vocab && position >= 0 && position < p.n_positions;
    for (int e = thread; e < p.n_embd; e += kThreads) {
      const float x =
          known ? T::value(p.wte[id * p.wte_stride + e]) + T::value(p.wpe[position * p.wpe_stride + e]) : NAN;
      activations[place(e)] = x;
      // what the projections add to, two barriers from here
      if (blockIdx.x == 0) p.x[e] = x;
    }
    meet();
  }

  // float32 [k] that other blocks have written, followed by zeros
  __device__ void load_row(const float* from, int k, int padded) {
    for (int i = thread; i < padded / 4; i += kThreads) {
      float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (4 * i + 4 <= k) {
        value = load_fresh(reinterpret_cast<const float4*>(from) + i);
      } else {
        if (4 * i < k) value.x = load_fresh(from + 4 * i);
        if (4 * i + 1 < k) value.y = load_fresh(from + 4 * i + 1);
        if (4 * i + 2 < k) value.z = load_fresh(from + 4 * i + 2);
      }
      *four(i) = value;
    }
    meet();
  }

  // layer norm of the row in place; k a multiple of eight
  __device__ void normalise(int k) {
    float sum = 0.0f;
    for (int i = thread; i < k / 4; i += kThreads) {
      const float4 x = *four(i);
      sum += (x.x + x.y) + (x.z + x.w);
    }
    const float mean = sum_of_all(sum) / k;
    sum = 0.0f;
    // a second pass: a difference of large squares would lose the digits of the variance
    for (int i = thread; i < k / 4; i += kThreads) {
      const float4 x = *four(i);
      const float a = x.x - mean, b = x.y - mean, c = x.z - mean, d = x.w - mean;
      sum += (a * a + b * b) + (c * c + d * d);
    }
    const float factor = 1.0f / sqrtf(sum_of_all(sum) / k + p.eps);
    for (int i = thread; i < k / 4; i += kThreads) {
      float4 x = *four(i);
      const float4 weight = reinterpret_cast<const float4*>(norm)[i];
      const float4 bias = reinterpret_cast<const float4*>(norm + p.n_embd)[i];
      x.x = (x.x - mean) * factor * weight.x + bias.x;
      x.y = (x.y - mean) * factor * weight.y + bias.y;
      x.z = (x.z - mean) * factor * weight.z + bias.z;
      x.w = (x.w - mean) * factor * weight.w + bias.w;
      *four(i) = x;
    }
    meet();
  }

  // the rows of this block's tiles by the row in shared memory
  __device__ void multiply(Product product, int layer, uint32_t turn) {
    const Matrix& m = p.weights[product];
    const int group = warp / kTileRows, row = warp % kTileRows;
    const bool adds = product == kProj || product == kDown;
    int mine = 0;
#pragma unroll 1
    for (int tile = first_tile(turn); tile < m.tiles; tile += gridDim.x, ++mine) {
      if (mine % groups != group) continue;
      const int column = tile * kTileRows + row;
      const bool speaks = lane == 0 && column < m.n;
      // on its way while the row is multiplied; this warp alone writes it
      const float before = speaks && adds ? load_fresh(p.x + column) : 0.0f;
      float bias = 0.0f, total[4] = {};
#pragma unroll 1
      for (int c = 0; c < m.chunks; ++c) {
        const int units = min(m.chunk, m.padded - c * m.chunk) / 8;
        mbarrier_wait(ring.full + cursor.stage, cursor.parity);
        const uint8_t* data = ring.at(cursor.stage);
        if (c == 0) {
          bias = reinterpret_cast<const float*>(data)[row];
          data += kTileHeader;
        }
        const float4* x = reinterpret_cast<const float4*>(activations) + c * m.chunk / 8;
        add_products(reinterpret_cast<const uint4*>(data) + row * units, x, units, total);
        // the stage may be filled again when all warps of this group have read it
        warp_meet();
        if (lane == 0) mbarrier_arrive(ring.empty + cursor.stage);
        cursor.advance(ring.stages);
      }
      const float y = lanes_sum((total[0] + total[1]) + (total[2] + total[3])) + bias;
      if (speaks) finish_column(product, layer, column, y, before);
    }
  }

  __device__ void finish_column(Product product, int layer, int column, float y, float before) {
    if (product == kQkv) {
      store_qkv(layer, column, y);
    } else if (product == kFc) {
      p.inner[column] = activated(y, p.activation);
    } else {
      (product == kHead ? p.logits : p.x)[column] = y + before;
      if (product == kHead) remember(y, column);
    }
  }

  // ---- the first of the largest logits ---------------------------------------------------------------------------

  // each warp's stands where sums stood
  __device__ int* best_places() const { return reinterpret_cast<int*>(scratch + kWarps); }

  __device__ void forget_best() {
    if (lane == 0) scratch[warp] = -INFINITY, best_places()[warp] = Best::kNone;
  }

  // by one lane
  __device__ void remember(float logit, int column) {
    Best best = {scratch[warp], best_places()[warp]};
    best.add(logit, column);
    scratch[warp] = best.value, best_places()[warp] = best.at;
  }

  // of all blocks, by the first one
  __device__ void choose() {
    meet();
    if (warp != 0) return;
    Best best;
    if (lane < kWarps) best = {scratch[lane], best_places()[lane]};
    best.reduce();
    if (lane == 0) {
      p.best[blockIdx.x] = best.value, p.best_at[blockIdx.x] = best.at;
      grid.arrive();
    }
    if (blockIdx.x != 0) return;
    if (lane == 0) grid.wait();
    warp_meet();
    best = {};
    for (int block = lane; block < static_cast<int>(gridDim.x); block += 32) {
      best.add(load_fresh(p.best + block), load_fresh(p.best_at + block));
    }
    best.reduce();
    if (lane == 0) *p.chosen = best.at;
  }

  // units of eight elements, of one row of a chunk
  __device__ void add_products(const uint4* weights, const float4* x, int units, float (&total)[4]) {
#pragma unroll
    for (int i = 0; i < kMaxChunk / kWarpElements; ++i) {
      const int unit = lane + 32 * i;
      if (unit >= units) break;
      float w[8];
      unpack_eight<T>(weights[unit], w);
      const float4 low = x[unit], high = x[plane / 4 + unit];
      total[0] = fmaf(w[0], low.x, total[0]);
      total[1] = fmaf(w[1], low.y, total[1]);
      total[2] = fmaf(w[2], low.z, total[2]);
      total[3] = fmaf(w[3], low.w, total[3]);
      total[0] = fmaf(w[4], high.x, total[0]);
      total[1] = fmaf(w[5], high.y, total[1]);
      total[2] = fmaf(w[6], high.z, total[2]);
      total[3] = fmaf(w[7], high.w, total[3]);
    }
  }

  __device__ void store_qkv(int layer, int column, float y) {
    const int wide = p.n_head * p.head_dim, within = column % wide;
    if (column < wide) {
      p.query[column] = y;
      return;
    }
    const int64_t slot = *p.slot;
    if (slot < 0 || slot >= p.num_blocks * p.block_size) return;
    const int offset = static_cast<int>(slot % p.block_size);
    const int64_t at = in_cache(p, layer, column / wide - 1, slot / p.block_size, within / p.head_dim, offset);
    p.cache[at + within % p.head_dim] = T::bits(y);
  }

  // the splits of all heads, in their order, into the row that is multiplied next
  __device__ void merge() {
    const int wanted = wanted_splits(p), used = used_splits(p), wide = p.n_head * p.head_dim;
    for (int i = thread; i < wide / 4; i += kThreads) {
      const int head = 4 * i / p.head_dim;
      const int64_t at = static_cast<int64_t>(head) * p.num_splits;
      const float4* from = reinterpret_cast<const float4*>(p.values + at * p.head_dim) + (i - head * (p.head_dim / 4));
      float most = -INFINITY, weight_sum = 0.0f;
#pragma unroll 8
      for (int split = 0; split < used; ++split) most = fmaxf(most, load_fresh(p.lse + at + split));
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
      for (int split = 0; split < used; ++split) {
        const float weight = exp2f(load_fresh(p.lse + at + split) - most);
        const float4 value = load_fresh(from + split * (p.head_dim / 4));
        weight_sum += weight;
        total.x = fmaf(weight, value.x, total.x);
        total.y = fmaf(weight, value.y, total.y);
        total.z = fmaf(weight, value.z, total.z);
        total.w = fmaf(weight, value.w, total.w);
      }
      // not a number: tokens that no split holds. Zero: a padding row
      const float factor = wanted > p.num_splits ? NAN : used > 0 ? 1.0f / weight_sum : 0.0f;
      *four(i) = make_float4(total.x * factor, total.y * factor, total.z * factor, total.w * factor);
    }
    meet();
  }
};

// The warp that fetches: this block's tiles of all weights, in the order of Consumers::run.
template <typename T, int groups>
class Producer {
 public:
  __device__ Producer(const PersistentParams& params, const Ring& first) : p(params), ring(first) {}

  __device__ void run() {
    const int steps = kHead * p.n_layer;
    const uint8_t* weight = p.stream;
    uint32_t turn = 0;
#pragma unroll 1
    for (int step = 0; step <= steps; ++step) {
      const Matrix& m = p.weights[step == steps ? kHead : step % kHead];
      fetch_tiles(m, weight, turn);
      weight += m.tiles * m.tile_bytes;
      turn = Order::next_turn(m, turn);
    }
  }

 private:
  using Order = Consumers<T, groups>;

  const PersistentParams& p;
  // of the first group; those of the others stand behind it
  const Ring ring;
  Cursor cursors[groups];

  __device__ void fetch_tiles(const Matrix& m, const uint8_t* weight, uint32_t turn) {
    int group = 0;
#pragma unroll 1
    for (int tile = Order::first_tile(turn); tile < m.tiles; tile += gridDim.x) {
      // a register array is indexed with constants alone
#pragma unroll
      for (int i = 0; i < groups; ++i) {
        if (i == group) fetch_tile(m, weight + tile * m.tile_bytes, ring_of(ring, i), cursors[i]);
      }
      group = group + 1 == groups ? 0 : group + 1;
    }
  }

  __device__ void fetch_tile(const Matrix& m, const uint8_t* from, const Ring& to, Cursor& cursor) {
#pragma unroll 1
    for (int c = 0; c < m.chunks; ++c) {
      const int bytes = 2 * kTileRows * min(m.chunk, m.padded - c * m.chunk) + (c == 0 ? kTileHeader : 0);
      mbarrier_wait(to.empty + cursor.stage, cursor.parity ^ 1);
      fetch(to.at(cursor.stage), from, bytes, to.full + cursor.stage);
      cursor.advance(to.stages);
      from += bytes;
    }
  }
};

// 32 * (kTileRows * groups + 1) threads; the last warp fetches. `row`: floats of the longest activation row; `fixed`:
// bytes of shared memory before the stages
template <typename T, int groups>
__device__ inline void persistent_step(const PersistentParams& p, uint4* shared, int row, int fixed) {
  constexpr int kThreads = consumer_threads(groups);
  float* const floats = reinterpret_cast<float*>(shared);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(shared);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(bytes + fixed) - 2 * kMaxStages * groups;
  const Ring first = {barriers, barriers + groups * p.stages, bytes + fixed, p.stages,
                      stage_bytes(p.weights[kQkv].chunk)};
  if (threadIdx.x < static_cast<unsigned>(groups * p.stages)) {
    mbarrier_init(first.full + threadIdx.x, arrivals_when_full());
    // one arrival for each warp of the group that multiplies a tile
    mbarrier_init(first.empty + threadIdx.x, kTileRows);
    mbarriers_ready();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    Producer<T, groups>(p, first).run();
  } else {
    const int group = threadIdx.x / (32 * kTileRows);
    Consumers<T, groups>(p, ring_of(first, group), floats, row).run();
  }
}

}  // namespace gpt2rt::cuda
