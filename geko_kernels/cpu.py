"""The C++ backend: the ops of `reference/ops.py` on the CPU, vectorised and multi-threaded; sources in csrc/.

Importing it raises `ImportError` where the extension `geko_kernels._C` was not built or does not fit this torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels.reference.rows import row_entropy

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


def score_rows_(
    logits: Tensor,
    rows: Tensor,
    targets: Tensor,
    tokens: Tensor,
    fused: bool,
    slot: int,
    start: int,
    count: int,
    vocab: int,
    softcap: float,
    entropy: Tensor | None = None,
) -> None:
    """See `reference.rows.score_rows_`, never fused: a row leaves the cache before its gradient is computed."""
    assert not fused
    slots, part = slice(slot, slot + count), slice(start, start + count)
    stats = token_stats(logits[slots, None, :vocab], targets[part, None], None, -1, False, softcap)
    tokens.index_copy_(1, rows[part], stats)
    if entropy is not None:
        entropy.index_copy_(0, rows[part], row_entropy(logits[slots, :vocab], stats, softcap))


def gradient_rows_(
    logits: Tensor,
    positions: Tensor,
    sources: Tensor | None,
    end: Tensor | None,
    labels: Tensor,
    tokens: Tensor,
    first: int,
    last: int,
    ready_from: int,
    vocab: int,
    shift: bool,
    softcap: float,
) -> None:
    """See `reference_rows.gradient_rows_`: the few rows that move are copied, then `logits_grad_` runs over all.

    No row is ready before: `score_rows_` makes no gradients.
    """
    last = last if end is None else min(last, int(end))
    rows = logits[first:last]
    if not len(rows):
        return
    if sources is not None:
        moved = (sources[first:last] != torch.arange(first, last)).nonzero()[:, 0]
        rows[moved] = logits[sources[first:last][moved]]
    at = positions[first:last]
    target = (labels.roll(-1, 1) if shift else labels).flatten()[at, None]
    one, by_row = torch.ones(()), torch.empty(0, dtype=torch.int32)
    stats, coeff = tokens[:, at], torch.ones(len(at))
    logits_grad_(one, rows[:, None, :vocab], target, stats, coeff, one, by_row, False, softcap)
    rows[:, vocab:] = 0
