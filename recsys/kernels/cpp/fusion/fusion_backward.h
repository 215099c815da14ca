// The backward pass of the Fusion-Q-Former for a block of items in cache.
//
// Shapes: as in fusion.h.
#pragma once

#include "fusion.h"
#include "layer_backward.h"

namespace recsys {

// Gradients of the weights, summed over a group of items.
struct FusionSums {
  Floats queries, embedding, missing;
  std::vector<std::unique_ptr<LayerSums>> layers;
  NormSums norm;
  LinearSums output, linear;

  FusionSums(const FusionSizes& s, const FusionWeights& w)
      : queries(s.Q * s.D),
        embedding(s.M * s.D),
        missing(s.M * s.D),
        norm(w.norm),
        output(w.output),
        linear(w.linear) {
    for (const auto& layer : w.layers) layers.push_back(std::make_unique<LayerSums>(*layer));
  }

  void add(const FusionSums& other) {
    for (auto part : {&FusionSums::queries, &FusionSums::embedding, &FusionSums::missing})
      (this->*part).add(other.*part);
    for (size_t layer = 0; layer < layers.size(); ++layer) layers[layer]->add(*other.layers[layer]);
    norm.add(other.norm);
    output.add(other.output);
    linear.add(other.linear);
  }

  // Writes the gradients in the order of the weights.
  void write(const std::vector<Tensor>& to) const {
    const auto copy = [](const Floats& from, const Tensor& tensor) {
      std::memcpy(mutable_floats(tensor), from, from.size() * sizeof(float));
    };
    const size_t end = to.size();
    copy(queries, to[0]);
    copy(embedding, to[1]);
    for (size_t layer = 0; layer < layers.size(); ++layer)
      layers[layer]->write(&to[2 + layer * kWeightsOfLayer]);
    norm.write(mutable_floats(to[end - 7]), mutable_floats(to[end - 6]));
    output.write(mutable_floats(to[end - 5]), mutable_floats(to[end - 4]));
    copy(missing, to[end - 3]);
    linear.write(mutable_floats(to[end - 2]), mutable_floats(to[end - 1]));
  }
};

class FusionBackward : public FusionBlock {
 public:
  FusionBackward(const FusionSizes& sizes, const FusionWeights& weights, const FusionInputs& inputs,
                 const FusionKept& of_forward, FusionSums& sums)
      : FusionBlock(sizes, weights, inputs, of_forward),
        to(sums),
        of_fused(s.block() * w.output.y),
        of_flat(s.block() * w.output.x),
        of_normed(s.block() * s.Q * w.norm.distance),
        of_outputs(s.block() * s.Q * w.norm.distance),
        of_means(s.block() * w.linear.x),
        of_layer(s.block() * (s.Q + s.T) * s.D),
        of_input(s.block() * (s.Q + s.T) * s.D) {
    for (size_t layer = 0; layer < s.layers.size(); ++layer)
      layers.push_back(
          std::make_unique<LayerBackward>(s.layers[layer], *w.layers[layer], *to.layers[layer]));
  }

  // Adds the gradients of weights to the sums, and writes those of the tokens [items, T, D].
  void compute(const float* gradient, int64_t item, int64_t items, float* of_tokens) {
    read_rows(s.layers.back(), gradient, items, of_fused);
    from_outputs(item, items);
    for (size_t layer = s.layers.size(); layer-- > 0;) {
      const LayerSizes& of = s.layers[layer];
      layers[layer]->compute(of_layer, kept.inputs[layer] + item * of.S * s.D,
                             noise_of(layer, 0, item), noise_of(layer, 1, item), items,
                             kept.layers[layer].from(of, item), of_input);
      std::memcpy(of_layer, of_input, items * of.S * s.D * sizeof(float));
    }
    part(items, of_tokens);
    from_means(item, items, of_tokens);
  }

 private:
  // Fills `of_layer` with the gradient of the last layer's outputs [items, Q, D].
  void from_outputs(int64_t item, int64_t items) {
    const LayerSizes& last = s.layers.back();
    read_outputs(item, items);
    to.output.add(flat, of_fused, items);
    std::memset(of_flat, 0, items * w.output.x * sizeof(float));
    w.output.add_back(of_fused, items, of_flat);
    for (int64_t row = 0; row < items * s.Q; ++row)
      std::memcpy(of_normed + row * last.d, of_flat + row / s.Q * w.output.x + row % s.Q * s.D,
                  s.D * sizeof(float));
    std::memset(of_outputs, 0, items * s.Q * last.d * sizeof(float));
    to.norm.add(outputs, of_normed, items * s.Q, of_outputs);
    write_rows(last, of_outputs, items * s.Q, of_layer);
  }

  // Parts the gradient of the first layer's input: of queries, of embeddings and of tokens.
  void part(int64_t items, float* of_tokens) {
    const int64_t S = s.Q + s.T;
    for (int64_t u = 0; u < items; ++u) {
      const float* row = of_layer + u * S * s.D;
      for (int64_t k = 0; k < s.Q * s.D; ++k) to.queries[k] += row[k];
      for (int64_t t = 0; t < s.T; ++t) {
        const float* of_token = row + (s.Q + t) * s.D;
        float* embedding = to.embedding + in.modality[t] * s.D;
        for (int64_t k = 0; k < s.D; ++k) embedding[k] += of_token[k];
      }
      std::memcpy(of_tokens + u * s.T * s.D, row + s.Q * s.D, s.T * s.D * sizeof(float));
    }
  }

  // Adds the gradients through the mean tokens.
  void from_means(int64_t item, int64_t items, float* of_tokens) {
    read_means(item, items);
    to.linear.add(means, of_fused, items);
    std::memset(of_means, 0, items * w.linear.x * sizeof(float));
    w.linear.add_back(of_fused, items, of_means);
    for (int64_t u = 0; u < items; ++u) {
      const float* of_item = of_means + u * w.linear.x;
      for (int64_t t = 0; t < s.T; ++t) {
        if (!in.is_token[(item + u) * s.T + t]) continue;
        const int64_t m = in.modality[t];
        float* of_token = of_tokens + (u * s.T + t) * s.D;
        for (int64_t k = 0; k < s.D; ++k) of_token[k] += of_item[m * s.D + k] / counts[u * s.M + m];
      }
      for (int64_t m = 0; m < s.M; ++m)
        if (counts[u * s.M + m] == 0)
          for (int64_t k = 0; k < s.D; ++k) to.missing[m * s.D + k] += of_item[m * s.D + k];
    }
  }

  FusionSums& to;
  Floats of_fused, of_flat, of_normed, of_outputs, of_means, of_layer, of_input;
  std::vector<std::unique_ptr<LayerBackward>> layers;
};

}  // namespace recsys
