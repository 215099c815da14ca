// Operators recsys::fusion and its backward; see fusion.h for mathematics and letters.
#include "fusion_backward.h"

namespace recsys {
namespace {

constexpr int64_t kBlocksPerGroup = 8, kMaxFusionGroups = 16;

std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> all;
  for (const Tensor& tensor : tensors)
    all.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  return all;
}

void require_shapes(const LayerSizes& s, const Tensor* w) {
  for (const int64_t norm : {0, 10})
    for (const int64_t part : {0, 1}) require_shape(w[norm + part], {s.D}, "a norm's weight");
  for (const int64_t map : {2, 4, 6, 8}) {
    require_shape(w[map], {s.D, s.D}, "a map of the attention");
    require_shape(w[map + 1], {s.D}, "a bias of the attention");
  }
  require_shape(w[12], {s.F, s.D}, "the first map of the feed-forward network");
  require_shape(w[13], {s.F}, "its bias");
  require_shape(w[14], {s.D, s.F}, "the second map of the feed-forward network");
  require_shape(w[15], {s.D}, "its bias");
}

void require_shapes(const FusionSizes& s, const Tensor& mask, const Tensor& modality,
                    const Tensor& noise, const std::vector<Tensor>& w) {
  const int64_t num_layers = s.layers.size();
  require_shape(mask, {s.U, s.T}, "mask");
  require_shape(modality, {s.T}, "modality");
  require_shape(w[0], {s.Q, s.D}, "queries");
  require_shape(w[1], {s.M, s.D}, "the embedding of modalities");
  int64_t num_random = 0;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    require_shapes(s.layers[layer], &w[2 + layer * kWeightsOfLayer]);
    num_random += 2 * s.U * s.layers[layer].R * s.D;
  }
  if (noise.numel()) require_shape(noise, {num_random}, "noise");
  const Tensor* last = &w[w.size() - 7];
  require_shape(last[0], {s.D}, "the last norm's weight");
  require_shape(last[1], {s.D}, "the last norm's bias");
  require_shape(last[2], {s.D, s.Q * s.D}, "the map of the output");
  require_shape(last[3], {s.D}, "the bias of the output");
  require_shape(last[4], {s.M, s.D}, "the vectors of missing modalities");
  require_shape(last[5], {s.D, s.M * s.D}, "the linear map");
  require_shape(last[6], {s.D}, "the bias of the linear map");
}

void check(const FusionSizes& s, const int64_t* modality) {
  bool in_range = true;
  for (int64_t t = 0; t < s.T; ++t) in_range &= 0 <= modality[t] && modality[t] < s.M;
  STD_TORCH_CHECK(in_range, "a token's modality is out of range");
}

FusionInputs inputs_of(const std::vector<Tensor>& all) {
  return {floats(all[0]), all[3].numel() ? floats(all[3]) : nullptr,
          static_cast<const bool*>(all[1].const_data_ptr()), integers(all[2])};
}

// -> fused [U, D] and what the backward reads
std::tuple<Tensor, Tensor> fusion(const Tensor& tokens, const Tensor& mask, const Tensor& modality,
                                  const Tensor& noise, const std::vector<Tensor>& weights_,
                                  int64_t num_layers, int64_t heads, double scale, double dropout,
                                  bool bfloat16) {
  const Precision precision(bfloat16);
  const std::vector<Tensor> all = contiguous({tokens, mask, modality, noise});
  const std::vector<Tensor> weights = contiguous(weights_);
  const FusionSizes s(all[0], weights, num_layers, heads, scale, dropout);
  require_shapes(s, mask, modality, noise, weights);
  const FusionInputs in = inputs_of(all);
  check(s, in.modality);
  const FusionWeights packed(s, weights, false);
  Tensor out = torch::stable::new_empty(all[0], {s.U, s.D});
  Tensor kept = torch::stable::new_empty(all[0], {FusionKept::size(s)});
  const FusionKept parts(s, mutable_floats(kept));
  float* to = mutable_floats(out);
  const int64_t blocks = (s.U + s.block() - 1) / s.block();
  torch::stable::parallel_for(0, blocks, kBlocksPerGroup, [&](int64_t begin, int64_t end) {
    const Precision of_thread(bfloat16);
    FusionForward forward(s, packed, in, parts);
    for (int64_t item = begin * s.block(); item < std::min(end * s.block(), s.U); item += s.block())
      forward.compute(item, std::min(s.block(), s.U - item), to + item * s.D);
  });
  return {out, kept};
}

// -> gradients of tokens [U, T, D] and of the weights. These are summed in groups of items that
// depend on the batch alone, so that they do not depend on the number of threads.
std::tuple<Tensor, std::vector<Tensor>> fusion_backward(
    const Tensor& gradient_, const Tensor& kept, const Tensor& tokens, const Tensor& mask,
    const Tensor& modality, const Tensor& noise, const std::vector<Tensor>& weights_,
    int64_t num_layers, int64_t heads, double scale, double dropout, bool bfloat16) {
  const Precision precision(bfloat16);
  const Tensor gradient = torch::stable::contiguous(gradient_);
  const std::vector<Tensor> all = contiguous({tokens, mask, modality, noise});
  const std::vector<Tensor> weights = contiguous(weights_);
  const FusionSizes s(all[0], weights, num_layers, heads, scale, dropout);
  const FusionInputs in = inputs_of(all);
  const FusionWeights packed(s, weights, true);
  // The backward only reads them.
  const FusionKept parts(s, const_cast<float*>(floats(kept)));
  Tensor of_tokens = torch::stable::empty_like(all[0]);
  std::vector<Tensor> of_weights;
  for (const Tensor& weight : weights) of_weights.push_back(torch::stable::empty_like(weight));
  const float* of_out = floats(gradient);
  float* for_tokens = mutable_floats(of_tokens);
  const int64_t blocks = (s.U + s.block() - 1) / s.block();
  const int64_t groups = std::clamp<int64_t>(blocks / kBlocksPerGroup, 1, kMaxFusionGroups);
  std::vector<std::unique_ptr<FusionSums>> sums(groups);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Precision of_thread(bfloat16);
    for (int64_t group = begin; group < end; ++group) {
      sums[group] = std::make_unique<FusionSums>(s, packed);
      FusionBackward backward(s, packed, in, parts, *sums[group]);
      const int64_t last = std::min(blocks * (group + 1) / groups * s.block(), s.U);
      for (int64_t item = blocks * group / groups * s.block(); item < last; item += s.block())
        backward.compute(of_out + item * s.D, item, std::min(s.block(), last - item),
                         for_tokens + item * s.T * s.D);
    }
  });
  for (int64_t group = 1; group < groups; ++group) sums[0]->add(*sums[group]);
  sums[0]->write(of_weights);
  return {of_tokens, of_weights};
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("fusion", TORCH_BOX(&recsys::fusion));
  library.impl("fusion_backward", TORCH_BOX(&recsys::fusion_backward));
}
