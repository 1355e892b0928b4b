// The kernel of csrc/cuda/persistent.cuh on the host, all blocks at once: what test_cuda_persistent_host.py loads.
#include "cuda_grid_on_host.h"

#include "persistent.cuh"

namespace {

using namespace gpt2rt::cuda;

template <typename T, int groups>
const char* launch(const PersistentParams& p, int blocks, unsigned seed) {
  const int row = longest_row(p), fixed = fixed_bytes(p, groups);
  return on_host::run(blocks, consumer_threads(groups) + 32, persistent_bytes(p, groups), seed,
                      [&](uint4* shared) { persistent_step<T, groups>(p, shared, row, fixed); });
}

template <typename T>
const char* launch(const PersistentParams& p, int groups, int blocks, unsigned seed) {
  return groups == 1 ? launch<T, 1>(p, blocks, seed) : launch<T, 2>(p, blocks, seed);
}

}  // namespace

extern "C" {

int size_of_params() { return sizeof(PersistentParams); }
int size_of_faults() { return sizeof(on_host::Faults); }

void set_model(PersistentParams* p, int n_layer, int n_head, int head_dim, int n_embd, int inner, int vocab,
               int num_splits) {
  set_sizes(*p, n_layer, n_head, head_dim, n_embd, inner, vocab);
  p->num_splits = num_splits;
}
int64_t model_stream_bytes(const PersistentParams* p) { return stream_bytes(*p); }
int64_t model_workspace_floats(const PersistentParams* p) { return workspace_floats(*p); }
// stages of each ring in so many bytes of shared memory
int model_stages(const PersistentParams* p, int bytes, int groups) { return stages_in(*p, groups, bytes); }
int model_stage_bytes(const PersistentParams* p) { return stage_bytes(p->weights[kQkv].chunk); }

const char* run_persistent(PersistentParams* p, float* workspace, int bfloat, int groups, int blocks, int stages,
                           int bulk, unsigned seed, const on_host::Faults* faults) {
  set_workspace(*p, workspace);
  p->stages = stages;
  on_host::grid.bulk = bulk != 0;
  on_host::grid.faults = *faults;
  return bfloat ? launch<BFloat>(*p, groups, blocks, seed) : launch<Half>(*p, groups, blocks, seed);
}
}
