// The backward pass of a layer of the fusion, for a block of items in cache.
//
// Shapes: as in layer.h.
#pragma once

#include <memory>

#include "layer.h"

namespace recsys {

// Gradients of the weights, summed over a group of items.
struct LayerSums {
  NormSums before;
  LinearSums query, key, value, output;
  NormSums between;
  LinearSums up, down;

  explicit LayerSums(const LayerWeights& w)
      : before(w.before),
        query(w.query),
        key(w.key),
        value(w.value),
        output(w.output),
        between(w.between),
        up(w.up),
        down(w.down) {}

  void add(const LayerSums& other) {
    for (auto norm : {&LayerSums::before, &LayerSums::between}) (this->*norm).add(other.*norm);
    for (auto map : {&LayerSums::query, &LayerSums::key, &LayerSums::value, &LayerSums::output,
                     &LayerSums::up, &LayerSums::down})
      (this->*map).add(other.*map);
  }

  // Writes the gradients in the order of the weights.
  void write(const Tensor* to) const {
    const auto next = [&](const auto& sums) {
      sums.write(mutable_floats(to[0]), mutable_floats(to[1]));
      to += 2;
    };
    next(before), next(query), next(key), next(value), next(output), next(between), next(up);
    next(down);
  }
};

class LayerBackward : public LayerBlock {
 public:
  LayerBackward(const LayerSizes& sizes, const LayerWeights& weights, LayerSums& sums)
      : LayerBlock(sizes, weights),
        to(sums),
        of_out(s.block() * s.R * s.d),
        of_rows(s.block() * s.R * s.d),
        of_query(s.block() * s.R * s.d),
        of_key(s.block() * s.S * s.d),
        of_value(s.block() * s.S * s.d),
        of_inputs(s.block() * s.S * s.d),
        of_normed(s.block() * s.S * s.d),
        of_units(s.block() * s.R * s.f),
        slopes(s.block() * s.R * s.f),
        work(s.S) {}

  // Adds the gradients of weights to the sums, and writes that of x [items, S, D].
  void compute(const float* gradient, const float* x, const float* noise_of_attended,
               const float* noise_of_active, int64_t items, const Kept& kept, float* of_x) {
    read_rows(s, gradient, items * s.R, of_out);
    feed_forward(noise_of_active, items * s.R, kept);
    attention(x, noise_of_attended, items, kept);
    std::memset(of_inputs, 0, items * s.S * s.d * sizeof(float));
    for (int64_t item = 0; item < items; ++item)
      std::memcpy(of_inputs + item * s.S * s.d, of_out + item * s.R * s.d,
                  s.R * s.d * sizeof(float));
    to.before.add(inputs, of_normed, items * s.S, of_inputs);
    write_rows(s, of_inputs, items * s.S, of_x);
  }

 private:
  // Turns the gradient of the output in `of_out` into that of y.
  void feed_forward(const float* noise, int64_t rows, const Kept& kept) {
    w.between.apply(kept.sums, rows, first);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < padded(s.F); k += kLanes) {
        const Gelu both = gelu(load(kept.units + row * s.f + k));
        store(active + row * s.f + k, both.value);
        store(slopes + row * s.f + k, both.slope);
      }
    drop(noise, rows, of_out, mapped);
    to.down.add(active, mapped, rows);
    std::memset(of_units, 0, rows * s.f * sizeof(float));
    w.down.add_back(mapped, rows, of_units);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < padded(s.F); k += kLanes) {
        const int64_t at = row * s.f + k;
        store(of_units + at, load(of_units + at) * load(slopes + at));
      }
    to.up.add(first, of_units, rows);
    std::memset(of_rows, 0, rows * s.d * sizeof(float));
    w.up.add_back(of_units, rows, of_rows);
    to.between.add(kept.sums, of_rows, rows, of_out);
  }

  // Fills `of_normed` with the gradient of norm(x), given that of y.
  void attention(const float* x, const float* noise, int64_t items, const Kept& kept) {
    const int64_t rows = items * s.R, tokens = items * s.S;
    drop(noise, rows, of_out, mapped);
    sum_values(kept, items);
    to.output.add(attended, mapped, rows);
    std::memset(of_rows, 0, rows * s.d * sizeof(float));
    w.output.add_back(mapped, rows, of_rows);
    std::memset(of_query, 0, rows * s.d * sizeof(float));
    std::memset(of_key, 0, tokens * s.d * sizeof(float));
    std::memset(of_value, 0, tokens * s.d * sizeof(float));
    for (int64_t item = 0; item < items; ++item) {
      const int64_t row = item * s.R * s.d, token = item * s.S * s.d;
      attend_backward(s.tokens(), of_rows + row, kept.shares + item * s.R * s.H * s.S,
                      kept.query + row, kept.key + token, kept.value + token, work, of_query + row,
                      of_key + token, of_value + token);
    }
    read(x, items);
    to.query.add(first, of_query, rows);
    to.key.add(normed, of_key, tokens);
    to.value.add(normed, of_value, tokens);
    std::memset(of_normed, 0, tokens * s.d * sizeof(float));
    std::memset(of_rows, 0, rows * s.d * sizeof(float));
    w.query.add_back(of_query, rows, of_rows);
    for (int64_t item = 0; item < items; ++item)
      std::memcpy(of_normed + item * s.S * s.d, of_rows + item * s.R * s.d,
                  s.R * s.d * sizeof(float));
    w.key.add_back(of_key, tokens, of_normed);
    w.value.add_back(of_value, tokens, of_normed);
  }

  LayerSums& to;
  Floats of_out, of_rows, of_query, of_key, of_value, of_inputs, of_normed, of_units, slopes, work;
};

}  // namespace recsys
