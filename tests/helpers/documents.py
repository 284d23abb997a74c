"""README, CONTRIBUTING and the pages in docs/: their blocks of code, links and headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
_COMMENT = re.compile(r"<!-- not run: ([^\n]+) -->\s*$")


class Block(NamedTuple):
    """A block of code; `reason` says why a test only compiles it, from an HTML comment before the block."""

    document: str
    line: int  # of its first line of code, from 1
    language: str
    code: str
    section: str  # the heading above it
    reason: str


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks_of(document: str, *languages: str) -> list[Block]:
    text, found = text_of(document), []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        comment = _COMMENT.search(before)
        section = ["", *re.findall(r"^#+ (.*)$", _FENCE.sub("", before), re.M)][-1]
        reason = comment[1] if comment else ""
        if fence[2] in languages:
            found.append(Block(document, before.count("\n") + 2, fence[2], fence[3], section, reason))
    return found


def prose_of(document: str) -> str:
    """The text without blocks and pieces of code."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text_of(document)))


def links_of(document: str) -> list[str]:
    """Targets of links and pictures, but for addresses on the web."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(document))
    return [link for link in links if not re.match(r"[a-z]+:", link)]


def anchors_of(document: str) -> set[str]:
    """The anchors of the headings, as mkdocs and GitHub make them of these pages."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text_of(document)), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}
