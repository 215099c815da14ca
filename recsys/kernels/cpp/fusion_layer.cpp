// Operators recsys::fusion_layer and its backward; see fusion_layer.h for mathematics and letters.
#include "fusion_layer_backward.h"

namespace recsys {
namespace {

constexpr int64_t kBlocksPerGroup = 8, kMaxLayerGroups = 16;

LayerSizes sizes_of(const Tensor& x, const std::vector<Tensor>& weights, int64_t num_outputs,
                    int64_t heads, double scale, double dropout) {
  LayerSizes s{x.size(0), x.size(1), num_outputs, x.size(2), weights[12].size(0), heads, 0, 0,
               static_cast<float>(scale), static_cast<float>(dropout)};
  s.d = distance_of(s.D), s.f = distance_of(s.F);
  return s;
}

std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> all;
  for (const Tensor& tensor : tensors) all.push_back(torch::stable::contiguous(tensor));
  return all;
}

// Uniform numbers [2, U, R, D] of both dropouts, from an item on; none without dropout.
const float* noise_of(const LayerSizes& s, const Tensor& noise, int64_t which, int64_t item) {
  return noise.numel() ? floats(noise) + (which * s.U + item) * s.R * s.D : nullptr;
}

// -> out [U, R, D] and what the backward reads
std::tuple<Tensor, Tensor> fusion_layer(const Tensor& x_, const Tensor& mask_,
                                        const Tensor& noise_, const std::vector<Tensor>& weights_,
                                        int64_t num_outputs, int64_t heads, double scale,
                                        double dropout) {
  const Tensor x = torch::stable::contiguous(x_), mask = torch::stable::contiguous(mask_);
  const Tensor noise = torch::stable::contiguous(noise_);
  const std::vector<Tensor> weights = contiguous(weights_);
  const LayerSizes s = sizes_of(x, weights, num_outputs, heads, scale, dropout);
  const LayerWeights packed(s, weights, false);
  Tensor out = torch::stable::new_empty(x, {s.U, s.R, s.D});
  Tensor kept = torch::stable::new_empty(x, {s.U, Kept::width(s)});
  const Kept parts(s, mutable_floats(kept));
  const float* from = floats(x);
  const bool* is_token = static_cast<const bool*>(mask.const_data_ptr());
  float* to = mutable_floats(out);
  const int64_t blocks = (s.U + s.block() - 1) / s.block();
  torch::stable::parallel_for(0, blocks, kBlocksPerGroup, [&](int64_t begin, int64_t end) {
    LayerForward forward(s, packed);
    for (int64_t item = begin * s.block(); item < std::min(end * s.block(), s.U); item += s.block())
      forward.compute(from + item * s.S * s.D, is_token + item * s.S, noise_of(s, noise, 0, item),
                      noise_of(s, noise, 1, item), std::min(s.block(), s.U - item),
                      parts.from(s, item), to + item * s.R * s.D);
  });
  return {out, kept};
}

// -> gradients of x [U, S, D] and of the weights. These are summed in groups of items that depend
// on the batch alone, so that they do not depend on the number of threads.
std::tuple<Tensor, std::vector<Tensor>> fusion_layer_backward(
    const Tensor& gradient_, const Tensor& kept, const Tensor& x_, const Tensor& noise_,
    const std::vector<Tensor>& weights_, int64_t num_outputs, int64_t heads, double scale,
    double dropout) {
  const Tensor gradient = torch::stable::contiguous(gradient_), x = torch::stable::contiguous(x_);
  const Tensor noise = torch::stable::contiguous(noise_);
  const std::vector<Tensor> weights = contiguous(weights_);
  const LayerSizes s = sizes_of(x, weights, num_outputs, heads, scale, dropout);
  const LayerWeights packed(s, weights, true);
  // The backward only reads them.
  const Kept parts(s, const_cast<float*>(floats(kept)));
  Tensor of_x = torch::stable::empty_like(x);
  std::vector<Tensor> of_weights;
  for (const Tensor& weight : weights) of_weights.push_back(torch::stable::empty_like(weight));
  const float *of_out = floats(gradient), *from = floats(x);
  float* for_x = mutable_floats(of_x);
  const int64_t blocks = (s.U + s.block() - 1) / s.block();
  const int64_t groups = std::clamp<int64_t>(blocks / kBlocksPerGroup, 1, kMaxLayerGroups);
  std::vector<std::unique_ptr<LayerSums>> sums(groups);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      sums[group] = std::make_unique<LayerSums>(packed);
      LayerBackward backward(s, packed, *sums[group]);
      const int64_t last = std::min(blocks * (group + 1) / groups * s.block(), s.U);
      for (int64_t item = blocks * group / groups * s.block(); item < last; item += s.block())
        backward.compute(of_out + item * s.R * s.D, from + item * s.S * s.D,
                         noise_of(s, noise, 0, item), noise_of(s, noise, 1, item),
                         std::min(s.block(), last - item), parts.from(s, item),
                         for_x + item * s.S * s.D);
    }
  });
  for (int64_t group = 1; group < groups; ++group) sums[0]->add(*sums[group]);
  sums[0]->write(of_weights);
  return {of_x, of_weights};
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("fusion_layer", TORCH_BOX(&recsys::fusion_layer));
  library.impl("fusion_layer_backward", TORCH_BOX(&recsys::fusion_layer_backward));
}
