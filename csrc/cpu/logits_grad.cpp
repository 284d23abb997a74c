// Backward over the logits: reads and writes once each row whose coefficient is not zero; others get zeros unread.
#include <cstring>

#include "csrc/cpu/gradient_memory.h"
#include "csrc/cpu/ops.h"

namespace geko {
namespace {

// `coeff * scale * upstream` of each token.
struct Coefficients {
  const float *coeff, *scale, *upstream;
  const int32_t* token_visit;  // null with one id a row
  int64_t upstream_stride, length;

  float at(int64_t token) const {
    if (coeff[token] == 0.f) return 0.f;
    const int64_t visit = token_visit ? token_visit[token] : token / length;
    return coeff[token] * *scale * upstream[visit * upstream_stride];
  }
};

void set_zero(char* row, int64_t stride, int64_t vocab, int64_t size) {
  if (stride == 1) {
    std::memset(row, 0, vocab * size);
  } else {
    for (int64_t i = 0; i < vocab; ++i) std::memset(row + i * stride * size, 0, size);
  }
}

void write_grad(
    const Tensor& out, const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens,
    const Tensor& coeff, const Tensor& scale, const Tensor& token_visit, bool shift, double softcap) {
  const Rows rows(logits), to(out);
  const HeldBatch batch(labels, std::nullopt, rows.vocab, INT64_MIN, shift);
  const int64_t count = batch.tokens();
  const bool by_visit = grad_output.dim() > 0, packed = token_visit.numel() > 0;
  STD_TORCH_CHECK(
      logits.size(0) == batch.batch && rows.length == batch.length, "labels must have the logits' shape without V");
  STD_TORCH_CHECK(
      grad_output.is_cpu() && grad_output.scalar_type() == ScalarType::Float &&
          (!by_visit || grad_output.numel() == (packed ? count : batch.batch)),
      "grad_output must be float32, () or one entry a visit");
  const Coefficients coefficients{
      data<float>(coeff, count, "coeff"),
      data<float>(scale, 1, "scale"),
      static_cast<const float*>(grad_output.data_ptr()),
      by_visit && packed ? data<int32_t>(token_visit, count, "token_visit") : nullptr,
      by_visit ? grad_output.stride(0) : 0,
      batch.length};
  const float* stats = data<float>(tokens, 5 * count, "tokens");
  const GradKernel kernel = row_kernels().grad[rows.element];
  // last row first: the end of the logits is what the forward left in the cache
  for_each_parallel(count, rows_a_step(rows.vocab), [&](int64_t i) {
    const int64_t t = count - 1 - i, target = batch.target_of(t);
    const float g = coefficients.at(t);
    if (g == 0.f || !batch.in_vocab(target)) return set_zero(to.at(t), to.strides[2], rows.vocab, rows.size);
    kernel(
        {rows.at(t), rows.strides[2], rows.vocab, target, static_cast<float>(softcap)},
        {to.at(t), to.strides[2], stats[count + t], stats[3 * count + t], g});
  });
}

}  // namespace

Tensor logits_grad(
    const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens, const Tensor& coeff,
    const Tensor& scale, const Tensor& token_visit, bool shift, double softcap) {
  Tensor out = empty_gradient(logits);
  write_grad(out, grad_output, logits, labels, tokens, coeff, scale, token_visit, shift, softcap);
  return out;
}

void logits_grad_(
    const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens, const Tensor& coeff,
    const Tensor& scale, const Tensor& token_visit, bool shift, double softcap) {
  write_grad(logits, grad_output, logits, labels, tokens, coeff, scale, token_visit, shift, softcap);
}

}  // namespace geko
