// Operators recsys::fusion and its backward; see fusion.h for mathematics and letters.
#include "fusion_backward.h"

namespace recsys {
namespace {

constexpr int64_t kBlocksPerGroup = 8, kMaxFusionGroups = 16;
constexpr int64_t kWeightsBefore = 2, kWeightsAfter = 7;  // those of the layers

void require_layers(const Operator& op, int64_t layers, int64_t num_weights) {
  const int64_t others = kWeightsBefore + kWeightsAfter, of_layers = num_weights - others;
  op.require(layers > 0, "layers is ", layers, ", but must be at least 1");
  op.require(of_layers % kWeightsOfLayer == 0 && of_layers / kWeightsOfLayer == layers,
             "weights has ", num_weights, " tensors, but must have ", others, ", and ",
             kWeightsOfLayer, " for each of ", layers, " layers");
}

// Returns the weights, in the order of `FusionWeights`.
std::vector<Tensor> checked_weights(const Operator& op, const std::vector<Tensor>& w, int64_t layers,
                                    int64_t D) {
  require_layers(op, layers, w.size());
  std::vector<Tensor> all;
  const auto add = [&](Operator::Shape shape) {
    const size_t at = all.size();
    all.push_back(op.float32("weights[" + std::to_string(at) + "]", w[at], shape));
  };
  add({kAny, D}), add({kAny, D});
  const int64_t Q = all[0].size(0), M = all[1].size(0);
  op.require(Q > 0, "weights[0] is ", described(all[0]), ", but must have one query or more");
  for (int64_t layer = 0; layer < layers; ++layer) {
    add({D}), add({D});
    for (int map = 0; map < 4; ++map) add({D, D}), add({D});
    add({D}), add({D});
    add({kAny, D});
    const int64_t units = all.back().size(0);
    add({units}), add({D, units}), add({D});
  }
  add({D}), add({D}), add({D, Q * D}), add({D}), add({M, D}), add({D, M * D}), add({D});
  return all;
}

// Returns how many random numbers the dropouts of all layers read.
int64_t num_random(const FusionSizes& s) {
  int64_t count = 0;
  for (const LayerSizes& layer : s.layers) count += 2 * s.U * layer.R * s.D;
  return count;
}

// The inputs, whose types, shapes and places in memory are as the kernel reads them.
struct CheckedFusion {
  Tensor tokens, mask, modality, noise;
  std::vector<Tensor> weights;
  FusionSizes s;

  CheckedFusion(const Operator& op, const Tensor& tokens_, const Tensor& mask_,
                const Tensor& modality_, const Tensor& noise_, const std::vector<Tensor>& weights_,
                int64_t layers, int64_t heads, double scale, double dropout)
      : tokens(op.float32("tokens", tokens_, {kAny, kAny, kAny})),
        mask(op.boolean("mask", mask_, {tokens.size(0), tokens.size(1)})),
        modality(op.int64("modality", modality_, {tokens.size(1)})),
        weights(checked_weights(op, weights_, layers, tokens.size(2))),
        s(tokens, weights, layers, heads, scale, dropout) {
    op.require(heads > 0 && s.D % heads == 0, "heads is ", heads,
               ", but must be at least 1 and divide ", s.D, ", the width of the vectors");
    op.require(std::isfinite(scale), "scale is ", scale, ", but must be a finite number");
    op.require(0 <= dropout && dropout <= 1, "dropout is ", dropout, ", but must be in [0, 1]");
    noise = op.float32("noise", noise_, {dropout > 0 ? num_random(s) : 0});
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t at = integers(modality)[t];
      op.require(0 <= at && at < s.M, "modality is out of range: modality[", t, "] is ", at,
                 ", but must be in [0, ", s.M, "), the rows of weights[1]");
    }
  }

  FusionInputs inputs() const {
    return {floats(tokens), noise.numel() ? floats(noise) : nullptr, flags(mask),
            integers(modality)};
  }
};

// -> fused [U, D] and what the backward reads
std::tuple<Tensor, Tensor> fusion(const Tensor& tokens, const Tensor& mask, const Tensor& modality,
                                  const Tensor& noise, const std::vector<Tensor>& weights,
                                  int64_t num_layers, int64_t heads, double scale, double dropout,
                                  bool bfloat16) {
  const Precision precision(bfloat16);
  const CheckedFusion all(Operator("fusion"), tokens, mask, modality, noise, weights, num_layers,
                          heads, scale, dropout);
  const FusionSizes& s = all.s;
  const FusionInputs in = all.inputs();
  const FusionWeights packed(s, all.weights, false);
  Tensor out = torch::stable::new_empty(all.tokens, {s.U, s.D});
  Tensor kept = torch::stable::new_empty(all.tokens, {FusionKept::size(s)});
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
    const Tensor& gradient_, const Tensor& kept_, const Tensor& tokens, const Tensor& mask,
    const Tensor& modality, const Tensor& noise, const std::vector<Tensor>& weights,
    int64_t num_layers, int64_t heads, double scale, double dropout, bool bfloat16) {
  const Precision precision(bfloat16);
  const Operator op("fusion_backward");
  const CheckedFusion all(op, tokens, mask, modality, noise, weights, num_layers, heads, scale,
                          dropout);
  const FusionSizes& s = all.s;
  const FusionInputs in = all.inputs();
  const Tensor gradient = op.float32("gradient", gradient_, {s.U, s.D});
  const Tensor kept = op.float32("kept", kept_, {FusionKept::size(s)});
  const FusionWeights packed(s, all.weights, true);
  // The backward only reads them.
  const FusionKept parts(s, const_cast<float*>(floats(kept)));
  Tensor of_tokens = torch::stable::empty_like(all.tokens);
  std::vector<Tensor> of_weights;
  for (const Tensor& weight : all.weights) of_weights.push_back(torch::stable::empty_like(weight));
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
