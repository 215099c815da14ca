// Multi-head attention among the few tokens of one item, forward and backward.
//
// Shapes: Q queries, T tokens, H heads, W width of a head; tokens have a distance in floats.
#pragma once

#include "functions.h"
#include "tensors.h"

namespace recsys {

struct FewTokens {
  int64_t Q, T, H, W;
  int64_t distance;  // of queries, and of tokens
  float scale;
};

inline float dot(const float* a, const float* b, int64_t width) {
  Vec total{};
  for (int64_t k = 0; k < width; k += kLanes)
    total += load_first(a + k, width - k) * load_first(b + k, width - k);
  return sum(total);
}

inline void add_scaled(float* to, float factor, const float* from, int64_t width) {
  const Vec by = splat(factor);
  for (int64_t k = 0; k < width; k += kLanes) {
    const Vec value = load_first(to + k, width - k) + by * load_first(from + k, width - k);
    std::memcpy(to + k, &value, std::min<int64_t>(kLanes, width - k) * sizeof(float));
  }
}

// Adds the sums of values weighted by shares [Q, H, T] to out.
inline void add_attended(const FewTokens& s, const float* shares, const float* value, float* out) {
  for (int64_t q = 0; q < s.Q; ++q)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t t = 0; t < s.T; ++t)
        add_scaled(out + q * s.distance + h * s.W, shares[(q * s.H + h) * s.T + t],
                   value + t * s.distance + h * s.W, s.W);
}

// Fills shares [Q, H, T] with the softmax of the scores of the tokens that the mask keeps.
inline void fill_shares(const FewTokens& s, const float* query, const float* key,
                        const bool* is_token, float* shares) {
  for (int64_t q = 0; q < s.Q; ++q)
    for (int64_t h = 0; h < s.H; ++h) {
      const float* own = query + q * s.distance + h * s.W;
      float* share = shares + (q * s.H + h) * s.T;
      for (int64_t t = 0; t < s.T; ++t) {
        const float* of_token = key + t * s.distance + h * s.W;
        share[t] = is_token[t] ? dot(own, of_token, s.W) * s.scale : -INFINITY;
      }
      softmax(share, s.T);
    }
}

// Adds the gradients of query, key and value, given that of the attended values; `work` [T].
inline void attend_backward(const FewTokens& s, const float* gradient, const float* shares,
                            const float* query, const float* key, const float* value, float* work,
                            float* of_query, float* of_key, float* of_value) {
  for (int64_t q = 0; q < s.Q; ++q)
    for (int64_t h = 0; h < s.H; ++h) {
      const int64_t at = q * s.distance + h * s.W;
      const float* share = shares + (q * s.H + h) * s.T;
      float mean = 0;
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t token = t * s.distance + h * s.W;
        work[t] = dot(gradient + at, value + token, s.W);
        mean += share[t] * work[t];
        add_scaled(of_value + token, share[t], gradient + at, s.W);
      }
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t token = t * s.distance + h * s.W;
        const float of_score = share[t] * (work[t] - mean) * s.scale;
        add_scaled(of_query + at, of_score, key + token, s.W);
        add_scaled(of_key + token, of_score, query + at, s.W);
      }
    }
}

}  // namespace recsys
