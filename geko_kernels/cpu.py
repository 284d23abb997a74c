"""The C++ backend: the ops of `reference/ops.py` on the CPU, vectorised and multi-threaded; sources in csrc/.

Importing it raises `ImportError` if the extension `geko_kernels._C` was not built or does not fit this torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels.reference.rows import row_entropy

try:
    import geko_kernels._C as _C  # registers the overloads `cpu` of torch.ops.geko
except ImportError as error:
    raise ImportError(f"the extension was not built at install, or was built for another torch: {error}") from error

CHECKED = {"token_stats", "sample_update_", "loss_forward_", "logits_grad", "logits_grad_"}  # in C++, see `op_checks`
build_info, cpu_capability, num_threads = _C.build_info, _C.cpu_capability, _C.num_threads

token_stats = torch.ops.geko.token_stats.cpu
sample_update_ = torch.ops.geko.sample_update_.cpu
loss_forward_ = torch.ops.geko.loss_forward_.cpu
logits_grad = torch.ops.geko.logits_grad.cpu
logits_grad_ = torch.ops.geko.logits_grad_.cpu
scored_rows = torch.ops.geko.scored_rows.cpu
kept_rows_ = torch.ops.geko.kept_rows_.cpu
gradient_rows_ = torch.ops.geko.gradient_rows_.cpu
gather_rows = torch.ops.geko.gather_rows.cpu
scatter_rows_ = torch.ops.geko.scatter_rows_.cpu
column_sums = torch.ops.geko.column_sums.cpu
rescale_ = torch.ops.geko.rescale_.cpu


def score_rows_(
    logits: Tensor,
    rows: Tensor,
    targets: Tensor,
    statistics: Tensor,
    fused: bool,
    slot: int,
    start: int,
    count: int,
    vocab: int,
    softcap: float,
    entropy: Tensor | None = None,
) -> None:
    """See `reference.rows.score_rows_`."""
    torch.ops.geko.score_rows_.cpu(logits, rows, targets, statistics, fused, slot, start, count, vocab, softcap)
    if entropy is not None:
        at = rows[start : start + count]
        entropy.index_copy_(0, at, row_entropy(logits[slot : slot + count, :vocab], statistics[:, at], softcap))
