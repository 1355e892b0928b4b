// What the ops of gpt2rt._C_cuda share. They go through torch's stable ABI and launch on torch's current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace gpt2rt::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ValueError in Python
template <typename... Parts>
void check_that(const char* op, bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// The device of a tensor, which is the current one while this object lives, and torch's stream there.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& tensor) {
    const int32_t device = static_cast<int32_t>(tensor.get_device_index());
    succeed(op, aoti_torch_create_cuda_guard(device, &guard_));
    succeed(op, aoti_torch_get_current_cuda_stream(device, &stream_));
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  void* stream() const { return stream_; }

 private:
  // torch has printed what was wrong
  static void succeed(const char* op, AOTITorchError code) {
    if (code != AOTI_TORCH_SUCCESS)
      throw std::runtime_error(std::string(op) + ": torch knows no such CUDA device or stream");
  }

  CUDAGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace gpt2rt::cuda
