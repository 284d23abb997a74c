"""The classes of labelled records, and their numbers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from geko_kernels.training.formats.errors import DataError
from geko_kernels.training.formats.records import Records

_SHOWN = 10
_KINDS = {bool: "true or false", int: "a number", str: "a name"}
_TRUTH = {"true": True, "false": False}
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
Label = bool | int | str


class Classes(NamedTuple):
    """`labels` in the order of their numbers, the `names` for the saved model, and a note."""

    labels: list[Label]
    names: list[str]
    note: str  # empty if every label is its own number

    def numbers(self, records: Records) -> list[int]:
        """The number of each record's label; DataError names the first label that the training data lacks."""
        number = {(type(label), label): i for i, label in enumerate(self.labels)}
        kind = type(self.labels[0])
        numbers = []
        for row, place in zip(records.rows, records.places, strict=True):
            label = _typed(row["label"], kind) if records.is_table else row["label"]
            if (type(label), label) not in number:
                known = listed([repr(label) for label in self.labels])
                raise DataError(
                    f"{records.source}, {place}: the label {label!r} is not in the training data, which has {known}; "
                    "remove the record or correct its label"
                )
            numbers.append(number[type(label), label])
        return numbers


def find_classes(train: Records, own: dict[int, str]) -> Classes:
    """Labels 0, 1, ... without a gap keep their numbers; others are numbered in sorted order.

    `own` are the model's classes by number: a model that already has classes with these names keeps its order.
    """
    given: list[Label] = [row["label"] for row in train.rows]
    if train.is_table:
        given = typed_alike(given)
    first: dict[type, tuple[str, Label]] = {}
    for label, place in zip(given, train.places, strict=True):
        first.setdefault(type(label), (place, label))
    if len(first) > 1:
        kinds = " and ".join(f"{_KINDS[kind]} in {place} ({label!r})" for kind, (place, label) in first.items())
        raise DataError(f"{train.source}: the label is {kinds}; write all labels alike")
    labels = sorted(set(given))
    _check_blanks(train.source, labels)
    if len(labels) == 1:
        raise DataError(f"{train.source}: every record has the label {labels[0]!r}; a classifier needs two or more")
    names = [str(label).lower() if isinstance(label, bool) else str(label) for label in labels]
    if labels == list(range(len(labels))) and bool not in first:
        generic = {i: f"LABEL_{i}" for i in range(len(labels))}
        return Classes(labels, list(own.values()) if len(own) == len(labels) and own != generic else names, "")
    order = [own[i] for i in sorted(own)]
    if sorted(order) == sorted(names):
        by_name = dict(zip(names, labels, strict=True))
        labels, names = [by_name[name] for name in order], order
    pairs = listed([f"{name} = {i}" for i, name in enumerate(names)])
    what = {bool: "the labels are true and false", str: "the labels are names"}.get(
        next(iter(first)), "the labels are not 0, 1, ... without a gap, so they are taken as names"
    )
    return Classes(labels, names, f"{train.source}: {what}, numbered {pairs}")


def _check_blanks(source: str, labels: list[Label]) -> None:
    first: dict[str, Label] = {}
    for label in labels:
        other = first.setdefault(str(label).strip(), label)
        if other != label:
            raise DataError(f"{source}: the labels {other!r} and {label!r} differ only in blanks; write them alike")


def _typed(label: Label, kind: type) -> Label:
    """A table's label, which is text, converted to `kind` if it is written like one."""
    text = str(label)
    if kind is int and _WHOLE.fullmatch(text):
        return int(text)
    return _TRUTH.get(text.lower(), text) if kind is bool else text


def typed_alike(texts: list[Label]) -> list[Label]:
    """Numbers if all are whole numbers, booleans if all are true or false, else the texts."""
    for kind in (int, bool):
        labels = [_typed(text, kind) for text in texts]
        if all(type(label) is kind for label in labels):
            return labels
    return texts


def listed(values: list[Any]) -> str:
    """The first ten, and the number of the others."""
    more = len(values) - _SHOWN
    return ", ".join(values[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
