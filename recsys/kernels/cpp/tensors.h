// Access to tensors of torch's stable ABI, whose headers compile in seconds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

}  // namespace recsys
