// Operators recsys::few_token_attention and its backward: multi-head attention among the few tokens
// of each item, one item after the other in cache.
//
// Shapes: U items, Q queries, T tokens, H heads, W width of a head, D = H * W.
#include <algorithm>
#include <cmath>

#include "tensors.h"
#include "vectors.h"

namespace recsys {
namespace {

constexpr int64_t kItemsPerTask = 64;

struct AttentionSizes {
  int64_t U, Q, T, H, W;
  int64_t D() const { return H * W; }
};

inline Vec load_up_to(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  float lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(float));
  return load(lanes);
}

inline float dot(const float* a, const float* b, int64_t width) {
  Vec total{};
  for (int64_t k = 0; k < width; k += kLanes)
    total += load_up_to(a + k, width - k) * load_up_to(b + k, width - k);
  return sum(total);
}

inline void add_scaled(float* to, float factor, const float* from, int64_t width) {
  const Vec by = splat(factor);
  for (int64_t k = 0; k < width; k += kLanes) {
    const Vec value = load_up_to(to + k, width - k) + by * load_up_to(from + k, width - k);
    std::memcpy(to + k, &value, std::min<int64_t>(kLanes, width - k) * sizeof(float));
  }
}

AttentionSizes sizes_of(const Tensor& query, const Tensor& key, int64_t heads) {
  return {query.size(0), query.size(1), key.size(1), heads, query.size(2) / heads};
}

// -> attended [U, Q, D] and weights [U, Q, H, T]
std::tuple<Tensor, Tensor> few_token_attention(const Tensor& query_, const Tensor& key_,
                                               const Tensor& value_, const Tensor& mask_,
                                               int64_t heads, double scale_) {
  const auto of = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor query = of(query_), key = of(key_), value = of(value_), mask = of(mask_);
  const AttentionSizes s = sizes_of(query, key, heads);
  Tensor out = torch::stable::new_zeros(query, {s.U, s.Q, s.D()});
  Tensor weights = torch::stable::new_empty(query, {s.U, s.Q, s.H, s.T});
  const float *of_query = floats(query), *of_key = floats(key), *of_value = floats(value);
  const bool* is_token = static_cast<const bool*>(mask.const_data_ptr());
  float *to = mutable_floats(out), *shares = mutable_floats(weights);
  const float scale = scale_;
  torch::stable::parallel_for(0, s.U, kItemsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t h = 0; h < s.H; ++h) {
          const int64_t at = (u * s.Q + q) * s.D() + h * s.W;
          float* share = shares + ((u * s.Q + q) * s.H + h) * s.T;
          float highest = -INFINITY, total = 0;
          for (int64_t t = 0; t < s.T; ++t) {
            const float* of_token = of_key + (u * s.T + t) * s.D() + h * s.W;
            share[t] = is_token[u * s.T + t] ? dot(of_query + at, of_token, s.W) * scale : -INFINITY;
            highest = std::max(highest, share[t]);
          }
          for (int64_t t = 0; t < s.T; ++t) total += share[t] = std::exp(share[t] - highest);
          for (int64_t t = 0; t < s.T; ++t) {
            share[t] /= total;
            add_scaled(to + at, share[t], of_value + (u * s.T + t) * s.D() + h * s.W, s.W);
          }
        }
  });
  return {out, weights};
}

// -> gradients of query [U, Q, D], key [U, T, D] and value [U, T, D]
std::tuple<Tensor, Tensor, Tensor> few_token_attention_backward(
    const Tensor& gradient_, const Tensor& weights, const Tensor& query_, const Tensor& key_,
    const Tensor& value_, int64_t heads, double scale_) {
  const auto of = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor gradient = of(gradient_), query = of(query_), key = of(key_), value = of(value_);
  const AttentionSizes s = sizes_of(query, key, heads);
  const auto zeros = [&](int64_t tokens) {
    return torch::stable::new_zeros(query, {s.U, tokens, s.D()});
  };
  Tensor to_query = zeros(s.Q), to_key = zeros(s.T), to_value = zeros(s.T);
  const float *of_query = floats(query), *of_key = floats(key), *of_value = floats(value);
  const float *of_out = floats(gradient), *shares = floats(weights), scale = scale_;
  float *for_query = mutable_floats(to_query), *for_key = mutable_floats(to_key);
  float* for_value = mutable_floats(to_value);
  torch::stable::parallel_for(0, s.U, kItemsPerTask, [&](int64_t first, int64_t last) {
    std::vector<float> of_share(s.T);
    for (int64_t u = first; u < last; ++u)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t h = 0; h < s.H; ++h) {
          const int64_t at = (u * s.Q + q) * s.D() + h * s.W;
          const float* share = shares + ((u * s.Q + q) * s.H + h) * s.T;
          float mean = 0;
          for (int64_t t = 0; t < s.T; ++t) {
            const int64_t token = (u * s.T + t) * s.D() + h * s.W;
            of_share[t] = dot(of_out + at, of_value + token, s.W);
            mean += share[t] * of_share[t];
            add_scaled(for_value + token, share[t], of_out + at, s.W);
          }
          for (int64_t t = 0; t < s.T; ++t) {
            const int64_t token = (u * s.T + t) * s.D() + h * s.W;
            const float of_score = share[t] * (of_share[t] - mean) * scale;
            add_scaled(for_query + at, of_score, of_key + token, s.W);
            add_scaled(for_key + token, of_score, of_query + at, s.W);
          }
        }
  });
  return {to_query, to_key, to_value};
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("few_token_attention", TORCH_BOX(&recsys::few_token_attention));
  library.impl("few_token_attention_backward", TORCH_BOX(&recsys::few_token_attention_backward));
}
