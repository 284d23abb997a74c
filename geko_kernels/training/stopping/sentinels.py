"""The samples held back to find the run's length: whole groups, so that no near-duplicate of theirs is trained."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

SHARE, LEAST, MOST = 0.02, 200, 0.05  # share of the samples; the least number; the largest share
_BEGINNING = 24  # the number of first tokens that near-duplicates share
_COMMON = 0.01  # a beginning shared by more samples is the prompt's template, and does not mark duplicates


def how_many(samples: int) -> int:
    """`min(max(2 %, 200), 5 %)` of the samples."""
    return min(max(round(SHARE * samples), LEAST), int(MOST * samples))


def near_duplicates(
    inputs: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], groups: Sequence[Hashable] | None = None
) -> list[int]:
    """A group number for each sample: the same if their inputs, or their answers, begin with the same 24 tokens.

    Shorter inputs have to be equal, and shorter answers do not count: many samples that are no duplicates share a class
    name. `groups` joins samples with the same value, whatever their number; None joins none.
    """
    keys: list[tuple[Hashable, ...]] = []
    for given, answer in zip(inputs, answers, strict=True):
        mine: list[Hashable] = [("input", *given[:_BEGINNING])]
        if len(answer) >= _BEGINNING:
            mine.append(("answer", *answer[:_BEGINNING]))
        keys.append(tuple(mine))
    return joined(keys, groups)


def joined(keys: Sequence[Sequence[Hashable]], groups: Sequence[Hashable] | None = None) -> list[int]:
    """A group number for each sample, the same for samples that share a key or a group, directly or through others.

    A key of more than 1 % of the samples (and more than 8) joins none; a group, unless None, always joins.
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
    """`count` samples or slightly fewer, sorted (int64): whole groups, taken in random order if they fit.

    It depends only on the arguments, so it is the same on every process and after a resume.
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
