"""Are a task's rows the ones that its figures were measured on? A SHA-256 of each part's rows, in `row_hashes.json`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
Hashes = dict[str, dict[str, str | int]]  # by part: rows, sha256


def hashes(parts: dict[str, list[str]]) -> Hashes:
    """A part's rows, a line of text each, in their order."""
    return {
        part: {"rows": len(rows), "sha256": hashlib.sha256("\n".join(rows).encode()).hexdigest()}
        for part, rows in parts.items()
    }


def write(task: str, parts: dict[str, list[str]]) -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps(known | {task: hashes(parts)}, indent=2) + "\n")


def check(task: str, parts: dict[str, list[str]], source: str) -> None:
    """Raises ValueError where a part has other rows; `source` is what they should have been made from."""
    expected: Hashes = json.loads(FILE.read_text())[task]
    for part, found in hashes(parts).items():
        if found != expected[part]:
            raise ValueError(
                f"{task}'s part {part!r} has {found['rows']} rows of SHA-256 {found['sha256'][:12]}..., not the "
                f"{expected[part]['rows']} rows of {str(expected[part]['sha256'])[:12]}... that {source} gives"
            )


def settle(task: str, lines: dict[str, list[str]], source: str, deal: bool) -> None:
    """Check the parts' rows, after writing their hashes anew if `deal`. Raises `ValueError` if they are others."""
    if deal:
        write(task, lines)
    check(task, lines, source)
