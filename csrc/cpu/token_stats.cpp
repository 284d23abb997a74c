// The forward over the logits: reads each scored row once and writes five floats a token.
#include "csrc/cpu/ops.h"

namespace geko {
namespace {

// `tensor` made contiguous, after the checks that must precede a copy.
Tensor integers(const Tensor& tensor, bool fits, const char* name, const char* shape) {
  STD_TORCH_CHECK(
      fits && tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long && has_memory(tensor), name, " must be ",
      shape, " Long on the CPU, got ", shape_and_type(tensor));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace

HeldBatch::HeldBatch(
    const Tensor& labels, const Optional& sample_ids, int64_t vocab, int64_t ignore_index, bool shift)
    : Batch{}, held_labels(integers(labels, labels.dim() == 1 || labels.dim() == 2, "labels", "(B, S) or (B,)")) {
  this->batch = labels.size(0), this->length = labels.dim() == 2 ? labels.size(1) : 1, this->vocab = vocab;
  this->ignore_index = ignore_index, this->shift = shift;
  STD_TORCH_CHECK(
      std::max(tokens(), batch) <= INT32_MAX, "labels must have at most 2^31 - 1 rows and elements, got ",
      shape_and_type(labels));
  this->labels = static_cast<const int64_t*>(held_labels.data_ptr());
  if (!sample_ids) return;
  const bool fits = has_shape(*sample_ids, {batch}) || has_shape(*sample_ids, {batch, length});
  held_ids = integers(*sample_ids, fits, "sample_ids", "(B,) or (B, S) like the labels,");
  this->packed = sample_ids->dim() == 2;
  this->ids = packed ? data<int64_t>(held_ids, {batch, length}, "sample_ids")
                     : data<int64_t>(held_ids, {batch}, "sample_ids");
}

Rows::Rows(const Tensor& logits) {
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(
      logits.is_cpu() && (dims == 2 || dims == 3) && has_memory(logits),
      "logits must be (B, S, V) or (B, V) on the CPU, got ", shape_and_type(logits));
  const ScalarType type = logits.scalar_type();
  element = type == ScalarType::Float ? FLOAT32 : type == ScalarType::BFloat16 ? BFLOAT16 : FLOAT16;
  STD_TORCH_CHECK(
      element != FLOAT16 || type == ScalarType::Half, "logits must be float32, bfloat16 or float16, got ",
      shape_and_type(logits));
  base = static_cast<char*>(logits.data_ptr());
  size = static_cast<int64_t>(logits.element_size());
  batch = logits.size(0), length = dims == 3 ? logits.size(1) : 1, vocab = logits.size(dims - 1);
  strides[0] = logits.stride(0), strides[1] = dims == 3 ? logits.stride(1) : 0, strides[2] = logits.stride(dims - 1);
}

void check_rows(const Tensor& logits, const Tensor& labels) {
  const int64_t dims = labels.dim();
  STD_TORCH_CHECK(
      logits.dim() == 3 || dims == 1, "logits must be (B, S, V) for labels ", shape_and_type(labels), ", got ",
      shape_and_type(logits));
  STD_TORCH_CHECK(
      dims == logits.dim() - 1 && labels.size(0) == logits.size(0) && (dims == 1 || labels.size(1) == logits.size(1)),
      "labels must have the logits' shape without V, that of ", shape_and_type(logits), ", got ",
      shape_and_type(labels));
}

HeldBatch batch_of(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, int64_t ignore_index, bool shift) {
  const Rows rows(logits);
  check_rows(logits, labels);
  return HeldBatch(labels, sample_ids, rows.vocab, ignore_index, shift);
}

Scorer::Scorer(const Tensor& logits, const HeldBatch& batch, const Tensor& out, double softcap)
    : rows(logits), batch(batch), stats(data<float>(out, {5, batch.tokens()}, "out")), softcap(softcap) {}

void Scorer::operator()(int64_t start, int64_t stop) const {
  const StatsKernel kernel = row_kernels().stats[rows.element];
  const int64_t tokens = batch.tokens();
  Row group[kGroup];
  TokenStats found[kGroup];
  int64_t at[kGroup], held = 0;
  const auto write = [&](int64_t t, const TokenStats& one) {
    stats[t] = one.loss, stats[tokens + t] = one.top, stats[2 * tokens + t] = one.log_sum;
    stats[3 * tokens + t] = one.confidence, stats[4 * tokens + t] = one.hit;
  };
  for (int64_t t = start; t < stop; ++t) {
    const int64_t target = batch.target_of(t);
    if (batch.in_vocab(target)) {
      group[held] = {rows.at(t), rows.strides[2], rows.vocab, target, softcap};
      at[held++] = t;
    } else {
      write(t, {});
    }
    if (held == 0 || (held < kGroup && t + 1 < stop)) continue;
    kernel(group, held, found);
    for (int64_t i = 0; i < held; ++i) write(at[i], found[i]);
    held = 0;
  }
}

Tensor token_stats(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, int64_t ignore_index, bool shift,
    double softcap) {
  const HeldBatch batch = batch_of(logits, labels, sample_ids, ignore_index, shift);
  Tensor out = empty({5, batch.tokens()}, ScalarType::Float);
  const Scorer score(logits, batch, out, softcap);
  for_each_parallel(batch.tokens(), rows_a_step(score.rows.vocab), score);
  return out;
}

}  // namespace geko
