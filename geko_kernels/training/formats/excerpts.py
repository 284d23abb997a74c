"""Excerpts by which a person recognises a record: its own id, and the start of its text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from geko_kernels.training.formats.records import Records

_CHARACTERS = 200
_TEXTS = ("text", "prompt", "instruction", "messages", "conversations")
TOLD = ("id", *_TEXTS)  # the columns that are read


def excerpts_of(records: Records) -> list[dict[str, Any]]:
    """A dict for each record: `record_id`, if the data have a column `id`, and `text`, at most 200 characters.

    The text is that of the prompt or instruction, if there is one; of a chat it is the user's first turn.
    """
    name = next(name for name in _TEXTS if name in records.rows[0])
    columns: dict[str, Iterable[Any]] = {} if records.ids is None else {"id": records.ids}
    return excerpts_of_columns({**columns, name: [row[name] for row in records.rows]})


def excerpts_of_columns(columns: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """The same from those columns of `TOLD` that exist; a value of an unknown form has no text."""
    told: dict[str, list[Any]] = {}
    if "id" in columns:
        ids = list(columns["id"])
        kinds = {type(identity) for identity in ids}
        told["record_id"] = ids if kinds == {int} else [_plain(identity) for identity in ids]
    name = next((name for name in _TEXTS if name in columns), None)
    if name is not None:
        told["text"] = [_text(value) for value in columns[name]]
    return [dict(zip(told, values, strict=True)) for values in zip(*told.values(), strict=True)]


def _plain(identity: Any) -> str | None:
    return None if identity is None else whole_text(str(identity))


def whole_text(text: str) -> str:
    """`text` with a question mark for half a surrogate pair, which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        asked = [turn for turn in turns if turn.get("role", turn.get("from")) in ("user", "human")] or turns
        value = next((turn.get("content", turn.get("value")) or "" for turn in asked), None)
    return whole_text(value[:_CHARACTERS]) if isinstance(value, str) else None
