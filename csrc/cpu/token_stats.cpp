// Forward over the logits: reads each scored row once, writes five floats a token.
#include "csrc/cpu/ops.h"

namespace geko {

HeldBatch::HeldBatch(
    const Tensor& labels, const Optional& sample_ids, int64_t vocab, int64_t ignore_index, bool shift)
    : Batch{}, held_labels(torch::stable::contiguous(labels)) {
  if (sample_ids) held_ids = torch::stable::contiguous(*sample_ids);
  this->batch = labels.size(0), this->length = labels.size(1), this->vocab = vocab;
  this->ignore_index = ignore_index, this->shift = shift;
  this->packed = sample_ids && sample_ids->dim() == 2;
  this->labels = data<int64_t>(held_labels, tokens(), "labels");
  this->ids = data<int64_t>(held_ids, packed ? tokens() : batch, "sample_ids");
}

Rows::Rows(const Tensor& logits) : base(static_cast<char*>(logits.data_ptr())) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 3, "logits must be (B, S, V) on the CPU");
  const ScalarType type = logits.scalar_type();
  element = type == ScalarType::Float ? FLOAT32 : type == ScalarType::BFloat16 ? BFLOAT16 : FLOAT16;
  STD_TORCH_CHECK(element != FLOAT16 || type == ScalarType::Half, "logits must be float32, bfloat16 or float16");
  size = static_cast<int64_t>(logits.element_size());
  length = logits.size(1), vocab = logits.size(2);
  for (int64_t d = 0; d < 3; ++d) strides[d] = logits.stride(d);
}

Tensor token_stats(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, int64_t ignore_index, bool shift,
    double softcap) {
  const Rows rows(logits);
  const HeldBatch batch(labels, sample_ids, rows.vocab, ignore_index, shift);
  const int64_t tokens = batch.tokens();
  STD_TORCH_CHECK(
      logits.size(0) == batch.batch && rows.length == batch.length, "labels must have the logits' shape without V");
  Tensor out = torch::stable::new_empty(logits, {5, tokens}, ScalarType::Float);
  float* stats = data<float>(out, 5 * tokens, "out");
  const StatsKernel kernel = row_kernels().stats[rows.element];
  for_each_parallel(tokens, rows_a_step(rows.vocab), [&](int64_t t) {
    const int64_t target = batch.target_of(t);
    TokenStats one{};
    if (batch.in_vocab(target))
      one = kernel({rows.at(t), rows.strides[2], rows.vocab, target, static_cast<float>(softcap)});
    stats[t] = one.loss, stats[tokens + t] = one.top, stats[2 * tokens + t] = one.log_sum;
    stats[3 * tokens + t] = one.confidence, stats[4 * tokens + t] = one.hit;
  });
  return out;
}

}  // namespace geko
