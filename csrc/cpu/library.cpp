// Registers the C++ kernels in the namespace geko as the overload `cpu` of each op, which PyTorch calls without going
// through Python. The overload `default` is declared in geko_kernels/ops/__init__.py.
#include "csrc/cpu/ops.h"

#define GEKO_TABLE \
  "Tensor rules, Tensor weights, Tensor? num_items, Tensor(a!)[] columns, Tensor(b!)? error, "
#define GEKO_WEIGHTS \
  "Tensor? token_weights=None, Tensor? sample_weights=None, bool strict=False, bool stats=True"
#define GEKO_GRAD \
  "Tensor labels, Tensor tokens, Tensor coeff, Tensor scale, Tensor token_visit, bool shift, float softcap"

STABLE_TORCH_LIBRARY_FRAGMENT(geko, library) {
  library.def(
      "token_stats.cpu(Tensor logits, Tensor labels, Tensor? sample_ids, int ignore_index, bool shift, float softcap) "
      "-> Tensor");
  library.def(
      "sample_update_.cpu(Tensor tokens, Tensor labels, Tensor? sample_ids, " GEKO_TABLE
      "int vocab, int reduction, int ignore_index, bool shift, bool update, " GEKO_WEIGHTS ") "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "loss_forward_.cpu(Tensor logits, Tensor labels, Tensor? sample_ids, " GEKO_TABLE
      "int reduction, int ignore_index, bool shift, float softcap, bool update, " GEKO_WEIGHTS ") "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("logits_grad.cpu(Tensor grad_output, Tensor logits, " GEKO_GRAD ") -> Tensor");
  library.def("logits_grad_.cpu(Tensor grad_output, Tensor(a!) logits, " GEKO_GRAD ") -> ()");
  library.def(
      "scored_rows.cpu(Tensor labels, Tensor? sample_ids, int vocab, int ignore_index, bool shift) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "score_rows_.cpu(Tensor logits, Tensor rows, Tensor targets, Tensor(a!) tokens, bool fused, int slot, int start, "
      "int count, int vocab, float softcap) -> ()");
  library.def(
      "kept_rows_.cpu(Tensor coeff, Tensor rows, Tensor(a!) positions, Tensor(b!) sources, int held, int start, "
      "int count) -> Tensor");
  library.def(
      "gradient_rows_.cpu(Tensor(a!) logits, Tensor positions, Tensor? sources, Tensor? end, Tensor labels, "
      "Tensor tokens, int first, int last, int ready_from, int vocab, bool shift, float softcap) -> ()");
  library.def("gather_rows.cpu(Tensor hidden, Tensor positions, Tensor coeff, int count) -> Tensor");
  library.def("scatter_rows_.cpu(Tensor(a!) out, Tensor product, Tensor positions, Tensor coeff, int first) -> ()");
  library.def("column_sums.cpu(Tensor tile, Tensor by_row) -> Tensor");
  library.def("rescale_.cpu(Tensor(a!) values, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(geko, CPU, library) {
  library.impl("token_stats.cpu", TORCH_BOX(&geko::token_stats));
  library.impl("sample_update_.cpu", TORCH_BOX(&geko::sample_update_));
  library.impl("loss_forward_.cpu", TORCH_BOX(&geko::loss_forward_));
  library.impl("logits_grad.cpu", TORCH_BOX(&geko::logits_grad));
  library.impl("logits_grad_.cpu", TORCH_BOX(&geko::logits_grad_));
  library.impl("scored_rows.cpu", TORCH_BOX(&geko::scored_rows));
  library.impl("score_rows_.cpu", TORCH_BOX(&geko::score_rows_));
  library.impl("kept_rows_.cpu", TORCH_BOX(&geko::kept_rows_));
  library.impl("gradient_rows_.cpu", TORCH_BOX(&geko::gradient_rows_));
  library.impl("gather_rows.cpu", TORCH_BOX(&geko::gather_rows));
  library.impl("scatter_rows_.cpu", TORCH_BOX(&geko::scatter_rows_));
  library.impl("column_sums.cpu", TORCH_BOX(&geko::column_sums));
  library.impl("rescale_.cpu", TORCH_BOX(&geko::rescale_));
}
