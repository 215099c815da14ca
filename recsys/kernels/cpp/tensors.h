// Access to tensors of torch's stable ABI, whose headers compile in seconds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <tuple>
#include <vector>

namespace recsys {

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

// Requires a shape: of a smaller tensor a kernel would read what lies behind it.
inline void require_shape(const Tensor& tensor, std::initializer_list<int64_t> shape,
                          const char* name) {
  bool is_same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) is_same = is_same && tensor.size(axis++) == size;
  STD_TORCH_CHECK(is_same, name, " has not the shape that the other inputs ask for");
}

}  // namespace recsys
