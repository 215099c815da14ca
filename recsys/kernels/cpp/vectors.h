// Vectors of the processor's width, and small matrix products whose operands stay in cache.
//
// Each output is a sum over k in ascending order, whatever the number of rows or columns that a
// block holds: a row's result does not depend on its neighbours, nor on the number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace recsys {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMaxColumns = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kMaxColumns = 2;
#else
constexpr int kLanes = 4, kMaxColumns = 2;
#endif
constexpr int kMaxRows = 6;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(float))));

// At any address of floats. No memcpy, whose stores might change any variable that a loop reads.
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float))));

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }

inline void store(float* to, Vec vector) { *reinterpret_cast<Unaligned*>(to) = vector; }

// Copies a row of some hundred floats at most, for which a call of memcpy would take longer.
inline void copy_row(float* to, const float* from, int64_t count) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(to + k, load(from + k));
  if (k < count) std::memcpy(to + k, from + k, (count - k) * sizeof(float));
}

inline void add_row(float* to, const float* from, int64_t count) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(to + k, load(to + k) + load(from + k));
  for (; k < count; ++k) to[k] += from[k];
}

// Less zero, which compilers drop; adding zero they must compute, as it turns -0 into 0.
inline Vec splat(float value) { return value - Vec{}; }

// Returns value where gate > 0 or is NaN, else 0: ReLU with value = gate, and its gradient. As in
// PyTorch NaN stays NaN, so that a model that diverges is seen in its loss.
inline Vec where_positive(Vec gate, Vec value) {
  const Mask mask = ~(gate <= Vec{});
  Mask bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= mask;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// Adds up the lanes: the upper half to the lower one, until one is left.
inline float sum(Vec vector) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[kLanes / 4];
  std::memcpy(parts, &vector, sizeof vector);
#pragma GCC unroll 2
  for (int width = kLanes / 8; width > 0; width /= 2)
#pragma GCC unroll 2
    for (int part = 0; part < width; ++part) parts[part] += parts[part + width];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Returns the distance of rows of `width` floats; no power of two, which would share cache sets.
inline int64_t row_stride(int64_t width) {
  return padded(width) >= 128 ? padded(width) + kLanes : padded(width);
}

// Zeroed floats, aligned to a cache line.
class Floats {
 public:
  explicit Floats(int64_t count) : count_(count) {
    const size_t bytes = (count * sizeof(float) + 127) / 64 * 64;
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
  }
  operator float*() const { return data_.get(); }
  int64_t size() const { return count_; }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  int64_t count_;
  std::unique_ptr<float[], Free> data_;
};

// Rows ahead of the one that is read whose memory is asked for, where rows are in random order.
constexpr int64_t kAhead = 6;

inline void prefetch(const float* row, int64_t width) {
  for (int64_t k = 0; k < width; k += 16) __builtin_prefetch(row + k);
}

enum class After { kNothing, kRelu, kGate };

// out[r, :] = after(init[r, :] + sum over k of a[r * row_step + k * k_step] * b[k, :]).
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
};

template <int R, int C>
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
      const Vec of_a = splat(a[r * p.row_step]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] += of_a * of_b[c];
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

template <int C>
inline void column_blocks(const Product& p, int64_t num_rows, int64_t column) {
  int64_t num_blocks = (num_rows + kMaxRows - 1) / kMaxRows;
  for (int64_t row = 0; row < num_rows; --num_blocks) {
    const int64_t height = (num_rows - row + num_blocks - 1) / num_blocks;  // about equal heights
    switch (height) {
      case 1: block<1, C>(p, row, column); break;
      case 2: block<2, C>(p, row, column); break;
      case 3: block<3, C>(p, row, column); break;
      case 4: block<4, C>(p, row, column); break;
      case 5: block<5, C>(p, row, column); break;
      default: block<6, C>(p, row, column);
    }
    row += height;
  }
}

// Computes the product for a number of rows and a padded number of columns.
inline void multiply(const Product& p, int64_t num_rows, int64_t width) {
  for (int64_t column = 0; column < width;) {
    const int64_t left = (width - column) / kLanes;
    if (left >= 4 && kMaxColumns >= 4) {
      column_blocks<kMaxColumns>(p, num_rows, column);
      column += kMaxColumns * kLanes;
    } else if (left >= 2) {
      column_blocks<2>(p, num_rows, column);
      column += 2 * kLanes;
    } else {
      column_blocks<1>(p, num_rows, column);
      column += kLanes;
    }
  }
}

}  // namespace recsys
