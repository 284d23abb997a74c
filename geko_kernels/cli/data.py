"""Training data for `train`: records from JSONL or a `datasets` path, turned into token ids and labels."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from geko_kernels.cli.errors import UsageError

_FORMS = (("prompt", "completion"), ("text", "label"), ("text",))
_IGNORED = -100


class Records(NamedTuple):
    """What was read: `rows` hold the `fields` of one of the forms, in the order of the data."""

    source: str
    fields: tuple[str, ...]
    rows: list[dict[str, Any]]

    @property
    def is_classification(self) -> bool:
        return "label" in self.fields


def read_records(path: str) -> Records:
    """The records of a .jsonl file, of a directory written by `save_to_disk`, or of what `load_dataset` finds.

    Raises:
        UsageError: no such file, a line that is no JSON object, or fields of none of the forms; names the record.
    """
    numbered = list(_json_lines(Path(path)) if path.endswith((".jsonl", ".json")) else _dataset_rows(path))
    if not numbered:
        raise UsageError(f"{path} holds no records")
    fields = next((form for form in _FORMS if set(form) <= numbered[0][1].keys()), None)
    if fields is None:
        raise UsageError(
            f"{path}: the first record has the fields {sorted(numbered[0][1])}; `train` needs `text`, "
            "or `prompt` and `completion`, or `text` and `label`: rename yours"
        )
    for where, row in numbered:
        for field in fields:
            _check_field(f"{path}, {where}", field, row.get(field))
    return Records(path, fields, [{field: row[field] for field in fields} for _, row in numbered])


def _check_field(where: str, field: str, value: Any) -> None:
    if value is None:
        raise UsageError(f"{where}: the field `{field}` is missing; every record needs the fields of the first one")
    allowed, kind = ((int, str), "a number or a name") if field == "label" else ((str,), "text")
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise UsageError(f"{where}: `{field}` must be {kind}, got {value!r}")
    if isinstance(value, str) and not value:
        raise UsageError(f"{where}: `{field}` is empty; remove the record or fill it in")


def _json_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); give the path of a .jsonl file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number} is not JSON ({error}); write one JSON object a line") from error
        if not isinstance(row, dict):
            raise UsageError(f'{path}, line {number} is not a JSON object like {{"text": "..."}}')
        yield f"line {number}", row


def _dataset_rows(path: str) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{path} does not end in .jsonl, and other data needs `pip install datasets`") from error
    saved = any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json"))
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


def label_names(train: Records) -> list[str]:
    """The classes in the order of their number: sorted names, or 0, 1, ... up to the largest number."""
    labels = {row["label"] for row in train.rows}
    if all(isinstance(label, int) for label in labels):
        if min(labels) < 0:
            raise UsageError(f"{train.source}: labels must be names or numbers from 0 on, got {min(labels)}")
        return [str(number) for number in range(max(labels) + 1)]
    return sorted(map(str, labels))


def encode(records: Records, tokenizer: Any, max_length: int, names: list[str]) -> list[dict[str, Any]]:
    """One item of `input_ids` and `labels` a record; `names` are the classes, unused without labels.

    A text that is too long loses its end; a prompt that is too long loses its start, so that the completion stays.
    """
    first = [row[records.fields[0]] for row in records.rows]
    if records.is_classification:
        ids = tokenizer(first, truncation=True, max_length=max_length)["input_ids"]
        labels = [_label_number(records.source, row["label"], names) for row in records.rows]
        return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    opening = [_without(end, ids) for ids in tokenizer(first)["input_ids"]]
    if records.fields == ("text",):
        texts = [(ids + end)[:max_length] for ids in opening]
        return [{"input_ids": ids, "labels": ids} for ids in texts]
    completions = tokenizer([row["completion"] for row in records.rows], add_special_tokens=False)["input_ids"]
    return [_join(prompt, ids + end, max_length) for prompt, ids in zip(opening, completions, strict=True)]


def _label_number(source: str, label: int | str, names: list[str]) -> int:
    if str(label) not in names:
        raise UsageError(f"{source}: the label {label!r} is not in the training data, which has {', '.join(names)}")
    return names.index(str(label))


def _without(end: list[int], ids: list[int]) -> list[int]:
    return ids[: -len(end)] if end and ids[-len(end) :] == end else ids  # some tokenizers add it themselves


def _join(prompt: list[int], completion: list[int], max_length: int) -> dict[str, Any]:
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    return {"input_ids": prompt + completion, "labels": [_IGNORED] * len(prompt) + completion}
