// Small matrix products whose operands stay in cache.
//
// Each output is a sum over k in ascending order, whatever the number of rows or columns that a
// block holds: a row's result does not depend on its neighbours, nor on the number of threads.
#pragma once

#include "bfloat16.h"

namespace recsys {

enum class After { kNothing, kRelu, kGate };

// out[r, :] = after(init[r, :] + sum over k of a[r * row_step + k * k_step] * b[k, :]).
// One of row_step and k_step is 1. With `in_pairs` the rows of b are pairs, as `pair_rows` writes them, and with
// `a_in_pairs` those of a, as `pair_along_rows` does; see bfloat16.h.
// kGate keeps the sum where gate, of out's row distance, is positive, and writes 0 elsewhere.
struct Product {
  int64_t num_k;
  const float* a;
  int64_t row_step, k_step;
  const float* b;
  int64_t b_stride;
  const float* init;
  int64_t init_stride;
  float* out;
  int64_t out_stride;
  After after;
  const float* gate = nullptr;
  bool in_pairs = false, a_in_pairs = false;
};

template <int R, int C, bool kPairs>
inline void block(const Product& p, int64_t row, int64_t column) {
  Vec sums[R][C];
  const float* init = p.init + row * p.init_stride + column;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = load(init + r * p.init_stride + c * kLanes);
  const float *a = p.a + row * p.row_step, *b = p.b + column;
  for (int64_t k = 0; k < p.num_k; ++k, a += p.k_step, b += p.b_stride) {
    Vec of_b[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) of_b[c] = load(b + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float of_a = a[r * p.row_step];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = multiply_add<kPairs>(sums[r][c], of_a, of_b[c]);
    }
  }
  float* out = p.out + row * p.out_stride + column;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = out + r * p.out_stride + c * kLanes;
      Vec value = sums[r][c];
      if (p.after == After::kRelu) value = where_positive(value, value);
      if (p.after == After::kGate) {
        const int64_t place = (row + r) * p.out_stride + column + c * kLanes;
        value = where_positive(load(p.gate + place), value);
      }
      store(to, value);
    }
}

template <int C, bool kPairs>
inline void column_blocks(const Product& p, int64_t num_rows, int64_t column) {
  int64_t num_blocks = (num_rows + kMaxRows - 1) / kMaxRows;
  for (int64_t row = 0; row < num_rows; --num_blocks) {
    const int64_t height = (num_rows - row + num_blocks - 1) / num_blocks;  // about equal heights
    switch (height) {
      case 1: block<1, C, kPairs>(p, row, column); break;
      case 2: block<2, C, kPairs>(p, row, column); break;
      case 3: block<3, C, kPairs>(p, row, column); break;
      case 4: block<4, C, kPairs>(p, row, column); break;
      case 5: block<5, C, kPairs>(p, row, column); break;
      default: block<6, C, kPairs>(p, row, column);
    }
    row += height;
  }
}

template <bool kPairs>
inline void all_blocks(const Product& p, int64_t num_rows, int64_t width) {
  for (int64_t column = 0; column < width;) {
    const int64_t left = (width - column) / kLanes;
    if (left >= 4 && kMaxColumns >= 4) {
      column_blocks<kMaxColumns, kPairs>(p, num_rows, column);
      column += kMaxColumns * kLanes;
    } else if (left >= 2) {
      column_blocks<2, kPairs>(p, num_rows, column);
      column += 2 * kLanes;
    } else {
      column_blocks<1, kPairs>(p, num_rows, column);
      column += kLanes;
    }
  }
}

// The product of bfloat16 pairs: those of a and of b, unless they are given, fill buffers.
inline void multiply_pairs(Product p, int64_t num_rows, int64_t width) {
  static thread_local Floats of_a(0), of_b(0);
  const auto reserve = [](Floats& buffer, int64_t count) {
    if (buffer.size() < count) buffer = Floats(count);
  };
  const int64_t num_pairs = (p.num_k + 1) / 2;
  if (!p.in_pairs) {
    reserve(of_b, num_pairs * width);
    pair_rows(p.b, p.b_stride, p.num_k, width, of_b, width);
    p.b = of_b, p.b_stride = width;
  }
  if (!p.a_in_pairs) {
    const int64_t distance = p.k_step == 1 ? padded(num_pairs) : padded(num_rows);
    reserve(of_a, distance * (p.k_step == 1 ? num_rows : num_pairs));
    if (p.k_step == 1) {
      pair_along_rows(p.a, p.row_step, num_rows, p.num_k, of_a, distance);
      p.row_step = distance;
    } else {
      pair_rows(p.a, p.k_step, p.num_k, num_rows, of_a, distance);
      p.row_step = 1, p.k_step = distance;
    }
    p.a = of_a;
  }
  p.num_k = num_pairs;
  all_blocks<true>(p, num_rows, width);
}

// Computes the product for a number of rows and a padded number of columns.
inline void multiply(const Product& p, int64_t num_rows, int64_t width) {
  if (in_bfloat16())
    multiply_pairs(p, num_rows, width);
  else
    all_blocks<false>(p, num_rows, width);
}

// As `multiply`, with b in the layout of `keep_for_products`.
inline void multiply_kept(Product p, int64_t num_rows, int64_t width) {
  p.in_pairs = in_bfloat16();
  multiply(p, num_rows, width);
}

}  // namespace recsys
