"""Moves the columns `token_weights` and `sample_weights` from the training data's items into the batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_COLUMNS = ("token_weights", "sample_weights")


def columns_beside(model: nn.Module) -> tuple[str, ...]:
    """Those of `WEIGHT_COLUMNS` that `model` does not take as inputs; the others are passed to it, as by Trainer."""
    own = inspect.signature(model.forward).parameters
    return tuple(name for name in WEIGHT_COLUMNS if name not in own)


def drawable(dataset: Any, columns: Sequence[str], present: Tensor | None) -> Tensor | None:
    """Ids (P,) int32 of `present` (None: all) without items whose `sample_weights` is 0, which would change nothing.

    For a datasets.Dataset, or a list or tuple of mappings. Other datasets are not read, as that may open files.

    Raises:
        ValueError: nothing is left.
    """
    if "sample_weights" not in columns or dataset is None:
        return present
    if "sample_weights" in (getattr(dataset, "column_names", None) or ()):
        values: list[Any] = list(dataset["sample_weights"])
    elif isinstance(dataset, (list, tuple)):
        values = [item.get("sample_weights") if isinstance(item, Mapping) else None for item in dataset]
    else:
        return present
    counts = torch.tensor([not isinstance(value, (int, float, Tensor)) or value != 0 for value in values])
    if bool(counts.all()):
        return present
    if present is not None:
        counts &= torch.zeros_like(counts).index_fill_(0, present.long(), True)
    if not bool(counts.any()):
        raise ValueError("sample_weights must be above 0 in an item of train_dataset, got 0 in all: nothing to train")
    return counts.nonzero()[:, 0].int()


def split_weights(
    items: Sequence[Any], ids: Sequence[int], columns: Sequence[str]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """The items without `columns`, and the weights by column; a column that no item has is left out.

    Raises:
        ValueError: only some items of the batch have a column; names one that has it and one that does not.
    """
    weights: dict[str, list[Any]] = {}
    for name in columns:
        has = [isinstance(item, Mapping) and item.get(name) is not None for item in items]
        if not any(has):
            continue
        if not all(has):
            raise ValueError(
                f"{name} must be in every item of train_dataset or in none: sample {ids[has.index(True)]} has it, "
                f"sample {ids[has.index(False)]} does not"
            )
        weights[name] = [item[name] for item in items]
    bare = [
        {key: value for key, value in item.items() if key not in columns}
        if isinstance(item, Mapping) and any(name in item for name in columns)
        else item
        for item in items
    ]
    return bare, weights


def add_weights(
    batch: MutableMapping[str, Any],
    labels: Tensor,
    items: Sequence[Any],
    ids: Sequence[int],
    weights: Mapping[str, Sequence[Any]],
    label_names: Sequence[str],
    packed_by_collator: bool,
) -> None:
    """Add `weights` to a batch with sample_ids, as `weighted_loss` takes them: token weights padded with 0.

    Args: labels: the batch's labels, as the collator made them; items, ids: the collator's input; packed_by_collator:
        whether it joined rows in its own way.
    Raises:
        ValueError: a value is not a finite number of 0 or more, or it is unknown which token a weight belongs to.
    """
    taken = [name for name in weights if name in batch]
    if taken:
        raise ValueError(f"the data collator returns {taken}, which the items also have: remove them from one of both")
    sample_ids = batch["sample_ids"]
    if "sample_weights" in weights:
        numbers = [_number(value, i) for value, i in zip(weights["sample_weights"], ids, strict=True)]
        values = torch.tensor(numbers, dtype=torch.float32)
        if sample_ids.dim() > 1:
            values = _by_token(values, ids, sample_ids)
        batch["sample_weights"] = values
    if "token_weights" in weights:
        rows = [_numbers(row, i) for row, i in zip(weights["token_weights"], ids, strict=True)]
        if labels.dim() != 2 or packed_by_collator:
            why = "packs rows in its own way" if packed_by_collator else f"made labels {tuple(labels.shape)}"
            raise ValueError(
                f"token_weights need one label a token, (B, S), but the data collator {why}: give sample_weights, one "
                "number a sample"
            )
        batch["token_weights"] = _placed(rows, batch, labels, items, ids, label_names)


def _number(value: Any, sample: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sample_weights must be one number an item, sample {sample} has {value!r}") from error
    if not 0 <= number < math.inf:
        raise ValueError(f"sample_weights must be finite numbers of 0 or more, sample {sample} has {number}")
    return number


def _numbers(values: Any, sample: int) -> Tensor:
    """(L,) float32."""
    row = torch.as_tensor(values, dtype=torch.float32)
    if row.dim() != 1:
        raise ValueError(f"token_weights must be a list of numbers an item, sample {sample} has shape {(*row.shape,)}")
    bad = ~((row >= 0) & (row < math.inf))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"token_weights must be finite numbers of 0 or more, sample {sample} has {float(row[at])} at {at}"
        )
    return row


def _by_token(values: Tensor, ids: Sequence[int], sample_ids: Tensor) -> Tensor:
    """(B, S): the value of each token's sample, 0 for padding."""
    spread = torch.zeros(sample_ids.shape, dtype=torch.float32)
    for value, i in zip(values, ids, strict=True):
        spread[sample_ids == i] = value
    return spread


def _placed(
    rows: Sequence[Tensor],
    batch: Mapping[str, Any],
    labels: Tensor,
    items: Sequence[Any],
    ids: Sequence[int],
    label_names: Sequence[str],
) -> Tensor:
    """(B, S), each item's weights at the positions of its labels."""
    joined = labels.shape[0] != len(items)  # joined end to end, by their input_ids, as for the sample ids
    name = next((name for name in label_names if items[0].get(name) is not None and not joined), "input_ids")
    lacking = next((i for item, i in zip(items, ids, strict=True) if item.get(name) is None), None)
    if lacking is not None:
        raise ValueError(f"token_weights must be as long as {name}, which sample {lacking} lacks")
    own = [torch.as_tensor(item[name]) for item in items]
    for row, tokens, i in zip(rows, own, ids, strict=True):
        if row.shape != tokens.shape:
            raise ValueError(
                f"token_weights must be as long as {name}: sample {i} has {len(row)} of them and {name} of shape "
                f"{tuple(tokens.shape)}"
            )
    placed = torch.zeros(labels.shape, dtype=torch.float32)
    if joined:
        end_to_end = torch.cat(list(rows))
        placed[0, : len(end_to_end)] = end_to_end
        return placed
    made = labels if name in label_names else torch.as_tensor(batch[name])
    spans = _spans(made, own, labels.shape) if made.shape == labels.shape else None
    if spans is None:
        raise ValueError(
            f"the data collator made {name} of shape {tuple(made.shape)} that are not the items' own with padding on "
            "one side, so it is unknown which token a weight of token_weights belongs to: let it only pad them"
        )
    for k, (span, row) in enumerate(zip(spans, rows, strict=True)):
        placed[k, span] = row
    return placed


def _spans(made: Tensor, own: Sequence[Tensor], shape: torch.Size) -> list[slice] | None:
    """Where each item's tokens are in `made`, padded on one side to `shape`; None if they are not there.

    Labels may have been set to -100, as collators for packs do with the first of each sample.
    """
    for masked in (False, True):
        for left in (False, True):
            spans = [_span(len(tokens), shape[1], left) for tokens in own]
            if all(_holds(row, span, tokens, masked) for row, span, tokens in zip(made, spans, own, strict=True)):
                return spans
    return None


def _holds(row: Tensor, span: slice, tokens: Tensor, masked: bool) -> bool:
    part = row[span]
    if not masked or part.shape != tokens.shape:
        return part.equal(tokens)
    same = (part == tokens) | (part == -100)
    return bool(same.all()) and int((part != -100).sum()) == int((row != -100).sum())


def _span(length: int, room: int, left: bool) -> slice:
    return slice(room - length, room) if left else slice(length)
