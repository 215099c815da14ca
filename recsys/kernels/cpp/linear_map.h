// Linear maps and layer norms of a block of rows in cache, with the sums of their gradients.
//
// Rows have the distance `distance_of` their width, and zeros up to the end of their last vector.
#pragma once

#include <algorithm>
#include <cmath>

#include "product.h"

namespace recsys {

// y = weight x + bias, with weight [outputs, inputs].
struct LinearMap {
  int64_t inputs, outputs, x, y;  // the last two are distances of rows
  Floats across, straight, bias;  // [inputs, y], [outputs, x], both kept for products; [y]

  LinearMap(int64_t num_inputs, int64_t num_outputs, const float* weight, const float* of_bias,
            bool backward)
      : inputs(num_inputs),
        outputs(num_outputs),
        x(distance_of(num_inputs)),
        y(distance_of(num_outputs)),
        across(backward ? 0 : inputs * y),
        straight(backward ? outputs * x : 0),
        bias(y) {
    std::memcpy(bias, of_bias, outputs * sizeof(float));
    for (int64_t out = 0; backward && out < outputs; ++out)
      std::memcpy(straight + out * x, weight + out * inputs, inputs * sizeof(float));
    constexpr int64_t kTile = 16;
    for (int64_t tile = 0; !backward && tile < outputs; tile += kTile)
      for (int64_t in = 0; in < inputs; ++in)
        for (int64_t out = tile; out < std::min(tile + kTile, outputs); ++out)
          across[in * y + out] = weight[out * inputs + in];
    if (backward)
      keep_for_products(straight, x, outputs);
    else
      keep_for_products(across, y, inputs);
  }

  void apply(const float* rows, int64_t count, float* to) const {
    multiply_kept({inputs, rows, x, 1, across, y, bias, 0, to, y, After::kNothing}, count,
                  padded(outputs));
  }

  // Adds the gradient of x to `to`, given that of y.
  void add_back(const float* of_y, int64_t count, float* to) const {
    multiply_kept({outputs, of_y, y, 1, straight, x, to, x, to, x, After::kNothing}, count,
                  padded(inputs));
  }
};

// Gradients of a linear map: weight [outputs, x] and bias.
struct LinearSums {
  const LinearMap& map;
  Floats weight, bias;

  explicit LinearSums(const LinearMap& of) : map(of), weight(of.outputs * of.x), bias(of.y) {}

  void add(const float* rows, const float* of_y, int64_t count) {
    multiply({count, of_y, 1, map.y, rows, map.x, weight, map.x, weight, map.x, After::kNothing},
             map.outputs, padded(map.inputs));
    for (int64_t k = 0; k < padded(map.outputs); k += kLanes) {
      Vec total = load(bias + k);
      for (int64_t row = 0; row < count; ++row) total += load(of_y + row * map.y + k);
      store(bias + k, total);
    }
  }

  void add(const LinearSums& other) { weight.add(other.weight), bias.add(other.bias); }

  void write(float* to_weight, float* to_bias) const {
    for (int64_t out = 0; out < map.outputs; ++out)
      std::memcpy(to_weight + out * map.inputs, weight + out * map.x, map.inputs * sizeof(float));
    std::memcpy(to_bias, bias, map.outputs * sizeof(float));
  }
};

// y = (x - mean) / sqrt(variance + 1e-5) * factor + shift, over a row.
struct LayerNorm {
  int64_t width, distance;
  Floats factor, shift;

  LayerNorm(int64_t of_width, const float* of_factor, const float* of_shift)
      : width(of_width), distance(distance_of(of_width)), factor(distance), shift(distance) {
    std::memcpy(factor, of_factor, width * sizeof(float));
    std::memcpy(shift, of_shift, width * sizeof(float));
  }

  struct Moments {
    float mean, inverse;
  };

  Moments moments(const float* row) const {
    Vec total{};
    for (int64_t k = 0; k < padded(width); k += kLanes) total += load(row + k);
    const float mean = sum(total) / width;
    Vec squares{};
    for (int64_t k = 0; k < padded(width); k += kLanes) {
      Vec centred = load(row + k) - splat(mean);
      // The zeros behind the row do not count.
      if (width - k < kLanes) centred = load_first(reinterpret_cast<float*>(&centred), width - k);
      squares += centred * centred;
    }
    return {mean, 1 / std::sqrt(sum(squares) / width + 1e-5f)};
  }

  void apply(const float* rows, int64_t count, float* to) const {
    for (int64_t row = 0; row < count; ++row, rows += distance, to += distance) {
      const Moments m = moments(rows);
      for (int64_t k = 0; k < padded(width); k += kLanes)
        store(to + k, (load(rows + k) - splat(m.mean)) * splat(m.inverse) * load(factor + k) +
                          load(shift + k));
    }
  }
};

// Gradients of a layer norm.
struct NormSums {
  const LayerNorm& norm;
  Floats factor, shift;

  explicit NormSums(const LayerNorm& of) : norm(of), factor(of.distance), shift(of.distance) {}

  // Adds the gradient of x to `to`, given that of y, whose padding is zero.
  void add(const float* rows, const float* of_y, int64_t count, float* to) {
    const int64_t width = padded(norm.width);
    for (int64_t row = 0; row < count; ++row) {
      const LayerNorm::Moments m = norm.moments(rows);
      const Vec mean = splat(m.mean), inverse = splat(m.inverse);
      Vec first{}, second{};
      for (int64_t k = 0; k < width; k += kLanes) {
        const Vec gradient = load(of_y + k), unit = (load(rows + k) - mean) * inverse;
        store(factor + k, load(factor + k) + gradient * unit);
        store(shift + k, load(shift + k) + gradient);
        const Vec scaled = gradient * load(norm.factor + k);
        first += scaled;
        second += scaled * unit;
      }
      const Vec of_mean = splat(sum(first) / norm.width), of_unit = splat(sum(second) / norm.width);
      for (int64_t k = 0; k < width; k += kLanes) {
        const Vec unit = (load(rows + k) - mean) * inverse;
        const Vec scaled = load(of_y + k) * load(norm.factor + k);
        store(to + k, load(to + k) + inverse * (scaled - of_mean - unit * of_unit));
      }
      rows += norm.distance, of_y += norm.distance, to += norm.distance;
    }
  }

  void add(const NormSums& other) { factor.add(other.factor), shift.add(other.shift); }

  void write(float* to_factor, float* to_shift) const {
    std::memcpy(to_factor, factor, norm.width * sizeof(float));
    std::memcpy(to_shift, shift, norm.width * sizeof(float));
  }
};

}  // namespace recsys
