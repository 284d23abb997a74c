"""Task D1: describe a Debian package. Name, section and summary -> the long description that its maintainer wrote.

    apt-get -o Acquire::Languages=en -o Dir::State::Lists=$PWD/lists update    # about 30 MB, on any Debian 12
    python -m benchmarks.end_to_end.packages lists --out d1

Writes `train.jsonl` (40,000 rows), `test.jsonl` (2,000) and `choose.jsonl` (1,000, to choose rates and rules by), with
`prompt`, `completion`, `name`, `section` and `source`. No source package is in two of them. `packages_keys.npz` beside
this file holds a hash of each row, so that lists of another day give the same rows; what they lack is counted.

Licence: the descriptions are part of Debian's packages, under each package's own licence; no text is in this repo.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

SIZES = {"test": 2_000, "choose": 1_000, "train": 40_000}  # in the order in which sources are dealt out
KEYS = Path(__file__).with_name("packages_keys.npz")
_SHORTEST = 40  # characters of a description that says something
_CAT = ("/usr/lib/apt/apt-helper", "cat-file")  # reads what apt compressed


class Package(NamedTuple):
    name: str
    section: str
    source: str
    summary: str
    text: str  # paragraphs are lines; list items too

    @property
    def prompt(self) -> str:
        return f"Package: {self.name}\nSection: {self.section}\nSummary: {self.summary}\nDescription:"

    @property
    def key(self) -> int:
        """32 bits of a hash of the row."""
        return int.from_bytes(hashlib.sha256("\n".join(self).encode()).digest()[:4], "big")

    def row(self) -> dict[str, str]:
        return {
            "prompt": self.prompt,
            "completion": f" {self.text}",
            "name": self.name,
            "section": self.section,
            "source": self.source,
        }


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph of a Debian control file; lines of a value are joined by newlines."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def flowing(lines: list[str]) -> str:
    """A long description without its line breaks: " ." parts paragraphs, two spaces keep a line as it is."""
    paragraphs = [""]
    for line in lines:
        if line.strip() == ".":
            paragraphs.append("")
        elif line.startswith("  "):
            paragraphs.append(line.strip())
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {line.strip()}".strip()
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def read_lists(folder: Path) -> list[Package]:
    """The packages of `folder`, one a name, sorted by name; those without a long description in English left out.

    Raises:
        FileNotFoundError: no Packages or no Translation-en file is there.
    """
    found = {kind: sorted(folder.glob(f"*{kind}*")) for kind in ("_Packages", "_Translation-en")}
    for kind, paths in found.items():
        if not paths:
            raise FileNotFoundError(f"{folder} has no file *{kind}*: `{__doc__.splitlines()[2].strip()}` brings them")
    texts: dict[str, list[str]] = {}
    for path in found["_Translation-en"]:
        for fields in stanzas(_content(path)):
            if "Description-en" in fields:
                texts.setdefault(fields["Description-md5"], fields["Description-en"].splitlines())
    packages: dict[str, Package] = {}
    for path in found["_Packages"]:
        for fields in stanzas(_content(path)):
            summary, *lines = texts.get(fields.get("Description-md5", ""), [""])
            text = flowing(lines)
            if len(text) >= _SHORTEST:
                name, section = fields["Package"], fields.get("Section", "misc")
                source = fields.get("Source", name).split()[0]
                packages.setdefault(name, Package(name, section, source, summary.strip(), text))
    return [packages[name] for name in sorted(packages)]


def deal(packages: list[Package], sizes: dict[str, int]) -> dict[str, list[Package]]:
    """Whole sources, in the order of their hashes, to one part after the other; what a full part's last source has
    over is in no part."""
    by_source: dict[str, list[Package]] = {}
    for package in packages:
        by_source.setdefault(package.source, []).append(package)
    sources = sorted(by_source, key=lambda source: hashlib.sha256(source.encode()).digest())
    parts: dict[str, list[Package]] = {}
    left = iter(sources)
    for name, size in sizes.items():
        part: list[Package] = []
        while len(part) < size:
            source = next(left, None)
            if source is None:
                raise ValueError(f"{len(packages)} packages are too few for {sizes}")
            part += by_source[source]
        parts[name] = part[:size]
    return parts


def with_keys(packages: list[Package], keys: dict[str, np.ndarray]) -> dict[str, list[Package]]:
    """The rows of each part by their hashes, in their order; rows that are not there are left out."""
    known = {package.key: package for package in packages}
    return {name: [known[key] for key in part.tolist() if key in known] for name, part in keys.items()}


def _content(path: Path) -> str:
    if path.suffix in (".gz", ".xz"):
        return (gzip if path.suffix == ".gz" else lzma).decompress(path.read_bytes()).decode()
    if path.suffix == ".lz4":
        return subprocess.run([*_CAT, str(path)], check=True, capture_output=True).stdout.decode()
    return path.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", type=Path, help="the folder that apt-get filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deal", action="store_true", help=f"choose the rows anew and write {KEYS.name}")
    given = parser.parse_args()
    packages = read_lists(given.lists)
    if given.deal:
        parts = deal(packages, SIZES)
        np.savez_compressed(KEYS, **{n: np.array([row.key for row in part], np.uint32) for n, part in parts.items()})
    else:
        parts = with_keys(packages, dict(np.load(KEYS)))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with open(given.out / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(package.row(), ensure_ascii=False) + "\n" for package in part)
        print(f"{name}: {len(part)} of {SIZES[name]} rows, {len({row.source for row in part})} sources")
    if any(len(part) < 0.99 * SIZES[name] for name, part in parts.items()):
        sys.exit("more than 1 % of a part's rows are missing: these are lists of another release than Debian 12")


if __name__ == "__main__":
    main()
