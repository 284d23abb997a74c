"""Texts of any length as token arrays: made once on a machine that has the tokenizer, read where the GPU is.

    python -m benchmarks.end_to_end.texts d1 --out d1.npz         # the folder that benchmarks.end_to_end.packages made
    python -m benchmarks.end_to_end.texts R2-30 --out r2_30.npz   # a gloss task of benchmarks.end_to_end

Held back from training, each 2 % of it, to be looked at while it runs: `random` samples; samples of whole `source`
packages; and samples of whole `cluster`s, which share a source or the first 150 characters. A gloss task has no
sources, and its clusters share the first 40 characters. Never trained on: `test`, and `choose` where the task has one.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.end_to_end import engine  # noqa: F401  puts examples/ on the path
from benchmarks.end_to_end.data import read_wordnet
from benchmarks.end_to_end.tasks import TASKS, make_data

LONGEST = 256  # tokens of a package's sample
_HELD = 0.02
_SAME = 150  # first characters that near-duplicates share


class Texts(NamedTuple):
    """N samples one after the other; the tokens from `prompts[i]` on are what sample i has to answer."""

    tokens: Tensor  # (T,) int32
    offsets: Tensor  # (N + 1,) int64
    prompts: Tensor  # (N,) int64: tokens of the prompt
    parts: dict[str, Tensor]  # ids by name: train, test and what is held back
    beside: dict[str, Tensor]  # what else a task has: the `groups` (N,), int64, of its samples, ...

    def length(self, ids: Tensor) -> Tensor:
        return self.offsets[ids + 1] - self.offsets[ids]


def load(path: Path) -> Texts:
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file}
    parts = {name.removeprefix("part_"): ids for name, ids in arrays.items() if name.startswith("part_")}
    known = ("tokens", "offsets", "prompts")
    beside = {name: values for name, values in arrays.items() if name not in known and not name.startswith("part_")}
    return Texts(arrays["tokens"].int(), arrays["offsets"], arrays["prompts"], parts, beside)


def save(
    path: Path,
    prompts: list[list[int]],
    answers: list[list[int]],
    parts: dict[str, Sequence[int]],
    beside: dict[str, np.ndarray] | None = None,
) -> None:
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    arrays = {
        "tokens": np.concatenate([np.array(row, np.uint16) for row in rows]),
        "offsets": np.cumsum([0, *map(len, rows)]).astype(np.int64),
        "prompts": np.array([len(prompt) for prompt in prompts], np.uint16),
    }
    arrays |= beside or {}
    np.savez_compressed(path, **arrays, **{f"part_{name}": np.array(ids, np.int32) for name, ids in parts.items()})


def groups_of(keys: list[tuple[str, ...]]) -> list[int]:
    """A number a sample, the same for samples that share a key, directly or through others."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[int, str], int] = {}
    for i, mine in enumerate(keys):
        for kind, key in enumerate(mine):
            parent[root(i)] = root(first.setdefault((kind, key), i))
    return [root(i) for i in range(len(keys))]


def hold_back(train: list[int], kinds: dict[str, list[int]]) -> dict[str, list[int]]:
    """`train` without what each kind holds back; a kind gives the group of each sample, whole groups are taken."""
    draw, count = random.Random(5), round(_HELD * len(train))
    left, parts = dict.fromkeys(train), {}
    for name, group in kinds.items():
        members: dict[int, list[int]] = {}
        for i in left:
            members.setdefault(group[i], []).append(i)
        names, held = list(members), []
        draw.shuffle(names)
        for key in names:
            if len(held) + len(members[key]) <= count:
                held += members[key]
        parts[name] = held
        for i in held:
            del left[i]
    return {"train": list(left), **parts}


def _packages(folder: Path, out: Path) -> None:
    from smollm2 import load_smollm2  # in examples/, on the path since benchmarks.end_to_end.engine was imported

    names = ("train", "test", "choose")
    by_part = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in names}
    rows = [row for name in names for row in by_part[name]]
    encode, end = load_smollm2()[1], 2  # <|im_end|>
    prompts = [encode(row["prompt"])[: LONGEST // 2] for row in rows]
    answers = [
        (encode(row["completion"]) + [end])[: LONGEST - len(prompt)] for row, prompt in zip(rows, prompts, strict=True)
    ]
    keys = [(row["source"], row["completion"][:_SAME]) for row in rows]
    bounds = np.cumsum([0, *(len(by_part[name]) for name in names)])
    parts = {name: range(bounds[i], bounds[i + 1]) for i, name in enumerate(names)}
    kinds = {
        "cluster": groups_of(keys),
        "source": groups_of([key[:1] for key in keys]),
        "random": list(range(len(rows))),
    }
    held = hold_back(list(parts["train"]), kinds)
    save(out, prompts, answers, {**held, "test": parts["test"], "choose": parts["choose"]})


def _glosses(name: str, wordnet: Path, out: Path) -> None:
    from smollm2 import load_smollm2

    task, encode_one = TASKS[name], load_smollm2()[1]
    made = make_data(task, lambda texts: [encode_one(text) for text in texts], wordnet)
    glosses = [gloss for _, _, gloss in read_wordnet(wordnet)[task.test : task.test + task.samples]]
    prompts, answers = [], []
    for split in (made.train, made.test):
        for row, start, labels in zip(split.tokens.tolist(), split.positions[:, 0].tolist(), split.labels, strict=True):
            prompts.append(row[: start + 1])
            answers.append(labels[labels >= 0].tolist())
    count = len(made.train)
    kinds = {
        "cluster": groups_of([(gloss[:40],) for gloss in glosses]),
        "random": list(range(count)),
    }
    held = hold_back(list(range(count)), kinds)
    wrong = set(made.train.wrong.nonzero()[:, 0].tolist())
    clean = [i for i in held["random"] if i not in wrong]
    save(out, prompts, answers, {**held, "random, right labels": clean, "test": range(count, count + len(made.test))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder of package rows, or a gloss task: R2-0, R2-10, R2-30, R2-pairs, R4")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.source in TASKS:
        _glosses(given.source, given.wordnet, given.out)
    else:
        _packages(Path(given.source), given.out)
    found = load(given.out)
    tokens = {name: int(found.length(ids).sum()) for name, ids in found.parts.items()}
    print({name: f"{len(ids)} samples, {tokens[name]} tokens" for name, ids in found.parts.items()})


if __name__ == "__main__":
    main()
