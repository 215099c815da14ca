// The Fusion-Q-Former, preset `modern`, for a block of items whose rows stay in cache.
//
// Its layers run over [queries; tokens + embedding of their modality]. Their outputs for the queries
// pass a norm and, flattened, a linear map; a linear map of each modality's mean token is added.
//
// Shapes: U items, T tokens of an item, Q queries, S = Q + T, M modalities, D dimension, L layers.
#pragma once

#include <memory>

#include "layer.h"

namespace recsys {

struct FusionSizes {
  int64_t U, T, Q, M, D;
  std::vector<LayerSizes> layers;

  FusionSizes(const Tensor& tokens, const std::vector<Tensor>& w, int64_t num_layers, int64_t heads,
              double scale, double dropout)
      : U(tokens.size(0)), T(tokens.size(1)), Q(w[0].size(0)), M(w[1].size(0)), D(tokens.size(2)) {
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      const int64_t units = w[2 + layer * kWeightsOfLayer + 12].size(0);
      const int64_t outputs = layer + 1 < num_layers ? Q + T : Q;
      layers.push_back({U, Q + T, outputs, D, units, heads, distance_of(D), distance_of(units),
                        static_cast<float>(scale), static_cast<float>(dropout)});
    }
  }

  int64_t block() const { return layers[0].block(); }
};

// Weights: queries [Q, D], embedding [M, D], those of the layers, norm, output, missing [M, D] (the
// vectors of missing modalities) and the map of the modalities.
struct FusionWeights {
  const float *queries, *embedding, *missing;
  std::vector<std::unique_ptr<LayerWeights>> layers;
  LayerNorm norm;
  LinearMap output, linear;

  FusionWeights(const FusionSizes& s, const std::vector<Tensor>& w, bool backward)
      : queries(floats(w[0])),
        embedding(floats(w[1])),
        missing(floats(w[w.size() - 3])),
        norm(s.D, floats(w[w.size() - 7]), floats(w[w.size() - 6])),
        output(s.Q * s.D, s.D, floats(w[w.size() - 5]), floats(w[w.size() - 4]), backward),
        linear(s.M * s.D, s.D, floats(w[w.size() - 2]), floats(w[w.size() - 1]), backward) {
    for (size_t layer = 0; layer < s.layers.size(); ++layer)
      layers.push_back(std::make_unique<LayerWeights>(s.layers[layer],
                                                      &w[2 + layer * kWeightsOfLayer], backward));
  }
};

struct FusionInputs {
  const float *tokens, *noise;  // noise of dropout; null without
  const bool* is_token;         // [U, T]
  const int64_t* modality;      // [T]
};

// What the backward reads: the input [U, S, D] of each layer and its `Kept`, then outputs [U, Q, D].
struct FusionKept {
  std::vector<float*> inputs;
  std::vector<Kept> layers;

  static int64_t size(const FusionSizes& s) {
    int64_t width = s.Q * s.D;
    for (const LayerSizes& of : s.layers) width += of.S * s.D + Kept::width(of);
    return s.U * width;
  }

  FusionKept(const FusionSizes& s, float* at) {
    for (const LayerSizes& of : s.layers) {
      inputs.push_back(at);
      layers.emplace_back(of, at + s.U * of.S * s.D);
      at += s.U * (of.S * s.D + Kept::width(of));
    }
    inputs.push_back(at);
  }
};

// The buffers of a block, and the steps that forward and backward share.
class FusionBlock {
 public:
  FusionBlock(const FusionSizes& sizes, const FusionWeights& weights, const FusionInputs& inputs,
              const FusionKept& of_forward)
      : s(sizes),
        w(weights),
        in(inputs),
        kept(of_forward),
        outputs(s.block() * s.Q * w.norm.distance),
        normed(s.block() * s.Q * w.norm.distance),
        flat(s.block() * w.output.x),
        means(s.block() * w.linear.x),
        counts(s.block() * s.M) {}

 protected:
  // Returns the noise of a layer's first (0) or second (1) dropout, from an item on.
  const float* noise_of(size_t layer, int64_t which, int64_t item) const {
    if (!in.noise) return nullptr;
    const float* at = in.noise;
    for (size_t before = 0; before < layer; ++before) at += 2 * s.U * s.layers[before].R * s.D;
    return at + (which * s.U + item) * s.layers[layer].R * s.D;
  }

  // Fills `flat` with the normed outputs of the last layer.
  void read_outputs(int64_t item, int64_t items) {
    const LayerSizes& last = s.layers.back();
    read_rows(last, kept.inputs.back() + item * s.Q * s.D, items * s.Q, outputs);
    w.norm.apply(outputs, items * s.Q, normed);
    for (int64_t row = 0; row < items * s.Q; ++row)
      std::memcpy(flat + row / s.Q * w.output.x + row % s.Q * s.D, normed + row * last.d,
                  s.D * sizeof(float));
  }

  // Fills `means` with each modality's mean token, or its vector where an item lacks it.
  void read_means(int64_t item, int64_t items) {
    std::memset(means, 0, items * w.linear.x * sizeof(float));
    std::memset(counts, 0, items * s.M * sizeof(float));
    for (int64_t u = 0; u < items; ++u) {
      float* of_item = means + u * w.linear.x;
      for (int64_t t = 0; t < s.T; ++t) {
        if (!in.is_token[(item + u) * s.T + t]) continue;
        counts[u * s.M + in.modality[t]] += 1;
        const float* token = in.tokens + ((item + u) * s.T + t) * s.D;
        float* mean = of_item + in.modality[t] * s.D;
        for (int64_t k = 0; k < s.D; ++k) mean[k] += token[k];
      }
      for (int64_t m = 0; m < s.M; ++m) {
        const float count = counts[u * s.M + m];
        for (int64_t k = 0; k < s.D; ++k) {
          float& mean = of_item[m * s.D + k];
          mean = count > 0 ? mean / count : w.missing[m * s.D + k];
        }
      }
    }
  }

  const FusionSizes& s;
  const FusionWeights& w;
  const FusionInputs& in;
  const FusionKept& kept;
  Floats outputs, normed, flat, means, counts;
};

class FusionForward : public FusionBlock {
 public:
  FusionForward(const FusionSizes& sizes, const FusionWeights& weights, const FusionInputs& inputs,
                const FusionKept& of_forward)
      : FusionBlock(sizes, weights, inputs, of_forward),
        is_key(new bool[s.block() * (s.Q + s.T)]),
        fused(s.block() * w.output.y),
        of_means(s.block() * w.output.y) {
    for (size_t layer = 0; layer < s.layers.size(); ++layer)
      layers.push_back(std::make_unique<LayerForward>(s.layers[layer], *w.layers[layer]));
  }

  // Writes the vectors [items, D] of a block of items.
  void compute(int64_t item, int64_t items, float* out) {
    join(item, items);
    for (size_t layer = 0; layer < s.layers.size(); ++layer) {
      const LayerSizes& of = s.layers[layer];
      layers[layer]->compute(kept.inputs[layer] + item * of.S * s.D, is_key.get(),
                             noise_of(layer, 0, item), noise_of(layer, 1, item), items,
                             kept.layers[layer].from(of, item),
                             kept.inputs[layer + 1] + item * of.R * s.D);
    }
    read_outputs(item, items);
    read_means(item, items);
    w.output.apply(flat, items, fused);
    w.linear.apply(means, items, of_means);
    for (int64_t u = 0; u < items; ++u)
      for (int64_t k = 0; k < s.D; ++k)
        out[u * s.D + k] = fused[u * w.output.y + k] + of_means[u * w.output.y + k];
  }

 private:
  // Fills the first layer's input with queries and embedded tokens; queries are never masked.
  void join(int64_t item, int64_t items) {
    const int64_t S = s.Q + s.T;
    for (int64_t u = 0; u < items; ++u) {
      float* row = kept.inputs[0] + (item + u) * S * s.D;
      std::memcpy(row, w.queries, s.Q * s.D * sizeof(float));
      for (int64_t q = 0; q < s.Q; ++q) is_key[u * S + q] = true;
      for (int64_t t = 0; t < s.T; ++t) {
        const float* token = in.tokens + ((item + u) * s.T + t) * s.D;
        const float* embedding = w.embedding + in.modality[t] * s.D;
        for (int64_t k = 0; k < s.D; ++k) row[(s.Q + t) * s.D + k] = token[k] + embedding[k];
        is_key[u * S + s.Q + t] = in.is_token[(item + u) * s.T + t];
      }
    }
  }

  std::vector<std::unique_ptr<LayerForward>> layers;
  std::unique_ptr<bool[]> is_key;
  Floats fused, of_means;
};

}  // namespace recsys
