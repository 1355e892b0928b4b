// The functions of torch's CUDA library that _C_cuda.so calls, for a torch without it: they let the library load, and
// its ops check their arguments. Whatever is launched then fails, for there is no device.
#include <cstdint>

extern "C" {

int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
