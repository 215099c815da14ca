// Operators recsys::content_interest and its backward: attention of dot products over items that
// get no gradient, and their cosines to the target in several spaces, one row after the other.
//
// Shapes: as in content_interest.h.
#include "content_interest.h"
#include "history.h"

namespace recsys {
namespace {

constexpr int64_t kRowsPerTask = 32, kItemsOfBlock = 64, kBlocksPerTask = 16, kMaxSums = 32;

struct InterestInputs {
  const float *queries, *items, *map, *of_lists, *parallel;
  const int64_t *index, *offsets;
};

// Items keep the distance of their rows, so that a slice of a wider tensor is not copied.
Tensor with_whole_rows(const Operator& op, const Tensor& items, const Tensor& queries) {
  const int64_t width = std::max<int64_t>(queries.size(1) - 1, 1) * queries.size(2);
  op.require_input("items", items, ScalarType::Float, {kAny, kAny});
  op.require(items.size(1) >= width, "items is ", described(items), ", but must have ", width,
             " columns or more");
  return items.stride(1) == 1 ? items : torch::stable::contiguous(items);
}

// The inputs, whose types, shapes and places in memory are as the kernel reads them.
struct CheckedInterest {
  Tensor queries, items, map, index, offsets, parallel, of_lists;
  InterestSizes s;

  CheckedInterest(const Operator& op, const Tensor& queries_, const Tensor& items_,
                  const Tensor& map_, const Tensor& index_, const Tensor& offsets_,
                  const Tensor& of_lists_, const Tensor& parallel_)
      : queries(op.float32("queries", queries_, {kAny, kAny, kAny})),
        items(with_whole_rows(op, items_, queries)),
        map(op.float32("map", map_, {queries.size(2), queries.size(2)})),
        index(op.int64("index", index_, {kAny})),
        offsets(op.int64("offsets", offsets_, {queries.size(0) + 1})),
        parallel(op.float32("parallel", parallel_, {index.size(0), kAny})),
        of_lists(op.float32("of_lists", of_lists_, {queries.size(0), parallel.size(1)})),
        s{queries.size(0),     items.size(0),    index.size(0),   queries.size(2),
          queries.size(1) - 1, parallel.size(1), items.stride(0), padded(queries.size(2))} {
    op.require(s.S >= 0, "queries is ", described(queries), ", but must have one query or more");
    require_history(op, integers(index), s.N, s.U, integers(offsets), s.B);
  }

  InterestInputs inputs() const {
    return {floats(queries),  floats(items),   floats(map),      floats(of_lists),
            floats(parallel), integers(index), integers(offsets)};
  }
};

// Fills the inverse lengths [U, S] of items: of the mapped vector in the first space.
void invert_lengths(const InterestSizes& s, const InterestInputs& in, float* inverse) {
  Floats columns(s.D * s.d), zeros(s.d);
  for (int64_t row = 0; row < s.D; ++row)
    for (int64_t k = 0; k < s.D; ++k) columns[k * s.d + row] = in.map[row * s.D + k];
  const int64_t blocks = (s.U + kItemsOfBlock - 1) / kItemsOfBlock;
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t first, int64_t last) {
    Floats mapped(kItemsOfBlock * s.d);
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * kItemsOfBlock;
      const int64_t count = std::min(kItemsOfBlock, s.U - start);
      multiply({s.D, in.items + start * s.stride, s.stride, 1, columns, s.d, zeros, 0, mapped, s.d,
                After::kNothing},
               count, s.d);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t space = 0; space < s.S; ++space) {
          const float* item = in.items + (start + t) * s.stride + space * s.D;
          const float* vector = space ? item : mapped + t * s.d;
          Vec total{};
          for (int64_t k = 0; k < s.D; k += kLanes) {
            const Vec part = load_first(vector + k, s.D - k);
            total += part * part;
          }
          inverse[(start + t) * s.S + space] = 1 / std::max(std::sqrt(sum(total)), kShortestVector);
        }
    }
  });
}

// The items of one row and buffers for its work.
class Row {
 public:
  Row(const InterestSizes& sizes, const InterestInputs& inputs)
      : s(sizes), in(inputs), vector(s.d), groups(s) {}

  // Finds the items of row b, and asks for the memory of those of the next one.
  void open(int64_t b) {
    start = in.offsets[b], count = in.offsets[b + 1] - start;
    parallel = in.parallel + start * s.P;
    items.resize(count), shares.resize(count);
    for (int64_t t = 0; t < count; ++t) items[t] = in.items + in.index[start + t] * s.stride;
    const int64_t width = std::max<int64_t>(s.S, 1) * s.D;
    for (int64_t n = start + count; n < (b + 1 < s.B ? in.offsets[b + 2] : 0); ++n)
      prefetch(in.items + in.index[n] * s.stride, width);
  }

  // Returns D floats in a padded vector.
  const float* padded_vector(const float* from) {
    std::memcpy(vector, from, s.D * sizeof(float));
    return vector;
  }

  // Fills values [T] with dot products of D floats and the items' vectors in a space.
  void dots_with(const float* query, int64_t space, float* values) {
    dots(padded_vector(query), items.data(), space * s.D, count, s.D, values);
  }

  // Writes the sum of factors [T] times the items' vectors in a space: D floats.
  void sum_to(const float* factors, int64_t space, float* out) {
    weighted_sum(factors, items.data(), space * s.D, count, s.D, vector);
    std::memcpy(out, vector, s.D * sizeof(float));
  }

  // Adds the dot products of a list's factors [P] and the parallel lists to values [T].
  void add_lists(const float* factors, float* values) const {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t p = 0; p < s.P; ++p) values[t] += factors[p] * parallel[t * s.P + p];
  }

  // Writes the sums of factors [T] times the parallel lists: P floats.
  void sum_lists_to(const float* factors, float* out) const {
    for (int64_t p = 0; p < s.P; ++p) out[p] = 0;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t p = 0; p < s.P; ++p) out[p] += factors[t] * parallel[t * s.P + p];
  }

  const InterestSizes& s;
  const InterestInputs& in;
  int64_t start = 0, count = 0;
  const float* parallel = nullptr;
  std::vector<const float*> items;
  std::vector<float> shares;  // of Groups
  Floats vector;
  Groups groups;
};

// -> sums [B, D + P], features [B, S * F], weights [N], cosines [S, N], inverse lengths [U, S]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> content_interest(
    const Tensor& queries, const Tensor& items, const Tensor& map, const Tensor& index,
    const Tensor& offsets, const Tensor& of_lists, const Tensor& parallel) {
  const CheckedInterest all(Operator("content_interest"), queries, items, map, index, offsets,
                            of_lists, parallel);
  const InterestSizes& s = all.s;
  const InterestInputs in = all.inputs();
  const auto zeros = [&](int64_t rows, int64_t columns) {
    return torch::stable::new_zeros(all.queries, {rows, columns});
  };
  Tensor sums = zeros(s.B, s.D + s.P), features = zeros(s.B, s.S * s.F());
  Tensor weights = torch::stable::new_empty(all.queries, {s.N});
  Tensor cosines = torch::stable::new_empty(all.queries, {s.S, s.N});
  Tensor inverse = torch::stable::new_empty(all.queries, {s.U, s.S});
  float *to_sums = mutable_floats(sums), *to_features = mutable_floats(features);
  float *weight = mutable_floats(weights), *cosine = mutable_floats(cosines);
  float* of_length = mutable_floats(inverse);
  if (s.S) invert_lengths(s, in, of_length);
  torch::stable::parallel_for(0, s.B, kRowsPerTask, [&](int64_t first, int64_t last) {
    Row row(s, in);
    for (int64_t b = first; b < last; ++b) {
      row.open(b);
      if (!row.count) continue;  // zeros
      const float* query = in.queries + b * (1 + s.S) * s.D;
      float *own = weight + row.start, *of_row = to_sums + b * (s.D + s.P);
      row.dots_with(query, 0, own);
      row.add_lists(in.of_lists + b * s.P, own);
      softmax(own, row.count);
      row.sum_to(own, 0, of_row);
      row.sum_lists_to(own, of_row + s.D);
      for (int64_t space = 0; space < s.S; ++space) {
        float* of_space = cosine + space * s.N + row.start;
        row.dots_with(query + (space + 1) * s.D, space, of_space);
        for (int64_t t = 0; t < row.count; ++t)
          of_space[t] *= of_length[in.index[row.start + t] * s.S + space];
        row.groups.read(of_space, row.parallel, row.count, row.shares.data());
        row.groups.write(to_features + (b * s.S + space) * s.F());
      }
    }
  });
  return {sums, features, weights, cosines, inverse};
}

// Returns the gradient of the map [D, D] from those of the lengths: the inverse length i of M v has
// the gradient -i^3 M v v^T, and of_places [N] holds i times each gradient of i, at its place.
Tensor map_gradient(const InterestSizes& s, const InterestInputs& in, const float* inverse,
                    const float* of_places, const Tensor& like) {
  std::vector<float> factors(s.U);
  for (int64_t n = 0; n < s.N; ++n) factors[in.index[n]] += of_places[n];
  for (int64_t item = 0; item < s.U; ++item) {
    const float of_length = inverse[item * s.S];
    factors[item] = of_length < 1 / kShortestVector ? -factors[item] * of_length * of_length : 0;
  }
  const int64_t blocks = (s.U + kItemsOfBlock - 1) / kItemsOfBlock;
  const int64_t groups = std::clamp<int64_t>(blocks / kBlocksPerTask, 1, kMaxSums);
  std::vector<std::unique_ptr<Floats>> squares(groups);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    Floats vectors(kItemsOfBlock * s.d), scaled(kItemsOfBlock * s.d);
    for (int64_t group = first; group < last; ++group) {
      squares[group] = std::make_unique<Floats>(s.D * s.d);
      float* to = *squares[group];
      for (int64_t block = blocks * group / groups; block < blocks * (group + 1) / groups; ++block) {
        const int64_t start = block * kItemsOfBlock;
        const int64_t count = std::min(kItemsOfBlock, s.U - start);
        for (int64_t t = 0; t < count; ++t) {
          std::memcpy(vectors + t * s.d, in.items + (start + t) * s.stride, s.D * sizeof(float));
          const Vec factor = splat(factors[start + t]);
          for (int64_t k = 0; k < s.d; k += kLanes)
            store(scaled + t * s.d + k, factor * load(vectors + t * s.d + k));
        }
        multiply({count, scaled, 1, s.d, vectors, s.d, to, s.d, to, s.d, After::kNothing}, s.D, s.d);
      }
    }
  });
  Floats& total = *squares[0];
  for (int64_t group = 1; group < groups; ++group) total.add(*squares[group]);
  Floats product(s.D * s.d), zeros(s.d);
  multiply({s.D, in.map, s.D, 1, total, s.d, zeros, 0, product, s.d, After::kNothing}, s.D, s.d);
  Tensor out = torch::stable::new_empty(like, {s.D, s.D});
  for (int64_t row = 0; row < s.D; ++row)
    std::memcpy(mutable_floats(out) + row * s.D, product + row * s.d, s.D * sizeof(float));
  return out;
}

// -> gradients of queries [B, 1 + S, D], map [D, D], of_lists [B, P]
std::tuple<Tensor, Tensor, Tensor> content_interest_backward(
    const Tensor& of_sums_, const Tensor& of_features_, const Tensor& weights_,
    const Tensor& cosines_, const Tensor& inverse_, const Tensor& queries, const Tensor& items,
    const Tensor& map, const Tensor& index, const Tensor& offsets, const Tensor& of_lists,
    const Tensor& parallel) {
  const Operator op("content_interest_backward");
  const CheckedInterest all(op, queries, items, map, index, offsets, of_lists, parallel);
  const InterestSizes& s = all.s;
  const InterestInputs in = all.inputs();
  const Tensor of_sums = op.float32("of_sums", of_sums_, {s.B, s.D + s.P});
  const Tensor of_features = op.float32("of_features", of_features_, {s.B, s.S * s.F()});
  const Tensor weights = op.float32("weights", weights_, {s.N});
  const Tensor cosines = op.float32("cosines", cosines_, {s.S, s.N});
  const Tensor inverse = op.float32("inverse", inverse_, {s.U, s.S});
  const float *sums = floats(of_sums), *features = floats(of_features), *weight = floats(weights);
  const float *cosine = floats(cosines), *of_length = floats(inverse);
  Tensor to_queries = torch::stable::new_empty(all.queries, {s.B, 1 + s.S, s.D});
  Tensor to_lists = torch::stable::new_empty(all.of_lists, {s.B, s.P});
  float *for_queries = mutable_floats(to_queries), *for_lists = mutable_floats(to_lists);
  std::vector<float> of_lengths(s.S ? s.N : 0);
  torch::stable::parallel_for(0, s.B, kRowsPerTask, [&](int64_t first, int64_t last) {
    Row row(s, in);
    std::vector<float> of_places;
    for (int64_t b = first; b < last; ++b) {
      row.open(b);
      of_places.resize(row.count);
      const float *own = weight + row.start, *of_row = sums + b * (s.D + s.P);
      float *to = for_queries + b * (1 + s.S) * s.D, mean = 0;
      row.dots_with(of_row, 0, of_places.data());
      row.add_lists(of_row + s.D, of_places.data());
      for (int64_t t = 0; t < row.count; ++t) mean += own[t] * of_places[t];
      for (int64_t t = 0; t < row.count; ++t) of_places[t] = own[t] * (of_places[t] - mean);
      row.sum_to(of_places.data(), 0, to);
      row.sum_lists_to(of_places.data(), for_lists + b * s.P);
      for (int64_t space = 0; space < s.S; ++space) {
        const float* of_space = cosine + space * s.N + row.start;
        row.groups.backward(features + (b * s.S + space) * s.F(), of_space, row.parallel,
                            row.count, row.shares.data(), of_places.data());
        for (int64_t t = 0; t < row.count; ++t) {
          if (!space) of_lengths[row.start + t] = of_places[t] * of_space[t];
          of_places[t] *= of_length[in.index[row.start + t] * s.S + space];
        }
        row.sum_to(of_places.data(), space, to + (space + 1) * s.D);
      }
    }
  });
  Tensor to_map = s.S ? map_gradient(s, in, of_length, of_lengths.data(), all.map)
                      : torch::stable::new_zeros(all.map, {s.D, s.D});
  return {to_queries, to_map, to_lists};
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("content_interest", TORCH_BOX(&recsys::content_interest));
  library.impl("content_interest_backward", TORCH_BOX(&recsys::content_interest_backward));
}
