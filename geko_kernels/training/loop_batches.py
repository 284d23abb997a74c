"""The batches of a `GEKOLoader`: each process's share of the planned ids, collated and moved to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from geko_kernels.training.data import IdDataset, Identified


class Batch(NamedTuple):
    """One batch of the plan, or of the probes before an epoch."""

    data: Any  # the collate function's result, its tensors on the device
    ids: Tensor  # (B,) int64 on the device; -1 for a repeat that only fills a process's share
    epoch: int
    trains: bool  # False: a probe, forward only
    weights: Tensor | None = None  # (B,) float32: sample_weights for the loss; None: all 1


class ProcessShares(Sampler[list[int]]):
    """One process's batches: of each `batch_size * world` of `ids` (n,), every world-th id from `rank` on.

    All processes have the same number of batches, with the same number of items. If the last ids are too few, a
    repeat is added as `~id`, which `IdDataset` turns into the item with id -1.
    """

    def __init__(self, ids: Tensor, batch_size: int, rank: int, world: int) -> None:
        self.ids, self.batch_size, self.rank, self.world = ids, batch_size, rank, world

    def __len__(self) -> int:
        return -(-len(self.ids) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        if len(self.ids) == 0:
            return
        for part in self.ids.split(self.batch_size * self.world):
            own = part[self.rank :: self.world].tolist()
            yield own if len(own) * self.world >= len(part) else [*own, ~int(part[0])]


class BatchSource:
    """Makes the batches of given ids.

    Args:
        dataset: with `len()` and `[]`.
        batch_size: of each process.
        device: where the batches go.
        collate_fn: makes a batch of a list of items.
        num_workers: as of `DataLoader`.
        rank, world: the number of this process, and of all processes.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        device: torch.device,
        collate_fn: Callable[[list[Any]], Any] | None,
        num_workers: int,
        rank: int,
        world: int,
    ) -> None:
        check_dataset(dataset)
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn must be callable, got {type(collate_fn).__name__}")
        self.dataset, self.batch_size, self.device, self.num_workers = dataset, batch_size, device, num_workers
        self.rank, self.world = rank, world
        self.collate = _Collate(collate_fn or default_collate)

    def load(self, ids: Tensor, seed: int) -> Iterator[tuple[Any, Tensor, int]]:
        """Yields (data, ids, the number of `ids` in the batches of all processes) for each batch."""
        loader = DataLoader(
            IdDataset(self.dataset),
            batch_sampler=ProcessShares(ids, self.batch_size, self.rank, self.world),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=self.device.type == "cuda" and self.num_workers > 0,  # else items may be on the GPU
            # seeds the workers: leaves the global generator alone, and differs between processes
            generator=torch.Generator("cpu").manual_seed(seed * self.world + self.rank),
        )
        left, size = len(ids), self.batch_size * self.world
        for data, sample_ids in loader:
            yield moved(data, self.device), sample_ids.to(self.device, non_blocking=True), min(size, left)
            left -= size


class _Collate:
    """(batch, ids (B,) int64) of items with ids; a class, so that it can be pickled for worker processes."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, rows: list[Identified]) -> tuple[Any, Tensor]:
        return self.collate_fn([row.item for row in rows]), torch.tensor([row.sample_id for row in rows], device="cpu")


def check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_dataset(dataset: Any) -> None:
    if isinstance(dataset, DataLoader):
        raise TypeError("dataset must have len() and [], got DataLoader: give its dataset, loader.dataset")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset must have len() and [], got {type(dataset).__name__}: a stream cannot be planned; load all of it"
        )
    table = hasattr(dataset, "iloc") and hasattr(dataset, "columns")  # a DataFrame
    named = isinstance(dataset, Mapping) and 0 not in dataset  # splits or columns
    if table or named or isinstance(dataset, str | bytes):
        raise TypeError(
            f"dataset must give a sample for each row, dataset[0] to dataset[len - 1], got {type(dataset).__name__}: "
            "give one split of several, zip columns into a list (a DataFrame: to_dict('records')), load a file"
        )
    if len(dataset) == 0:
        raise ValueError("dataset must have at least one sample, got none")


def moved(data: Any, device: torch.device) -> Any:
    """`data` with every tensor moved to `device`; objects with a `to` method move themselves."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if callable(getattr(data, "to", None)):  # such as a PackedSequence, which is a named tuple
        return data.to(device)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(moved(part, device) for part in data))
    if isinstance(data, list | tuple):
        return type(data)(moved(part, device) for part in data)
    if isinstance(data, Mapping):
        return {name: moved(part, device) for name, part in data.items()}
    return data
