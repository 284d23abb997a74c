"""The question and the answer of an item, as tokens; and the same item with another item's answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from geko_kernels.training.data import IGNORED, LABEL_KEYS

GROUPS = "groups"  # the user's column: samples with the same value are held back together
TRAINED = ("completion_mask", "assistant_masks")  # TRL's marks of the tokens that are trained
_BEGINNING = 24


class Parts(NamedTuple):
    """An item as question and answer."""

    kind: str  # "row": the labels are the row's own tokens; "label": one for the item; "aligned": one for each token
    prompt: list[int]  # tokens before the first trained one; all tokens if the labels are not the row's tokens
    answer: list[Any]  # trained tokens, or the label


class ItemExcerpt(NamedTuple):
    """The part of an item that is kept to find its group."""

    kind: str  # of `Parts`, "" for an item without tokens
    prompt: tuple[int, ...]
    answer: tuple[Any, ...]
    group: Hashable


def parts_of(item: Any, label_names: Sequence[str] = ()) -> Parts | None:
    """Question and answer of an item; None if it does not hold one row of tokens."""
    if not isinstance(item, Mapping) or item.get("input_ids") is None:
        return None
    tokens = _as_list(item["input_ids"])
    if tokens is None:
        return None
    mask = _as_list(item.get("attention_mask")) or [1] * len(tokens)
    name = label_key(item, label_names)
    if name is None:
        marks = [values for key in TRAINED if (values := _as_list(item.get(key))) is not None]
        labels: list[int] | None = [
            token if all(given) else IGNORED for token, *given in zip(tokens, mask, *marks, strict=False)
        ]
    else:
        labels = _as_list(item[name])
        if labels is None:
            label = item[name].tolist() if isinstance(item[name], (Tensor, np.generic)) else item[name]
            return Parts("label", tokens, [label if isinstance(label, int) else str(label)])
    assert labels is not None
    if len(labels) != len(tokens):
        return Parts("label", tokens, [label for label in labels if label != IGNORED])
    if any(label not in (IGNORED, token) for label, token in zip(labels, tokens, strict=True)):
        return Parts("aligned", tokens, labels)
    first = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
    prompt = [token for token, read in zip(tokens[:first], mask, strict=False) if read]
    return Parts("row", prompt, [label for label in labels if label != IGNORED])


def label_key(item: Mapping[str, Any], label_names: Sequence[str]) -> str | None:
    """The key of the item's labels; None if it has none."""
    return next((key for key in (*label_names, *LABEL_KEYS) if item.get(key) is not None), None)


def with_answer(item: Mapping[str, Any], other: Mapping[str, Any], label_names: Sequence[str] = ()) -> Any:
    """`item` with the answer of `other`, both of one kind; None if that is impossible.

    A row keeps its prompt, followed by the other row's trained tokens, as many as fit into the longer of both rows.
    """
    mine, theirs = parts_of(item, label_names), parts_of(other, label_names)
    if mine is None or theirs is None or mine.kind != theirs.kind or mine.kind == "aligned":
        return None
    name = label_key(item, label_names)
    if mine.kind == "label":
        assert name is not None
        apart = {key: value for key, value in other.items() if key.startswith("decoder_")}
        return {**item, **apart, name: other[name]}
    rows = item["input_ids"], other["input_ids"]
    answer = theirs.answer[: max(max(map(len, rows)) - len(mine.prompt), 1)]
    before, tokens = len(mine.prompt), [*mine.prompt, *answer]
    made = {"input_ids": tokens, **dict.fromkeys(TRAINED, [0] * before + [1] * len(answer))}
    made["attention_mask"] = [1] * len(tokens)
    if name is not None:
        made[name] = [IGNORED] * before + answer
    others = (value for key, value in item.items() if key not in made and not isinstance(value, str))
    if not mine.prompt or any(hasattr(value, "__len__") and len(value) == len(rows[0]) for value in others):
        return None  # no question, or another value for each token
    return {key: _like(value, made[key]) if key in made else value for key, value in item.items() if key != "length"}


def _as_list(values: Any) -> list[int] | None:
    """`values` as a list; None if they are not a list of numbers."""
    plain = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    if not isinstance(plain, (list, tuple)) or (plain and not isinstance(plain[0], (int, float, np.integer))):
        return None
    return list(plain)


def _like(value: Any, numbers: list[int]) -> Any:
    if isinstance(value, Tensor):
        return torch.tensor(numbers, dtype=value.dtype)
    return np.array(numbers, dtype=value.dtype) if isinstance(value, np.ndarray) else numbers


class _Read(Dataset[Any]):
    def __init__(self, dataset: Any, take: Callable[[Any], Any]) -> None:
        self.dataset, self.take = dataset, take

    def __getitem__(self, row: int) -> Any:
        return self.take(self.dataset[row])


class ExcerptOf:
    """`ItemExcerpt` of an item; a class, since loader workers may have to pickle it."""

    def __init__(self, label_names: Sequence[str]) -> None:
        self.label_names = tuple(label_names)

    def __call__(self, item: Any) -> ItemExcerpt:
        parts = parts_of(item, self.label_names)
        group: Any = item.get(GROUPS) if isinstance(item, Mapping) else None
        group = group.tolist() if isinstance(group, (Tensor, np.ndarray, np.generic)) else group
        if parts is None:
            return ItemExcerpt("", (), (), group)
        answer = () if parts.kind == "aligned" else tuple(parts.answer[:_BEGINNING])
        return ItemExcerpt(parts.kind, tuple(parts.prompt[:_BEGINNING]), answer, group)


def _itself(item: Any) -> Any:
    return item


def read(dataset: Any, rows: Sequence[int], args: Any, take: Callable[[Any], Any] = _itself) -> Iterator[Any]:
    """`take(dataset[row])` of each row, read in the same way as in training: by `args`' loader workers, if any."""
    workers = args.dataloader_num_workers
    options = {"multiprocessing_context": args.dataloader_multiprocessing_context} if workers else {}
    generator = torch.Generator()  # without it the loader would use the run's random numbers
    return iter(
        DataLoader(
            _Read(dataset, take), sampler=rows, batch_size=None, num_workers=workers, generator=generator, **options
        )
    )


class WithoutGroups:
    """A collator that gets the items without their `groups`."""

    def __init__(self, collator: Any) -> None:
        self.collator, self._then = collator, getattr(collator, "_remove_columns", None)

    def _remove_columns(self, item: Any) -> Any:
        if isinstance(item, Mapping) and GROUPS in item:
            item = {key: value for key, value in item.items() if key != GROUPS}
        return item if self._then is None else self._then(item)

    def __call__(self, items: Sequence[Any]) -> Any:
        return self.collator([self._remove_columns(item) for item in items])
