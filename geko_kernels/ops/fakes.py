"""The shapes and dtypes of the ops' outputs, by which they are traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geko_kernels.reference.visits import real_dtype, sum_dtype


def _entries(labels: Tensor, sample_ids: Tensor | None) -> int | torch.SymInt:
    return labels.numel() if sample_ids is not None and sample_ids.dim() == 2 else labels.shape[0]


def _token_stats(logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((5, labels.numel()), dtype=real_dtype(logits))


def _sample_update(
    statistics: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    _rules: Tensor,
    _weights: Tensor,
    _num_items: Tensor | None,
    _columns: Sequence[Tensor],
    _error: Tensor | None,
    _vocab: int,
    reduction: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    entries = _entries(labels, sample_ids)
    packed = sample_ids is not None and sample_ids.dim() == 2
    value = statistics.new_empty(() if reduction else (entries,))
    coeff = statistics.new_empty(labels.numel())
    token_visit = labels.new_empty(labels.numel() if packed else 0, dtype=torch.int32)
    floats, ints = statistics.new_empty((6, entries)), labels.new_empty((2, entries))
    flags = labels.new_empty((2, entries), dtype=torch.uint8)
    return value, statistics.new_empty(()), coeff, token_visit, floats, ints, flags


def _loss_forward(logits: Tensor, labels: Tensor, sample_ids: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    statistics, (table, options) = _token_stats(logits, labels), (rest[:5], rest[5:])
    return *_sample_update(statistics, labels, sample_ids, *table, logits.shape[-1], *options), statistics


def _scored_rows(labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = labels.numel()
    return labels.new_empty(count), labels.new_empty(count), labels.new_empty(1 + count, dtype=torch.int32)


FAKES: dict[str, Callable[..., Any]] = {
    "token_stats": _token_stats,
    "sample_update_": _sample_update,
    "loss_forward_": _loss_forward,
    "logits_grad": lambda _grad_output, logits, *_: logits.new_empty(logits.shape),
    "logits_grad_": lambda *_: None,
    "scored_rows": _scored_rows,
    "kept_rows_": lambda coeff, *_: coeff.new_empty((), dtype=torch.int32),
    "gradient_rows_": lambda *_: None,
    "score_rows_": lambda *_: None,
    "gather_rows": lambda hidden, _positions, _coeff, count: hidden.new_empty((count, hidden.shape[1])),
    "scatter_rows_": lambda *_: None,
    "clear_rows_": lambda *_: None,
    "column_sums": lambda tile, _by_row: tile.new_empty(tile.shape[1], dtype=sum_dtype(tile.device)),
    "rescale_": lambda *_: None,
    "weight_product_": lambda *_: None,
    "hidden_product_": lambda *_: None,
}
