"""Task D2's rows: what a Debian package is, in its maintainer's words -> the section that it was put in.

    apt-get -o Acquire::Languages=en -o Dir::State::Lists=$PWD/lists update    # about 30 MB, on any Debian 12
    python -m benchmarks.end_to_end.sections lists --out d2.npz

Writes the rows as tokens. `sections_keys.npz` beside this file holds a hash of each row, so that lists of another day
give the same rows; what they lack is counted. TASKS.md says how the rows were chosen.

Licence: the descriptions are part of Debian's packages, under each package's own licence; no text is in this repo.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.end_to_end.data import Encode
from benchmarks.end_to_end.packages import Package, read_lists, with_keys
from benchmarks.end_to_end.texts import save

KEYS = Path(__file__).with_name("sections_keys.npz")
LONGEST = 112  # tokens of a row
TRAIN = 20_000
LEAST = 120  # packages of a section that is a class, of one source at most ALIKE
ALIKE = 3  # rows of a class that one source gives to a part that is held out
HELD = {"test": (30, 2_000), "choose": (15, 1_000)}  # of each class at least; otherwise its share of so many
_ASKED = "\nSection:"


def classes(packages: list[Package]) -> list[str]:
    """The sections that have LEAST packages, of one source at most ALIKE, sorted."""
    found: Counter[str] = Counter()
    for (section, _), count in Counter((package.section, package.source) for package in packages).items():
        found[section] += min(count, ALIKE)
    return sorted(section for section, count in found.items() if count >= LEAST)


def deal(packages: list[Package]) -> dict[str, list[Package]]:
    """Whole sources, in the order of their hashes: those that a held-out part still needs, then those trained on.

    A source goes to a part that lacks rows of one of its classes, and gives it at most ALIKE of each class that it
    lacks; its other rows are in no part. What is left of TRAIN rows is cut off within the last source.
    """
    names = classes(packages)
    by_source: dict[str, list[Package]] = {}
    for package in packages:
        if package.section in names:
            by_source.setdefault(package.source, []).append(package)
    left = dict.fromkeys(sorted(by_source, key=lambda source: hashlib.sha256(source.encode()).digest()))
    total = Counter(package.section for rows in by_source.values() for package in rows)
    share = {name: count / total.total() for name, count in total.items()}
    parts: dict[str, list[Package]] = {}
    for part, (least, size) in HELD.items():
        wanted = {name: max(least, round(size * share[name])) for name in names}
        parts[part] = []
        for source in list(left):
            taken: Counter[str] = Counter()
            for package in by_source[source]:
                if taken[package.section] < min(ALIKE, wanted[package.section]):
                    taken[package.section] += 1
                    parts[part].append(package)
            if taken:
                del left[source]
                wanted = {name: count - taken[name] for name, count in wanted.items()}
        if short := {name: count for name, count in wanted.items() if count > 0}:
            raise ValueError(f"{len(packages)} packages are too few for the part {part!r}, which lacks {short}")
    parts["train"] = [package for source in left for package in by_source[source]][:TRAIN]
    return parts


def build(parts: dict[str, list[Package]], encode: Encode, out: Path) -> None:
    """Write the rows; groups are the numbers of the sections in their sorted order."""
    rows = [package for part in parts.values() for package in part]
    names = sorted({package.section for package in rows})
    answers = dict(zip(names, encode([f" {name}" for name in names]), strict=True))
    for name, answer in answers.items():
        if clash := [other for other in names if other != name and answers[other][: len(answer)] == answer]:
            raise ValueError(f"the tokens of {clash[0]} begin with all those of {name}: no answer may")
    (asked,) = encode([_ASKED])
    room = LONGEST - len(asked) - max(map(len, answers.values()))
    texts = encode([f"{package.summary}\n{package.text}" for package in rows])
    bounds = np.cumsum([0, *map(len, parts.values())])
    save(
        out,
        [text[:room] + asked for text in texts],
        [answers[package.section] for package in rows],
        {part: range(bounds[i], bounds[i + 1]) for i, part in enumerate(parts)},
        {"groups": np.array([names.index(package.section) for package in rows], np.uint8)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", type=Path, help="the folder that apt-get filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deal", action="store_true", help=f"choose the rows anew and write {KEYS.name}")
    given = parser.parse_args()
    packages = read_lists(given.lists)
    if given.deal:
        dealt = deal(packages)
        np.savez_compressed(KEYS, **{n: np.array([row.key for row in part], np.uint32) for n, part in dealt.items()})
    keys = dict(np.load(KEYS))
    parts = with_keys(packages, keys)
    for name, part in parts.items():
        of = Counter(package.section for package in part)
        print(f"{name}: {len(part)} of {len(keys[name])} rows, {len(of)} classes of {min(of.values())} or more")
        if len(part) < 0.99 * len(keys[name]):
            sys.exit("more than 1 % of a part's rows are missing: these are lists of another release than Debian 12")
    from smollm2 import load_smollm2  # in examples/, on the path since benchmarks.end_to_end.engine was imported

    encode_one = load_smollm2()[1]
    build(parts, lambda texts: [encode_one(text) for text in texts], given.out)


if __name__ == "__main__":
    main()
