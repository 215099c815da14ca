// Operators recsys::target_attention and its backward; see attention.h for mathematics and letters.
#include "attention_backward.h"
#include "functions.h"
#include "history.h"

namespace recsys {
namespace {

int64_t longest_row(const Sizes& s, const int64_t* offsets) {
  int64_t longest = 0;
  for (int64_t row = 0; row < s.B; ++row)
    longest = std::max(longest, offsets[row + 1] - offsets[row]);
  return longest;
}

// scores [T] -> weights [T], and their sum of vectors [T, d] in out [D]
void softmax_and_sum(const Sizes& s, const float* scores, const float* vectors, int64_t count,
                     float* weights, float* out) {
  std::memcpy(weights, scores, count * sizeof(float));
  softmax(weights, count);
  for (int64_t k = 0; k < s.D; k += kLanes) {
    Vec total{};
    for (int64_t t = 0; t < count; ++t) total += splat(weights[t]) * load(vectors + t * s.d + k);
    std::memcpy(out + k, &total, std::min<int64_t>(s.D - k, kLanes) * sizeof(float));
  }
}

// The inputs, whose types, shapes and places in memory are as the kernel reads them.
struct CheckedAttention {
  Tensor target, items, index, offsets, parallel, lists, first, first_bias, second, second_bias,
      last;
  Sizes s;

  CheckedAttention(const Operator& op, const Tensor& target_, const Tensor& items_,
                   const Tensor& index_, const Tensor& offsets_, const Tensor& parallel_,
                   const Tensor& lists_, const Tensor& first_, const Tensor& first_bias_,
                   const Tensor& second_, const Tensor& second_bias_, const Tensor& last_)
      : target(op.float32("target", target_, {kAny, kAny})),
        items(op.float32("items", items_, {kAny, target.size(1)})),
        index(op.int64("index", index_, {kAny})),
        offsets(op.int64("offsets", offsets_, {target.size(0) + 1})),
        parallel(op.float32("parallel", parallel_, {index.size(0), kAny})),
        lists(op.float32("lists", lists_, {target.size(1), parallel.size(1)})),
        first(op.float32("first", first_, {kAny, 4 * target.size(1)})),
        first_bias(op.float32("first_bias", first_bias_, {first.size(0)})),
        second(op.float32("second", second_, {kAny, first.size(0)})),
        second_bias(op.float32("second_bias", second_bias_, {second.size(0)})),
        last(op.float32("last", last_, {1, second.size(0)})),
        s(sizes_of(target.size(0), items.size(0), index.size(0), target.size(1), first.size(0),
                   second.size(0), parallel.size(1))) {
    require_history(op, integers(index), s.N, s.U, integers(offsets), s.B);
  }

  Inputs inputs() const {
    return {floats(target),    floats(items),      floats(parallel), floats(lists),
            integers(index),   integers(offsets),  floats(first),    floats(first_bias),
            floats(second),    floats(second_bias), floats(last)};
  }
};

// -> interest [B, D], weights [N] and, if wanted, the units of both layers [N, u], else [N, 0]
std::tuple<Tensor, Tensor, Tensor> target_attention(
    const Tensor& target, const Tensor& items, const Tensor& index, const Tensor& offsets,
    const Tensor& parallel, const Tensor& lists, const Tensor& first, const Tensor& first_bias,
    const Tensor& second, const Tensor& second_bias, const Tensor& last, const Tensor& last_bias,
    bool keeps_units, bool bfloat16) {
  const Precision precision(bfloat16);
  const Operator op("target_attention");
  const CheckedAttention all(op, target, items, index, offsets, parallel, lists, first, first_bias,
                             second, second_bias, last);
  op.require_input("last_bias", last_bias, ScalarType::Float, {1});
  const Sizes& s = all.s;
  const Inputs in = all.inputs();
  const int64_t longest = longest_row(s, in.offsets);
  const Weights weights(s, in, false);
  const std::vector<int64_t> bounds = group_bounds(s, in.offsets);
  Tensor out = torch::stable::new_zeros(all.target, {s.B, s.D});
  Tensor shares = torch::stable::new_empty(all.target, {s.N});
  Tensor kept = torch::stable::new_empty(all.target, {s.N, keeps_units ? s.u : 0});
  float *to = mutable_floats(out), *share = mutable_floats(shares), *units = mutable_floats(kept);
  torch::stable::parallel_for(0, bounds.size() - 1, 1, [&](int64_t group, int64_t last_group) {
    const Precision of_thread(bfloat16);
    Forward forward(s, in, weights, longest);
    for_chunks(in.offsets, bounds[group], bounds[last_group], [&](const Chunk& chunk) {
      forward.compute(chunk, keeps_units ? units + chunk.first_item * s.u : forward.own_units);
      for (int64_t row = chunk.first_row; row < chunk.last_row; ++row) {
        const int64_t at = in.offsets[row] - chunk.first_item;
        const int64_t count = in.offsets[row + 1] - in.offsets[row];
        if (count)
          softmax_and_sum(s, forward.scores + at, forward.vectors + at * s.d, count,
                          share + in.offsets[row], to + row * s.D);
      }
    });
  });
  return {out, shares, kept};
}

// Sums the gradients of places [N, D] by unique item, in the order of places, into [U, D]: as one
// thread adds them up on the way.
void sum_by_item(const Sizes& s, const int64_t* index, const float* of_places, float* of_items) {
  std::vector<int64_t> starts(s.U + 1), places(s.N);
  for (int64_t n = 0; n < s.N; ++n) ++starts[index[n] + 1];
  for (int64_t item = 0; item < s.U; ++item) starts[item + 1] += starts[item];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < s.N; ++n) places[next[index[n]]++] = n;
  torch::stable::parallel_for(0, s.U, 256, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      float* to = of_items + item * s.D;
      for (int64_t at = starts[item]; at < starts[item + 1]; ++at) {
        const float* from = of_places + places[at] * s.D;
        if (at + kAhead < s.N) prefetch(of_places + places[at + kAhead] * s.D, s.D);
        add_row(to, from, s.D);
      }
    }
  });
}

// Writes a sum in the layout of `Weights` [rows, stride] as [columns, rows] with a row distance.
void write_transposed(const float* from, int64_t rows, int64_t stride, int64_t columns, float* to,
                      int64_t distance) {
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t row = 0; row < rows; ++row) to[column * distance + row] = from[row * stride + column];
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of lists [D, P], first [H, 4 D], its bias [H], second [G, H], its bias [G], last [1, G].
Gradients weight_gradients(const Sizes& s, const Tensor& like, const Sums& sums, Tensor of_target,
                           Tensor of_items) {
  const auto empty = [&](int64_t rows, int64_t columns) {
    return torch::stable::new_empty(like, {rows, columns});
  };
  Tensor lists = empty(s.D, s.P), first = empty(s.H, 4 * s.D), second = empty(s.G, s.H),
         last = empty(1, s.G), first_bias = torch::stable::new_empty(like, {s.H}),
         second_bias = torch::stable::new_empty(like, {s.G});
  write_transposed(sums.lists, s.P, s.d, s.D, mutable_floats(lists), s.P);
  float* of_first = mutable_floats(first);
  write_transposed(sums.of_items, s.D, s.h, s.H, of_first, 4 * s.D);
  write_transposed(sums.of_target, s.D, s.h, s.H, of_first + s.D, 4 * s.D);
  write_transposed(sums.of_products, s.D, s.h, s.H, of_first + 3 * s.D, 4 * s.D);
  for (int64_t unit = 0; unit < s.H; ++unit) {
    float* row = of_first + unit * 4 * s.D;
    for (int64_t k = 0; k < s.D; ++k) row[2 * s.D + k] = row[k] - row[s.D + k];
  }
  for (int64_t unit = 0; unit < s.G; ++unit)
    std::memcpy(mutable_floats(second) + unit * s.H, sums.second + unit * s.h,
                s.H * sizeof(float));
  std::memcpy(mutable_floats(first_bias), sums.first_bias, s.H * sizeof(float));
  std::memcpy(mutable_floats(second_bias), sums.second_bias, s.G * sizeof(float));
  std::memcpy(mutable_floats(last), sums.last, s.G * sizeof(float));
  return {of_target, of_items, lists, first, first_bias, second, second_bias, last};
}

Gradients target_attention_backward(
    const Tensor& gradient_, const Tensor& shares_, const Tensor& kept_, const Tensor& target,
    const Tensor& items, const Tensor& index, const Tensor& offsets, const Tensor& parallel,
    const Tensor& lists, const Tensor& first, const Tensor& first_bias, const Tensor& second,
    const Tensor& second_bias, const Tensor& last, bool bfloat16) {
  const Precision precision(bfloat16);
  const Operator op("target_attention_backward");
  const CheckedAttention all(op, target, items, index, offsets, parallel, lists, first, first_bias,
                             second, second_bias, last);
  const Sizes& s = all.s;
  const Inputs in = all.inputs();
  const Tensor gradient = op.float32("gradient", gradient_, {s.B, s.D});
  const Tensor shares = op.float32("shares", shares_, {s.N});
  const bool keeps_units = kept_.dim() > 1 && kept_.size(1) > 0;
  const Tensor kept = op.float32("kept", kept_, {s.N, keeps_units ? s.u : 0});
  const int64_t longest = longest_row(s, in.offsets);
  const Weights weights(s, in, true);
  const std::vector<int64_t> bounds = group_bounds(s, in.offsets);
  Tensor of_target = torch::stable::new_empty(all.target, {s.B, s.D});
  const bool by_place = torch::stable::get_num_threads() > 1;
  Tensor of_items = torch::stable::new_zeros(all.items, {s.U, s.D});
  Tensor of_places = torch::stable::new_empty(all.items, {by_place ? s.N : 0, s.D});
  const float *of_out = floats(gradient), *share = floats(shares);
  const float* units = keeps_units ? floats(kept) : nullptr;
  float *for_target = mutable_floats(of_target), *for_items = mutable_floats(of_items);
  float* for_places = by_place ? mutable_floats(of_places) : nullptr;
  const int64_t groups = bounds.size() - 1;
  std::vector<std::unique_ptr<Sums>> sums(groups);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Precision of_thread(bfloat16);
    for (int64_t group = begin; group < end; ++group) {
      sums[group] = std::make_unique<Sums>(s);
      Backward backward(s, in, weights, longest, *sums[group]);
      for_chunks(in.offsets, bounds[group], bounds[group + 1], [&](const Chunk& chunk) {
        backward.compute(chunk, of_out, share, units, for_target, for_places, for_items);
      });
    }
  });
  for (int64_t group = 1; group < groups; ++group) sums[0]->add(*sums[group]);
  if (by_place) sum_by_item(s, in.index, for_places, for_items);
  return weight_gradients(s, all.target, *sums[0], of_target, of_items);
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("target_attention", TORCH_BOX(&recsys::target_attention));
  library.impl("target_attention_backward", TORCH_BOX(&recsys::target_attention_backward));
}
