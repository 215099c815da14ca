// Sizes, weights and the forward pass of target attention, for a chunk of rows in cache.
//
// The first layer of DIN's MLP over (h, t, h - t, h * t) with weight (W1, W2, W3, W4) is one matrix
// per row, M_b = (W1 + W3) + W4 diag(t), and one constant, c_b = bias + (W2 - W3) t. Rows with few
// items do without M_b: for them the layer is the product of (h, t * h) with both matrices.
//
// Shapes: B rows, U unique items, N history items, D dimension, H and G units of the two hidden
// layers, P parallel lists, T items of a chunk. Weights stand transposed, inputs first, where the
// units of a layer are the columns of a product.
#pragma once

#include <algorithm>
#include <cmath>

#include "product.h"
#include "tensors.h"

namespace recsys {

constexpr int64_t kItemsOfChunk = 64, kItemsOfGroup = 2048, kMaxGroups = 32;
// Rows with fewer items than this have no matrix of their own: filling it would cost more.
constexpr int64_t kItemsForMatrix = 4;

struct Sizes {
  int64_t B, U, N, D, H, G, P;
  int64_t d, h, g;  // distances of rows of D, H and G floats
  int64_t u, second;  // distance of rows with the units of both layers, and where the second begins
};

inline Sizes sizes_of(int64_t B, int64_t U, int64_t N, int64_t D, int64_t H, int64_t G, int64_t P) {
  const int64_t second = whole_lines(H);
  return {B, U, N, D, H, G, P, padded(D), distance_of(H), distance_of(G), second + whole_lines(G), second};
}

struct Inputs {
  const float *target, *items, *parallel, *parallel_map;
  const int64_t *index, *offsets;
  const float *first, *first_bias, *second, *second_bias, *last;
};

// Weights in the order in which products read them, those with * in the layout of
// `keep_for_products`. Those named `back` are for the backward alone.
struct Weights {
  Floats of_items, first_bias;  // [2 D, h]: factors of items, below them those of products; [h]
  Floats second_bias, last, lists;  // [g], [g], [P, d]
  Floats of_target, second;  // * [D, h], [H, g]
  Floats items_back, products_back;  // [H, d] both
  Floats target_back, second_back;  // * [H, d], [G, h]

  Weights(const Sizes& s, const Inputs& in, bool backward)
      : of_items(2 * s.D * s.h),
        first_bias(s.h),
        second_bias(s.g),
        last(s.g),
        lists(s.P * s.d),
        of_target(s.D * s.h),
        second(s.H * s.g),
        items_back(backward ? s.H * s.d : 0),
        products_back(backward ? s.H * s.d : 0),
        target_back(backward ? s.H * s.d : 0),
        second_back(backward ? s.G * s.h : 0) {
    for (int64_t unit = 0; unit < s.H; ++unit) {
      const float* row = in.first + unit * 4 * s.D;
      for (int64_t k = 0; k < s.D; ++k) {
        const float difference = row[2 * s.D + k], product = row[3 * s.D + k];
        const float item = row[k] + difference, target = row[s.D + k] - difference;
        of_items[k * s.h + unit] = item;
        of_items[(s.D + k) * s.h + unit] = product;
        of_target[k * s.h + unit] = target;
        if (backward) {
          items_back[unit * s.d + k] = item;
          products_back[unit * s.d + k] = product;
          target_back[unit * s.d + k] = target;
        }
      }
      first_bias[unit] = in.first_bias[unit];
    }
    for (int64_t unit = 0; unit < s.G; ++unit) {
      for (int64_t k = 0; k < s.H; ++k) {
        second[k * s.g + unit] = in.second[unit * s.H + k];
        if (backward) second_back[unit * s.h + k] = in.second[unit * s.H + k];
      }
      second_bias[unit] = in.second_bias[unit];
      last[unit] = in.last[unit];
    }
    for (int64_t list = 0; list < s.P; ++list)
      for (int64_t k = 0; k < s.D; ++k) lists[list * s.d + k] = in.parallel_map[k * s.P + list];
    keep_for_products(of_target, s.h, s.D);
    keep_for_products(second, s.g, s.H);
    if (!backward) return;
    keep_for_products(target_back, s.d, s.H);
    keep_for_products(second_back, s.h, s.G);
  }

  const float* products() const { return of_items + of_items.size() / 2; }
};

// A chunk of rows, whose intermediate results stay in cache.
struct Chunk {
  int64_t first_row, last_row, first_item, num_items;
};

// Returns the bounds of groups of rows with about equally many items. They depend on the batch
// alone, so that sums over groups do not depend on the number of threads.
inline std::vector<int64_t> group_bounds(const Sizes& s, const int64_t* offsets) {
  const int64_t groups = std::clamp<int64_t>(s.N / kItemsOfGroup, 1, kMaxGroups);
  std::vector<int64_t> bounds{0};
  for (int64_t group = 1; group < groups; ++group) {
    const int64_t share = (s.N + s.B) * group / groups;
    int64_t row = bounds.back();
    while (row < s.B && offsets[row] + row < share) ++row;
    bounds.push_back(row);
  }
  bounds.push_back(s.B);
  return bounds;
}

// Calls work(chunk) for consecutive rows with at most kItemsOfChunk items, or for one longer row.
template <class Work>
void for_chunks(const int64_t* offsets, int64_t row, int64_t end, const Work& work) {
  while (row < end) {
    int64_t last = row + 1;
    while (last < end && offsets[last + 1] - offsets[row] <= kItemsOfChunk &&
           last - row < kItemsOfChunk)
      ++last;
    work(Chunk{row, last, offsets[row], offsets[last] - offsets[row]});
    row = last;
  }
}

// Calls work(first row, last row, has matrix) for each row with a matrix and each run of others.
template <class Work>
void for_runs(const int64_t* offsets, const Chunk& chunk, const Work& work) {
  for (int64_t row = chunk.first_row; row < chunk.last_row;) {
    int64_t last = row;
    while (last < chunk.last_row && offsets[last + 1] - offsets[last] < kItemsForMatrix) ++last;
    const bool has_matrix = last == row;
    last += has_matrix;
    work(row, last, has_matrix);
    row = last;
  }
}

// Buffers of a chunk and its forward pass.
class Forward {
 public:
  Forward(const Sizes& sizes, const Inputs& inputs, const Weights& weights, int64_t longest)
      : s(sizes),
        in(inputs),
        w(weights),
        capacity(std::max(longest, kItemsOfChunk)),
        vectors(capacity * s.d),
        pairs(kItemsOfChunk * 2 * s.D),
        own_units(capacity * s.u),
        scores(capacity),
        constants(kItemsOfChunk * s.h),
        matrix(s.D * s.h) {}

  // Fills vectors [T, d], scores [T] and the units [T, u] of both layers, at `units`.
  void compute(const Chunk& chunk, float* units) {
    gather(chunk);
    float* hidden = units;
    fill_constants(chunk.first_row, chunk.last_row);
    for_runs(in.offsets, chunk, [&](int64_t row, int64_t last, bool has_matrix) {
      const int64_t at = in.offsets[row] - chunk.first_item;
      const int64_t count = in.offsets[last] - in.offsets[row];
      if (has_matrix) {
        fill_matrix(row);
        first_layer(vectors + at * s.d, s.d, false, constants + (row - chunk.first_row) * s.h,
                    hidden + at * s.u, count);
      } else if (count) {
        fill_pairs(chunk, row, last);
        for (int64_t r = row; r < last; ++r)
          for (int64_t n = in.offsets[r]; n < in.offsets[r + 1]; ++n)
            copy_row(hidden + (n - chunk.first_item) * s.u,
                     constants + (r - chunk.first_row) * s.h, padded(s.H));
        float* to = hidden + at * s.u;
        multiply({2 * s.D, pairs, 2 * s.D, 1, w.of_items, s.h, to, s.u, to, s.u, After::kRelu},
                 count, padded(s.H));
      }
    });
    score_units(units, chunk.num_items, scores);
  }

  // Fills the constants [rows, h] of the first layer: its bias, and the terms of the targets.
  void fill_constants(int64_t first_row, int64_t last_row) {
    multiply_kept({s.D, in.target + first_row * s.D, s.D, 1, w.of_target, s.h, w.first_bias, 0,
                   constants, s.h, After::kNothing},
                  last_row - first_row, padded(s.H));
  }

  // Computes the first layer of the items of a row whose matrix is filled, as floats or as pairs.
  void first_layer(const float* items, int64_t step, bool are_pairs, const float* constant,
                   float* hidden, int64_t count) const {
    Product product{s.D, items, step, 1, matrix, s.h, constant, 0, hidden, s.u, After::kRelu};
    product.a_in_pairs = are_pairs;
    multiply_kept(product, count, padded(s.H));
  }

  // Fills the units of the second layer, beside those of the first, and the scores.
  void score_units(float* units, int64_t count, float* to) const {
    float* second = units + s.second;
    multiply_kept({s.H, units, s.u, 1, w.second, s.g, w.second_bias, 0, second, s.u, After::kRelu},
                  count, padded(s.G));
    for (int64_t n = 0; n < count; ++n) {
      Vec total{};
      for (int64_t k = 0; k < padded(s.G); k += kLanes)
        total += load(second + n * s.u + k) * load(w.last + k);
      to[n] = sum(total);
    }
  }

  // Fills pairs [count, 2 D]: the vectors of a run, and their products with the targets.
  void fill_pairs(const Chunk& chunk, int64_t row, int64_t last) {
    float* to = pairs;
    for (int64_t r = row; r < last; ++r)
      for (int64_t n = in.offsets[r]; n < in.offsets[r + 1]; ++n, to += 2 * s.D) {
        const float* from = vectors + (n - chunk.first_item) * s.d;
        for (int64_t k = 0; k < s.D; ++k) {
          to[k] = from[k];
          to[s.D + k] = from[k] * in.target[r * s.D + k];
        }
      }
  }

  const Sizes& s;
  const Inputs& in;
  const Weights& w;
  const int64_t capacity;
  Floats vectors, pairs, own_units, scores, constants, matrix;

  // Fills vectors [T, d].
  void gather(const Chunk& chunk) {
    for (int64_t t = 0; t < chunk.num_items; ++t) {
      const int64_t n = chunk.first_item + t;
      float* to = vectors + t * s.d;
      if (t + kAhead < chunk.num_items) prefetch(in.items + in.index[n + kAhead] * s.D, s.D);
      copy_row(to, in.items + in.index[n] * s.D, s.D);
      for (int64_t list = 0; list < s.P; ++list) {
        const Vec value = splat(in.parallel[n * s.P + list]);
        for (int64_t k = 0; k < s.d; k += kLanes)
          store(to + k, load(to + k) + value * load(w.lists + list * s.d + k));
      }
    }
  }

  // Fills the matrix of a row's first layer.
  void fill_matrix(int64_t row) {
    const float* target = in.target + row * s.D;
    const auto factors = [&](int64_t k, int64_t unit) {
      const int64_t at = k * s.h + unit;
      return load(w.of_items + at) + splat(target[k]) * load(w.products() + at);
    };
    fill_kept(s.D, padded(s.H), matrix, s.h, factors);
  }
};

}  // namespace recsys
