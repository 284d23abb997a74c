"""Task V1's rows: a text -> how one rater felt about it, of the 15 to 100 people who rated each.

    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2     # 2.5 MB
    python -m benchmarks.end_to_end.raters vaderSentiment-3.3.2.tar.gz --out v1.npz

Writes the rows as tokens, and the mean of all raters of each. TASKS.md says how the rows were chosen.

Licence: MIT, C.J. Hutto and E. Gilbert, VADER (ICWSM-14); no text is in this repo.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

from benchmarks.end_to_end import row_hashes
from benchmarks.end_to_end.data import Encode
from benchmarks.end_to_end.texts import save

SOURCE = "vaderSentiment 3.3.2's source archive"
KINDS = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets", "movieReviewSnippets")  # the groups
SIZES = {"test": 3_000, "choose": 1_500}  # texts, of whole documents; the others are trained on
LONGEST = 64  # tokens of a row
LOWEST, HIGHEST = -4, 4
UNIT = 10_000  # mean ratings are kept as whole numbers of 1 / UNIT
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_ASKED = "\nRating from 1 to 9: "
_ROUNDED = 0.01


class Rated(NamedTuple):
    kind: int
    document: str  # whose sentence the text is
    text: str
    rating: int  # by the one rater that is trained on
    mean: float

    def line(self) -> str:
        return f"{self.kind}\t{self.document}\t{self.rating}\t{self.mean:.4f}\t{self.text}"


def read(archive: Path) -> list[Rated]:
    """The texts that have ratings of their own, in the archive's order; of equal ones the first.

    A text is left out if the mean beside it is not that of the ratings under its id.
    """
    with tarfile.open(archive) as outer:
        (name,) = [name for name in outer.getnames() if name.endswith(_INNER)]
        inner = outer.extractfile(name)
        assert inner is not None
        content = io.BytesIO(inner.read())
    found: dict[str, Rated] = {}
    with tarfile.open(fileobj=content) as files:
        for number, kind in enumerate(KINDS):
            ratings = {each[0]: json.loads(each[3]) for each in _fields(files, f"{kind}_anonDataRatings.txt")}
            for identity, told, text in _fields(files, f"{kind}_GroundTruth.txt"):
                given = ratings[identity]
                if abs(mean(given) - float(told)) <= _ROUNDED:
                    document = f"{kind} {identity.split('_')[0]}"
                    rating = given[_hash(f"{kind} {identity}") % len(given)]
                    found.setdefault(text.lower(), Rated(number, document, text.strip(), rating, mean(given)))
    return list(found.values())


def _fields(files: tarfile.TarFile, name: str) -> list[list[str]]:
    (path,) = [path for path in files.getnames() if path.endswith("/" + name)]
    file = files.extractfile(path)
    assert file is not None
    return [line.split("\t") for line in file.read().decode("utf-8-sig").split("\n") if line.strip()]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def deal(rows: list[Rated]) -> dict[str, list[Rated]]:
    """Whole documents, in the order of their hashes: to `test`, to `choose`, and what is left to `train`."""
    documents: dict[str, list[Rated]] = {}
    for row in rows:
        documents.setdefault(row.document, []).append(row)
    left = iter(sorted(documents, key=_hash))
    parts: dict[str, list[Rated]] = {}
    for part, size in SIZES.items():
        parts[part] = []
        while len(parts[part]) < size:
            document = next(left, None)
            if document is None:
                raise ValueError(f"{len(rows)} texts are too few for {SIZES}")
            parts[part] += documents[document]
    return {**parts, "train": [row for document in left for row in documents[document]]}


def build(parts: dict[str, list[Rated]], encode: Encode, out: Path) -> None:
    rows = [row for part in parts.values() for row in part]
    values = encode([str(1 + i) for i in range(HIGHEST - LOWEST + 1)])
    (asked,) = encode([_ASKED])
    room = LONGEST - len(asked) - 1
    bounds = np.cumsum([0, *map(len, parts.values())])
    save(
        out,
        [text[:room] + asked for text in encode([row.text for row in rows])],
        [values[row.rating - LOWEST] for row in rows],
        {part: range(bounds[i], bounds[i + 1]) for i, part in enumerate(parts)},
        {
            "groups": np.array([row.kind for row in rows], np.uint8),
            "means": np.array([round(UNIT * row.mean) for row in rows], np.int32),
            "values": np.concatenate([np.array(value, np.uint16) for value in values]),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deal", action="store_true", help=f"write the rows' hashes to {row_hashes.FILE.name}")
    given = parser.parse_args()
    parts = deal(read(given.archive))
    row_hashes.settle("V1", {name: [row.line() for row in part] for name, part in parts.items()}, SOURCE, given.deal)
    from smollm2 import load_smollm2  # in examples/, on the path since benchmarks.end_to_end.engine was imported

    encode_one = load_smollm2()[1]
    build(parts, lambda texts: [encode_one(text) for text in texts], given.out)
    print(
        {name: f"{len(part)} texts of {len({row.document for row in part})} documents" for name, part in parts.items()}
    )


if __name__ == "__main__":
    main()
