// Operator recsys::attention_to_shared: target attention of rows that all have one history; see attention.h for the
// mathematics and letters. It has no backward.
#include "attention.h"
#include "functions.h"

namespace recsys {
namespace {

constexpr int64_t kItemsOfBlock = 60;  // whose units stay in the first cache

// Computes the scores of all items for one row after the other, and the interests of several rows.
class SharedForward {
 public:
  SharedForward(const Sizes& sizes, const Inputs& inputs, const Weights& weights,
                const float* items_as_factors, int64_t step)
      : s(sizes),
        in(inputs),
        factors_(items_as_factors),
        step_(step),
        forward_(sizes, inputs, weights, kItemsOfBlock),
        shares_(kMaxRows * sizes.N),
        sums_(kMaxRows * sizes.d),
        zeros_(sizes.d) {}

  // vectors [N, d] -> interests [last_row - first_row, D], of kMaxRows rows at most
  void compute(int64_t first_row, int64_t last_row, const float* vectors, float* interests) {
    for (int64_t row = first_row; row < last_row; ++row) {
      float* shares = shares_ + (row - first_row) * s.N;
      score(row, shares);
      softmax(shares, s.N);
    }
    // In float32, whatever the precision of the scores.
    all_blocks<false>(
        {s.N, shares_, s.N, 1, vectors, s.d, zeros_, 0, sums_, s.d, After::kNothing},
        last_row - first_row, s.d);
    for (int64_t row = 0; row < last_row - first_row; ++row)
      std::memcpy(interests + row * s.D, sums_ + row * s.d, s.D * sizeof(float));
  }

 private:
  void score(int64_t row, float* scores) {
    forward_.fill_constants(row, row + 1);
    forward_.fill_matrix(row);
    for (int64_t item = 0; item < s.N; item += kItemsOfBlock) {
      const int64_t count = std::min(s.N - item, kItemsOfBlock);
      forward_.first_layer(factors_ + item * step_, step_, in_bfloat16(), forward_.constants,
                           forward_.own_units, count);
      forward_.score_units(forward_.own_units, count, scores + item);
    }
  }

  const Sizes& s;
  const Inputs& in;
  const float* factors_;
  const int64_t step_;
  Forward forward_;
  Floats shares_, sums_, zeros_;
};

// target [B, D], items [N, D] and the weights of the score's MLP -> interest [B, D]
Tensor attention_to_shared(const Tensor& target_, const Tensor& items_, const Tensor& first_,
                           const Tensor& first_bias_, const Tensor& second_,
                           const Tensor& second_bias_, const Tensor& last_, bool bfloat16) {
  const Precision precision(bfloat16);
  const Operator op("attention_to_shared");
  const Tensor target = op.float32("target", target_, {kAny, kAny});
  const Tensor items = op.float32("items", items_, {kAny, target.size(1)});
  const Tensor first = op.float32("first", first_, {kAny, 4 * target.size(1)});
  const Tensor first_bias = op.float32("first_bias", first_bias_, {first.size(0)});
  const Tensor second = op.float32("second", second_, {kAny, first.size(0)});
  const Tensor second_bias = op.float32("second_bias", second_bias_, {second.size(0)});
  const Tensor last = op.float32("last", last_, {1, second.size(0)});
  const Sizes s = sizes_of(target.size(0), items.size(0), items.size(0), target.size(1),
                           first.size(0), second.size(0), 0);
  const Inputs in{floats(target), floats(items),       nullptr,        nullptr,
                  nullptr,        nullptr,             floats(first),  floats(first_bias),
                  floats(second), floats(second_bias), floats(last)};
  const Weights weights(s, in, false);
  Floats vectors(s.N * s.d);
  for (int64_t n = 0; n < s.N; ++n) copy_row(vectors + n * s.d, in.items + n * s.D, s.D);
  // As factors of the first layer: the same, or pairs.
  const int64_t step = in_bfloat16() ? padded((s.D + 1) / 2) : s.d;
  Floats pairs(in_bfloat16() ? s.N * step : 0);
  if (in_bfloat16()) pair_along_rows(vectors, s.d, s.N, s.D, pairs, step);
  const float* factors = in_bfloat16() ? pairs : vectors;
  Tensor out = torch::stable::new_zeros(target, {s.B, s.D});
  float* to = mutable_floats(out);
  const int64_t blocks = s.N ? (s.B + kMaxRows - 1) / kMaxRows : 0;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t block, int64_t last_block) {
    const Precision of_thread(bfloat16);
    SharedForward forward(s, in, weights, factors, step);
    for (; block < last_block; ++block) {
      const int64_t row = block * kMaxRows;
      forward.compute(row, std::min(row + kMaxRows, s.B), vectors, to + row * s.D);
    }
  });
  return out;
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("attention_to_shared", TORCH_BOX(&recsys::attention_to_shared));
}
