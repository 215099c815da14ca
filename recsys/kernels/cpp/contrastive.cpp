// Operators recsys::in_batch_contrastive and its backward; see contrastive.h.
#include "contrastive.h"

namespace recsys {
namespace {

constexpr float kShortest = 1e-5;
constexpr int64_t kBlocksOfGroup = 4, kMaxGroupsOfRows = 8;

ContrastiveSizes sizes_of(const Tensor& content) {
  ContrastiveSizes s{content.size(0), content.size(1), 0, 0};
  s.b = distance_of(s.B), s.d = padded(s.D);
  return s;
}

// Groups of rows depend on the batch alone, so that sums do not depend on the number of threads.
int64_t num_groups(const ContrastiveSizes& s) {
  return std::clamp<int64_t>(s.B / (kBlocksOfGroup * kRowsOfLogits), 1, kMaxGroupsOfRows);
}

// Calls work(group, first row, number of rows) for blocks of the rows of a group, groups at once.
template <class Start, class Work>
void for_blocks(const ContrastiveSizes& s, const Start& start, const Work& work) {
  const int64_t groups = num_groups(s);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      auto state = start(group);
      const int64_t last = s.B * (group + 1) / groups;
      for (int64_t row = s.B * group / groups; row < last; row += kRowsOfLogits)
        work(state, row, std::min(kRowsOfLogits, last - row));
    }
  });
}

// rows [B, d] -> [D, b]
Floats transposed(const ContrastiveSizes& s, const float* rows) {
  Floats to(s.D * s.b);
  for (int64_t row = 0; row < s.B; ++row)
    for (int64_t k = 0; k < s.D; ++k) to[k * s.b + row] = rows[row * s.d + k];
  return to;
}

// -> losses [B], logs of the sums of rows and columns [2, B] and, if wanted, logits [B, b]
std::tuple<Tensor, Tensor, Tensor> in_batch_contrastive(const Tensor& content_, const Tensor& ids_,
                                                        const Tensor& items_,
                                                        const Tensor& sharpness, bool normalize,
                                                        bool keeps) {
  const Operator op("in_batch_contrastive");
  const Tensor of_content = op.float32("content", content_, {kAny, kAny});
  const ContrastiveSizes s = sizes_of(of_content);
  const Tensor of_ids = op.float32("ids", ids_, {s.B, s.D});
  const Tensor items = op.int64("items", items_, {s.B});
  const float sharp = *floats(op.float32("sharpness", sharpness, {}));
  const Side content(s, floats(of_content), normalize, kShortest);
  const Side ids(s, floats(of_ids), normalize, kShortest);
  const Floats across = transposed(s, ids.rows);
  const std::vector<int32_t> codes = first_rows(s, integers(items));
  Tensor losses = torch::stable::new_empty(of_content, {s.B});
  Tensor logs = torch::stable::new_empty(of_content, {2, s.B});
  Tensor kept = torch::stable::new_empty(of_content, {keeps ? s.B : 0, s.b});
  float *loss = mutable_floats(losses), *log = mutable_floats(logs), *all = mutable_floats(kept);
  std::vector<float> own(s.B), highest(num_groups(s) * s.b, kLowest), total(num_groups(s) * s.b);
  struct State {
    LogitsBlock block;
    Floats buffer;
    float *highest, *total;
  };
  for_blocks(
      s,
      [&](int64_t group) {
        return State{{s, content, across, codes, sharp},
                     Floats(keeps ? 0 : kRowsOfLogits * s.b),
                     highest.data() + group * s.b,
                     total.data() + group * s.b};
      },
      [&](State& state, int64_t row, int64_t rows) {
        float* logits = keeps ? all + row * s.b : state.buffer;
        state.block.fill(row, rows, logits);
        for (int64_t r = 0; r < rows; ++r) {
          own[row + r] = logits[r * s.b + row + r];
          log[row + r] = state.block.row_sum(row + r, logits + r * s.b);
        }
        state.block.add_to_columns(row, rows, logits, state.highest, state.total);
      });
  for (int64_t row = 0; row < s.B; ++row) {
    RunningSum column{own[row], 1};
    for (int64_t group = 0; group < num_groups(s); ++group)
      column.add(highest[group * s.b + row], total[group * s.b + row]);
    log[s.B + row] = column.log();
    loss[row] = 0.5f * (log[row] - own[row] + log[s.B + row] - own[row]);
  }
  return {losses, logs, kept};
}

// -> gradients of content [B, D], ids [B, D] and sharpness []
std::tuple<Tensor, Tensor, Tensor> in_batch_contrastive_backward(
    const Tensor& gradient_, const Tensor& logs_, const Tensor& kept_, const Tensor& content_,
    const Tensor& ids_, const Tensor& items_, const Tensor& sharpness, bool normalize) {
  const Operator op("in_batch_contrastive_backward");
  const Tensor of_content = op.float32("content", content_, {kAny, kAny});
  const ContrastiveSizes s = sizes_of(of_content);
  const Tensor of_ids = op.float32("ids", ids_, {s.B, s.D});
  const Tensor items = op.int64("items", items_, {s.B});
  const Tensor gradient = op.float32("gradient", gradient_, {s.B});
  const Tensor logs = op.float32("logs", logs_, {2, s.B});
  const bool keeps = kept_.dim() > 0 && kept_.size(0) > 0;
  const Tensor kept = op.float32("kept", kept_, {keeps ? s.B : 0, s.b});
  const float sharp = *floats(op.float32("sharpness", sharpness, {}));
  const float* log = floats(logs);
  const Side content(s, floats(of_content), normalize, kShortest);
  const Side ids(s, floats(of_ids), normalize, kShortest);
  const Floats across = keeps ? Floats(0) : transposed(s, ids.rows);
  const std::vector<int32_t> codes = first_rows(s, integers(items));
  Floats of_losses(s.b), column_logs(s.b), zeros(s.d), along(s.B);
  std::memcpy(of_losses, floats(gradient), s.B * sizeof(float));
  std::memcpy(column_logs, log + s.B, s.B * sizeof(float));
  Tensor to_content = torch::stable::empty_like(of_content);
  Tensor to_ids = torch::stable::empty_like(of_ids);
  Tensor to_sharpness = torch::stable::empty_like(sharpness);
  std::vector<Floats> sums;  // gradients of ids / sharpness, by group
  for (int64_t group = 0; group < num_groups(s); ++group) sums.emplace_back(s.B * s.d);
  struct State {
    LogitsBlock block;
    Floats logits, of_rows;
    float* of_ids;
  };
  for_blocks(
      s,
      [&](int64_t group) {
        return State{{s, content, across, codes, sharp},
                     Floats(kRowsOfLogits * s.b),
                     Floats(kRowsOfLogits * s.d),
                     sums[group]};
      },
      [&](State& state, int64_t row, int64_t rows) {
        if (keeps)
          std::memcpy(state.logits, floats(kept) + row * s.b, rows * s.b * sizeof(float));
        else
          state.block.fill(row, rows, state.logits);
        for (int64_t r = 0; r < rows; ++r)
          state.block.gradient(row + r, of_losses, log, column_logs, state.logits + r * s.b);
        multiply({s.B, state.logits, s.b, 1, ids.rows, s.d, zeros, 0, state.of_rows, s.d,
                  After::kNothing},
                 rows, s.d);
        multiply({rows, state.logits, 1, s.b, content.rows + row * s.d, s.d, state.of_ids, s.d,
                  state.of_ids, s.d, After::kNothing},
                 s.B, s.d);
        for (int64_t r = 0; r < rows; ++r) {
          float* own = state.of_rows + r * s.d;
          for (int64_t k = 0; k < s.D; ++k) {
            along[row + r] += own[k] * content.rows[(row + r) * s.d + k];
            own[k] *= sharp;
          }
          content.write_back(s, row + r, kShortest, own,
                             mutable_floats(to_content) + (row + r) * s.D);
        }
      });
  float of_sharpness = 0;
  for (int64_t row = 0; row < s.B; ++row) {
    float* own = sums[0] + row * s.d;
    for (int64_t k = 0; k < s.D; ++k) {
      for (size_t group = 1; group < sums.size(); ++group) own[k] += sums[group][row * s.d + k];
      own[k] *= sharp;
    }
    ids.write_back(s, row, kShortest, own, mutable_floats(to_ids) + row * s.D);
    of_sharpness += along[row];
  }
  *mutable_floats(to_sharpness) = of_sharpness;
  return {to_content, to_ids, to_sharpness};
}

}  // namespace
}  // namespace recsys

STABLE_TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("in_batch_contrastive", TORCH_BOX(&recsys::in_batch_contrastive));
  library.impl("in_batch_contrastive_backward", TORCH_BOX(&recsys::in_batch_contrastive_backward));
}
