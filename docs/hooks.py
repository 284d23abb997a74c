"""mkdocs calls these: files that a page links to outside of docs/ become part of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
PICTURE = re.compile(r"(?<!\[)!\[[^\]]*\]\(([^)]+)\)")
NAMED = re.compile(r"(?<!\[)`docs/([\w/-]+\.md)`(?!\])")


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of docs/ that pages link to, and those that they link to."""
    pages = [file.src_uri for file in files if file.is_documentation_page()]
    while pages:
        page = pages.pop()
        for _, link, _ in LINK.findall(_source(page).read_text(encoding="utf-8")):
            uri = _uri(page, link)
            if files.get_file_from_path(uri) is None and _source(uri).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(_source(uri))))
                pages += [uri] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site, where pages of docs/ lie beside the repository's folders."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        uri = _uri(here, match[2])
        return match[1] + posixpath.relpath(uri, posixpath.dirname(here) or ".") + (match[3] or "")

    def linked(match: re.Match[str]) -> str:
        return f"[{match[0]}]({posixpath.relpath(match[1], posixpath.dirname(here) or '.')})"

    markdown = NAMED.sub(linked, LINK.sub(moved, markdown))
    return PICTURE.sub(r"[\g<0>](\1)", markdown)  # a click shows it in its size


def _source(uri: str) -> Path:
    """The file in the repository: a page of docs/, or a file beside docs/."""
    inside = ROOT / "docs" / uri
    return inside if inside.exists() else ROOT / uri


def _uri(page: str, link: str) -> str:
    """Where the site has what `page` links to."""
    source = _source(page).parent / link
    path = posixpath.relpath(posixpath.normpath(source.as_posix()), ROOT.as_posix())
    return path.removeprefix("docs/")
