"""How a record is recognised: by its own id, and the start of its text."""

from __future__ import annotations

from typing import Any

from geko_kernels.training.formats.records import Records

_CHARACTERS = 200


def excerpts_of(records: Records) -> list[dict[str, Any]]:
    """A dict for each record: `record_id`, if the data have a column `id`, and `text`, at most 200 characters.

    The text is that of the prompt or instruction, if there is one; of a chat it is the user's first turn.
    """
    texts = [{"text": _text(row)[:_CHARACTERS]} for row in records.rows]
    if records.ids is None:
        return texts
    kinds = {type(identity) for identity in records.ids}
    ids = records.ids if len(kinds) == 1 and kinds <= {int, str} else [_plain(identity) for identity in records.ids]
    return [{"record_id": identity, **text} for identity, text in zip(ids, texts, strict=True)]


def _plain(identity: Any) -> str | None:
    return None if identity is None else str(identity)


def _text(row: dict[str, Any]) -> str:
    value = next(row[name] for name in ("text", "prompt", "instruction", "messages", "conversations") if name in row)
    if isinstance(value, str):
        return value
    asked = next((turn for turn in value if turn["role"] == "user"), value[0])
    return asked["content"] or ""
