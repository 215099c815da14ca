// Products of bfloat16: both factors are rounded, sums are of float32.
//
// The instruction adds to each sum the products of two pairs. So the factors of a product are stored
// as pairs of consecutive k, each in the place of a float, which all code but this moves unread.
// Processors without the instruction multiply in float32.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace recsys {

#if defined(__AVX512BF16__)
constexpr bool kHasBfloat16 = true;
#else
constexpr bool kHasBfloat16 = false;
#endif

inline thread_local bool rounds_products = false;

inline bool in_bfloat16() { return kHasBfloat16 && rounds_products; }

// While it lives, products of this thread are of bfloat16, or of float32.
class Precision {
 public:
  explicit Precision(bool bfloat16) : before_(rounds_products) { rounds_products = bfloat16; }
  ~Precision() { rounds_products = before_; }
  Precision(const Precision&) = delete;

 private:
  const bool before_;
};

#if defined(__AVX512BF16__)

// Returns sum + a * b, of floats or of pairs.
template <bool kPairs>
__attribute__((always_inline)) inline Vec multiply_add(Vec sum, float a, Vec b) {
  if constexpr (kPairs)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  return fused_multiply_add(sum, splat(a), b);
}

// Returns 16 pairs, of the lanes of both vectors.
inline Vec pairs_of(Vec first, Vec second) {
  alignas(64) static constexpr int16_t kOrder[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
}

// Returns 16 pairs of neighbours, of 32 lanes in their order.
inline Vec pairs_along(Vec first, Vec second) {
  return (Vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

#else

template <bool kPairs>
inline Vec multiply_add(Vec sum, float a, Vec b) {
  return fused_multiply_add(sum, splat(a), b);
}

inline Vec pairs_of(Vec first, Vec) { return first; }

inline Vec pairs_along(Vec first, Vec) { return first; }

#endif

// Writes rows k [width] as pairs of rows: k and k + 1, the last with zeros. `to` may be `rows`.
inline void pair_rows(const float* rows, int64_t step, int64_t num_k, int64_t width, float* to,
                      int64_t to_step) {
  for (int64_t k = 0; k < num_k; k += 2, rows += 2 * step, to += to_step) {
    const bool is_last = k + 1 == num_k;
    int64_t at = 0;
    for (; at + kLanes <= width; at += kLanes)
      store(to + at, pairs_of(load(rows + at), is_last ? Vec{} : load(rows + step + at)));
    if (at < width) {
      const Vec second = is_last ? Vec{} : load_first(rows + step + at, width - at);
      store(to + at, pairs_of(load_first(rows + at, width - at), second));
    }
  }
}

// Writes rows [num_k] as rows of pairs of neighbours, the last with zeros up to a whole vector.
inline void pair_along_rows(const float* rows, int64_t step, int64_t count, int64_t num_k,
                            float* to, int64_t to_step) {
  for (int64_t row = 0; row < count; ++row, rows += step, to += to_step) {
    int64_t k = 0;
    for (; k + 2 * kLanes <= num_k; k += 2 * kLanes)
      store(to + k / 2, pairs_along(load(rows + k), load(rows + k + kLanes)));
    if (k < num_k)
      store(to + k / 2, pairs_along(load_first(rows + k, num_k - k),
                                    load_first(rows + k + kLanes, num_k - k - kLanes)));
  }
}

// Fills a matrix in the layout that `multiply_kept` reads with row(k, first lane).
template <class Row>
inline void fill_kept(int64_t num_k, int64_t width, float* to, int64_t step, const Row& row) {
  if (!in_bfloat16()) {
    for (int64_t k = 0; k < num_k; ++k)
      for (int64_t at = 0; at < width; at += kLanes) store(to + k * step + at, row(k, at));
    return;
  }
  for (int64_t k = 0; k < num_k; k += 2)
    for (int64_t at = 0; at < width; at += kLanes)
      store(to + k / 2 * step + at, pairs_of(row(k, at), k + 1 < num_k ? row(k + 1, at) : Vec{}));
}

// Turns rows k, in place, into the layout that `multiply_kept` reads: pairs, or as they are.
inline void keep_for_products(float* rows, int64_t step, int64_t num_k) {
  if (in_bfloat16()) pair_rows(rows, step, num_k, padded(step), rows, step);
}

}  // namespace recsys
