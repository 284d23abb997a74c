"""Training data for `train`: records from JSONL or a `datasets` path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.json_lines import json_lines

_FORMS = (("prompt", "completion"), ("text", "label"), ("text",))


class Records(NamedTuple):
    """What was read: `rows` hold the `fields` of one of the forms, in the order of the data."""

    source: str
    fields: tuple[str, ...]
    rows: list[dict[str, Any]]
    places: list[str]  # of the rows: "line 1" or "record 0"

    @property
    def is_classification(self) -> bool:
        return "label" in self.fields


def read_records(path: str) -> Records:
    """The records of a .jsonl file, of a directory written by `save_to_disk`, or of what `load_dataset` finds.

    Raises:
        UsageError: no such file, a line that is no JSON object, or fields of none of the forms; names the record.
    """
    numbered = list(json_lines(path) if path.endswith((".jsonl", ".json")) else _dataset_rows(path))
    if not numbered:
        raise UsageError(f"{path} holds no records")
    fields = next((form for form in _FORMS if set(form) <= numbered[0][1].keys()), None)
    if fields is None:
        raise UsageError(
            f"{path}: the first record has the fields {sorted(numbered[0][1])}; `train` needs `text`, "
            "or `prompt` and `completion`, or `text` and `label`: rename yours"
        )
    for place, row in numbered:
        for field in fields:
            _check_field(f"{path}, {place}", field, row.get(field))
    rows = [{field: row[field] for field in fields} for _, row in numbered]
    return Records(path, fields, rows, [place for place, _ in numbered])


def _check_field(where: str, field: str, value: Any) -> None:
    if value is None:
        raise UsageError(f"{where}: the field `{field}` is missing; every record needs the fields of the first one")
    allowed, kind = ((int, str), "a number or a name") if field == "label" else ((str,), "text")
    if not isinstance(value, allowed):
        kind += ", and numbers must be whole" if isinstance(value, float) and field == "label" else ""
        raise UsageError(f"{where}: `{field}` must be {kind}, got {_short(value)}")
    if isinstance(value, str) and not value:
        raise UsageError(f"{where}: `{field}` is empty; remove the record or fill it in")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise UsageError(
            f"{where}: `{field}` holds a lone surrogate (\\ud800 to \\udfff), which is half a character; remove it"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _dataset_rows(path: str) -> Iterable[tuple[str, dict[str, Any]]]:
    if os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(
            f"{path} does not end in .jsonl; give a .jsonl file (unpacked, if this is an archive), a directory written "
            "by `Dataset.save_to_disk`, or a hub name"
        )
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{path} does not end in .jsonl, and other data needs `pip install datasets`") from error
    saved = any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
    try:
        data = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # load_dataset raises many kinds, all for a path it cannot use
        raise UsageError(
            f"cannot load {path} with `datasets` ({type(error).__name__}: {error}); "
            "give a .jsonl file, a directory written by `Dataset.save_to_disk`, or a hub name"
        ) from error
    if isinstance(data, dict):
        if "train" not in data:
            raise UsageError(f"{path} has the splits {sorted(data)} and no `train`; save the one you want on its own")
        data = data["train"]
    for index, row in enumerate(data):
        yield f"record {index}", row
