"""Reading JSON lines: one object a line, lines ended by a line feed and by nothing else."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.files import read_bytes

_GZIP = b"\x1f\x8b"
_MOST_DIGITS = 4300  # Python's own limit


def json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("line N", object) of each line that is not blank; UsageError names the line that is no JSON object in UTF-8."""
    content = read_bytes(Path(path), path, "a .jsonl file").removeprefix(codecs.BOM_UTF8)
    if content.startswith(_GZIP):
        raise UsageError(f"{path} is compressed with gzip; unpack it with gunzip first")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip(b" \t\r"):
            yield f"line {number}", _read_object(f"{path}, line {number}", line)


def _read_object(where: str, line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise UsageError(f"{where} holds NUL bytes: the file is damaged or not UTF-8; write it anew as UTF-8")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_int=_parse_integer)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text (byte {error.start} of it); convert the file first") from error
    except RecursionError as error:
        raise UsageError(f"{where} nests too deeply; write one flat JSON object a line") from error
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({_reason(error)}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise UsageError(f'{where} is not a JSON object like {{"text": "..."}}')
    return row


def _reason(error: ValueError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


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
