"""`GEKOLoader`: the planned batches of a whole run, for a training loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from geko_kernels.config import GEKOConfig
from geko_kernels.state import SampleState
from geko_kernels.training.data import IdDataset, Identified
from geko_kernels.training.fingerprint import changed_items, fingerprint
from geko_kernels.training.planning.sampler import GEKOSampler

_SAME = ("num_samples", "batch_size", "num_epochs", "seed")  # what a run has to share with the one it goes on from
_UNCOUNTED = (
    "no visit was counted in {what} of epoch {epoch}: train and probe with "
    "weighted_loss(logits, labels, batch.ids, loader.state, update=True)"
)


class Batch(NamedTuple):
    """One batch of the plan, or of the probes before an epoch."""

    data: Any  # what the collate function made, its tensors on the device
    ids: Tensor  # (B,) int64 on the device
    epoch: int
    trains: bool  # False: a look, forward only


class GEKOLoader:
    """Iterates the planned batches of all epochs; before each epoch but the first, batches of probes (`trains` False).

    With nothing left out its batches are those of a `DataLoader` whose sampler draws
    `torch.randperm(N, generator=torch.Generator("cpu").manual_seed(seed + epoch))` in each epoch.

        loader = GEKOLoader(dataset, batch_size=32, num_epochs=10, device="cuda")
        for batch in loader:
            model.train(batch.trains)
            with torch.set_grad_enabled(batch.trains):
                inputs, labels = batch.data
                loss = weighted_loss(model(inputs), labels, batch.ids, loader.state, update=True)
            if batch.trains:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    A batch counts as consumed when the next one is asked for. So take `state_dict()` before a batch is trained, between
    epochs or after the loop: who resumes gets the batch at hand again. A second `iter()` goes on with that batch too.

    Args:
        dataset: with `len()` and `[]`; its items are what `collate_fn` takes.
        batch_size: samples in a batch; the last one of an epoch may be smaller.
        num_epochs: passes over the dataset.
        config: `GEKOConfig.recommended()` if left out.
        device: of the batches and of `state`; `torch.get_default_device()` if left out.
        collate_fn: makes a batch of a list of items; `torch.utils.data.default_collate` if left out.
        seed: of the order.
        num_workers: processes that load, as of `DataLoader`.

    Raises:
        TypeError, ValueError: a wrong argument; names it.
        NotImplementedError: torch.distributed runs with more than one process.
        RuntimeError: while iterating, where a whole epoch, or all of a round of probes, has counted no visit.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 32,
        num_epochs: int = 10,
        config: GEKOConfig | None = None,
        device: torch.device | str | int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        _check_dataset(dataset)
        _check_int("batch_size", batch_size, 1)
        _check_int("num_epochs", num_epochs, 1)
        _check_int("seed", seed, 0)
        _check_int("num_workers", num_workers, 0)
        if config is not None and not isinstance(config, GEKOConfig):
            raise TypeError(f"config must be a GEKOConfig, got {type(config).__name__}")
        if config is not None and config.auto_stop:
            raise ValueError("config.auto_stop must be False, got True: GEKOLoader cannot end a loop, use GEKOTrainer")
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn must be callable, got {type(collate_fn).__name__}")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise NotImplementedError(
                f"GEKOLoader serves one process, and torch.distributed runs {torch.distributed.get_world_size()}: use "
                "GEKOTrainer, or GEKOSampler with accelerate"
            )
        self.dataset, self.batch_size, self.num_epochs = dataset, batch_size, num_epochs
        self.seed, self.num_workers = seed, num_workers
        self.device = torch.get_default_device() if device is None else torch.device(device)
        self.state = SampleState(len(dataset), config or GEKOConfig.recommended(), self.device)
        self.sampler = GEKOSampler(self.state, num_epochs, seed=seed)
        self._collate = _Collate(collate_fn or default_collate)
        self._items: dict[str, Any] | None = None  # digests of some
        self._consumed = 0  # samples of the plan at hand
        self._due: Tensor | None = None  # ids of the round of probes at hand,
        self._probed = 0  # and how many of them are consumed

    @property
    def epoch(self) -> int:
        """The epoch at hand, from 0; `num_epochs` once all are done."""
        return self.sampler.next_epoch

    @property
    def progress(self) -> float:
        """Finished share of the run, in [0, 1]; 1.0 once all epochs are done."""
        if self.epoch >= self.num_epochs:
            return 1.0
        return self.sampler.progress(self._consumed)

    def __iter__(self) -> Iterator[Batch]:
        for epoch in self.epochs():
            yield from epoch

    def epochs(self) -> Iterator[Iterator[Batch]]:
        """For each epoch left an iterator of its batches, probes first.

        An epoch that is not iterated to its end comes again, from where it was left.

        Raises:
            RuntimeError: the next epoch is asked for, and no batch of this one has been consumed.
        """
        while self.epoch < self.num_epochs:
            before = self._place()
            yield self._batches(self.epoch)
            if self._place() == before:
                raise RuntimeError(
                    f"no batch of epoch {self.epoch} was consumed before the next epoch was asked for: iterate each "
                    "epoch of loader.epochs() to its end"
                )

    def _place(self) -> tuple[int, int, int]:
        """What changes with every batch consumed."""
        return self.epoch, self._consumed, self._probed

    def _batches(self, epoch: int) -> Iterator[Batch]:
        yield from self._probes(epoch)
        sampler = self.sampler
        if sampler.handed_out or sampler.plan is None:
            sampler.set_epoch(epoch)
            self._consumed = 0
        assert sampler.plan is not None
        size, before = len(sampler.plan.ids), self._visits()
        left = sampler.plan.ids[self._consumed :]
        for data, ids in self._load(left):
            sampler.advance(self._consumed)
            yield Batch(data, ids, epoch, True)
            self._consumed += len(ids)
        if len(left) and self._visits() == before:
            raise RuntimeError(_UNCOUNTED.format(what="the batches", epoch=epoch))
        self._consumed = sampler.position = size
        for _ in sampler:  # marks the plan as handed out
            pass

    def _probes(self, epoch: int) -> Iterator[Batch]:
        while True:
            if self._due is None:
                self._due, self._probed = self.sampler.due_probes(epoch), 0
            if len(self._due) == 0:
                self._due = None
                return
            for data, ids in self._load(self._due[self._probed :]):
                yield Batch(data, ids, epoch, False)
                self._probed += len(ids)
            try:
                self.sampler.probed(self._due, epoch)
            except ValueError as error:
                raise RuntimeError(_UNCOUNTED.format(what="the probes", epoch=epoch)) from error
            self._due = None

    def _load(self, ids: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Batches of the samples `ids`, on the device."""
        loader = DataLoader(
            IdDataset(self.dataset),
            batch_sampler=[part.tolist() for part in ids.split(self.batch_size)] if len(ids) else [],
            num_workers=self.num_workers,
            collate_fn=self._collate,
            pin_memory=self.device.type == "cuda" and self.num_workers > 0,  # else items may be on the GPU already
            generator=torch.Generator("cpu").manual_seed(self.seed + self.epoch),  # leaves the global one alone
        )
        for data, sample_ids in loader:
            yield _moved(data, self.device), sample_ids.to(self.device, non_blocking=True)

    def _visits(self) -> int:
        return int(self.state.times_seen.sum())

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on with the batch at hand; tensors are copies."""
        sampler = self.sampler
        return {
            "num_samples": len(self.dataset),
            "batch_size": self.batch_size,
            "num_epochs": self.num_epochs,
            "seed": self.seed,
            "config": self.state.config.to_dict(),
            "items": self._fingerprint(),
            "state": _copied(self.state.state_dict()),
            "upstream": self.state.upstream.clone(),
            "sampler": _copied(sampler.state_dict(self._consumed)),
            "due": None if self._due is None else self._due.clone(),
            "probed": self._probed,
            "looked": sampler._looked,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; iterate anew afterwards.

        Raises:
            ValueError: a value is missing or damaged, or of a run with other data, batch_size, num_epochs, seed or
                config; names it.
        """
        missing = sorted(_KEYS - values.keys())
        if missing:
            raise ValueError(f"state_dict lacks {missing}: is it what GEKOLoader.state_dict() returned?")
        self._check_same_run(values)
        _check_due(values["due"], values["probed"], len(self.dataset))
        before = _copied(self.state.state_dict())
        self.state.load_state_dict(values["state"])
        try:
            self.sampler.load_state_dict(values["sampler"])
        except ValueError:
            self.state.load_state_dict(before)
            raise
        self.state.upstream.copy_(values["upstream"])
        plan = self.sampler.plan
        finished = plan is not None and self.sampler.handed_out
        self._consumed = len(plan.ids) if plan is not None and finished else self.sampler.position
        self.sampler._looked = values["looked"]
        self._due = None if values["due"] is None else values["due"].cpu().clone()
        self._probed = values["probed"]
        if self._due is not None:
            self.sampler.probes.hand_out_(self._due, self.state.times_seen)

    def _check_same_run(self, values: Mapping[str, Any]) -> None:
        own = {"num_samples": len(self.dataset), **{name: getattr(self, name) for name in _SAME[1:]}}
        for name in _SAME:
            if values[name] != own[name]:
                raise ValueError(f"state_dict[{name!r}] is {values[name]!r}, and this loader's {name} is {own[name]!r}")
        config = self.state.config.to_dict()
        for name in sorted({*config, *values["config"]}):
            if values["config"].get(name) != config.get(name):
                raise ValueError(
                    f"state_dict['config'] has {name}={values['config'].get(name)!r}, and this loader's config "
                    f"{config.get(name)!r}"
                )
        changed, compared = changed_items(values["items"], self._fingerprint())
        if changed:
            raise ValueError(f"state_dict is of a run over other data: {changed} of {compared} items compared differ")

    def _fingerprint(self) -> dict[str, Any]:
        if self._items is None:
            self._items = fingerprint(self.dataset, in_worker=self.num_workers > 0)
        return self._items


_KEYS = {*_SAME, "config", "items", "state", "upstream", "sampler", "due", "probed", "looked"}


class _Collate:
    """(batch, ids (B,) int64) of items with their ids; a class, so that worker processes can be given it."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, rows: list[Identified]) -> tuple[Any, Tensor]:
        return self.collate_fn([row.item for row in rows]), torch.tensor([row.sample_id for row in rows], device="cpu")


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset must have len() and [], got {type(dataset).__name__}: a stream cannot be planned; load it whole"
        )
    if len(dataset) == 0:
        raise ValueError("dataset must have at least one sample, got none")


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_due(due: Any, probed: Any, num_samples: int) -> None:
    if due is not None and not (isinstance(due, Tensor) and due.dtype == torch.int64 and due.dim() == 1 and len(due)):
        raise ValueError(f"state_dict['due'] must be None or a tensor of int64 ids, got {due!r}")
    if due is not None and not 0 <= int(due.min()) <= int(due.max()) < num_samples:
        raise ValueError(
            f"state_dict['due'] must hold ids in [0, {num_samples}), got {int(due.min())}..{int(due.max())}"
        )
    if not isinstance(probed, int) or probed < 0 or (due is not None and probed >= len(due)):
        raise ValueError(f"state_dict['probed'] must be an int from 0 to below the number of due ids, got {probed!r}")


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}


def _moved(data: Any, device: torch.device) -> Any:
    """`data` with every tensor in it on `device`; what has a `to` of its own is asked."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if callable(getattr(data, "to", None)):  # a PackedSequence among them, which is a named tuple
        return data.to(device)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_moved(part, device) for part in data))
    if isinstance(data, list | tuple):
        return type(data)(_moved(part, device) for part in data)
    if isinstance(data, Mapping):
        return {name: _moved(part, device) for name, part in data.items()}
    return data
