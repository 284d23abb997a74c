"""Records of training data: determines their form by their columns, and checks them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from geko_kernels.training.formats.errors import DataError
from geko_kernels.training.formats.sources import Source, digest_of, read_source

# The columns of each form, in the order in which they are tried, and the optional columns of each.
_FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): (),
    ("conversations",): (),
    ("prompt", "completion"): (),
    ("text", "label"): (),
    ("instruction", "output"): ("input",),
    ("text",): (),
}
_TURNS = ("messages", "conversations")
_LISTS = (*_TURNS, "prompt", "completion")
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's

Turn = dict[str, Any]


class Records(NamedTuple):
    """Records whose `rows` have the `fields` of one of the forms, in the order of the data."""

    source: str
    fields: tuple[str, ...]
    rows: list[dict[str, Any]]
    places: list[str]  # where each row is: "line 1" or "record 0"
    notes: tuple[str, ...] = ()  # on how they were read
    is_table: bool = False  # then all labels are text
    ids: list[Any] | None = None  # the data's own column `id`, if there is one
    digest: str = ""  # of all rows in order, as they were read

    @property
    def is_classification(self) -> bool:
        return "label" in self.fields

    @property
    def are_turns(self) -> bool:
        """Whether they are turns of a chat."""
        return self.fields[0] in _TURNS or (self.fields[0] == "prompt" and isinstance(self.rows[0]["prompt"], list))


def read_records(data: Any, label_column: str = "") -> Records:
    """The records of a file, a folder, a saved dataset, a dataset on the hub, or an iterable of mappings.

    Turns of a chat are returned with `role` and `content`, and `label_column` as `label`.

    Raises:
        DataError: the data do not exist, cannot be read, or have none of the forms; names the record.
    """
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(data)
        source = read_source(name)
    else:
        name, source = "the dataset", Source(list(_numbered(data)), False, [])
    if not source.rows:
        raise DataError(f"{name} holds no records")
    fields = _form(name, source.rows[0][1], label_column)
    label = label_column or "label"
    extra = _FORMS.get(fields, ())
    places, rows = [], []
    for place, row in source.rows:
        where = f"{name}, {place}"
        if fields == ("text", "label"):
            row = {"text": row.get("text"), "label": row.get(label)}
        for field in fields:
            _check_field(where, label if field == "label" else field, field, row.get(field))
        kept = {field: row[field] for field in fields} | {field: row.get(field) or "" for field in extra}
        for field in extra:
            _check_text(where, field, kept[field])
        places.append(place)
        rows.append(kept)
    rows = [_with_turns(f"{name}, {place}", row) for place, row in zip(places, rows, strict=True)]
    if "prompt" in fields:
        lists = [isinstance(row["prompt"], list) for row in rows]
        if any(lists) != all(lists):
            other = places[lists.index(not lists[0])]
            raise DataError(
                f"{name}: `prompt` is text in one of {places[0]} and {other}, turns in the other; write all alike"
            )
    used = {label if field == "label" else field for field in (*fields, *extra)}
    unused = sorted(str(column) for column in source.rows[0][1].keys() - used)
    notes = [*source.notes, *([f"{name}: columns that are not used: {', '.join(unused)}"] if unused else [])]
    ids = [row.get("id") for _, row in source.rows] if "id" in source.rows[0][1] and "id" not in used else None
    return Records(name, fields, rows, places, tuple(notes), source.is_table, ids, digest_of(source))


def _numbered(data: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    if isinstance(data, Mapping):
        raise DataError(
            f"the data have the splits or columns {sorted(map(str, data))}; give one split, or a list of records"
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a path, a hub name or an iterable of records, got {type(data).__name__}")
    for index, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise DataError(f"the dataset, record {index}: must be a mapping of column to value, got {_short(row)}")
        yield f"record {index}", dict(row)


def _form(name: str, first: dict[str, Any], label_column: str) -> tuple[str, ...]:
    if label_column:
        missing = sorted({"text", label_column} - first.keys())
        if missing:
            raise DataError(
                f"{name}: the first record has no {' and no '.join(f'`{column}`' for column in missing)}, only "
                f"{sorted(first)}; a label column needs a column `text` beside it"
            )
        return ("text", "label")
    fields = next((form for form in _FORMS if set(form) <= first.keys()), None)
    if fields is None:
        raise DataError(
            f"{name}: the first record has the fields {sorted(first)}; `train` needs `text`, or `prompt` and "
            "`completion`, or `messages`, or `conversations`, or `instruction` and `output`, or `text` and `label`: "
            "rename yours"
        )
    return fields


def _check_field(where: str, told: str, field: str, value: Any) -> None:
    if value is None:
        raise DataError(f"{where}: the field `{told}` is missing; every record needs the fields of the first one")
    if field == "label":
        if not isinstance(value, (int, str)):
            whole = ", and numbers must be whole" if isinstance(value, float) else ""
            raise DataError(f"{where}: `{told}` must be a number or a name{whole}, got {_short(value)}")
    elif not isinstance(value, str) and not (field in _LISTS and isinstance(value, list)):
        raise DataError(
            f"{where}: `{told}` must be text{' or a list of turns' if field in _LISTS else ''}, got {_short(value)}"
        )
    blank = field == "label" and isinstance(value, str) and not value.strip()
    if blank or (isinstance(value, (str, list)) and not value):
        raise DataError(f"{where}: `{told}` is empty; remove the record or fill it in")
    if isinstance(value, str):
        _check_text(where, told, value)


def _check_text(where: str, field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{field}` must be text, got {_short(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{where}: `{field}` has a lone surrogate (\\ud800 to \\udfff), which is half a character; remove it"
        )


def _with_turns(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """`row` with its lists of turns checked and in the same form."""
    lists = [field for field in row if isinstance(row[field], list)]
    if any(field in _TURNS for field in row) and not lists:
        raise DataError(f"{where}: `{next(iter(row))}` must be a list of turns, got text; text alone is named `text`")
    if "prompt" in row and len(lists) == 1:
        other = "completion" if lists == ["prompt"] else "prompt"
        raise DataError(f"{where}: `{lists[0]}` is a list of turns and `{other}` is text; write both alike")
    return {
        **row,
        **{field: [_turn(f"{where}: `{field}`[{i}]", t) for i, t in enumerate(row[field])] for field in lists},
    }


def _turn(where: str, turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} must be a turn with `role` and `content`, got {_short(turn)}")
    # in a table every row has the keys of all turns
    turn = {key: value for key, value in turn.items() if value is not None or key == "content"}
    if "from" in turn and "role" not in turn:
        turn["role"] = _ROLES.get(turn["from"], turn["from"])
        turn["content"] = turn.get("value")
        turn = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if turn["role"] not in ("user", "assistant", "system", "tool"):
            raise DataError(f"{where}: `from` must be human, gpt, system or tool, got {_short(turn['role'])}")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has no `role` (or ShareGPT's `from`), only {sorted(turn)}")
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise DataError(f"{where}: `content` must be text, got {_short(content)}")
    _check_text(where, "content", content or "")
    return turn


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
