// Registers the ops of the namespace geko_cpu.
#include "csrc/cpu/ops.h"

#define GEKO_TABLE \
  "Tensor rules, Tensor weights, Tensor? num_items, Tensor(a!)[] columns, Tensor(b!)? error, "
#define GEKO_WEIGHTS \
  "Tensor? token_weights=None, Tensor? sample_weights=None, bool strict=False, bool stats=True"
#define GEKO_GRAD \
  "Tensor labels, Tensor tokens, Tensor coeff, Tensor scale, Tensor token_visit, bool shift, float softcap"

STABLE_TORCH_LIBRARY(geko_cpu, library) {
  library.def(
      "token_stats(Tensor logits, Tensor labels, Tensor? sample_ids, int ignore_index, bool shift, float softcap) "
      "-> Tensor");
  library.def(
      "sample_update_(Tensor tokens, Tensor labels, Tensor? sample_ids, " GEKO_TABLE
      "int vocab, int reduction, int ignore_index, bool shift, bool update, " GEKO_WEIGHTS ") "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "loss_forward_(Tensor logits, Tensor labels, Tensor? sample_ids, " GEKO_TABLE
      "int reduction, int ignore_index, bool shift, float softcap, bool update, " GEKO_WEIGHTS ") "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("logits_grad(Tensor grad_output, Tensor logits, " GEKO_GRAD ") -> Tensor");
  library.def("logits_grad_(Tensor grad_output, Tensor(a!) logits, " GEKO_GRAD ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(geko_cpu, CPU, library) {
  library.impl("token_stats", TORCH_BOX(&geko::token_stats));
  library.impl("sample_update_", TORCH_BOX(&geko::sample_update_));
  library.impl("loss_forward_", TORCH_BOX(&geko::loss_forward_));
  library.impl("logits_grad", TORCH_BOX(&geko::logits_grad));
  library.impl("logits_grad_", TORCH_BOX(&geko::logits_grad_));
}
