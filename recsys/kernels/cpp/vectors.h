// Vectors of the processor's width, and buffers of floats.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

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

// Returns the first floats of a vector, at most all, and zeros after them.
inline Vec load_first(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Vec lanes{};
  if (count > 0) std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

// Less zero, which compilers drop; adding zero they must compute, as it turns -0 into 0.
inline Vec splat(float value) { return value - Vec{}; }

// Returns sum + a * b. Compilers fuse both in some loops and not in others, which would make a row's last bits depend
// on the number of rows beside it.
inline Vec fused_multiply_add(Vec sum, Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

inline Mask bits_of(Vec value) {
  Mask bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline Vec from_bits(Mask bits) {
  Vec value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Returns value where gate > 0 or is NaN, else 0: ReLU with value = gate, and its gradient. As in
// PyTorch NaN stays NaN, so that a model that diverges is seen in its loss.
inline Vec where_positive(Vec gate, Vec value) {
  return from_bits(bits_of(value) & ~(gate <= Vec{}));
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

// Returns a width up to the end of its last cache line, the same on every processor.
inline int64_t whole_lines(int64_t width) { return (width + 15) / 16 * 16; }

// Returns the distance of rows of `width` floats, the same on every processor, as the shape of a
// tensor may depend on it; no power of two, which would share cache sets.
inline int64_t distance_of(int64_t width) {
  return whole_lines(width) >= 128 ? whole_lines(width) + 16 : whole_lines(width);
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
  void add(const Floats& other) {
    for (int64_t k = 0; k < count_; ++k) data_[k] += other.data_[k];
  }

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

}  // namespace recsys
