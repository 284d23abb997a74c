// Visit means, learning state, bucket and weight of each visit, and the loss: one pass over tokens, one over visits.
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

  SampleRow read(int64_t id) const {
    SampleRow row;
    if (!holds(id)) return row;
    row.q_value = q_value[id], row.confidence = confidence[id], row.times_seen = times_seen[id];
    row.bucket = bucket[id], row.wrong_streak = wrong_streak[id];
    std::memcpy(row.history, history + id * kHistory, sizeof(row.history));
    return row;
  }

  void write(int64_t id, const SampleRow& row) const {
    q_value[id] = row.q_value, confidence[id] = row.confidence, times_seen[id] = row.times_seen;
    bucket[id] = row.bucket, wrong_streak[id] = row.wrong_streak, changed[id] = 1;
    std::memcpy(history + id * kHistory, row.history, sizeof(row.history));
  }
};

// The weight of what a valid token predicts, which lies beside its label; 1 without weights.
struct TokenWeights {
  const float* beside_labels;
  bool shift;

  float of(int64_t token) const { return beside_labels ? beside_labels[token + shift] : 1.f; }
};

std::vector<Sums> sums_of(const Layout& layout, const float* stats, int64_t tokens, const TokenWeights& weights) {
  std::vector<Sums> sums(layout.ids.size());
  for (int64_t t = 0; t < tokens; ++t) {
    if (!layout.valid(t)) continue;
    Sums& sum = sums[layout.visit[t]];
    const double weight = weights.of(t);
    sum.tokens += 1, sum.items += weight;
    sum.loss += weight * stats[t], sum.confidence += weight * stats[3 * tokens + t];
    sum.hits += weight * stats[4 * tokens + t];
  }
  return sums;
}

// (M,) factors of the visits from (B,), or packed from (B, S) that at each one's first token; empty for none.
std::vector<float> factors_of(const HeldBatch& batch, const Layout& layout, const Optional& sample_weights) {
  if (!sample_weights) return {};
  if (!batch.packed) {
    const float* given = data<float>(sample_weights, {batch.batch}, "sample_weights");
    return std::vector<float>(given, given + batch.batch);
  }
  const float* given = data<float>(sample_weights, {batch.batch, batch.length}, "sample_weights");
  std::vector<float> factors(layout.ids.size(), 1.f);
  for (int64_t t = 0; t < batch.tokens(); ++t)
    if (layout.visit[t] >= 0 && (t == 0 || layout.visit[t] != layout.visit[t - 1])) factors[layout.visit[t]] = given[t];
  return factors;
}

}  // namespace

Update sample_update_(
    const Tensor& tokens, const Tensor& labels, const Optional& sample_ids, const Tensor& rules, const Tensor& weights,
    const Optional& num_items, const Columns& columns, const Optional& error, int64_t vocab, int64_t reduction,
    int64_t ignore_index, bool shift, bool update, const Optional& token_weights, const Optional& sample_weights) {
  const Table table(columns);
  int64_t* key = data<int64_t>(error, {}, "error");
  const float* items_given = data<float>(num_items, {}, "num_items");
  STD_TORCH_CHECK(reduction >= NONE && reduction <= SUM, "reduction must be 0, 1, 2 or 3, got ", reduction);
  const HeldBatch batch(labels, sample_ids, vocab, ignore_index, shift);
  const Layout layout = layout_of(batch, table.rows);
  const int64_t count = batch.tokens(), entries = batch.visits();
  const TokenWeights by_token{data<float>(token_weights, {batch.batch, batch.length}, "token_weights"), shift};
  const std::vector<Sums> sums = sums_of(layout, data<float>(tokens, {5, count}, "tokens"), count, by_token);
  const std::vector<float> factors = factors_of(batch, layout, sample_weights);
  const Rules& rule = *reinterpret_cast<const Rules*>(data<float>(rules, {kRules}, "rules"));
  const float* bucket_weights = data<float>(weights, {4}, "weights");

  const bool none = reduction == NONE, of_tokens = reduction == TOKEN_MEAN;
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(tokens, shape, type);
  };
  Tensor value = none ? empty({entries}, ScalarType::Float) : empty({}, ScalarType::Float);
  Tensor scale = empty({}, ScalarType::Float), coeff = empty({count}, ScalarType::Float);
  Tensor token_visit = empty({batch.packed ? count : 0}, ScalarType::Int);
  Tensor floats = empty({6, entries}, ScalarType::Float), ints = empty({2, entries}, ScalarType::Long);
  Tensor flags_out = empty({2, entries}, ScalarType::Byte);
  float* loss_to = static_cast<float*>(value.data_ptr());
  float* floats_to = data<float>(floats, {6, entries}, "floats");
  int64_t* ints_to = data<int64_t>(ints, {2, entries}, "ints");
  uint8_t* flags_to = data<uint8_t>(flags_out, {2, entries}, "flags");

  std::vector<Visit> visits(entries);  // all judged by the old rows before any is written
  std::vector<float> token_coeff(entries);
  double sum = 0., weighed = 0.;
  int64_t counted = 0;
  for (int64_t v = 0; v < entries; ++v) {
    const int64_t id = layout.ids[v];
    const Visit visit = judge(table.read(id), sums[v], rule);
    const bool dropped = table.quarantined && table.holds(id) && table.quarantined[id];
    const float any = visit.tokens > 0 ? 1.f : 0.f;
    float weight = dropped ? 0.f : table.q_value ? weight_of(visit, bucket_weights) : any;
    if (!factors.empty() && visit.tokens > 0) weight *= factors[v];
    const float loss = visit.tokens > 0 ? weight * (of_tokens ? static_cast<float>(sums[v].loss) : visit.loss) : 0.f;
    if (none) loss_to[v] = loss;
    sum += loss, counted += visit.tokens > 0, weighed += sums[v].items;
    token_coeff[v] = of_tokens || visit.tokens == 0 ? weight : weight / static_cast<float>(sums[v].items);
    const float means[6] = {visit.loss, visit.confidence, visit.accuracy, visit.quality, visit.row.q_value, weight};
    for (int64_t i = 0; i < 6; ++i) floats_to[i * entries + v] = means[i];
    ints_to[v] = id, ints_to[entries + v] = visit.tokens;
    flags_to[v] = visit.row.bucket, flags_to[entries + v] = visit.correct;
    visits[v] = visit;
  }
  if (table.q_value && update)
    for (int64_t v = 0; v < entries; ++v)
      if (visits[v].finite) table.write(layout.ids[v], visits[v].row);  // the last visit of a sample stays
  if (key) *key = std::min(*key, layout.error);

  float items = 1.f;
  if (reduction == MEAN || of_tokens) items = items_given ? *items_given : static_cast<float>(of_tokens ? weighed : counted);
  *data<float>(scale, {}, "scale") = items > 0.f ? 1.f / items : 0.f;
  if (!none) *loss_to = static_cast<float>(items > 0.f ? sum / items : sum * 0.);
  float* coeff_to = data<float>(coeff, {count}, "coeff");
  for (int64_t t = 0; t < count; ++t) coeff_to[t] = layout.valid(t) ? token_coeff[layout.visit[t]] * by_token.of(t) : 0.f;
  if (batch.packed && count)
    std::memcpy(data<int32_t>(token_visit, {count}, "token_visit"), layout.visit.data(), count * sizeof(int32_t));
  return {value, scale, coeff, token_visit, floats, ints, flags_out};
}

Forward loss_forward_(
    const Tensor& logits, const Tensor& labels, const Optional& sample_ids, const Tensor& rules, const Tensor& weights,
    const Optional& num_items, const Columns& columns, const Optional& error, int64_t reduction, int64_t ignore_index,
    bool shift, double softcap, bool update, const Optional& token_weights, const Optional& sample_weights) {
  const Tensor tokens = token_stats(logits, labels, sample_ids, ignore_index, shift, softcap);
  const Update rest = sample_update_(
      tokens, labels, sample_ids, rules, weights, num_items, columns, error, logits.size(2), reduction, ignore_index,
      shift, update, token_weights, sample_weights);
  return std::tuple_cat(rest, std::make_tuple(tokens));
}

}  // namespace geko
