"""Records as token ids and labels."""

from __future__ import annotations

from typing import Any, NamedTuple

from geko_kernels.cli.data import Records
from geko_kernels.cli.errors import UsageError

_IGNORED = -100


class Encoded(NamedTuple):
    """One item of `input_ids` and `labels` a record, and how many records were too long and lost a part."""

    items: list[dict[str, Any]]
    num_cut: int


def encode(records: Records, tokenizer: Any, max_length: int, labels: list[int] | None) -> Encoded:
    """`labels` are the numbers of the records' classes, None for language modelling.

    A text that is too long loses its end; a prompt that is too long loses its start, so that the completion stays.
    """
    first = [row[records.fields[0]] for row in records.rows]
    whole = tokenizer(first)["input_ids"]
    if labels is not None:
        lengths = [len(ids) for ids in whole]
        ids = [
            tokenizer(text, truncation=True, max_length=max_length)["input_ids"] if len(ids) > max_length else ids
            for text, ids in zip(first, whole, strict=True)
        ]
        items = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        opening = [_without(end, ids) for ids in whole]
        if records.fields == ("text",):
            lengths = [len(ids + end) for ids in opening]
            texts = [(ids + end)[:max_length] for ids in opening]
            items = [{"input_ids": ids, "labels": ids} for ids in texts]
        else:
            completions = tokenizer([row["completion"] for row in records.rows], add_special_tokens=False)["input_ids"]
            pairs = [(prompt, ids + end) for prompt, ids in zip(opening, completions, strict=True)]
            lengths = [len(prompt) + len(ids) for prompt, ids in pairs]
            items = [_join(*pair, max_length) for pair in pairs]
    for item, place in zip(items, records.places, strict=True):
        if not item["input_ids"]:
            raise UsageError(f"{records.source}, {place}: the tokenizer makes no token of it; remove the record")
    return Encoded(items, sum(length > max_length for length in lengths))


def _without(end: list[int], ids: list[int]) -> list[int]:
    return ids[: -len(end)] if end and ids[-len(end) :] == end else ids  # some tokenizers add it themselves


def _join(prompt: list[int], completion: list[int], max_length: int) -> dict[str, Any]:
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    return {"input_ids": prompt + completion, "labels": [_IGNORED] * len(prompt) + completion}
