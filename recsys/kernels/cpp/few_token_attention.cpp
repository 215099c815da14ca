// Operators recsys::few_token_attention and its backward: multi-head attention among the few tokens
// of each item, one item after the other in cache.
//
// Shapes: U items, Q queries, T tokens, H heads, D dimension.
#include "few_tokens.h"
#include "tensors.h"

namespace recsys {
namespace {

constexpr int64_t kItemsPerTask = 64;

FewTokens sizes_of(const Operator& op, const Tensor& query, const Tensor& key, int64_t heads,
                   double scale) {
  const int64_t D = query.size(2);
  require_heads(op, heads, D, scale);
  return {query.size(1), key.size(1), heads, D / heads, D, static_cast<float>(scale)};
}

// Requires a token of each item: a softmax over none is NaN.
void require_tokens(const Operator& op, const bool* is_token, int64_t items, int64_t tokens) {
  for (int64_t item = 0; item < items; ++item)
    op.require(std::memchr(is_token + item * tokens, 1, tokens), "mask keeps no token of item ",
               item, ", but must keep at least one");
}

// -> attended [U, Q, D] and weights [U, Q, H, T]
std::tuple<Tensor, Tensor> few_token_attention(const Tensor& query_, const Tensor& key_,
                                               const Tensor& value_, const Tensor& mask_,
                                               int64_t heads, double scale) {
  const Operator op("few_token_attention");
  const Tensor query = op.float32("query", query_, {kAny, kAny, kAny});
  const int64_t U = query.size(0);
  const Tensor key = op.float32("key", key_, {U, kAny, query.size(2)});
  const Tensor value = op.float32("value", value_, {U, key.size(1), query.size(2)});
  const Tensor mask = op.boolean("mask", mask_, {U, key.size(1)});
  const FewTokens s = sizes_of(op, query, key, heads, scale);
  const int64_t of_item = s.T * s.distance;
  Tensor out = torch::stable::new_zeros(query, {U, s.Q, s.distance});
  Tensor weights = torch::stable::new_empty(query, {U, s.Q, s.H, s.T});
  const float *of_query = floats(query), *of_key = floats(key), *of_value = floats(value);
  const bool* is_token = flags(mask);
  require_tokens(op, is_token, U, s.T);
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
    const Tensor& gradient_, const Tensor& weights_, const Tensor& query_, const Tensor& key_,
    const Tensor& value_, int64_t heads, double scale) {
  const Operator op("few_token_attention_backward");
  const Tensor query = op.float32("query", query_, {kAny, kAny, kAny});
  const int64_t U = query.size(0);
  const Tensor key = op.float32("key", key_, {U, kAny, query.size(2)});
  const Tensor value = op.float32("value", value_, {U, key.size(1), query.size(2)});
  const FewTokens s = sizes_of(op, query, key, heads, scale);
  const Tensor gradient = op.float32("gradient", gradient_, {U, s.Q, s.distance});
  const Tensor weights = op.float32("weights", weights_, {U, s.Q, s.H, s.T});
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
