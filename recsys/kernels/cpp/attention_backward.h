// The backward pass of target attention for a chunk of rows. It reads the units of both layers if
// the forward kept them, and else computes them again.
//
// Shapes: as in attention.h.
#pragma once

#include "attention.h"

namespace recsys {

// Sums over a group of rows, in the layouts of `Weights`.
struct Sums {
  Floats of_items, of_products, of_target, first_bias, second, second_bias, last, lists;

  explicit Sums(const Sizes& s)
      : of_items(s.D * s.h),
        of_products(s.D * s.h),
        of_target(s.D * s.h),
        first_bias(s.h),
        second(s.G * s.h),
        second_bias(s.g),
        last(s.g),
        lists(s.P * s.d) {}

  void add(const Sums& other) {
    for (auto part : {&Sums::of_items, &Sums::of_products, &Sums::of_target, &Sums::first_bias,
                      &Sums::second, &Sums::second_bias, &Sums::last, &Sums::lists})
      (this->*part).add(other.*part);
  }
};

class Backward : public Forward {
 public:
  Backward(const Sizes& sizes, const Inputs& inputs, const Weights& weights, int64_t longest,
           Sums& sums)
      : Forward(sizes, inputs, weights, longest),
        to(sums),
        of_out(s.d),
        of_vectors(capacity * s.d),
        hidden(own_units),
        second(own_units + s.second),
        of_pairs(2 * kItemsOfChunk * s.d),
        of_constants(kItemsOfChunk * s.h),
        of_target(kItemsOfChunk * s.d),
        padded_target(s.d),
        matrix_back(s.H * s.d),
        products_times(s.d * s.h),
        zeros(std::max(s.d, s.h)) {}

  // Adds the gradients of weights to the sums, and writes those of targets [B, D]. The gradients of
  // the vectors are written by place [N, D], or without that added up by item [U, D].
  void compute(const Chunk& chunk, const float* gradient, const float* weights, const float* units,
               float* for_target, float* for_places, float* for_items) {
    if (units)
      gather(chunk);
    else
      Forward::compute(chunk, own_units);
    second_layer(chunk, gradient, weights,
                 units ? units + chunk.first_item * s.u : own_units);
    std::memset(of_target, 0, kItemsOfChunk * s.d * sizeof(float));
    for_runs(in.offsets, chunk, [&](int64_t row, int64_t last, bool has_matrix) {
      if (has_matrix)
        row_with_matrix(chunk, row);
      else if (in.offsets[last] > in.offsets[row])
        run_of_short_rows(chunk, row, last);
    });
    constants_and_targets(chunk, for_target);
    for (int64_t t = 0; t < chunk.num_items; ++t) {
      const int64_t n = chunk.first_item + t;
      if (for_places)
        copy_row(for_places + n * s.D, of_vectors + t * s.d, s.D);
      else
        add_row(for_items + in.index[n] * s.D, of_vectors + t * s.d, s.D);
    }
    multiply({chunk.num_items, in.parallel + chunk.first_item * s.P, 1, s.P, of_vectors, s.d,
              to.lists, s.d, to.lists, s.d, After::kNothing},
             s.P, s.d);
  }

 private:
  // Softmax, weighted sum and second layer: fills `hidden` with the gradient of the first layer,
  // given the units of both.
  void second_layer(const Chunk& chunk, const float* gradient, const float* weights,
                    const float* units) {
    for (int64_t row = chunk.first_row; row < chunk.last_row; ++row) {
      copy_row(of_out, gradient + row * s.D, s.D);
      const int64_t start = in.offsets[row] - chunk.first_item;
      const int64_t end = in.offsets[row + 1] - chunk.first_item;
      const float* weight = weights + chunk.first_item;
      float mean = 0;
      for (int64_t t = start; t < end; ++t) {
        const Vec factor = splat(weight[t]);
        Vec dot{};
        for (int64_t k = 0; k < s.d; k += kLanes) {
          const Vec value = load(of_out + k);
          dot += value * load(vectors + t * s.d + k);
          store(of_vectors + t * s.d + k, factor * value);
        }
        scores[t] = sum(dot);
        mean += weight[t] * scores[t];
      }
      for (int64_t t = start; t < end; ++t) scores[t] = weight[t] * (scores[t] - mean);
    }
    for (int64_t t = 0; t < chunk.num_items; ++t) {
      const Vec of_score = splat(scores[t]);
      for (int64_t k = 0; k < padded(s.G); k += kLanes) {
        const Vec unit = load(units + t * s.u + s.second + k);
        const Vec gated = where_positive(unit, of_score * load(w.last + k));
        store(to.last + k, load(to.last + k) + of_score * unit);
        store(to.second_bias + k, load(to.second_bias + k) + gated);
        store(second + t * s.u + k, gated);
      }
    }
    multiply({chunk.num_items, second, 1, s.u, units, s.u, to.second, s.h, to.second, s.h,
              After::kNothing},
             s.G, padded(s.H));
    multiply_kept(
        {s.G, second, s.u, 1, w.second_back, s.h, zeros, 0, hidden, s.u, After::kGate, units},
        chunk.num_items, padded(s.H));
  }

  // With the row's matrix M = W_h + W_p diag(t): the gradient of M is that of W_h; times t it is
  // that of W_p, and times W_p, summed over units, that of t.
  void row_with_matrix(const Chunk& chunk, int64_t row) {
    const float* target = in.target + row * s.D;
    const int64_t at = in.offsets[row] - chunk.first_item;
    const int64_t count = in.offsets[row + 1] - in.offsets[row];
    float* of_hidden = hidden + at * s.u;
    sum_rows(of_hidden, count, of_constants + (row - chunk.first_row) * s.h);
    float* of_row = of_target + (row - chunk.first_row) * s.d;
    // Few rows at a time stay in cache; in bfloat16 the pairs of `of_hidden` are made once for all.
    const int64_t most = in_bfloat16() ? s.D : kMaxRows;
    for (int64_t k = 0; k < s.D; k += most) {
      const int64_t height = std::min(most, s.D - k);
      multiply({count, vectors + at * s.d + k, 1, s.d, of_hidden, s.u, zeros, 0, products_times,
                s.h, After::kNothing},
               height, padded(s.H));
      for (int64_t r = 0; r < height; ++r) {
        const Vec factor = splat(target[k + r]);
        Vec total{};
        for (int64_t unit = 0; unit < padded(s.H); unit += kLanes) {
          const Vec value = load(products_times + r * s.h + unit);
          const int64_t place = (k + r) * s.h + unit;
          store(to.of_items + place, load(to.of_items + place) + value);
          store(to.of_products + place, load(to.of_products + place) + factor * value);
          total += value * load(w.products() + place);
        }
        of_row[k + r] = sum(total);
      }
    }
    std::memcpy(padded_target, target, s.D * sizeof(float));
    fill_kept(s.H, padded(s.D), matrix_back, s.d, [&](int64_t unit, int64_t k) {
      const int64_t place = unit * s.d + k;
      return load(w.items_back + place) + load(padded_target + k) * load(w.products_back + place);
    });
    float* for_vectors = of_vectors + at * s.d;
    multiply_kept({s.H, of_hidden, s.u, 1, matrix_back, s.d, for_vectors, s.d, for_vectors, s.d,
                   After::kNothing},
                  count, padded(s.D));
  }

  void run_of_short_rows(const Chunk& chunk, int64_t row, int64_t last) {
    const int64_t at = in.offsets[row] - chunk.first_item;
    const int64_t count = in.offsets[last] - in.offsets[row];
    float *of_hidden = hidden + at * s.u, *for_vectors = of_vectors + at * s.d;
    fill_pairs(chunk, row, last);
    multiply({count, pairs, 1, 2 * s.D, of_hidden, s.u, to.of_items, s.h, to.of_items, s.h,
              After::kNothing},
             s.D, padded(s.H));
    multiply({count, pairs + s.D, 1, 2 * s.D, of_hidden, s.u, to.of_products, s.h, to.of_products,
              s.h, After::kNothing},
             s.D, padded(s.H));
    multiply({s.H, of_hidden, s.u, 1, w.items_back, s.d, for_vectors, s.d, for_vectors, s.d,
              After::kNothing},
             count, padded(s.D));
    multiply({s.H, of_hidden, s.u, 1, w.products_back, s.d, zeros, 0, of_pairs, s.d,
              After::kNothing},
             count, padded(s.D));
    for (int64_t r = row; r < last; ++r) {
      const int64_t start = in.offsets[r] - chunk.first_item;
      const int64_t end = in.offsets[r + 1] - chunk.first_item;
      sum_rows(hidden + start * s.u, end - start, of_constants + (r - chunk.first_row) * s.h);
      float* of_row = of_target + (r - chunk.first_row) * s.d;
      for (int64_t t = start; t < end; ++t)
        for (int64_t k = 0; k < s.D; ++k) {
          const float of_pair = of_pairs[(t - at) * s.d + k];
          of_row[k] += vectors[t * s.d + k] * of_pair;
          of_vectors[t * s.d + k] += in.target[r * s.D + k] * of_pair;
        }
    }
  }

  void constants_and_targets(const Chunk& chunk, float* for_target) {
    const int64_t rows = chunk.last_row - chunk.first_row;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = chunk.first_row + r;
      float* of_row = of_constants + r * s.h;
      if (in.offsets[row] == in.offsets[row + 1]) std::memset(of_row, 0, s.h * sizeof(float));
      for (int64_t unit = 0; unit < padded(s.H); unit += kLanes)
        store(to.first_bias + unit, load(to.first_bias + unit) + load(of_row + unit));
    }
    multiply({rows, in.target + chunk.first_row * s.D, 1, s.D, of_constants, s.h, to.of_target,
              s.h, to.of_target, s.h, After::kNothing},
             s.D, padded(s.H));
    multiply_kept({s.H, of_constants, s.h, 1, w.target_back, s.d, of_target, s.d, of_target, s.d,
                   After::kNothing},
                  rows, padded(s.D));
    for (int64_t r = 0; r < rows; ++r)
      copy_row(for_target + (chunk.first_row + r) * s.D, of_target + r * s.d, s.D);
  }

  void sum_rows(const float* rows, int64_t count, float* total) const {
    for (int64_t unit = 0; unit < padded(s.H); unit += kLanes) {
      Vec value{};
      for (int64_t t = 0; t < count; ++t) value += load(rows + t * s.u + unit);
      store(total + unit, value);
    }
  }

  Sums& to;
  Floats of_out, of_vectors;
  float *hidden, *second;
  Floats of_pairs, of_constants, of_target, padded_target, matrix_back,
      products_times, zeros;
};

}  // namespace recsys
