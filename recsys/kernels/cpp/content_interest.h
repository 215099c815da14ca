// Sizes and the work of one row of content interest, forward and backward.
//
// Shapes: B rows, U unique items, N history items, D dimension, S spaces with similarities, P
// parallel lists, G = 1 + 2 P groups of history items, F = 2 G + P features of a space, T items of
// a row. An item's row holds its vector in each space, one after the other.
#pragma once

#include "functions.h"
#include "product.h"
#include "tensors.h"

namespace recsys {

constexpr float kSharpness = 10;          // of votes, softmax(cosine / 0.1)
constexpr float kLowerThanCosine = -2;    // the maximum of nothing
constexpr float kShortestVector = 1e-12;  // shorter ones are divided by this

struct InterestSizes {
  int64_t B, U, N, D, S, P;
  int64_t stride;  // distance of items
  int64_t d;       // distance of vectors of D floats in buffers
  int64_t G() const { return 1 + 2 * P; }
  int64_t F() const { return 2 * G() + P; }
};

// Fills out [T] with the dot products of a padded vector and vectors of D floats.
inline void dots(const float* padded, const float* const* vectors, int64_t at, int64_t count,
                 int64_t D, float* out) {
  for (int64_t t = 0; t < count; ++t) {
    const float* vector = vectors[t] + at;
    Vec total{};
    int64_t k = 0;
    for (; k + kLanes <= D; k += kLanes) total += load(padded + k) * load(vector + k);
    if (k < D) total += load(padded + k) * load_first(vector + k, D - k);
    out[t] = sum(total);
  }
}

// Writes the sum of factors [T] times vectors of D floats to a padded vector.
inline void weighted_sum(const float* factors, const float* const* vectors, int64_t at,
                         int64_t count, int64_t D, float* out) {
  constexpr int kVectors = 4;
  int64_t k = 0;
  for (; k + kVectors * kLanes <= D; k += kVectors * kLanes) {
    Vec totals[kVectors] = {};
    for (int64_t t = 0; t < count; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        totals[v] += splat(factors[t]) * load(vectors[t] + at + k + v * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + k + v * kLanes, totals[v]);
  }
  for (; k < D; k += kLanes) {
    Vec total{};
    for (int64_t t = 0; t < count; ++t)
      total += splat(factors[t]) * load_first(vectors[t] + at + k, D - k);
    store(out + k, total);
  }
}

// The groups of one row's items in one space: numbers of items, sums, maxima and votes.
class Groups {
 public:
  explicit Groups(const InterestSizes& sizes)
      : s(sizes), members(s.G()), sums(s.G()), maxima(s.G()), ties(s.G()), votes(s.P) {}

  // Reads the cosines [T] and parallel lists [T, P] of a row; shares [T] gets exp(cosine / 0.1).
  void read(const float* cosine, const float* parallel, int64_t count, float* shares) {
    for (int64_t g = 0; g < s.G(); ++g) members[g] = sums[g] = 0, maxima[g] = kLowerThanCosine;
    for (int64_t p = 0; p < s.P; ++p) votes[p] = 0;
    const float highest = *std::max_element(cosine, cosine + count);
    total = 0;
    for (int64_t t = 0; t < count; ++t) {
      add(0, cosine[t]);
      total += shares[t] = std::exp(kSharpness * (cosine[t] - highest));
      for (int64_t p = 0; p < s.P; ++p) {
        const float value = parallel[t * s.P + p];
        add(group(p, value), cosine[t]);
        votes[p] += shares[t] * value;
      }
    }
  }

  // Writes the features [F] of the groups that were read.
  void write(float* features) const {
    for (int64_t g = 0; g < s.G(); ++g) {
      features[g] = members[g] > 0 ? sums[g] / members[g] : 0;
      features[s.G() + g] = members[g] > 0 ? maxima[g] : 0;
    }
    for (int64_t p = 0; p < s.P; ++p) features[2 * s.G() + p] = votes[p] / total;
  }

  // Turns the gradient of the features [F] into that of the cosines [T]. Equal maxima share theirs.
  void backward(const float* gradient, const float* cosine, const float* parallel, int64_t count,
                float* shares, float* of_cosine) {
    if (!count) return;
    read(cosine, parallel, count, shares);
    for (int64_t g = 0; g < s.G(); ++g) ties[g] = 0;
    const float *of_votes = gradient + 2 * s.G();
    float mean = 0;
    for (int64_t t = 0; t < count; ++t) {
      ties[0] += cosine[t] == maxima[0];
      float of_share = 0;
      for (int64_t p = 0; p < s.P; ++p) {
        const float value = parallel[t * s.P + p];
        ties[group(p, value)] += cosine[t] == maxima[group(p, value)];
        of_share += of_votes[p] * value;
      }
      of_cosine[t] = of_share;
      mean += shares[t] / total * of_share;
    }
    for (int64_t t = 0; t < count; ++t) {
      float of_this = kSharpness * (shares[t] / total) * (of_cosine[t] - mean);
      of_this += of_group(0, gradient, cosine[t]);
      for (int64_t p = 0; p < s.P; ++p)
        of_this += of_group(group(p, parallel[t * s.P + p]), gradient, cosine[t]);
      of_cosine[t] = of_this;
    }
  }

 private:
  int64_t group(int64_t list, float value) const {
    return value > 0.5f ? 1 + list : 1 + s.P + list;
  }

  void add(int64_t g, float cosine) {
    members[g] += 1;
    sums[g] += cosine;
    maxima[g] = std::max(maxima[g], cosine);
  }

  float of_group(int64_t g, const float* gradient, float cosine) const {
    const float of_mean = gradient[g] / members[g];
    return cosine == maxima[g] ? of_mean + gradient[s.G() + g] / ties[g] : of_mean;
  }

  const InterestSizes& s;
  Floats members, sums, maxima, ties, votes;
  float total = 0;
};

}  // namespace recsys
