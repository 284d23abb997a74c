// The row ops of the linear loss: which rows are scored and kept, their statistics and gradients, and their sums.
#include <cstring>

#include "csrc/cpu/ops.h"
#include "csrc/cpu/simd/half.h"

namespace geko {
namespace {

constexpr int64_t kElements = 32768;  // elements that a thread takes at a time

// Calls `work` with a null pointer to the type of the tensor's elements.
template <class Work>
void by_element(const Tensor& tensor, const char* name, const Work& work) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return work(static_cast<float*>(nullptr));
  if (type == ScalarType::BFloat16) return work(static_cast<BFloat16*>(nullptr));
  STD_TORCH_CHECK(
      type == ScalarType::Half, name, " must be float32, bfloat16 or float16, got ", shape_and_type(tensor));
  work(static_cast<Half*>(nullptr));
}

// The data of a contiguous (n, m) tensor of float32, bfloat16 or float16.
char* matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 2 && tensor.is_contiguous() && has_memory(tensor), name,
      " must be a contiguous matrix on the CPU, got ", shape_and_type(tensor));
  return static_cast<char*>(tensor.data_ptr());
}

int64_t* indices(const Tensor& tensor, const char* name) {
  return data<int64_t>(tensor, {tensor.dim() == 1 ? tensor.size(0) : -1}, name);
}

void check_range(const char* name, int64_t start, int64_t count, int64_t size) {
  STD_TORCH_CHECK(
      start >= 0 && count >= 0 && start <= size - count, name, " [", start, ", ", start, " + ", count,
      ") must lie in [0, ", size, ")");
}

// Remembers an index in a tensor that is out of range, if any thread found one.
class Foreign {
 public:
  bool outside(int64_t index, int64_t size) {
    if (index >= 0 && index < size) return false;
    found_ = true;
    return true;
  }
  void check(const char* name) const { STD_TORCH_CHECK(!found_, name, " hold an index out of range"); }

 private:
  std::atomic<bool> found_{false};
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> scored_rows(
    const Tensor& labels, const Optional& sample_ids, int64_t vocab, int64_t ignore_index, bool shift) {
  const HeldBatch batch(labels, sample_ids, vocab, ignore_index, shift);
  const int64_t tokens = batch.tokens();
  Tensor rows = empty({tokens}, ScalarType::Long), targets = empty({tokens}, ScalarType::Long);
  Tensor visits = empty({1 + tokens}, ScalarType::Int);
  int64_t* rows_to = static_cast<int64_t*>(rows.data_ptr());
  int64_t* targets_to = static_cast<int64_t*>(targets.data_ptr());
  int32_t* visits_to = static_cast<int32_t*>(visits.data_ptr());
  std::vector<int32_t> token_visit(batch.packed ? tokens : 0);
  if (batch.packed) spans_of(batch, token_visit.data());
  int64_t found = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t target = batch.target_of(t);
    if (!batch.in_vocab(target)) continue;
    rows_to[found] = t, targets_to[found] = target;
    visits_to[++found] = batch.packed ? token_visit[t] : static_cast<int32_t>(batch.row_of(t));
  }
  visits_to[0] = static_cast<int32_t>(found);
  std::fill(rows_to + found, rows_to + tokens, 0);
  std::fill(targets_to + found, targets_to + tokens, 0);
  std::fill(visits_to + 1 + found, visits_to + 1 + tokens, -1);
  return {rows, targets, visits};
}

void score_rows_(
    const Tensor& logits, const Tensor& rows, const Tensor& targets, const Tensor& tokens, bool fused, int64_t slot,
    int64_t start, int64_t count, int64_t vocab, double softcap) {
  STD_TORCH_CHECK(!fused, "fused must be False on the CPU: a row leaves the cache before its gradient is computed");
  matrix(logits, "logits");
  const Rows from(logits);
  const int64_t* row = indices(rows, "rows");
  const int64_t *target = data<int64_t>(targets, {rows.size(0)}, "targets"), all = tokens.dim() == 2 ? tokens.size(1) : -1;
  float* stats = data<float>(tokens, {5, all}, "tokens");
  check_range("slots", slot, count, from.batch);
  check_range("rows", start, count, rows.size(0));
  check_range("columns", 0, vocab, from.vocab);
  const StatsKernel kernel = row_kernels().stats[from.element];
  Foreign foreign;
  for_each_parallel(count, rows_a_step(vocab), [&](int64_t first, int64_t stop) {
    Row group[kGroup];
    TokenStats found[kGroup];
    for (int64_t at = first, held; at < stop; at += held) {
      held = std::min(kGroup, stop - at);
      for (int64_t i = 0; i < held; ++i) {
        const int64_t wanted = target[start + at + i];
        if (foreign.outside(row[start + at + i], all) || foreign.outside(wanted, vocab)) return;
        group[i] = {from.at(slot + at + i), 1, vocab, wanted, static_cast<float>(softcap)};
      }
      kernel(group, held, found);
      for (int64_t i = 0; i < held; ++i) {
        const float values[5] = {
            found[i].loss, found[i].top, found[i].log_sum, found[i].confidence, found[i].hit};
        for (int64_t k = 0; k < 5; ++k) stats[k * all + row[start + at + i]] = values[k];
      }
    }
  });
  foreign.check("rows or targets");
}

Tensor kept_rows_(
    const Tensor& coeff, const Tensor& rows, const Tensor& positions, const Tensor& sources, int64_t held,
    int64_t start, int64_t count) {
  const int64_t tokens = coeff.dim() == 1 ? coeff.size(0) : -1;
  const float* weight = data<float>(coeff, {tokens}, "coeff");
  const int64_t* row = indices(rows, "rows");
  int64_t *position = indices(positions, "positions"), *source = indices(sources, "sources");
  check_range("rows", start, count, rows.size(0));
  check_range("slots", held, count, std::min(positions.size(0), sources.size(0)));
  Foreign foreign;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i)
    kept += !foreign.outside(row[start + i], tokens) && weight[row[start + i]] != 0.f;
  foreign.check("rows");
  int64_t behind = kept;  // the next row that may fill a hole
  for (int64_t i = 0; i < kept; ++i) {
    int64_t from = i;
    if (weight[row[start + i]] == 0.f) {
      while (weight[row[start + behind]] == 0.f) ++behind;
      from = behind++;
    }
    position[held + i] = row[start + from], source[held + i] = held + from;
  }
  Tensor end = empty({}, ScalarType::Int);
  *static_cast<int32_t*>(end.data_ptr()) = static_cast<int32_t>(held + kept);
  return end;
}

void gradient_rows_(
    const Tensor& logits, const Tensor& positions, const Optional& sources, const Optional& end, const Tensor& labels,
    const Tensor& tokens, int64_t first, int64_t last, int64_t ready_from, int64_t vocab, bool shift, double softcap) {
  matrix(logits, "logits");
  const Rows to(logits);
  const HeldBatch batch(labels, std::nullopt, vocab, INT64_MIN, shift);
  const int64_t all = batch.tokens(), *position = indices(positions, "positions");
  const float* stats = data<float>(tokens, {5, all}, "tokens");
  const int64_t* source = sources ? indices(*sources, "sources") : nullptr;
  if (end) last = std::min<int64_t>(last, *data<int32_t>(end, {}, "end"));
  if (last <= first) return;
  check_range("slots", first, last - first, std::min(to.batch, positions.size(0)));
  if (source) check_range("slots", first, last - first, sources->size(0));
  check_range("columns", 0, vocab, to.vocab);
  const GradKernel kernel = row_kernels().grad[to.element];
  Foreign foreign;
  for_each_parallel(last - first, rows_a_step(vocab), [&](int64_t start, int64_t stop) {
    Row group[kGroup];
    RowGrad grads[kGroup];
    int64_t held = 0;
    for (int64_t slot = first + start; slot < first + stop; ++slot) {
      const int64_t t = position[slot], from = source ? source[slot] : slot;
      if (foreign.outside(t, all) || foreign.outside(from, to.batch)) return;
      char* out = to.at(slot);
      if (from >= ready_from) {
        std::memmove(out, to.at(from), to.vocab * to.size);
      } else {
        const int64_t target = batch.target_of(t);
        if (foreign.outside(target, vocab)) return;
        group[held] = {to.at(from), 1, vocab, target, static_cast<float>(softcap)};
        grads[held++] = {out, 1, stats[all + t], stats[3 * all + t], 1.f};
        std::memset(out + vocab * to.size, 0, (to.vocab - vocab) * to.size);
      }
      if (held == 0 || (held < kGroup && slot + 1 < first + stop)) continue;
      kernel(group, grads, held);
      held = 0;
    }
  });
  foreign.check("positions, sources or labels");
}

Tensor gather_rows(const Tensor& hidden, const Tensor& positions, const Tensor& coeff, int64_t count) {
  const char* from = matrix(hidden, "hidden");
  const int64_t tokens = hidden.size(0), columns = hidden.size(1), *position = indices(positions, "positions");
  const float* weight = data<float>(coeff, {tokens}, "coeff");
  check_range("positions", 0, count, positions.size(0));
  Tensor out = empty({count, columns}, hidden.scalar_type());
  Foreign foreign;
  by_element(hidden, "hidden", [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    T* to = static_cast<T*>(out.data_ptr());
    for_each_parallel(count, std::max<int64_t>(1, kElements / (columns + 8)), [&](int64_t start, int64_t stop) {
      for (int64_t i = start; i < stop; ++i) {
        const int64_t t = position[i];
        if (foreign.outside(t, tokens)) return;
        const T* row = reinterpret_cast<const T*>(from) + t * columns;
        const bool zero = weight[t] == 0;
        for (int64_t j = 0; j < columns; ++j) {
          to[i * columns + j] = zero ? T() : narrow<T>(widen(row[j]) * weight[t]);
        }
      }
    });
  });
  foreign.check("positions");
  return out;
}

void scatter_rows_(
    const Tensor& out, const Tensor& product, const Tensor& positions, const Tensor& coeff, int64_t first) {
  char *to = matrix(out, "out"), *from = matrix(product, "product");
  const int64_t tokens = out.size(0), columns = out.size(1), count = product.size(0);
  const int64_t* position = indices(positions, "positions");
  const float* weight = data<float>(coeff, {tokens}, "coeff");
  STD_TORCH_CHECK(
      product.size(1) == columns, "product must have the columns of out, ", columns, ", got ", shape_and_type(product));
  check_range("positions", first, count, positions.size(0));
  Foreign foreign;
  by_element(out, "out", [&](auto* no_out) {
    using To = std::remove_pointer_t<decltype(no_out)>;
    by_element(product, "product", [&](auto* no_product) {
      using From = std::remove_pointer_t<decltype(no_product)>;
      for_each_parallel(count, std::max<int64_t>(1, kElements / (columns + 8)), [&](int64_t start, int64_t stop) {
        for (int64_t i = start; i < stop; ++i) {
          const int64_t t = position[first + i];
          if (foreign.outside(t, tokens)) return;
          const From* row = reinterpret_cast<const From*>(from) + i * columns;
          To* there = reinterpret_cast<To*>(to) + t * columns;
          const bool zero = weight[t] == 0;
          for (int64_t j = 0; j < columns; ++j) there[j] = zero ? To() : narrow<To>(widen(row[j]) * weight[t]);
        }
      });
    });
  });
  foreign.check("positions");
}

Tensor column_sums(const Tensor& tile, const Tensor& by_row) {
  constexpr int64_t kRows = 1024, kColumns = 512;  // size of a piece, whose sums stay in the cache
  const char* from = matrix(tile, "tile");
  const int64_t rows = tile.size(0), columns = tile.size(1);
  const float* weight = data<float>(by_row, {rows}, "by_row");
  const int64_t down = (rows + kRows - 1) / kRows, across = (columns + kColumns - 1) / kColumns;
  std::vector<double> sums(down * columns);
  by_element(tile, "tile", [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    const T* values = reinterpret_cast<const T*>(from);
    for_each_parallel(down * across, 1, [&](int64_t start, int64_t stop) {
      for (int64_t piece = start; piece < stop; ++piece) {
        const int64_t block = piece / across, left = piece % across * kColumns;
        const int64_t right = std::min(left + kColumns, columns);
        double* sum = sums.data() + block * columns;
        for (int64_t i = block * kRows; i < std::min((block + 1) * kRows, rows); ++i)
          for (int64_t j = left; j < right; ++j)
            sum[j] += static_cast<double>(weight[i]) * static_cast<double>(widen(values[i * columns + j]));
      }
    });
  });
  Tensor out = empty({columns}, ScalarType::Double);
  double* total = static_cast<double*>(out.data_ptr());
  std::fill_n(total, columns, 0.);
  for (int64_t block = 0; block < down; ++block)
    for (int64_t j = 0; j < columns; ++j) total[j] += sums[block * columns + j];
  return out;
}

void rescale_(const Tensor& values, const Tensor& factor) {
  const float by = *data<float>(factor, {}, "factor");
  STD_TORCH_CHECK(
      values.is_cpu() && values.is_contiguous() && has_memory(values), "values must be contiguous on the CPU, got ",
      shape_and_type(values));
  if (by == 1.f) return;
  by_element(values, "values", [&](auto* none) {
    using T = std::remove_pointer_t<decltype(none)>;
    T* to = static_cast<T*>(values.data_ptr());
    for_each_parallel(values.numel(), kElements, [&](int64_t start, int64_t stop) {
      for (int64_t i = start; i < stop; ++i) to[i] = narrow<T>(widen(to[i]) * by);
    });
  });
}

}  // namespace geko
