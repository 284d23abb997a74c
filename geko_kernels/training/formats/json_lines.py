"""Reading JSON: one object a line, where only a line feed ends a line; or one array of objects.

The JSON reader of `datasets` is not used, because it changes values: text that looks like a date becomes a time, and an
integer of more than 64 bits, or in a column with fractions, becomes a float. Nor does it name an error's line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from geko_kernels.training.formats.errors import DataError
from geko_kernels.training.formats.files import read_content

_MOST_DIGITS = 4300  # Python's own limit


def json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("line N", object) of each line that is not blank; DataError names a line that is no JSON object in UTF-8."""
    content = read_content(path, "a .jsonl file").removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip(b" \t\r"):
            yield f"line {number}", _object(f"{path}, line {number}", _parse(f"{path}, line {number}", line))


def json_file(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("record N", object), N from 0, of a file with one array; any other file as `json_lines`."""
    content = read_content(path, "a .json file").removeprefix(codecs.BOM_UTF8)
    if not content.lstrip(b" \t\r\n").startswith(b"["):
        yield from json_lines(path)
        return
    for index, row in enumerate(_parse(path, content)):
        yield f"record {index}", _object(f"{path}, record {index}", row)


def _parse(where: str, text: bytes) -> Any:
    if b"\0" in text:
        raise DataError(f"{where} holds NUL bytes: the file is damaged or not UTF-8; write it again as UTF-8")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_int=_parse_integer)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start} of it); convert the file first") from error
    except RecursionError as error:
        raise DataError(f"{where} nests too deeply; write one flat JSON object a line") from error
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({_reason(error)}); write one JSON object a line") from error


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f'{where} is not a JSON object like {{"text": "..."}}')
    return row


def _reason(error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg} at " + (f"line {error.lineno}, " if error.lineno > 1 else "") + f"column {error.colno}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return row


def _parse_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits; at most {_MOST_DIGITS:,} can be read")
    return int(digits)
