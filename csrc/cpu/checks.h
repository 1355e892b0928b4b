// Argument checks of the ops, on the stable ABI's Tensor. A failed check raises ValueError in Python, or
// what its macro says.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "types.h"

namespace gpt2rt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Error is one of the classes that pybind11 translates: invalid_argument to ValueError, out_of_range to IndexError,
// runtime_error to RuntimeError, which is all that STD_TORCH_CHECK knows
template <typename Error, typename... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

#define GPT2RT_CHECK_AS(Error, condition, ...) \
  do {                                         \
    if (!(condition)) [[unlikely]] {           \
      ::gpt2rt::raise<Error>(__VA_ARGS__);     \
    }                                          \
  } while (false)

// arguments that do not fit: ValueError. GPT2RT_CHECK(condition, parts of the sentence...)
#define GPT2RT_CHECK(condition, ...) GPT2RT_CHECK_AS(std::invalid_argument, condition, __VA_ARGS__)
// an id, slot or block outside its table: IndexError
#define GPT2RT_CHECK_INDEX(condition, ...) GPT2RT_CHECK_AS(std::out_of_range, condition, __VA_ARGS__)
// a state that forbids what was asked: RuntimeError
#define GPT2RT_CHECK_STATE(condition, ...) GPT2RT_CHECK_AS(std::runtime_error, condition, __VA_ARGS__)

// "[2, 3]"
std::string shape_text(const Tensor& t);
const char* dtype_text(ScalarType type);

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* expected);
void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected);
bool is_storage(ScalarType type);
// one of the storage dtypes
DType check_storage(const char* op, const char* name, const Tensor& t);
// the same dtype as another argument
void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other);
void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t expected, const char* meaning);
void check_contiguous(const char* op, const char* name, const Tensor& t);
// rows of a [.., n] tensor are contiguous; the other strides are free but not negative
void check_rows(const char* op, const char* name, const Tensor& t);

// a vector of n elements in x's dtype, contiguous: weights of norms, biases
void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, const char* x_name, const Tensor& x);

// a tensor argument and its name; null: an optional one that was not given
struct Named {
  const char* name;
  const Tensor* tensor;
};

inline const Tensor* given(const std::optional<Tensor>& t) { return t.has_value() ? &*t : nullptr; }

// none of the tensors that an op writes to shares memory with another of them or with one that it reads
void check_apart(const char* op, std::initializer_list<Named> written, std::initializer_list<Named> read);

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// an element counted in storage items
inline const void* at(const void* base, int64_t index, DType dtype) {
  return static_cast<const char*>(base) + index * item_size(dtype);
}

inline void* at(void* base, int64_t index, DType dtype) { return static_cast<char*>(base) + index * item_size(dtype); }

// a new contiguous tensor with x's dtype
Tensor new_like(const Tensor& x, std::initializer_list<int64_t> sizes);

}  // namespace gpt2rt
