// Operators recsys::few_token_attention and its backward: multi-head attention among the few tokens
// of each item, one item after the other in cache.
//
// Shapes: U items, Q queries, T tokens, H heads, D dimension.
#include "few_tokens.h"
#include "tensors.h"

namespace recsys {
namespace {

constexpr int64_t kItemsPerTask = 64;

FewTokens sizes_of(const Tensor& query, const Tensor& key, int64_t heads, double scale) {
  const int64_t D = query.size(2);
  return {query.size(1), key.size(1), heads, D / heads, D, static_cast<float>(scale)};
}

// -> attended [U, Q, D] and weights [U, Q, H, T]
std::tuple<Tensor, Tensor> few_token_attention(const Tensor& query_, const Tensor& key_,
                                               const Tensor& value_, const Tensor& mask_,
                                               int64_t heads, double scale) {
  const auto of = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor query = of(query_), key = of(key_), value = of(value_), mask = of(mask_);
  const FewTokens s = sizes_of(query, key, heads, scale);
  const int64_t U = query.size(0), of_item = s.T * s.distance;
  require_shape(key, {U, s.T, s.distance}, "key");
  require_shape(value, {U, s.T, s.distance}, "value");
  require_shape(mask, {U, s.T}, "mask");
  Tensor out = torch::stable::new_zeros(query, {U, s.Q, s.distance});
  Tensor weights = torch::stable::new_empty(query, {U, s.Q, s.H, s.T});
  const float *of_query = floats(query), *of_key = floats(key), *of_value = floats(value);
  const bool* is_token = static_cast<const bool*>(mask.const_data_ptr());
  float *to = mutable_floats(out), *shares = mutable_floats(weights);
  torch::stable::parallel_for(0, U, kItemsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      float* own = shares + u * s.Q * s.H * s.T;
      fill_shares(s, of_query + u * s.Q * s.distance, of_key + u * of_item, is_token + u * s.T, own);
      add_attended(s, own, of_value + u * of_item, to + u * s.Q * s.distance);
    }
  });
  return {out, weights};
}

// -> gradients of query [U, Q, D], key [U, T, D] and value [U, T, D]
std::tuple<Tensor, Tensor, Tensor> few_token_attention_backward(
    const Tensor& gradient_, const Tensor& weights, const Tensor& query_, const Tensor& key_,
    const Tensor& value_, int64_t heads, double scale) {
  const auto of = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor gradient = of(gradient_), query = of(query_), key = of(key_), value = of(value_);
  const FewTokens s = sizes_of(query, key, heads, scale);
  const int64_t U = query.size(0);
  const auto zeros = [&](int64_t tokens) {
    return torch::stable::new_zeros(query, {U, tokens, s.distance});
  };
  Tensor to_query = zeros(s.Q), to_key = zeros(s.T), to_value = zeros(s.T);
  const float *of_query = floats(query), *of_key = floats(key), *of_value = floats(value);
  const float *of_out = floats(gradient), *shares = floats(weights);
  float *for_query = mutable_floats(to_query), *for_key = mutable_floats(to_key);
  float* for_value = mutable_floats(to_value);
  torch::stable::parallel_for(0, U, kItemsPerTask, [&](int64_t first, int64_t last) {
    std::vector<float> work(s.T);
    for (int64_t u = first; u < last; ++u) {
      const int64_t at = u * s.Q * s.distance, token = u * s.T * s.distance;
      attend_backward(s, of_out + at, shares + u * s.Q * s.H * s.T, of_query + at, of_key + token,
                      of_value + token, work.data(), for_query + at, for_key + token,
                      for_value + token);
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
