"""The C++ backend: the ops of `reference/ops.py` on the CPU, vectorised and multi-threaded; sources in csrc/.

Importing it raises `ImportError` where the extension `geko_kernels._C` was not built or does not fit this torch.
"""

from __future__ import annotations

import torch

try:
    import geko_kernels._C as _C  # registers torch.ops.geko_cpu
except ImportError as error:
    raise ImportError(f"the extension was not built at install, or not for this torch: {error}") from error

CHECKED = {"token_stats", "sample_update_", "loss_forward_", "logits_grad", "logits_grad_"}  # in C++, see `op_checks`
build_info, cpu_capability, num_threads = _C.build_info, _C.cpu_capability, _C.num_threads

token_stats = torch.ops.geko_cpu.token_stats.default
sample_update_ = torch.ops.geko_cpu.sample_update_.default
loss_forward_ = torch.ops.geko_cpu.loss_forward_.default
logits_grad = torch.ops.geko_cpu.logits_grad.default
logits_grad_ = torch.ops.geko_cpu.logits_grad_.default
scored_rows = torch.ops.geko_cpu.scored_rows.default
score_rows_ = torch.ops.geko_cpu.score_rows_.default
kept_rows_ = torch.ops.geko_cpu.kept_rows_.default
gradient_rows_ = torch.ops.geko_cpu.gradient_rows_.default
gather_rows = torch.ops.geko_cpu.gather_rows.default
scatter_rows_ = torch.ops.geko_cpu.scatter_rows_.default
column_sums = torch.ops.geko_cpu.column_sums.default
rescale_ = torch.ops.geko_cpu.rescale_.default
