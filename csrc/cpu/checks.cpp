#include "checks.h"

#include <vector>

namespace gpt2rt {

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return text + "]";
}

const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* expected) {
  GPT2RT_CHECK(t.dim() == dim, op, ": ", name, " has shape ", shape_text(t), ", expected ", expected);
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  const ScalarType type = t.scalar_type();
  GPT2RT_CHECK(type == expected, op, ": ", name, " is ", dtype_text(type), ", expected ", dtype_text(expected),
               "; convert it with .to(torch.", dtype_text(expected), ")");
}

bool is_storage(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

DType check_storage(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      raise<std::invalid_argument>(op, ": ", name, " is ", dtype_text(type), ", expected float32, bfloat16 or float16");
  }
}

void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  const ScalarType type = t.scalar_type();
  const ScalarType expected = other.scalar_type();
  GPT2RT_CHECK(type == expected, op, ": ", name, " is ", dtype_text(type), ", expected ", dtype_text(expected),
               ", the dtype of ", other_name, "; convert one of them");
}

void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t expected, const char* meaning) {
  GPT2RT_CHECK(t.size(dim) == expected, op, ": ", name, " has shape ", shape_text(t), ", expected ", expected, " (",
               meaning, ") in dimension ", dim);
}

void check_contiguous(const char* op, const char* name, const Tensor& t) {
  GPT2RT_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, shape ", shape_text(t),
               "; call .contiguous() on it");
}

void check_rows(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  GPT2RT_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, ": ", name, " has stride ", t.stride(last),
               " in its last dimension, expected 1; call .contiguous() on it");
}

void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, const char* x_name, const Tensor& x) {
  GPT2RT_CHECK(t.dim() == 1 && t.size(0) == n, op, ": ", name, " has shape ", shape_text(t), ", expected [", n,
               "], the last dimension of ", x_name, " ", shape_text(x));
  check_same_dtype(op, name, t, x_name, x);
  check_contiguous(op, name, t);
}

namespace {

struct Span {
  const char* name;
  const char* begin;
  const char* end;
};

// from the first byte of a tensor to its last; strides are not negative
Span span_of(const Named& named) {
  if (named.tensor == nullptr) return {named.name, nullptr, nullptr};
  const Tensor& t = *named.tensor;
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {named.name, begin, begin};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {named.name, begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
}

}  // namespace

void check_apart(const char* op, std::initializer_list<Named> written, std::initializer_list<Named> read) {
  std::vector<Span> spans;
  spans.reserve(written.size() + read.size());
  for (const Named& t : written) spans.push_back(span_of(t));
  for (const Named& t : read) spans.push_back(span_of(t));
  for (size_t i = 0; i < written.size(); ++i) {
    const Span& a = spans[i];
    for (size_t j = i + 1; j < spans.size(); ++j) {
      const Span& b = spans[j];
      GPT2RT_CHECK(a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin, op, ": ", a.name,
                   " is written to and shares memory with ", b.name, "; pass a tensor of its own");
    }
  }
}

Tensor new_like(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

}  // namespace gpt2rt
