"""An extension of griffe: docstrings as this package writes them become Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Docstring, Extension

_SECTION = re.compile(r"(Args|Attributes|Raises):")  # which griffe reads itself
_SEVERAL = re.compile(r"^    (\w+(?:,\s+\w+)+): (.+(?:\n {8}.*)*)\n?", re.M)
_HEADED = re.compile(r"([A-Z]\w+): (.+)")
_ENTRY = re.compile(r"(\w+(?:, \w+)*)( [^:`]*)?: (.+)")
_NAMES = re.compile(r"\w+(, \w+)*$")
_DOCS = Path(__file__).parent
_PAGE = re.compile(r"`?docs/(\w+\.md)`?")
_NAME = re.compile(r"(?<!\[)`(\w+)`")


class PlainDocstrings(Extension):
    """Blocks of `name: text`, as in `GEKOConfig`, become lists; comments the text of attributes."""

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
    """`text`, each block that is indented below a line made a list, or the rest of that line."""
    paragraphs = re.split(r"\n{2,}", text)
    return "\n\n".join(map(_paragraph, paragraphs))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    table = _table(lines)
    if table is not None:
        return "\n".join(table)
    if lines[0] == "Args:":
        return _arguments(text)
    if _SECTION.fullmatch(lines[0]) or lines[0].startswith((" ", "-")) or "\n    " not in text:
        return text
    parts: list[str] = []
    for group in re.findall(r"^\S.*(?:\n {4,}.*)*", text, re.M):
        head, *block = group.split("\n")
        if head == "Returns:":
            head = f"Returns: {block.pop(0).strip()}"
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


def _arguments(text: str) -> str:
    """The section, which takes one name an entry; what is said of several stands behind it."""
    several = [
        f"{_coded(' '.join(names.split()))}: {said}" for names, said in _SEVERAL.findall(text)
    ]
    behind = [" ".join(said.split()) for said in several]
    return "\n\n".join([_SEVERAL.sub("", text).rstrip(), *behind])


def _coded(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _entries(lines: list[str]) -> list[str] | None:
    """Items of a list from lines `name: text`, further lines indented; None for running text."""
    items: list[str] = []
    for line in lines:
        entry = _ENTRY.fullmatch(line)
        if entry:
            items.append(f"- {_coded(entry[1])}{entry[2] or ''}: {entry[3]}")
        elif items and line.startswith(" "):
            items[-1] += " " + line.strip()
        else:
            return None
    return items


def _table(lines: list[str]) -> list[str] | None:
    """Items of a list from two aligned columns, names and texts; None for other lines."""
    column = min(
        (len(line) - len(line.lstrip()) for line in lines if line.startswith(" " * 12)), default=0
    )
    items: list[str] = []
    for line in lines if column else []:
        names, between, rest = line[4 : column - 1].strip(), line[column - 1], line[column:]
        if not line.startswith("    ") or between != " " or (names and not _NAMES.match(names)):
            return None
        if names:
            items.append(f"- {_coded(names)}: {rest}")
        elif items:
            items[-1] += " " + rest.strip()
    return items or None


def _linked(text: str, names: set[str]) -> str:
    def name(match: re.Match[str]) -> str:
        return f"[`{match[1]}`][geko_kernels.{match[1]}]" if match[1] in names else match[0]

    def page(match: re.Match[str]) -> str:
        heading = (_DOCS / match[1]).read_text(encoding="utf-8").partition("\n")[0]
        return f"[{heading.removeprefix('# ')}](../{match[1]})"

    return _NAME.sub(name, _PAGE.sub(page, text))


def _take_comment(member: Any) -> None:
    line = member.lines_collection[member.filepath][member.lineno - 1]
    comment = line.partition("  # ")[2]
    if comment:
        member.docstring = Docstring(comment, parent=member, lineno=member.lineno)
