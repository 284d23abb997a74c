"""Passes sample ids through dataset and collator without changing the user's items."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geko_kernels.training.weights import add_weights, split_weights

Collator = Callable[[list[Any]], Any]
IGNORED = -100


class Identified(NamedTuple):
    """An item of the user's dataset and its sample id; -1 for a repeat that only fills a batch."""

    sample_id: int
    item: Any


class IdDataset(Dataset[Identified]):
    """`Identified(i, dataset[i])`; `~i` (negative) is the same item with id -1. For any dataset with `[]` and `len()`.

    For packs, which are lists of indices, a batch contains the items of all packs in order.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Identified:
        return Identified(max(index, -1), self.dataset[index if index >= 0 else ~index])

    def __getitems__(self, units: list[int] | list[list[int]]) -> list[Identified]:
        indices = [index for unit in units for index in (unit if isinstance(unit, list) else (unit,))]
        rows = [index if index >= 0 else ~index for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(rows) if fetch is not None else [self.dataset[row] for row in rows]
        return [Identified(max(index, -1), item) for index, item in zip(indices, items, strict=True)]


class IdCollator:
    """`collator(items)` with `batch["sample_ids"]` added: (B,) int64, or one id a token where rows were merged.

    If the collator merges rows (padding-free collators), each token gets the id of its item, by the length of the
    items' `input_ids`. A collator that packs in another way takes a keyword `sample_ids` (list of int, one an item) and
    returns `batch["sample_ids"]` itself: (B, S), -1 for padding.
    Labels of repeats (id -1) become -100. `prepare` is applied to each item before the collator gets it; the labels
    are the first of `label_names` that the batch has.

    The columns named in `weights` (`token_weights`: as long as the labels; `sample_weights`: a number) are taken out of
    the items before `collator` gets them, and added to the batch as `weighted_loss` takes them, 0 for padding.

    Raises:
        ValueError: the batch has no labels, it is unknown which token belongs to which item, or a weight is not a
            finite number of 0 or more.
    """

    def __init__(
        self,
        collator: Collator,
        prepare: Callable[[Any], Any] | None = None,
        label_names: Sequence[str] = ("labels",),
        weights: Sequence[str] = (),
    ) -> None:
        if not callable(collator):
            raise TypeError(
                f"collator must be callable, got {type(collator).__name__}: give the one that makes batches"
            )
        self.weights = tuple(weights)
        self.collator, self.prepare, self.label_names = collator, prepare, tuple(label_names)
        self.passes_ids = takes_ids(collator)

    def __call__(self, features: Sequence[Identified]) -> MutableMapping[str, Any]:
        if not all(isinstance(feature, Identified) for feature in features):
            bare = next(type(each).__name__ for each in features if not isinstance(each, Identified))
            raise TypeError(
                f"IdCollator takes the items of an IdDataset, got {bare}: wrap the data, IdDataset(dataset)"
            )
        ids = [feature.sample_id for feature in features]
        items = [feature.item for feature in features]
        weights: dict[str, list[Any]] = {}
        if self.weights:
            items, weights = split_weights(items, ids, self.weights)
        items = items if self.prepare is None else [self.prepare(item) for item in items]
        batch = self._collated(items, ids)
        if not isinstance(batch, MutableMapping):
            raise TypeError(f"the data collator must return a dict, got {type(batch).__name__}")
        batch = copy.copy(batch)  # the collator may have returned an item of the dataset
        name = label_of(batch, self.label_names)
        if name is None:
            self._check_text(items, ids)
            raise ValueError(
                f"training needs labels: the data collator returned only {sorted(batch)}, and none of the label "
                f"names {list(self.label_names)}. For a causal LM, labels may be a copy of input_ids. If the column "
                "has another name, set TrainingArguments(label_names=[...])"
            )
        labels = torch.as_tensor(batch[name])
        if not self.passes_ids:
            if "sample_ids" in batch:
                raise ValueError("the batch already has 'sample_ids', a name that GEKO needs; rename that column")
            batch["sample_ids"] = _ids_of(ids, items, labels)
        if weights:
            add_weights(batch, labels, items, ids, weights, self.label_names, self.passes_ids)
        if -1 in ids:
            batch[name] = _without_repeats(labels, batch["sample_ids"])
            if batch.get("shift_labels") is not None:
                batch["shift_labels"] = _without_repeats(torch.as_tensor(batch["shift_labels"]), batch["sample_ids"])
        return batch

    def _collated(self, items: list[Any], ids: list[int]) -> Any:
        try:
            return self.collator(items, sample_ids=ids) if self.passes_ids else self.collator(items)  # type: ignore[call-arg]
        except (ValueError, TypeError) as error:
            self._check_text(items, ids, error)
            raise

    def _check_text(self, items: list[Any], ids: list[int], error: Exception | None = None) -> None:
        """Raise if the label of the first item is a text, of which the collator has made no tensor."""
        first = items[0] if isinstance(items[0], Mapping) else {}
        name = label_of(first, (*self.label_names, *LABEL_KEYS))
        if name is not None and isinstance(first[name], str):
            raise ValueError(
                f"the data collator made no labels of the column {name}, which holds texts, sample {ids[0]} has "
                f"{first[name]!r}: number the classes from 0, or let geko_kernels.load_dataset do so"
            ) from error


def label_of(batch: Mapping[str, Any], label_names: Sequence[str]) -> str | None:
    """The first of `label_names` that `batch` has."""
    return next((name for name in label_names if batch.get(name) is not None), None)


def takes_ids(collator: Collator) -> bool:
    """Whether it takes a keyword `sample_ids`, and so places the ids itself."""
    try:
        return "sample_ids" in inspect.signature(collator).parameters
    except (TypeError, ValueError):
        return False


def _ids_of(ids: list[int], items: list[Any], labels: Tensor) -> Tensor:
    """(B,) one id a row, or (1, S) one a token if the items were joined end to end (-1 after them)."""
    if labels.dim() and labels.shape[0] == len(items):
        return torch.tensor(ids)
    lengths = [len(item["input_ids"]) for item in items if isinstance(item, Mapping) and "input_ids" in item]
    total = sum(lengths)
    joined = len(lengths) == len(items) and labels.dim() == 2 and labels.shape[0] == 1 and labels.shape[1] >= total
    if joined and bool((labels[0, total:] == IGNORED).all()):
        token_ids = torch.full_like(labels, -1)
        token_ids[0, :total] = torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths))
        return token_ids
    raise ValueError(
        f"the data collator made labels of shape {tuple(labels.shape)} out of {len(items)} items (input_ids of lengths "
        f"{lengths}), so it is unknown which token belongs to which sample. Let the collator take a keyword "
        "`sample_ids` (one id an item) and return batch['sample_ids'] in the shape of the labels, -1 for padding"
    )


def _without_repeats(labels: Tensor, sample_ids: Tensor) -> Tensor:
    repeat = sample_ids == -1
    return labels.masked_fill(repeat.view(repeat.shape + (1,) * (labels.dim() - repeat.dim())), IGNORED)


class CausalCollator:
    """Pads items of a causal LM on the right: the default where no collator is given.

    `input_ids` are padded with `pad_token_id`, `labels` (or `label_ids`, `label`; a copy of `input_ids` if an item has
    none of them) with -100. `attention_mask` is added if there is padding or the items have it. Other keys must have
    one shape and are stacked; text and None are dropped, as by Transformers' default collator.

    Raises:
        ValueError: an item has no `input_ids`, or labels of another length; names it.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [_causal_row(item) for item in items]
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        batch: dict[str, Tensor] = {}
        masked = "attention_mask" in items[0] or any(len(row["input_ids"]) < longest for row in rows)
        for name in rows[0]:
            if name == "attention_mask" and not masked:
                continue
            values = [torch.as_tensor(row[name]) for row in rows]
            if name in fill:
                values = [_padded(value, longest, fill[name]) for value in values]
            batch[name] = torch.stack(values)
        return batch


LABEL_KEYS = ("labels", "label_ids", "label")  # keys of an item that Transformers' default collator reads as labels


def _causal_row(item: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(item, Mapping) or item.get("input_ids") is None:
        found = f"the keys {sorted(item)}" if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(
            f"an item of train_dataset must be a dict with `input_ids`, got {found}: tokenise the dataset, or give a "
            "data_collator that does so"
        )
    tokens = _integers(item["input_ids"])
    mask = item.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else _integers(mask)
    given = next((item[key] for key in LABEL_KEYS if item.get(key) is not None), None)
    labels = tokens.masked_fill(mask == 0, IGNORED) if given is None else _integers(given)
    for name, values in (("labels", labels), ("attention_mask", mask)):
        if values.shape != tokens.shape:
            raise ValueError(
                f"an item has {name} of shape {tuple(values.shape)} and input_ids of shape {tuple(tokens.shape)}: a "
                "causal LM takes one for each token (-100 for labels that do not count); for another kind of model, "
                "give a data_collator"
            )
    rest = {k: value for k, value in item.items() if k not in LABEL_KEYS and not isinstance(value, str | None)}
    return {**rest, "input_ids": tokens, "labels": labels, "attention_mask": mask}


def _integers(values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor if tensor.numel() else tensor.long()  # an empty list becomes float32


def _padded(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=fill)
