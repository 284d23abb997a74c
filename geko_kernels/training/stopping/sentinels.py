"""Which samples are held back to say how long to train: whole groups, so that none of their like is trained on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

SHARE, LEAST, MOST = 0.02, 200, 0.05  # of the samples; at least so many; but never more than that share
_BEGINNING = 24  # tokens that near-duplicates begin with alike
_COMMON = 0.01  # a beginning that more samples share is the prompt's template, and marks nobody as a duplicate


def how_many(samples: int) -> int:
    """`min(max(2 %, 200), 5 %)` of the samples."""
    return min(max(round(SHARE * samples), LEAST), int(MOST * samples))


def near_duplicates(
    inputs: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], groups: Sequence[Hashable] | None = None
) -> list[int]:
    """A group number a sample: the same for samples whose input, or whose answer, begins with the same 24 tokens.

    Shorter ones count only whole inputs: a class name is an answer of many samples that are no duplicates. `groups`
    joins those with the same value, however many they are; None joins nobody.
    """
    keys: list[tuple[Hashable, ...]] = []
    for given, answer in zip(inputs, answers, strict=True):
        mine: list[Hashable] = [("input", *given[:_BEGINNING])]
        if len(answer) >= _BEGINNING:
            mine.append(("answer", *answer[:_BEGINNING]))
        keys.append(tuple(mine))
    return joined(keys, groups)


def joined(keys: Sequence[Sequence[Hashable]], groups: Sequence[Hashable] | None = None) -> list[int]:
    """A group number a sample, the same for samples that share a key or a group, directly or through others.

    A key that more than 1 % of the samples have (and more than 8) joins nobody; a group, unless None, always does.
    """
    counts: dict[Hashable, int] = {}
    for mine in keys:
        for key in set(mine):
            counts[key] = counts.get(key, 0) + 1
    most = max(8, _COMMON * len(keys))
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, mine in enumerate(keys):
        for key in mine:
            if counts[key] <= most:
                parent[root(i)] = root(first.setdefault(key, i))
    first = {}
    for i, group in enumerate(groups or ()):
        if group is not None:
            parent[root(i)] = root(first.setdefault(group, i))
    return [root(i) for i in range(len(keys))]


def hold_back(groups: Sequence[Hashable], count: int, seed: int) -> Tensor:
    """`count` samples or a few less, sorted (int64): whole groups in a random order, those that fit.

    The same on every process and after a resume: it depends on the arguments alone.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    names = list(members)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held: list[int] = []
    for place in order:
        those = members[names[place]]
        if len(held) + len(those) <= count:
            held += those
    return torch.tensor(sorted(held), dtype=torch.int64)
