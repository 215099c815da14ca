// Dot interaction of DLRM, forward and backward, one row of the batch after the other in cache.
//
// Shapes: B batch, F sparse features, V = F + 1 vectors, D dimension, I = F * (F + 1) / 2 pairs.
#include <algorithm>

#include "product.h"
#include "tensors.h"

namespace recsys {
namespace {

constexpr int64_t kRowsPerTask = 128;

// out [B, D + I]
Tensor dot_interaction(const Tensor& dense_, const Tensor& sparse_) {
  const Tensor dense = torch::stable::contiguous(dense_);
  const Tensor sparse = torch::stable::contiguous(sparse_);
  const int64_t B = sparse.size(0), F = sparse.size(1), D = sparse.size(2), V = F + 1;
  const int64_t width = D + F * V / 2, stride = padded(V) + kLanes;
  Tensor out = torch::stable::new_empty(dense, {B, width});
  const float *of_dense = floats(dense), *of_sparse = floats(sparse);
  float* to = mutable_floats(out);
  torch::stable::parallel_for(0, B, kRowsPerTask, [&](int64_t first, int64_t last) {
    Floats transposed(D * stride), products(kMaxRows * stride), zeros(stride);
    for (int64_t b = first; b < last; ++b) {
      float* result = to + b * width;
      std::memcpy(result, of_dense + b * D, D * sizeof(float));
      for (int64_t v = 0; v < V; ++v) {
        const float* vector = v ? of_sparse + (b * F + v - 1) * D : of_dense + b * D;
        for (int64_t d = 0; d < D; ++d) transposed[d * stride + v] = vector[d];
      }
      result += D;
      for (int64_t i = 0; i < F; i += kMaxRows) {  // pairs (i, j) with j > i, from a whole vector on
        const int64_t height = std::min<int64_t>(kMaxRows, F - i);
        const int64_t start = (i + 1) / kLanes * kLanes;
        const Product product{D,       transposed + i, 1,        stride, transposed + start, stride,
                              zeros,   0,              products, stride, After::kNothing};
        multiply(product, height, padded(V) - start);
        for (int64_t r = 0; r < height; ++r) {
          const int64_t count = V - 1 - (i + r);
          std::memcpy(result, products + r * stride + (i + r + 1 - start), count * sizeof(float));
          result += count;
        }
      }
    }
  });
  return out;
}

// gradient [B, D + I] -> gradients of dense [B, D] and sparse [B, F, D]
std::tuple<Tensor, Tensor> dot_interaction_backward(const Tensor& gradient_, const Tensor& dense_,
                                                    const Tensor& sparse_) {
  const Tensor gradient = torch::stable::contiguous(gradient_);
  const Tensor dense = torch::stable::contiguous(dense_);
  const Tensor sparse = torch::stable::contiguous(sparse_);
  const int64_t B = sparse.size(0), F = sparse.size(1), D = sparse.size(2), V = F + 1;
  const int64_t width = D + F * V / 2, stride = padded(D);
  Tensor to_dense = torch::stable::empty_like(dense);
  Tensor to_sparse = torch::stable::empty_like(sparse);
  const float *of_out = floats(gradient), *of_dense = floats(dense), *of_sparse = floats(sparse);
  float *for_dense = mutable_floats(to_dense), *for_sparse = mutable_floats(to_sparse);
  torch::stable::parallel_for(0, B, kRowsPerTask, [&](int64_t first, int64_t last) {
    Floats vectors(V * stride), of_pairs(V * V), results(V * stride), zeros(stride);
    for (int64_t b = first; b < last; ++b) {
      const float* row = of_out + b * width;
      for (int64_t v = 0; v < V; ++v) {
        const float* vector = v ? of_sparse + (b * F + v - 1) * D : of_dense + b * D;
        copy_row(vectors + v * stride, vector, D);
      }
      const float* pair = row + D;
      for (int64_t i = 0; i < V; ++i)
        for (int64_t j = i + 1; j < V; ++j, ++pair)
          of_pairs[i * V + j] = of_pairs[j * V + i] = *pair;
      const Product product{V,     of_pairs, V,       1,      vectors, stride,
                            zeros, 0,        results, stride, After::kNothing};
      multiply(product, V, stride);
      for (int64_t d = 0; d < D; ++d) for_dense[b * D + d] = row[d] + results[d];
      for (int64_t v = 1; v < V; ++v)
        copy_row(for_sparse + (b * F + v - 1) * D, results + v * stride, D);
    }
  });
  return {to_dense, to_sparse};
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("dot_interaction", TORCH_BOX(&recsys::dot_interaction));
  library.impl("dot_interaction_backward", TORCH_BOX(&recsys::dot_interaction_backward));
}
