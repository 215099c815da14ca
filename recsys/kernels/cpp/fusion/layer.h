// A layer of the fusion: pre-norm joint attention of an item's tokens, and a feed-forward network.
//
//   y = x + dropout(output(attention(norm(x)))),   out = y + dropout(down(gelu(up(norm(y)))))
//
// Items are computed in blocks whose rows stay in cache. What the backward reads of a block is in
// `Kept`; it computes norms, weighted sums and GELU again.
//
// Shapes: U items, S tokens of an item, R of them with outputs, D dimension, F hidden units, H heads.
#pragma once

#include "../few_tokens.h"
#include "../functions.h"
#include "../linear_map.h"
#include "../tensors.h"

namespace recsys {

constexpr int64_t kRowsOfBlock = 64;

struct LayerSizes {
  int64_t U, S, R, D, F, H, d, f;  // the last two are distances of rows of D and F floats
  float scale, dropout;
  int64_t block() const { return std::max<int64_t>(1, kRowsOfBlock / S); }
  FewTokens tokens() const { return {R, S, H, D / H, d, scale}; }
};

// Parts of one tensor [U, width] which the forward fills, one after the other.
struct Kept {
  float *key, *value, *query, *sums, *units, *shares;  // sums: y, units: before GELU

  static int64_t width(const LayerSizes& s) {
    return 2 * (s.S + s.R) * s.d + s.R * (s.f + s.H * s.S);
  }

  Kept(const LayerSizes& s, float* at)
      : key(at),
        value(key + s.U * s.S * s.d),
        query(value + s.U * s.S * s.d),
        sums(query + s.U * s.R * s.d),
        units(sums + s.U * s.R * s.d),
        shares(units + s.U * s.R * s.f) {}

  // Returns the parts from an item on.
  Kept from(const LayerSizes& s, int64_t item) const {
    Kept moved = *this;
    moved.key += item * s.S * s.d, moved.value += item * s.S * s.d;
    moved.query += item * s.R * s.d, moved.sums += item * s.R * s.d;
    moved.units += item * s.R * s.f, moved.shares += item * s.R * s.H * s.S;
    return moved;
  }
};

// 16 of the weights, from `w` on, in the order of `weights` of `recsys.content.fusion.layers`.
constexpr int64_t kWeightsOfLayer = 16;

struct LayerWeights {
  LayerNorm before;
  LinearMap query, key, value, output;
  LayerNorm between;
  LinearMap up, down;

  LayerWeights(const LayerSizes& s, const Tensor* w, bool backward)
      : before(s.D, floats(w[0]), floats(w[1])),
        query(s.D, s.D, floats(w[2]), floats(w[3]), backward),
        key(s.D, s.D, floats(w[4]), floats(w[5]), backward),
        value(s.D, s.D, floats(w[6]), floats(w[7]), backward),
        output(s.D, s.D, floats(w[8]), floats(w[9]), backward),
        between(s.D, floats(w[10]), floats(w[11])),
        up(s.D, s.F, floats(w[12]), floats(w[13]), backward),
        down(s.F, s.D, floats(w[14]), floats(w[15]), backward) {}
};

// Rows [count, D] without and with padding.
inline void read_rows(const LayerSizes& s, const float* from, int64_t count, float* to) {
  for (int64_t row = 0; row < count; ++row)
    std::memcpy(to + row * s.d, from + row * s.D, s.D * sizeof(float));
}

inline void write_rows(const LayerSizes& s, const float* from, int64_t count, float* to) {
  for (int64_t row = 0; row < count; ++row)
    std::memcpy(to + row * s.D, from + row * s.d, s.D * sizeof(float));
}

// The buffers of a block, and the steps that forward and backward share.
class LayerBlock {
 public:
  LayerBlock(const LayerSizes& sizes, const LayerWeights& weights)
      : s(sizes),
        w(weights),
        inputs(s.block() * s.S * s.d),
        normed(s.block() * s.S * s.d),
        first(s.block() * s.R * s.d),
        attended(s.block() * s.R * s.d),
        mapped(s.block() * s.R * s.d),
        active(s.block() * s.R * s.f) {}

 protected:
  // Fills `inputs`, `normed` and, of the tokens with outputs, `first`.
  void read(const float* x, int64_t items) {
    read_rows(s, x, items * s.S, inputs);
    w.before.apply(inputs, items * s.S, normed);
    for (int64_t item = 0; item < items; ++item)
      std::memcpy(first + item * s.R * s.d, normed + item * s.S * s.d, s.R * s.d * sizeof(float));
  }

  void sum_values(const Kept& kept, int64_t items) {
    std::memset(attended, 0, items * s.R * s.d * sizeof(float));
    for (int64_t item = 0; item < items; ++item)
      add_attended(s.tokens(), kept.shares + item * s.R * s.H * s.S, kept.value + item * s.S * s.d,
                   attended + item * s.R * s.d);
  }

  // Multiplies rows by the factors of dropout, from uniform numbers; none: all factors are 1.
  void drop(const float* noise, int64_t count, const float* rows, float* to) const {
    const float share = s.dropout, factor = share < 1 ? 1 / (1 - share) : 0;
    for (int64_t row = 0; row < count; ++row, rows += s.d, to += s.d)
      for (int64_t k = 0; k < s.D; ++k)
        to[k] = noise ? rows[k] * (noise[row * s.D + k] >= share ? factor : 0) : rows[k];
  }

  const LayerSizes& s;
  const LayerWeights& w;
  Floats inputs, normed, first, attended, mapped, active;
};

class LayerForward : public LayerBlock {
 public:
  using LayerBlock::LayerBlock;

  // x [items, S, D] -> out [items, R, D]; noise of both dropouts
  void compute(const float* x, const bool* is_token, const float* of_attended,
               const float* of_active, int64_t items, const Kept& kept, float* out) {
    const int64_t rows = items * s.R;
    read(x, items);
    w.query.apply(first, rows, kept.query);
    w.key.apply(normed, items * s.S, kept.key);
    w.value.apply(normed, items * s.S, kept.value);
    for (int64_t item = 0; item < items; ++item)
      fill_shares(s.tokens(), kept.query + item * s.R * s.d, kept.key + item * s.S * s.d,
                  is_token + item * s.S, kept.shares + item * s.R * s.H * s.S);
    sum_values(kept, items);
    w.output.apply(attended, rows, mapped);
    drop(of_attended, rows, mapped, mapped);
    for (int64_t row = 0; row < rows; ++row) {
      const float* own = inputs + (row / s.R * s.S + row % s.R) * s.d;
      add(own, mapped + row * s.d, kept.sums + row * s.d);
    }
    w.between.apply(kept.sums, rows, first);
    w.up.apply(first, rows, kept.units);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < padded(s.F); k += kLanes)
        store(active + row * s.f + k, gelu(load(kept.units + row * s.f + k)).value);
    w.down.apply(active, rows, mapped);
    drop(of_active, rows, mapped, mapped);
    for (int64_t row = 0; row < rows; ++row)
      add(kept.sums + row * s.d, mapped + row * s.d, mapped + row * s.d);
    write_rows(s, mapped, rows, out);
  }

 private:
  void add(const float* a, const float* b, float* to) const {
    for (int64_t k = 0; k < padded(s.D); k += kLanes) store(to + k, load(a + k) + load(b + k));
  }
};

}  // namespace recsys
