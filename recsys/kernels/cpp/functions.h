// Functions of single numbers, for all lanes of a vector, and softmax.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace recsys {

inline Vec select(Mask chosen, Vec yes, Vec no) {
  return from_bits((bits_of(yes) & chosen) | (bits_of(no) & ~chosen));
}

// Returns exp(x) for x <= 0, to the last bits of a float; NaN stays NaN. 2^n exp(r) with
// |r| <= log(2) / 2 and the polynomial of the Cephes library.
inline Vec exp_of_negative(Vec x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec shifted = x * splat(1.44269504f) + splat(kRound), n = shifted - splat(kRound);
  const Vec r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f})
    p = p * r + splat(c);
  p = p * r * r + r + splat(1);
  const Vec power = from_bits((bits_of(shifted) + 127) << 23);
  return select(x < splat(-87.3f), Vec{}, p * power);
}

inline void softmax(float* values, int64_t count) {
  const float highest = *std::max_element(values, values + count);
  Vec total{};
  for (int64_t t = 0; t < count; t += kLanes) {
    const int64_t left = std::min<int64_t>(count - t, kLanes);
    Vec lanes = splat(highest);
    std::memcpy(&lanes, values + t, left * sizeof(float));
    lanes = exp_of_negative(lanes - splat(highest));
    std::memcpy(values + t, &lanes, left * sizeof(float));
    if (left < kLanes) lanes = load_first(values + t, left);
    total += lanes;
  }
  const float whole = sum(total);
  for (int64_t t = 0; t < count; ++t) values[t] /= whole;
}

struct Gelu {
  Vec value, slope;
};

// Returns x times the normal distribution function of x, and its derivative. The error function is
// formula 7.1.26 of Abramowitz and Stegun (error 1.5e-7), as in PyTorch's vectors.
inline Gelu gelu(Vec x) {
  const Vec positive = from_bits(bits_of(x) & 0x7fffffff);
  const Vec density = exp_of_negative(x * x * splat(-0.5f));
  const Vec t = splat(1) / (splat(1) + splat(0.3275911f * 0.70710678f) * positive);
  Vec p = splat(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    p = p * t + splat(c);
  const Vec upper = splat(0.5f) * p * t * density;  // 1 - distribution(|x|)
  const Vec distribution = select(x < Vec{}, upper, splat(1) - upper);
  return {x * distribution, distribution + x * density * splat(0.39894228f)};
}

}  // namespace recsys
