"""A few rows of a batch, for testing a model's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

HIDDEN = 2  # tokens masked for the test
_LONGER = 8  # tokens of a test row, if the rows have one token


def few_rows(
    inputs: Mapping[str, Any], labels: Tensor, sample_ids: Tensor | None, most_rows: int, most_tokens: int
) -> tuple[dict[str, Any], Tensor] | None:
    """(inputs, labels) of a few rows, cut to a few tokens; None if they cannot be cut.

    A packed row is cut within its first sample. With one label a row, rows are repeated up to `most_rows`. Otherwise a
    few tokens of the last row are masked, to see whether the model ignores their labels as padding. Rows of one token
    with one label are made longer, since a model that shifts its labels has no loss for them.
    """
    tokens = inputs.get("input_ids")
    size = len(labels)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() == 2 else 0
    packed = sample_ids is not None and sample_ids.dim() == 2
    if packed:
        assert sample_ids is not None
        tensors = {name: value for name, value in tensors.items() if name not in _PACKED_KEYS}
        inputs = {name: value for name, value in inputs.items() if name not in _PACKED_KEYS}
        if any(value.shape[:2] != labels.shape for value in tensors.values()) or not length:
            return None
        run = int((sample_ids[0] == sample_ids[0, 0]).long().cumprod(0).sum())
        most_tokens = min(most_tokens, run)
    if any(value.dim() == 0 or len(value) != size or value.layout != torch.strided for value in tensors.values()):
        return None
    mask = inputs.get("attention_mask")
    masked = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length > 0
    order = torch.arange(size, device=labels.device)
    if masked:
        order = mask.ne(0).sum(1).argsort(descending=True, stable=True)  # type: ignore[union-attr]
    by_row = labels.dim() == 1 or labels.shape[-1] == 1
    rows = order[torch.arange(most_rows, device=order.device) % size] if by_row else order[:most_rows]
    if packed:
        rows = rows[:1] * 0
    left = masked and not bool(mask[rows, 0].ne(0).all())  # type: ignore[index]  # padded on the left

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value[rows.to(value.device)]
        if value.dim() > 1 and value.shape[1] == length:
            return value[:, -most_tokens:] if left else value[:, :most_tokens]
        return value

    some, few = cut(labels), {name: cut(value) for name, value in inputs.items()}
    if length and some.shape == few["input_ids"].shape and some.shape[1] == 1:
        return {name: _longer(value) for name, value in few.items()}, _longer(some)
    if not by_row and masked and few["attention_mask"].shape[1] > 2 * HIDDEN:
        few["attention_mask"][-1, slice(HIDDEN) if left else slice(-HIDDEN, None)] = 0
    return few, some if by_row else some[:, :most_tokens]


def _longer(value: Any) -> Any:
    """A tensor of (B, 1, ...) as (B, _LONGER, ...), its only position repeated."""
    one = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == 1
    return value.repeat_interleave(_LONGER, 1) if one else value


# for FlashAttention: where the samples of a packed row begin, and the length of the longest
_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
