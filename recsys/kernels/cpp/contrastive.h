// A block of rows of the Content-ID-Contrastive loss against all rows of a batch, in cache.
//
// logit(i, j) = sharpness * content_i . ids_j. Row i and column i of the logits are two
// cross-entropies with the class i. Rows of the same item and padding rows are no negatives.
//
// Shapes: B rows, D dimension.
#pragma once

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "functions.h"
#include "linear_map.h"
#include "tensors.h"

namespace recsys {

constexpr int64_t kRowsOfLogits = 64;
constexpr float kLowest = -1e30;  // the maximum of nothing

struct ContrastiveSizes {
  int64_t B, D, b, d;  // the last two are distances of rows of B and D floats
};

// Both sides, normalised if wanted, with the lengths that they were divided by.
struct Side {
  Floats rows;  // [B, d]
  std::vector<float> lengths;
  bool is_normalised;

  Side(const ContrastiveSizes& s, const float* from, bool normalize, float shortest)
      : rows(s.B * s.d), lengths(s.B, 1), is_normalised(normalize) {
    for (int64_t row = 0; row < s.B; ++row) {
      float* to = rows + row * s.d;
      std::memcpy(to, from + row * s.D, s.D * sizeof(float));
      if (!normalize) continue;
      Vec squares{};
      for (int64_t k = 0; k < s.d; k += kLanes) squares += load(to + k) * load(to + k);
      const float length = std::sqrt(sum(squares));
      lengths[row] = length < shortest ? shortest : length;  // NaN stays NaN
      for (int64_t k = 0; k < s.d; k += kLanes) store(to + k, load(to + k) / splat(lengths[row]));
    }
  }

  // Turns the gradient of a row into that of the vector before it was normalised.
  void write_back(const ContrastiveSizes& s, int64_t row, float shortest, const float* gradient,
                  float* to) const {
    const float* own = rows + row * s.d;
    const bool is_on_sphere = is_normalised && lengths[row] > shortest;
    float along = 0;
    for (int64_t k = 0; is_on_sphere && k < s.D; ++k) along += own[k] * gradient[k];
    for (int64_t k = 0; k < s.D; ++k) to[k] = (gradient[k] - along * own[k]) / lengths[row];
  }
};

// Returns for each row the first row of its item; -1 for padding rows, and beyond the last row.
inline std::vector<int32_t> first_rows(const ContrastiveSizes& s, const int64_t* items) {
  std::vector<int32_t> codes(s.b, -1);
  std::unordered_map<int64_t, int32_t> firsts;
  for (int64_t row = 0; row < s.B; ++row)
    if (items[row] != -1) codes[row] = firsts.emplace(items[row], row).first->second;
  return codes;
}

inline Mask codes_at(const int32_t* codes) {
  Mask lanes;
  std::memcpy(&lanes, codes, sizeof lanes);
  return lanes;
}

inline Vec larger(Vec a, Vec b) { return select(a > b, a, b); }

// Maximum and sum of exp(value - maximum), from which log-sum-exp is made.
struct RunningSum {
  float highest = kLowest, total = 0;

  void add(float other_highest, float other_total) {
    const float both = std::max(highest, other_highest);
    total = total * std::exp(highest - both) + other_total * std::exp(other_highest - both);
    highest = both;
  }
  float log() const { return highest + std::log(total); }
};

class LogitsBlock {
 public:
  LogitsBlock(const ContrastiveSizes& sizes, const Side& content, const float* across,
              const std::vector<int32_t>& codes, float sharpness)
      : s(sizes),
        content(content),
        across(across),
        codes(codes.data()),
        scaled(kRowsOfLogits * s.d),
        zeros(s.b),
        sharpness(sharpness) {}

  // Fills logits [rows, b] of some rows from `row` on.
  void fill(int64_t row, int64_t rows, float* logits) {
    for (int64_t at = 0; at < rows * s.d; at += kLanes)
      store(scaled + at, load(content.rows + row * s.d + at) * splat(sharpness));
    multiply({s.D, scaled, s.d, 1, across, s.b, zeros, 0, logits, s.b, After::kNothing}, rows,
             padded(s.B));
  }

  // Returns log-sum-exp of row i: its own logit and those of its negatives.
  float row_sum(int64_t i, const float* logits) const {
    const Mask own = Mask{} + codes[i];
    const auto is_negative = [&](int64_t j) {
      const Mask other = codes_at(codes + j);
      return (other != own) & (other != -1);
    };
    Vec maxima = splat(logits[i]), totals{};
    for (int64_t j = 0; j < s.B; j += kLanes)
      maxima = select(is_negative(j), larger(load(logits + j), maxima), maxima);
    float highest = maxima[0];
    for (int lane = 1; lane < kLanes; ++lane) highest = std::max(highest, maxima[lane]);
    for (int64_t j = 0; j < s.B; j += kLanes)
      totals += select(is_negative(j), exp_of_negative(load(logits + j) - splat(highest)), Vec{});
    return highest + std::log(sum(totals) + std::exp(logits[i] - highest));
  }

  // Adds rows to the running sums of the columns: `highest` and `total` [b].
  void add_to_columns(int64_t row, int64_t rows, const float* logits, float* highest,
                      float* total) const {
    for (int64_t j = 0; j < s.B; j += kLanes) {
      const Vec before = load(highest + j);
      Vec maxima = before;
      for (int64_t r = 0; r < rows; ++r)
        maxima = select(is_of_column(row + r, j), larger(load(logits + r * s.b + j), maxima), maxima);
      Vec sums = load(total + j) * exp_of_negative(before - maxima);
      for (int64_t r = 0; r < rows; ++r)
        sums += select(is_of_column(row + r, j),
                       exp_of_negative(load(logits + r * s.b + j) - maxima), Vec{});
      store(highest + j, maxima);
      store(total + j, sums);
    }
  }

  // Turns the logits of row i into their gradients.
  void gradient(int64_t i, const float* of_losses, const float* row_logs, const float* column_logs,
                float* logits) const {
    const Vec of_row = splat(0.5f * of_losses[i]), log = splat(row_logs[i]);
    const Mask own = Mask{} + codes[i];
    const float itself = logits[i];
    for (int64_t j = 0; j < s.B; j += kLanes) {
      const Mask other = codes_at(codes + j);
      const Vec value = load(logits + j), of_column = load(of_losses + j) * splat(0.5f);
      const Vec in_row = of_row * exp_of_negative(value - log);
      const Vec in_column = of_column * exp_of_negative(value - load(column_logs + j));
      store(logits + j, select((other != own) & (other != -1), in_row, Vec{}) +
                            select(is_of_column(i, j), in_column, Vec{}));
    }
    logits[i] = 0.5f * of_losses[i] *
                (std::exp(itself - row_logs[i]) - 1 + std::exp(itself - column_logs[i]) - 1);
  }

 private:
  // Lanes of row i that are in the sums of the columns from j on, but for the row's own column.
  Mask is_of_column(int64_t i, int64_t j) const {
    return codes[i] == -1 ? Mask{} : Mask(codes_at(codes + j) != codes[i]);
  }

  const ContrastiveSizes& s;
  const Side& content;
  const float* across;
  const int32_t* codes;
  Floats scaled, zeros;
  float sharpness;
};

}  // namespace recsys
