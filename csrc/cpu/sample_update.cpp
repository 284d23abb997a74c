// Visit means, learning state, bucket and weight of each visit, and the loss: visit by visit, then the rows of the table.
#include <cstring>

#include "csrc/cpu/ops.h"
#include "csrc/cpu/visit.h"

namespace geko {
namespace {

// The columns of `SampleState`, in the order of geko_kernels/columns.py; none, and all null, without a state.
struct Table {
  static constexpr size_t kColumns = 9;
  int64_t rows = -1;
  float *q_value = nullptr, *confidence = nullptr, *history = nullptr;
  int32_t* times_seen = nullptr;
  uint8_t *bucket = nullptr, *wrong_streak = nullptr, *changed = nullptr, *quarantined = nullptr;

  explicit Table(const Columns& columns) {
    STD_TORCH_CHECK(
        columns.empty() || columns.size() == kColumns,
        "the columns of a state, q_value to quarantined, must be given all or none, got ", columns.size(), " of ",
        kColumns);
    if (columns.empty()) return;
    auto next = columns.begin();
    rows = next->dim() > 0 ? next->size(0) : 0;
    q_value = data<float>(*next++, {rows}, "q_value");
    confidence = data<float>(*next++, {rows}, "confidence");
    history = data<float>(*next++, {rows, kHistory}, "loss_history");
    times_seen = data<int32_t>(*next++, {rows}, "times_seen");
    bucket = data<uint8_t>(*next++, {rows}, "bucket");
    wrong_streak = data<uint8_t>(*next++, {rows}, "wrong_streak");
    changed = flags(*next++, {rows}, "changed");
    data<int32_t>(*next++, {rows}, "claim");  // not needed: the visits are written one after the other
    quarantined = flags(*next++, {rows}, "quarantined");
  }

  bool holds(int64_t id) const { return id >= 0 && id < rows; }

  // Reads into `row`, which holds the values of a sample never seen.
  void read(int64_t id, SampleRow& row) const {
    if (!holds(id)) return;
    row.q_value = q_value[id], row.confidence = confidence[id], row.times_seen = times_seen[id];
    row.bucket = bucket[id], row.wrong_streak = wrong_streak[id];
    for (int64_t i = 0; i < kHistory; ++i) row.history[i] = history[id * kHistory + i];
  }

  void write(int64_t id, const SampleRow& row) const {
    q_value[id] = row.q_value, confidence[id] = row.confidence, times_seen[id] = row.times_seen;
    bucket[id] = row.bucket, wrong_streak[id] = row.wrong_streak, changed[id] = 1;
    std::memcpy(history + id * kHistory, row.history, sizeof(row.history));
  }
};

// The weight of the label that a valid token predicts; 1 without weights.
struct TokenWeights {
  const float* beside_labels;
  bool shift;

  float of(int64_t token) const { return beside_labels ? beside_labels[token + shift] : 1.f; }
};

// Addresses of the tensors that the call returns; the last three are null if not asked for.
struct Outputs {
  float *loss, *coeff, *floats;
  int64_t* ints;
  uint8_t* flags;
};

// A sample's row after a visit, and whether to write it.
struct Learnt {
  SampleRow row;
  bool counts = false;
};

// Sums over a block of visits. Blocks are added in order, so the result does not depend on the threads.
struct Total {
  double loss = 0., items = 0.;
  int64_t counted = 0, error = kNoError;
};

// One call's arguments, and the update of each visit.
struct Judge {
  const HeldBatch& batch;
  const Table& table;
  const Rules& rules;
  const float *bucket_weights, *stats;  // (4,), (5, T)
  TokenWeights by_token;
  const float* sample_weights;  // (B,) or (B, S), or null
  int64_t reduction, entries;
  std::vector<Span> packed;
  Outputs out;
  const Scorer* score;  // null if the statistics are given

  Span span_of(int64_t v) const {
    if (batch.packed) return v < static_cast<int64_t>(packed.size()) ? packed[v] : Span{};
    return {batch.ids ? batch.ids[v] : v, v * batch.length, (v + 1) * batch.length};
  }

  Sums sums_of(const Span& span) const {
    const int64_t tokens = batch.tokens();
    Sums sum;
    for (int64_t t = span.first; t < span.end; ++t) {
      if (!batch.in_vocab(batch.target_of(t))) continue;
      const double weight = by_token.of(t);
      sum.tokens += 1, sum.items += weight;
      sum.loss += weight * stats[t], sum.confidence += weight * stats[3 * tokens + t];
      sum.hits += weight * stats[4 * tokens + t];
    }
    return sum;
  }

  // Judges the visit: `row` becomes its sample's new row, and `total` gets its share. Returns whether it is finite.
  bool of(int64_t v, SampleRow& row, Total& total) const {
    const bool of_tokens = reduction == TOKEN_MEAN;
    const Span span = span_of(v);
    const int64_t error = error_of(batch, span, table.rows);
    total.error = std::min(total.error, error);
    const Sums sums = error == kNoError ? sums_of(span) : Sums{};
    table.read(span.id, row);
    const Visit visit = judge(row, sums, rules);
    const bool any = visit.tokens > 0, dropped = table.holds(span.id) && table.quarantined[span.id];
    float weight = dropped ? 0.f : table.q_value ? weight_of(visit, row, bucket_weights) : any ? 1.f : 0.f;
    if (sample_weights && any) weight *= sample_weights[batch.packed ? span.first : v];
    const float loss = any ? weight * (of_tokens ? static_cast<float>(sums.loss) : visit.loss) : 0.f;
    if (reduction == NONE) out.loss[v] = loss;
    total.loss += loss, total.counted += any, total.items += sums.items;
    const float coeff = of_tokens || !any ? weight : weight / static_cast<float>(sums.items);
    for (int64_t t = span.first; t < span.end; ++t)
      out.coeff[t] = any && batch.in_vocab(batch.target_of(t)) ? coeff * by_token.of(t) : 0.f;
    if (!out.floats) return visit.finite;
    const float means[6] = {visit.loss, visit.confidence, visit.accuracy, visit.quality, row.q_value, weight};
    for (int64_t i = 0; i < 6; ++i) out.floats[i * entries + v] = means[i];
    out.ints[v] = span.id, out.ints[entries + v] = visit.tokens;
    out.flags[v] = row.bucket, out.flags[entries + v] = visit.correct;
    return visit.finite;
  }

  // Judges all visits by the old rows; `learnt` (M,), unless null, takes the new rows.
  Total all(Learnt* learnt) const {
    const int64_t length = batch.packed ? 1 : std::max<int64_t>(batch.length, 1);
    const int64_t a_block = std::max<int64_t>(1, std::min(kBlock, score ? rows_a_step(batch.vocab) : kBlock) / length);
    std::vector<Total> totals((entries + a_block - 1) / a_block);
    for_each_parallel(totals.size(), 1, [&](int64_t start, int64_t stop) {
      for (int64_t block = start; block < stop; ++block) {
        const int64_t first = block * a_block, end = std::min(first + a_block, entries);
        if (score) (*score)(first * batch.length, end * batch.length);
        Total total;  // a local, as its slot shares a cache line with another thread's
        for (int64_t v = first; v < end; ++v) {
          Learnt unused, &to = learnt ? learnt[v] : unused;
          to.counts = of(v, to.row, total);
        }
        totals[block] = total;
      }
    });
    Total sum;
    for (const Total& part : totals) {
      sum.loss += part.loss, sum.items += part.items, sum.counted += part.counted;
      sum.error = std::min(sum.error, part.error);
    }
    return sum;
  }

  // A sample's last visit wins: each thread has its own samples, and takes the visits in order.
  void write_rows(const std::vector<Learnt>& learnt) const {
    const int64_t parts = entries > 4 * kBlock ? num_threads() : 1, rows = (table.rows + parts - 1) / parts;
    for_each_parallel(parts, 1, [&](int64_t start, int64_t stop) {
      for (int64_t v = 0; v < entries; ++v) {
        const int64_t id = learnt[v].counts ? span_of(v).id : -1;
        if (id >= start * rows && id < stop * rows) table.write(id, learnt[v].row);
      }
    });
  }

  static constexpr int64_t kBlock = 512;
};

const float* sample_weights_of(const HeldBatch& batch, const Optional& given) {
  return batch.packed ? data<float>(given, {batch.batch, batch.length}, "sample_weights")
                      : data<float>(given, {batch.batch}, "sample_weights");
}

Update judged(
    const Tensor& tokens, const HeldBatch& batch, const Scorer* score, const Tensor& rules, const Tensor& weights,
    const Optional& num_items, const Columns& columns, const Optional& error, int64_t reduction, bool update,
    const Optional& token_weights, const Optional& sample_weights, bool strict, bool stats) {
  const Table table(columns);
  int64_t* key = data<int64_t>(error, {}, "error");
  const float* items_given = data<float>(num_items, {}, "num_items");
  STD_TORCH_CHECK(reduction >= NONE && reduction <= SUM, "reduction must be 0, 1, 2 or 3, got ", reduction);
  const int64_t count = batch.tokens(), entries = batch.visits(), told = stats ? entries : 0;
  const bool none = reduction == NONE, of_tokens = reduction == TOKEN_MEAN;

  Tensor value = none ? empty({entries}, ScalarType::Float) : empty({}, ScalarType::Float);
  Tensor scale = empty({}, ScalarType::Float), coeff = empty({count}, ScalarType::Float);
  Tensor token_visit = empty({batch.packed ? count : 0}, ScalarType::Int);
  Tensor floats = empty({6, told}, ScalarType::Float), ints = empty({2, told}, ScalarType::Long);
  Tensor flags_out = empty({2, told}, ScalarType::Byte);
  float* value_to = static_cast<float*>(value.data_ptr());
  float* coeff_to = static_cast<float*>(coeff.data_ptr());
  Outputs out{value_to, coeff_to, nullptr, nullptr, nullptr};
  if (stats) {
    out.floats = static_cast<float*>(floats.data_ptr());
    out.ints = static_cast<int64_t*>(ints.data_ptr());
    out.flags = static_cast<uint8_t*>(flags_out.data_ptr());
  }
  std::vector<Span> spans;
  if (batch.packed) {
    spans = spans_of(batch, static_cast<int32_t*>(token_visit.data_ptr()));
    std::fill_n(coeff_to, count, 0.f);  // padding belongs to no visit
  }
  const Judge judge{
      batch,
      table,
      *reinterpret_cast<const Rules*>(data<float>(rules, {kRules}, "rules")),
      data<float>(weights, {4}, "weights"),
      data<float>(tokens, {5, count}, "tokens"),
      {data<float>(token_weights, {batch.batch, batch.length}, "token_weights"), batch.shift},
      sample_weights_of(batch, sample_weights),
      reduction,
      entries,
      std::move(spans),
      out,
      score};
  std::vector<Learnt> learnt(table.q_value && update ? entries : 0);
  const Total total = judge.all(learnt.empty() ? nullptr : learnt.data());
  STD_TORCH_CHECK(!strict || total.error == kNoError, "labels or sample_ids hold a value out of range");
  if (!learnt.empty()) judge.write_rows(learnt);
  if (key) *key = std::min(*key, total.error);

  float items = 1.f;
  if (reduction == MEAN || of_tokens)
    items = items_given ? *items_given : static_cast<float>(of_tokens ? total.items : total.counted);
  *static_cast<float*>(scale.data_ptr()) = items > 0.f ? 1.f / items : 0.f;
  if (!none) *value_to = static_cast<float>(items > 0.f ? total.loss / items : total.loss * 0.);
  return {value, scale, coeff, token_visit, floats, ints, flags_out};
}

}  // namespace

Update sample_update_(
    const Tensor& tokens, const Tensor& labels, const Optional& sample_ids, const Tensor& rules, const Tensor& weights,
    const Optional& num_items, const Columns& columns, const Optional& error, int64_t vocab, int64_t reduction,
    int64_t ignore_index, bool shift, bool update, const Optional& token_weights, const Optional& sample_weights,
    bool strict, bool stats) {
  const HeldBatch batch(labels, sample_ids, vocab, ignore_index, shift);
  return judged(
      tokens, batch, nullptr, rules, weights, num_items, columns, error, reduction, update, token_weights,
      sample_weights, strict, stats);
}

Forward loss_forward_(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, const Tensor& rules, const Tensor& weights,
    const Optional& num_items, const Columns& columns, const Optional& error, int64_t reduction, int64_t ignore_index,
    bool shift, double softcap, bool update, const Optional& token_weights, const Optional& sample_weights,
    bool strict, bool stats) {
  const HeldBatch batch = batch_of(logits, labels, sample_ids, ignore_index, shift);
  const Tensor tokens = empty({5, batch.tokens()}, ScalarType::Float);
  const Scorer score(logits, batch, tokens, softcap);
  // a visit of few tokens is judged by the thread that scored them; otherwise tokens are spread over all threads
  const int64_t step = rows_a_step(batch.vocab);
  const bool at_once = !batch.packed && batch.length <= step;
  if (!at_once) for_each_parallel(batch.tokens(), step, score);
  const Update rest = judged(
      tokens, batch, at_once ? &score : nullptr, rules, weights, num_items, columns, error, reduction, update,
      token_weights, sample_weights, strict, stats);
  return std::tuple_cat(rest, std::make_tuple(tokens));
}

}  // namespace geko
