"""The samples by which a run is judged, and the swap test's made-up items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers.trainer_utils import has_length

from geko_kernels.training.stopping.items import GROUPS, ExcerptOf, label_key, parts_of, read, with_answer
from geko_kernels.training.stopping.sentinels import hold_back, how_many, near_duplicates

FEWEST = 2000  # with fewer samples, none is held back
FEWEST_EVALUATED = 10  # with fewer samples, eval_dataset is not used
_SEEN, _PAIRS, _FEW_PAIRS, _MOST_EVALUATED = 400, 400, 10, 1000


class Swapped(NamedTuple):
    """Items with another item's answer."""

    items: list[Any]
    places: Tensor  # (m,) int64: for each, the index of its sample among those evaluated


class LookedAt(NamedTuple):
    """The samples that every look (evaluation) of a run uses."""

    source: str  # "held_back" or "eval_dataset"
    dataset: Any  # the dataset of the samples
    held: Tensor  # (n,) int64, ascending
    seen: Tensor  # (m,) int64, ascending: samples of the training set
    swapped: tuple[Swapped, Swapped] | None  # of `held` and of `seen`; None if no swap is possible


def sentinels(dataset: Any, seed: int, args: Any) -> Tensor:
    """ids (n,) int64 to hold back: whole groups of near-duplicates, joined by the items' `groups` if they have any.

    An item without tokens is a group of its own unless it has `groups`. None are held back below 2,000 samples, or if
    the groups are so large that fewer than half of the wanted samples fit: with a handful, chance would decide.

    Raises:
        TypeError: a value of `groups` is a list or the like.
    """
    total = len(dataset)
    if total < FEWEST:
        return torch.empty(0, dtype=torch.int64)
    first = dataset[0]
    if parts_of(first, args.label_names or ()) is None and not (isinstance(first, Mapping) and GROUPS in first):
        return hold_back(range(total), how_many(total), seed)  # reading images would take long and show no duplicates
    rows = list(read(dataset, range(total), args, ExcerptOf(args.label_names or ())))
    _check_groups([row.group for row in rows])
    prompts = [row.prompt if row.kind else ("item", number) for number, row in enumerate(rows)]
    groups = near_duplicates(prompts, [row.answer for row in rows], [row.group for row in rows])  # type: ignore[arg-type]
    held = hold_back(groups, how_many(total), seed)
    return held if 2 * len(held) >= how_many(total) else held[:0]


def _check_groups(groups: Sequence[Any]) -> None:
    for number, group in enumerate(groups):
        try:
            hash(group)
        except TypeError as error:
            raise TypeError(
                f"{GROUPS} must be one value an item (a number, a text, or None for no group), sample {number} has "
                f"{group!r}"
            ) from error


def looked_at(trainer: Any, held: Tensor, collate: Callable[[list[Any]], Any]) -> LookedAt | None:
    """`held` samples of the training set; if there are none, those of `eval_dataset`; None without that."""
    args, train, seed = trainer.args, trainer.train_dataset, trainer.args.seed
    source, dataset = "held_back", train
    if not len(held):
        source, dataset = "eval_dataset", _evaluated(trainer.eval_dataset, train, args.label_names or ())
        if dataset is None:
            return None
        held = _some(torch.arange(len(dataset)), _MOST_EVALUATED, seed)
    others = torch.ones(len(train), dtype=torch.bool)
    if source == "held_back":
        others[held] = False
    seen = _some(others.nonzero()[:, 0], min(_SEEN, max(len(held), 1)), seed)
    pairs = [_swap(each, ids, args, seed) for each, ids in ((dataset, held), (train, seen))]
    size = trainer.config.probe_batch_size or getattr(args, "probe_batch_size", None)
    size = size or 4 * args.per_device_train_batch_size
    possible = all(pair is not None and _collates(pair.items, collate, size) for pair in pairs)
    return LookedAt(source, dataset, held, seen, (pairs[0], pairs[1]) if possible else None)  # type: ignore[arg-type]


def places_of(at: LookedAt | None) -> Tensor:
    """(m,) int64: the samples that have a made-up item; empty without the swap test."""
    parts = () if at is None or at.swapped is None else at.swapped
    return torch.cat([torch.empty(0, dtype=torch.int64), *(part.places for part in parts)])


def _evaluated(dataset: Any, train: Any, label_names: Sequence[str]) -> Any:
    """The evaluation data as one set of items by index; None if they cannot be used.

    They cannot without a length, with hardly any samples, or without labels if the items of `train` have them: a
    language model would then be judged by its prompts.
    """
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    if not parts or any(part is None or not has_length(part) or not hasattr(part, "__getitem__") for part in parts):
        return None
    firsts = [part[0] for part in (train, *parts) if len(part)]
    labelled = [not isinstance(item, Mapping) or label_key(item, label_names) is not None for item in firsts]
    if labelled[0] and not all(labelled):
        return None
    together = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    return together if len(together) >= FEWEST_EVALUATED else None


def _some(ids: Tensor, most: int, seed: int) -> Tensor:
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:most]
    return ids[order].sort().values


def _swap(dataset: Any, ids: Tensor, args: Any, seed: int) -> Swapped | None:
    """Pairs in a random ring; a pair with the same question or answer shows nothing and is left out."""
    names = args.label_names or ()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed + 1))[: _PAIRS + 1].tolist()
    items = list(read(dataset, ids[order].tolist(), args))
    parts = [parts_of(item, names) for item in items]
    made, places = [], []
    for place, mine, theirs, item, other in zip(order, parts, _next(parts), items, _next(items), strict=True):
        if mine is None or theirs is None or mine.answer == theirs.answer or mine.prompt == theirs.prompt:
            continue
        swapped = with_answer(item, other, names)
        if swapped is None:
            return None
        made.append(swapped)
        places.append(place)
    return Swapped(made, torch.tensor(places)) if len(made) >= _FEW_PAIRS else None


def _next(values: Sequence[Any]) -> list[Any]:
    return [*values[1:], *values[:1]]


def _collates(items: list[Any], collate: Callable[[list[Any]], Any], size: int) -> bool:
    try:
        for start in range(0, len(items), size):
            collate(items[start : start + size])
    except Exception:  # any error of the user's collator, which was not written for such items
        return False
    return True
