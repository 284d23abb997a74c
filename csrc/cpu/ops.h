// The overloads `cpu` of the ops; geko_kernels/reference/ops.py says what each equals. They take (B, S, V) logits with
// (B, S) labels, and also (B, V) with (B,).
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "csrc/cpu/tensors.h"
#include "csrc/cpu/layout.h"

namespace geko {

using Optional = std::optional<Tensor>;
using Columns = std::vector<Tensor>;  // of a `SampleState`, in the order of geko_kernels/columns.py; or none
using Update = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A batch, and the tensors that keep its labels and ids alive.
struct HeldBatch : Batch {
  HeldBatch(const Tensor& labels, const Optional& sample_ids, int64_t vocab, int64_t ignore_index, bool shift);
  Tensor held_labels;
  Optional held_ids;
};

// The addresses, sizes and element type of the rows of (B, S, V) or (B, V) logits.
struct Rows {
  explicit Rows(const Tensor& logits);
  char* at(int64_t token) const {
    const int64_t row = quotient(token, length);
    return base + (row * strides[0] + (token - row * length) * strides[1]) * size;
  }
  char* base;
  int64_t batch, length, vocab, size, strides[3], element;
};

// Throws std::runtime_error unless there is one label for each row of logits.
void check_rows(const Tensor& logits, const Tensor& labels);

// Call it after `check_rows`.
HeldBatch batch_of(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, int64_t ignore_index, bool shift);

// `token_stats` of the tokens [start, stop), written to `out` (5, T).
struct Scorer {
  Scorer(const Tensor& logits, const HeldBatch& batch, const Tensor& out, double softcap);
  void operator()(int64_t start, int64_t stop) const;
  Rows rows;
  const HeldBatch& batch;
  float* stats;
  float softcap;
};

Tensor token_stats(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, int64_t ignore_index, bool shift,
    double softcap);

// `strict`: throws if a label or an id is out of range, before anything is counted. Without `stats` the last three
// tensors are empty.
Update sample_update_(
    const Tensor& tokens, const Tensor& labels, const Optional& sample_ids, const Tensor& rules, const Tensor& weights,
    const Optional& num_items, const Columns& columns, const Optional& error, int64_t vocab, int64_t reduction,
    int64_t ignore_index, bool shift, bool update, const Optional& token_weights, const Optional& sample_weights,
    bool strict, bool stats);

Forward loss_forward_(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, const Tensor& rules, const Tensor& weights,
    const Optional& num_items, const Columns& columns, const Optional& error, int64_t reduction, int64_t ignore_index,
    bool shift, double softcap, bool update, const Optional& token_weights, const Optional& sample_weights,
    bool strict, bool stats);

Tensor logits_grad(
    const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens, const Tensor& coeff,
    const Tensor& scale, const Tensor& token_visit, bool shift, double softcap);

void logits_grad_(
    const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens, const Tensor& coeff,
    const Tensor& scale, const Tensor& token_visit, bool shift, double softcap);

std::tuple<Tensor, Tensor, Tensor> scored_rows(
    const Tensor& labels, const Optional& sample_ids, int64_t vocab, int64_t ignore_index, bool shift);

// `fused` must be false.
void score_rows_(
    const Tensor& logits, const Tensor& rows, const Tensor& targets, const Tensor& tokens, bool fused, int64_t slot,
    int64_t start, int64_t count, int64_t vocab, double softcap);

Tensor kept_rows_(
    const Tensor& coeff, const Tensor& rows, const Tensor& positions, const Tensor& sources, int64_t held,
    int64_t start, int64_t count);

void gradient_rows_(
    const Tensor& logits, const Tensor& positions, const Optional& sources, const Optional& end, const Tensor& labels,
    const Tensor& tokens, int64_t first, int64_t last, int64_t ready_from, int64_t vocab, bool shift, double softcap);

Tensor gather_rows(const Tensor& hidden, const Tensor& positions, const Tensor& coeff, int64_t count);

void scatter_rows_(
    const Tensor& out, const Tensor& product, const Tensor& positions, const Tensor& coeff, int64_t first);

Tensor column_sums(const Tensor& tile, const Tensor& by_row);

void rescale_(const Tensor& values, const Tensor& factor);

}  // namespace geko
