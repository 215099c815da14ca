// Dot interaction of DLRM, forward and backward, one row of the batch after the other in cache.
//
// Shapes: B batch, F sparse features, V = F + 1 vectors, D dimension, I = F * (F + 1) / 2 pairs.
// The features are in any number of tensors [B, D] and [B, features of the tensor, D], whose vectors
// need not follow each other.
#include <algorithm>

#include "product.h"
#include "tensors.h"

namespace recsys {
namespace {

constexpr int64_t kRowsPerTask = 128;

// The vectors of a row, the dense one first: `at[v] + row * step[v]`.
template <class Pointer>
struct Vectors {
  std::vector<Pointer> at;
  std::vector<int64_t> step;

  void add(Pointer from, const Tensor& tensor) {
    const int64_t features = tensor.dim() == 2 ? 1 : tensor.size(1);
    for (int64_t feature = 0; feature < features; ++feature) {
      at.push_back(from + (tensor.dim() == 2 ? 0 : feature * tensor.stride(1)));
      step.push_back(tensor.stride(0));
    }
  }

  Pointer of(int64_t row, int64_t v) const { return at[v] + row * step[v]; }
  int64_t size() const { return at.size(); }
};

// Returns the tensors, with neighbouring numbers of each vector.
std::vector<Tensor> with_whole_vectors(const Operator& op, const Tensor& dense,
                                       const std::vector<Tensor>& sparse) {
  std::vector<Tensor> all{op.float32("dense", dense, {kAny, kAny})};
  const int64_t B = dense.size(0), D = dense.size(1);
  for (size_t at = 0; at < sparse.size(); ++at) {
    const Tensor& part = sparse[at];
    const std::string name = "sparse[" + std::to_string(at) + "]";
    if (part.dim() == 2)
      op.require_input(name, part, ScalarType::Float, {B, D});
    else
      op.require_input(name, part, ScalarType::Float, {B, kAny, D});
    const bool is_whole = part.stride(part.dim() - 1) == 1;
    all.push_back(is_whole ? part : torch::stable::contiguous(part));
  }
  return all;
}

Vectors<const float*> vectors_of(const std::vector<Tensor>& all) {
  Vectors<const float*> vectors;
  for (const Tensor& part : all) vectors.add(floats(part), part);
  return vectors;
}

// out [B, D + I]
Tensor dot_interaction(const Tensor& dense_, const std::vector<Tensor>& sparse) {
  const std::vector<Tensor> all = with_whole_vectors(Operator("dot_interaction"), dense_, sparse);
  const Vectors<const float*> from = vectors_of(all);
  const Tensor& dense = all[0];
  const int64_t B = dense.size(0), D = dense.size(1), V = from.size(), F = V - 1;
  const int64_t width = D + F * V / 2, stride = padded(V) + kLanes;
  Tensor out = torch::stable::new_empty(dense, {B, width});
  float* to = mutable_floats(out);
  torch::stable::parallel_for(0, B, kRowsPerTask, [&](int64_t first, int64_t last) {
    Floats transposed(D * stride), products(kMaxRows * stride), zeros(stride);
    for (int64_t b = first; b < last; ++b) {
      float* result = to + b * width;
      std::memcpy(result, from.of(b, 0), D * sizeof(float));
      for (int64_t v = 0; v < V; ++v) {
        const float* vector = from.of(b, v);
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

// gradient [B, D + I] -> gradients of dense [B, D] and of the tensors of sparse features
std::tuple<Tensor, std::vector<Tensor>> dot_interaction_backward(
    const Tensor& gradient_, const Tensor& dense, const std::vector<Tensor>& sparse) {
  const Operator op("dot_interaction_backward");
  const std::vector<Tensor> all = with_whole_vectors(op, dense, sparse);
  const Vectors<const float*> from = vectors_of(all);
  const int64_t B = dense.size(0), D = dense.size(1), V = from.size(), F = V - 1;
  const int64_t width = D + F * V / 2, stride = padded(D);
  const Tensor gradient = op.float32("gradient", gradient_, {B, width});
  std::vector<Tensor> gradients;
  Vectors<float*> to;
  for (const Tensor& part : all) {
    gradients.push_back(part.dim() == 2
                            ? torch::stable::new_empty(part, {B, D})
                            : torch::stable::new_empty(part, {B, part.size(1), D}));
    to.add(mutable_floats(gradients.back()), gradients.back());
  }
  const float* of_out = floats(gradient);
  torch::stable::parallel_for(0, B, kRowsPerTask, [&](int64_t first, int64_t last) {
    Floats vectors(V * stride), of_pairs(V * V), results(V * stride), zeros(stride);
    for (int64_t b = first; b < last; ++b) {
      const float* row = of_out + b * width;
      for (int64_t v = 0; v < V; ++v) copy_row(vectors + v * stride, from.of(b, v), D);
      const float* pair = row + D;
      for (int64_t i = 0; i < V; ++i)
        for (int64_t j = i + 1; j < V; ++j, ++pair)
          of_pairs[i * V + j] = of_pairs[j * V + i] = *pair;
      const Product product{V,     of_pairs, V,       1,      vectors, stride,
                            zeros, 0,        results, stride, After::kNothing};
      multiply(product, V, stride);
      for (int64_t v = 0; v < V; ++v) copy_row(to.of(b, v), results + v * stride, D);
      for (int64_t d = 0; d < D; ++d) to.of(b, 0)[d] += row[d];
    }
  });
  const Tensor of_dense = gradients[0];
  gradients.erase(gradients.begin());
  return {of_dense, gradients};
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("dot_interaction", TORCH_BOX(&recsys::dot_interaction));
  library.impl("dot_interaction_backward", TORCH_BOX(&recsys::dot_interaction_backward));
}
