"""An extension of griffe: docstrings as this package writes them become the Markdown that the reference shows."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")  # which griffe reads itself
_HEADED = re.compile(r"([A-Z]\w+): (.+)")
_ENTRY = re.compile(r"(\w+(?:, \w+)*)( [^:`]*)?: (.+)")
_PAGE = re.compile(r"`?docs/(\w+)\.md`?")
_NAME = re.compile(r"(?<!\[)`(\w+)`")


class PlainDocstrings(Extension):
    """Blocks below a line of their own, as in `GEKOConfig`, become lists; comments beside attributes are their text."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        self._visit(pkg, {name for name in pkg.members if name in pkg.exports})

    def _visit(self, part: Any, names: set[str]) -> None:
        for member in part.members.values():
            if member.is_alias:
                continue
            if member.is_attribute and member.docstring is None and part.is_class:
                _take_comment(member)
            if member.docstring is not None:
                member.docstring.value = _linked(to_markdown(member.docstring.value), names)
            self._visit(member, names)


def to_markdown(text: str) -> str:
    """`text` with each block that is indented below a line of its own as a list, or as the rest of that line."""
    paragraphs = re.split(r"\n{2,}", text)
    return "\n\n".join(map(_paragraph, paragraphs))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if _SECTION.fullmatch(lines[0]) or lines[0].startswith((" ", "-")) or not any(x.startswith("    ") for x in lines):
        return text
    parts: list[str] = []
    for group in re.findall(r"^\S.*(?:\n {4,}.*)*", text, re.M):
        head, *block = group.split("\n")
        headed = _HEADED.fullmatch(head)
        head = f"**{headed[1]}:** {headed[2]}" if headed else head
        entries = _entries([line[4:] for line in block])
        if not block:
            parts.append(head)
        elif entries is None:
            parts.append(" ".join([head, *map(str.strip, block)]))
        else:
            parts += [head if headed or ":" in head else f"**{head}**", "\n".join(entries)]
    return "\n\n".join(parts)


def _entries(lines: list[str]) -> list[str] | None:
    """`name: text` a line, with its further lines indented, as items of a list; None for running text."""
    items: list[str] = []
    for line in lines:
        entry = _ENTRY.fullmatch(line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            items.append(f"- {names}{entry[2] or ''}: {entry[3]}")
        elif items and line.startswith(" "):
            items[-1] += " " + line.strip()
        else:
            return None
    return items


def _linked(text: str, names: set[str]) -> str:
    def name(match: re.Match[str]) -> str:
        return f"[`{match[1]}`][geko_kernels.{match[1]}]" if match[1] in names else match[0]

    return _NAME.sub(name, _PAGE.sub(r"[\1](../\1.md)", text))


def _take_comment(member: Any) -> None:
    line = member.lines_collection[member.filepath][member.lineno - 1]
    comment = line.partition("  # ")[2]
    if comment:
        member.docstring = Docstring(comment, parent=member, lineno=member.lineno)
