// The op of the persistent decode kernel: it checks what would make the kernel read or write outside its tensors.
#include "op.h"
#include "persistent.h"

namespace gpt2rt::cuda {
namespace {

constexpr const char* kOp = "persistent_decode_cuda";
// sizes are ints in the kernel
constexpr int64_t kMost = 1 << 28;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  check_that(kOp, condition, parts...);
}

// a contiguous tensor that starts at a multiple of 16 bytes
template <typename T>
T* whole(const char* name, const Tensor& t, ScalarType type, const char* expected, int64_t numel) {
  check(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel, name, " must be ", expected,
        ", contiguous, of ", numel, " elements, got ", t.numel());
  check(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

// the first element of a vector with room for one sequence or more
template <typename T>
const T* first_of(const char* name, const Tensor& t, ScalarType type, const char* expected) {
  check(t.scalar_type() == type && t.dim() >= 1 && t.numel() >= 1, name, " must be ", expected, " with an element");
  return static_cast<const T*>(t.const_data_ptr());
}

const uint16_t* table(const char* name, const Tensor& t, ScalarType type, int64_t columns) {
  check(t.dim() == 2 && t.size(1) == columns && t.stride(1) == 1 && t.scalar_type() == type, name, " must be [rows, ",
        columns, "] of the dtype of the cache, rows contiguous");
  return static_cast<const uint16_t*>(t.const_data_ptr());
}

void check_sizes(int64_t n_head, int64_t head_dim, int64_t n_embd, int64_t inner) {
  check(n_head >= 1 && inner >= 1 && n_embd >= 8 && n_embd % 8 == 0, "there are ", n_head, " heads, n_embd is ", n_embd,
        " and the inner size ", inner, ", expected at least 1 each and n_embd a multiple of 8");
  check(head_dim >= 8 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim, "head_dim is ", head_dim,
        ", expected a multiple of 8 up to ", kMaxHeadDim);
  check(3 * n_head * head_dim < kMost && n_embd < kMost && inner < kMost, "the model is too large");
}

void persistent_decode(const Tensor& stream, const Tensor& norms, const Tensor& scales, double eps, int64_t activation,
                       const Tensor& wte, const Tensor& wpe, const Tensor& input_ids, const Tensor& position_ids,
                       const Tensor& slot_mapping, const Tensor& seq_lens, const Tensor& block_table,
                       const Tensor& cache, const Tensor& workspace, const Tensor& barrier, const Tensor& logits,
                       const MaybeTensor& hidden, const MaybeTensor& chosen, int64_t inner, int64_t num_splits,
                       int64_t blocks) {
  check(cache.dim() == 6 && cache.size(1) == 2 && cache.is_contiguous(),
        "cache must be [n_layer, 2, num_blocks, n_head, block_size, head_dim], contiguous");
  const ScalarType type = cache.scalar_type();
  check(type == ScalarType::Half || type == ScalarType::BFloat16, "cache must be float16 or bfloat16");
  check(wte.dim() == 2, "wte must be a matrix");
  const int64_t n_layer = cache.size(0), n_head = cache.size(3), head_dim = cache.size(5), n_embd = wte.size(1);
  const int64_t vocab = logits.numel();
  check_sizes(n_head, head_dim, n_embd, inner);
  check(n_layer >= 1 && vocab >= 1 && vocab < kMost && num_splits >= 1 && num_splits < kMost && wte.size(0) == vocab,
        "there are ", n_layer, " layers, ", num_splits, " splits, ", wte.size(0), " rows of wte and ", vocab,
        " logits, expected at least 1 each and as many rows as logits");
  PersistentParams p;
  set_sizes(p, static_cast<int>(n_layer), static_cast<int>(n_head), static_cast<int>(head_dim),
            static_cast<int>(n_embd), static_cast<int>(inner), static_cast<int>(vocab));
  p.num_splits = static_cast<int32_t>(num_splits);
  p.stream = whole<uint8_t>("stream", stream, ScalarType::Byte, "uint8", stream_bytes(p));
  p.norms = whole<float>("norms", norms, ScalarType::Float, "float32", (2 * n_layer + 1) * 2 * n_embd);
  check(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.numel() == n_layer,
        "scales must be float32 [", n_layer, "]");
  p.scales = static_cast<const float*>(scales.const_data_ptr());
  p.eps = static_cast<float>(eps);
  check(activation >= 0 && activation <= static_cast<int64_t>(Activation::quick_gelu), "there is no activation ",
        activation);
  p.activation = static_cast<Activation>(activation);
  p.wte = table("wte", wte, type, n_embd), p.wte_stride = wte.stride(0);
  p.wpe = table("wpe", wpe, type, n_embd), p.wpe_stride = wpe.stride(0), p.n_positions = wpe.size(0);
  p.input_id = first_of<int64_t>("input_ids", input_ids, ScalarType::Long, "int64");
  p.position_id = first_of<int64_t>("position_ids", position_ids, ScalarType::Long, "int64");
  p.slot = first_of<int64_t>("slot_mapping", slot_mapping, ScalarType::Long, "int64");
  p.seq_len = first_of<int32_t>("seq_lens", seq_lens, ScalarType::Int, "int32");
  p.block_table = first_of<int32_t>("block_table", block_table, ScalarType::Int, "int32");
  check(block_table.dim() == 2 && block_table.stride(1) == 1, "block_table must be a matrix with contiguous rows");
  p.max_blocks = static_cast<int32_t>(block_table.size(1));
  p.cache = whole<uint16_t>("cache", cache, type, "of its dtype", cache.numel());
  p.num_blocks = cache.size(2), p.block_size = static_cast<int32_t>(cache.size(4));
  set_workspace(p, whole<float>("workspace", workspace, ScalarType::Float, "float32", workspace_floats(p)));
  p.barrier = whole<uint32_t>("barrier", barrier, ScalarType::Int, "int32", 1);
  check(logits.scalar_type() == ScalarType::Float && logits.dim() >= 1 && logits.stride(logits.dim() - 1) == 1,
        "logits must be float32, contiguous");
  p.logits = static_cast<float*>(const_cast<void*>(logits.const_data_ptr()));
  if (hidden) {
    check(hidden->scalar_type() == ScalarType::Float && hidden->is_contiguous() && hidden->numel() == n_embd,
          "hidden must be float32 of ", n_embd, " elements, contiguous");
    p.hidden = static_cast<float*>(const_cast<void*>(hidden->const_data_ptr()));
  }
  if (chosen) {
    check(chosen->scalar_type() == ScalarType::Long && chosen->numel() == 1, "chosen must be int64 of one element");
    p.chosen = static_cast<int64_t*>(const_cast<void*>(chosen->const_data_ptr()));
  }
  for (const Tensor& each : {stream, norms, scales, wte, wpe, input_ids, position_ids, slot_mapping, seq_lens,
                             block_table, workspace, barrier, logits}) {
    check(each.get_device_index() == cache.get_device_index(), "the tensors are on different devices");
  }
  const OnDevice on(kOp, cache);
  const Type compute = type == ScalarType::BFloat16 ? Type::bfloat16 : Type::float16;
  const char* error = launch_persistent(p, compute, static_cast<int>(blocks), on.stream());
  if (error != nullptr) throw std::runtime_error(std::string(kOp) + ": the launch failed: " + error);
}

// how many blocks a launch on the device of `like`, of its dtype, has; ValueError if it cannot be
int64_t persistent_blocks(const Tensor& like, int64_t n_head, int64_t head_dim, int64_t n_embd, int64_t inner) {
  check_sizes(n_head, head_dim, n_embd, inner);
  PersistentParams p;
  set_sizes(p, 1, static_cast<int>(n_head), static_cast<int>(head_dim), static_cast<int>(n_embd),
            static_cast<int>(inner), 1);
  const OnDevice on(kOp, like);
  const Type compute = like.scalar_type() == ScalarType::BFloat16 ? Type::bfloat16 : Type::float16;
  int blocks = 0, stages = 0;
  const char* error = persistent_grid(p, compute, &blocks, &stages);
  check(error == nullptr, error == nullptr ? "" : error);
  return blocks;
}

}  // namespace
}  // namespace gpt2rt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(gpt2rt, m) {
  m.def(
      "persistent_decode_cuda(Tensor stream, Tensor norms, Tensor scales, float eps, int activation, Tensor wte, "
      "Tensor wpe, Tensor input_ids, Tensor position_ids, Tensor slot_mapping, Tensor seq_lens, Tensor block_table, "
      "Tensor(a!) cache, Tensor(b!) workspace, Tensor(c!) barrier, Tensor(d!) logits, Tensor(e!)? hidden, Tensor(f!)? "
      "chosen, int inner, "
      "int num_splits, int blocks) -> ()");
  m.def("persistent_blocks_cuda(Tensor like, int n_head, int head_dim, int n_embd, int inner) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2rt, CUDA, m) {
  m.impl("persistent_decode_cuda", TORCH_BOX(&gpt2rt::cuda::persistent_decode));
  m.impl("persistent_blocks_cuda", TORCH_BOX(&gpt2rt::cuda::persistent_blocks));
}
