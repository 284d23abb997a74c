"""Records as token ids and labels."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.utils.data import Dataset

from geko_kernels.training.data import IGNORED
from geko_kernels.training.formats.chat import ChatEncoder
from geko_kernels.training.formats.records import Records, Turn

_SHOWN = 5


class EncodedDataset(Dataset[dict[str, Any]]):
    """A dataset of items {"input_ids": list, "labels": list, or the number of the class}.

    Attributes:
        skipped_rows: rows of the data, from 0 and ascending, that have no token to train. They are not items, but
            GEKOTrainer's report counts them, so that its ids are rows of the data.
        num_cut: the number of records that were longer than `max_length` and were cut.
        class_names: for classification, by number; else empty.
        notes: lines that say how the data were read.
        excerpts: for `samples.jsonl`, the start of each item's text, and its own id if it has one.
    """

    def __init__(self, items: list[dict[str, Any]], skipped_rows: list[int], num_cut: int) -> None:
        self._items = items
        self.skipped_rows, self.num_cut = skipped_rows, num_cut
        self.class_names: list[str] = []
        self.notes: list[str] = []
        self.excerpts: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]


class _Item(NamedTuple):
    input_ids: list[int]
    labels: Any
    length: int  # before it was cut


def encode(records: Records, tokenizer: Any, max_length: int, labels: list[int] | None) -> EncodedDataset:
    """The records as token ids; `labels` are the numbers of their classes, None for language modelling.

    A text or conversation that is too long loses its end. A prompt that is too long loses its start, so that the
    completion is kept. Records that then have no token to train are left out.
    """
    if labels is not None:
        items = _classified(records, tokenizer, max_length, labels)
    elif records.are_turns or (records.fields[0] == "instruction" and getattr(tokenizer, "chat_template", None)):
        items = _conversations(records, tokenizer, max_length)
    elif records.fields == ("text",):
        items = _texts(records, tokenizer, max_length)
    else:
        items = _completions(records, tokenizer, max_length)
    trained = [_trains(item) for item in items]
    return EncodedDataset(
        [{"input_ids": item.input_ids, "labels": item.labels} for item, t in zip(items, trained, strict=True) if t],
        [row for row, t in enumerate(trained) if not t],
        sum(item.length > max_length for item in items),
    )


def encoding_notes(records: Records, encoded: EncodedDataset, limit: str) -> list[str]:
    """Notes on the records that were cut to `limit` (such as "--max-length 30"), and on those left out."""
    notes, total = [], len(records.rows)
    if encoded.num_cut:
        texts = records.fields[0] in ("prompt", "instruction") and not records.are_turns
        lost = "the start of their prompt, then the end of the completion" if texts else "their end"
        notes.append(
            f"{records.source}: {encoded.num_cut:,} of {total:,} records are longer than {limit} and lose {lost}"
        )
    skipped = encoded.skipped_rows
    if skipped:
        rows = ", ".join(f"{row} ({records.places[row]})" for row in skipped[:_SHOWN])
        more = f" and {len(skipped) - _SHOWN:,} more" if len(skipped) > _SHOWN else ""
        notes.append(
            f"{records.source}: {len(skipped):,} of {total:,} records have no token to train within {limit} and are "
            f"skipped: row {rows}{more}; rows are counted from 0, and the other rows keep their numbers in the report"
        )
    return notes


def _trains(item: _Item) -> bool:
    """Whether any of its tokens is trained; the first token of a text is not, as nothing predicts it."""
    if isinstance(item.labels, int):
        return bool(item.input_ids)
    return any(label != IGNORED for label in item.labels[1:])


def _classified(records: Records, tokenizer: Any, max_length: int, labels: list[int]) -> list[_Item]:
    texts = [row["text"] for row in records.rows]
    whole = tokenizer(texts)["input_ids"]
    cut = [
        tokenizer(text, truncation=True, max_length=max_length)["input_ids"] if len(ids) > max_length else ids
        for text, ids in zip(texts, whole, strict=True)
    ]
    return [_Item(c, label, len(ids)) for c, label, ids in zip(cut, labels, whole, strict=True)]


def _conversations(records: Records, tokenizer: Any, max_length: int) -> list[_Item]:
    encoder, items = ChatEncoder(records.source, tokenizer), []
    for row, place in zip(records.rows, records.places, strict=True):
        ids, labels = encoder.encode(f"{records.source}, {place}", *_turns(row))
        items.append(_Item(ids[:max_length], labels[:max_length], len(ids)))
    return items


def _turns(row: dict[str, Any]) -> tuple[list[Turn], int]:
    """The turns of a record, and how many of them are the prompt."""
    if "prompt" in row:
        return row["prompt"] + row["completion"], len(row["prompt"])
    if "instruction" in row:
        user, assistant = (
            {"role": "user", "content": _instruction(row)},
            {"role": "assistant", "content": row["output"]},
        )
        return [user, assistant], 0
    return row.get("messages") or row["conversations"], 0


def _instruction(row: dict[str, Any]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]


def _texts(records: Records, tokenizer: Any, max_length: int) -> list[_Item]:
    end = _end(tokenizer)
    whole = [_without(end, ids) + end for ids in tokenizer([row["text"] for row in records.rows])["input_ids"]]
    return [_Item(ids[:max_length], ids[:max_length], len(ids)) for ids in whole]


def _completions(records: Records, tokenizer: Any, max_length: int) -> list[_Item]:
    end = _end(tokenizer)
    if records.fields[0] == "instruction":
        pairs = [(_instruction(row) + "\n\n", row["output"]) for row in records.rows]
    else:
        pairs = [(row["prompt"], row["completion"]) for row in records.rows]
    prompts = [_without(end, ids) for ids in tokenizer([prompt for prompt, _ in pairs])["input_ids"]]
    completions = tokenizer([completion for _, completion in pairs], add_special_tokens=False)["input_ids"]
    return [_join(prompt, ids + end, max_length) for prompt, ids in zip(prompts, completions, strict=True)]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _without(end: list[int], ids: list[int]) -> list[int]:
    return ids[: -len(end)] if end and ids[-len(end) :] == end else ids  # some tokenizers add it themselves


def _join(prompt: list[int], completion: list[int], max_length: int) -> _Item:
    length = len(prompt) + len(completion)
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    return _Item(prompt + completion, [IGNORED] * len(prompt) + completion, length)
