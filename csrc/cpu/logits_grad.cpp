// The backward over the logits: reads and writes each row of nonzero coefficient once; other rows are zeroed unread.
#include <algorithm>
#include <cstring>

#include "csrc/cpu/gradient_memory.h"
#include "csrc/cpu/ops.h"

namespace geko {
namespace {

// `coeff * scale * upstream` of each token.
struct Coefficients {
  const float *coeff, *scale, *upstream;
  const int32_t* token_visit;  // null with one id a row
  int64_t upstream_stride, length, visits;

  // The index into `upstream`, negative if token_visit has none.
  int64_t visit_of(int64_t token) const {
    const int64_t visit = token_visit ? token_visit[token] : quotient(token, length);
    return visit < visits ? visit : -1;
  }
  float at(int64_t token, int64_t visit) const { return coeff[token] * *scale * upstream[visit * upstream_stride]; }
};

// Whether the strides prove that no two elements share memory.
bool apart(const Rows& rows) {
  const int64_t sizes[3] = {rows.batch, rows.length, rows.vocab};
  int64_t order[3] = {0, 1, 2}, end = 0;  // end: the last offset that the dimensions so far reach
  std::sort(order, order + 3, [&](int64_t a, int64_t b) { return rows.strides[a] < rows.strides[b]; });
  for (const int64_t d : order) {
    if (sizes[d] > 1 && rows.strides[d] <= end) return false;
    end += (sizes[d] - 1) * rows.strides[d];
  }
  return true;
}

void set_zero(char* row, int64_t stride, int64_t vocab, int64_t size) {
  if (vocab == 0) return;
  if (stride == 1) {
    std::memset(row, 0, vocab * size);
  } else {
    for (int64_t i = 0; i < vocab; ++i) std::memset(row + i * stride * size, 0, size);
  }
}

Coefficients coefficients_of(
    const Batch& batch, const Tensor& grad_output, const Tensor& coeff, const Tensor& scale,
    const Tensor& token_visit) {
  const int64_t count = batch.tokens();
  const bool by_visit = grad_output.dim() > 0, packed = token_visit.numel() > 0;
  const int64_t visits = packed ? count : batch.batch;
  const int32_t* visit_of = data<int32_t>(token_visit, {packed ? count : 0}, "token_visit");
  STD_TORCH_CHECK(
      grad_output.is_cpu() && grad_output.scalar_type() == ScalarType::Float && has_memory(grad_output) &&
          (!by_visit || has_shape(grad_output, {visits})),
      "grad_output must be () or ", shape_of({visits}), " Float on the CPU, got ", shape_and_type(grad_output));
  return {
      data<float>(coeff, {count}, "coeff"),
      data<float>(scale, {}, "scale"),
      static_cast<const float*>(grad_output.data_ptr()),
      by_visit && packed ? visit_of : nullptr,
      by_visit ? grad_output.stride(0) : 0,
      batch.length,
      visits};
}

void write_grad(
    const Tensor& out, const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens,
    const Tensor& coeff, const Tensor& scale, const Tensor& token_visit, bool shift, double softcap) {
  const Rows rows(logits), to(out);
  const HeldBatch batch(labels, std::nullopt, rows.vocab, INT64_MIN, shift);
  check_rows(logits, labels);
  const int64_t count = batch.tokens();
  const Coefficients coefficients = coefficients_of(batch, grad_output, coeff, scale, token_visit);
  const float* stats = data<float>(tokens, {5, count}, "tokens");
  const GradKernel kernel = row_kernels().grad[rows.element];
  std::atomic<int64_t> foreign{-1};  // a token with a coefficient, but no label or no entry in grad_output
  // last row first: the forward left the end of the logits in the cache
  for_each_parallel(count, rows_a_step(rows.vocab), [&](int64_t start, int64_t stop) {
    Row group[kGroup];
    RowGrad grads[kGroup];
    int64_t held = 0;
    for (int64_t t = stop - 1; t >= start; --t) {
      float g = 0.f;
      int64_t target = 0;
      if (coefficients.coeff[t] != 0.f) {
        const int64_t visit = coefficients.visit_of(t);
        target = batch.target_of(t);
        if (visit < 0 || !batch.in_vocab(target))
          foreign = t;
        else
          g = coefficients.at(t, visit);
      }
      if (g == 0.f) {
        set_zero(to.at(t), to.strides[2], rows.vocab, rows.size);
      } else {
        group[held] = {rows.at(t), rows.strides[2], rows.vocab, target, static_cast<float>(softcap)};
        grads[held++] = {to.at(t), to.strides[2], stats[count + t], stats[3 * count + t], g};
      }
      if (held == 0 || (held < kGroup && t > start)) continue;
      kernel(group, grads, held);
      held = 0;
    }
  }, /*backwards=*/true);
  STD_TORCH_CHECK(
      foreign < 0, "labels, coeff and token_visit must be those of one forward: token ", foreign.load(),
      " has a coefficient, but its label is outside [0, ", rows.vocab, ") or its visit outside [0, ",
      coefficients.visits, ")");
}

}  // namespace

Tensor logits_grad(
    const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens, const Tensor& coeff,
    const Tensor& scale, const Tensor& token_visit, bool shift, double softcap) {
  const Rows rows(logits);
  check_rows(logits, labels);
  Tensor out = empty_gradient(logits);
  write_grad(out, grad_output, logits, labels, tokens, coeff, scale, token_visit, shift, softcap);
  return out;
}

void logits_grad_(
    const Tensor& grad_output, const Tensor& logits, const Tensor& labels, const Tensor& tokens, const Tensor& coeff,
    const Tensor& scale, const Tensor& token_visit, bool shift, double softcap) {
  const Rows rows(logits);
  STD_TORCH_CHECK(
      apart(rows), "logits must not overlap themselves to be written over, got strides ",
      shape_of({rows.strides[0], rows.strides[1], rows.strides[2]}));
  write_grad(logits, grad_output, logits, labels, tokens, coeff, scale, token_visit, shift, softcap);
}

}  // namespace geko
