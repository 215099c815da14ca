// Access to tensors of torch's stable ABI, whose headers compile in seconds, and checks of them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace recsys {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline const int64_t* integers(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

inline const bool* flags(const Tensor& tensor) {
  return static_cast<const bool*>(tensor.const_data_ptr());
}

constexpr int64_t kAny = -1;  // a size that no other input asks for

// Returns the type's name in PyTorch.
inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(type);
  }
}

// Writes a type and a shape, such as "float32 of shape [3, any]".
template <class Shape>
std::string described(ScalarType type, const Shape& shape) {
  std::ostringstream text;
  text << name_of(type) << " of shape [";
  const char* separator = "";
  for (const int64_t size : shape) {
    text << separator;
    separator = ", ";
    if (size == kAny) text << "any";
    else text << size;
  }
  text << "]";
  return text.str();
}

inline std::string described(const Tensor& tensor) {
  return described(tensor.scalar_type(), tensor.sizes());
}

// Checks the inputs of an operator: of a smaller tensor, or of one of a narrower type, a kernel would
// read what lies behind it. An error names the operator and the input, what it has and must have.
class Operator {
 public:
  using Shape = std::initializer_list<int64_t>;

  explicit Operator(const char* name) : name_(name) {}

  // Return an input of a type and shape, with its numbers one after the other.
  Tensor float32(const std::string& input, const Tensor& tensor, Shape shape) const {
    return contiguous(input, tensor, ScalarType::Float, shape);
  }
  Tensor int64(const std::string& input, const Tensor& tensor, Shape shape) const {
    return contiguous(input, tensor, ScalarType::Long, shape);
  }
  Tensor boolean(const std::string& input, const Tensor& tensor, Shape shape) const {
    return contiguous(input, tensor, ScalarType::Bool, shape);
  }

  // Requires a type and a shape, whatever the distances of numbers.
  void require_input(const std::string& input, const Tensor& tensor, ScalarType type,
                     Shape shape) const {
    if (!has(tensor, type, shape)) [[unlikely]]
      fail(input, " is ", described(tensor), ", but must be ", described(type, shape));
  }

  void require(bool condition, const auto&... text) const {
    if (!condition) [[unlikely]] fail(text...);
  }

  // Throws "recsys::NAME: ", followed by the text.
  [[noreturn]] void fail(const auto&... text) const {
    std::ostringstream message;
    message << "recsys::" << name_ << ": ";
    (message << ... << text);
    throw std::runtime_error(message.str());
  }

 private:
  Tensor contiguous(const std::string& input, const Tensor& tensor, ScalarType type,
                    Shape shape) const {
    require_input(input, tensor, type, shape);
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }

  static bool has(const Tensor& tensor, ScalarType type, Shape shape) {
    if (tensor.scalar_type() != type || tensor.dim() != static_cast<int64_t>(shape.size()))
      return false;
    int64_t axis = 0;
    for (const int64_t size : shape)
      if (tensor.size(axis++) != size && size != kAny) return false;
    return true;
  }

  const char* name_;
};

}  // namespace recsys
