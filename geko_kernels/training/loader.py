"""`GEKOLoader`: the planned batches of a whole run, for a training loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geko_kernels.config import GEKOConfig, check_config
from geko_kernels.state import SampleState
from geko_kernels.training.fingerprint import fingerprint, named_items
from geko_kernels.training.loop_batches import Batch, BatchSource, check_int
from geko_kernels.training.loop_counts import HandedOut, LoopCounts
from geko_kernels.training.loop_position import go_on_from, position_of
from geko_kernels.training.loop_report import write_run
from geko_kernels.training.planning.sampler import GEKOSampler
from geko_kernels.training.processes import check_alike, rank_and_world
from geko_kernels.training.report.facts import loader_facts
from geko_kernels.training.report.labels import label_figures
from geko_kernels.training.report.samples import MOST_SAMPLES, SAMPLES_NAME, sample_rows, write_rows
from geko_kernels.training.report.summary import run_summary

_UNCOUNTED = (
    "no visit was counted in {what} of epoch {epoch}: train and probe with "
    "weighted_loss(logits, labels, batch.ids, loader.state, update=True), and finish a batch before you fetch the next "
    "one. If the loop does both, no sample has a label that counts, or every loss is NaN or infinite"
)


class GEKOLoader:
    """Iterates the planned batches of all epochs; before each epoch but the first, batches of probes (`trains` False).

    With nothing left out its batches are those of a `DataLoader` whose sampler draws
    `torch.randperm(N, generator=torch.Generator("cpu").manual_seed(seed + epoch))` in each epoch.

        loader = GEKOLoader(dataset, batch_size=32, num_epochs=10, device="cuda")
        for batch in loader:
            model.train(batch.trains)
            with torch.set_grad_enabled(batch.trains):
                inputs, labels = batch.data
                given = labels, batch.ids, loader.state
                loss = weighted_loss(model(inputs), *given, sample_weights=batch.weights, update=True)
            if batch.trains:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        loader.write_report("run")

    A batch counts as consumed once the next one is fetched. If its visits have been counted, it also counts as consumed
    in `state_dict()` and when the iteration starts again. So call `state_dict()` before a batch is trained or after its
    optimizer step.

    Several processes (torchrun, accelerate): make the loader after torch.distributed is initialised, with the same
    arguments everywhere. Each process gets its share of the same plan, and all get the same number of batches. A repeat
    that fills a batch up has id -1 and no part in the loss or the state. DDP takes the mean of the processes' means, as
    in any loop. All processes have to iterate, and to call `state_dict`.

    A loop must not fetch a batch before it has finished the last one (Lightning does, except with `dataloader_iter`):
    no visit would be counted.

    Args:
        dataset: with `len()` and `[]`; `collate_fn` gets its items.
        batch_size: samples in a batch of each process; the last one of an epoch may be smaller.
        num_epochs: passes over the dataset.
        config: `GEKOConfig.recommended()` if left out.
        device: of the batches and of `state`; `torch.get_default_device()` if left out.
        collate_fn: makes a batch of a list of items; `torch.utils.data.default_collate` if left out.
        seed: of the order.
        num_workers: processes that load, as of `DataLoader`.

    Raises:
        TypeError, ValueError: a wrong argument, or one that differs between processes; names it.
        ValueError: when the iteration begins, if only some processes have loaded a state_dict, or others than the rest.
        RuntimeError: while iterating, if a whole epoch or a whole round of probes has counted no visit, or if
            torch.distributed was initialised after the loader was made.
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
        check_int("batch_size", batch_size, 1)
        check_int("num_epochs", num_epochs, 1)
        check_int("seed", seed, 0)
        check_int("num_workers", num_workers, 0)
        check_config(config)
        for name in ("batch_tokens", "probe_batch_size"):
            if getattr(config, name, None) is not None:
                raise ValueError(f"config.{name} is for GEKOTrainer: GEKOLoader's batches have batch_size samples")
        if config is not None and config.auto_stop:
            raise ValueError("config.auto_stop must be False, got True: GEKOLoader cannot end a loop, use GEKOTrainer")
        self.dataset, self.batch_size, self.num_epochs = dataset, batch_size, num_epochs
        self.seed, self.num_workers = seed, num_workers
        self.device = torch.get_default_device() if device is None else torch.device(device)
        self.rank, self.world = rank_and_world()
        self._source = BatchSource(dataset, batch_size, self.device, collate_fn, num_workers, self.rank, self.world)
        self.state = SampleState(len(dataset), config or GEKOConfig.recommended(), self.device)
        self.sampler = GEKOSampler(self.state, num_epochs, seed=seed)
        several = (dist.all_reduce, partial(dist.all_reduce, op=dist.ReduceOp.MAX)) if self.world > 1 else ()
        self.counts = LoopCounts(self.state, *several)
        self._items: dict[str, Any] | None = None  # digests of some items
        self._consumed = 0  # samples of the current plan
        self._due: Tensor | None = None  # ids of the current round of probes,
        self._probed = 0  # and how many of them are consumed
        self._at_hand: tuple[HandedOut, int] | None = None  # the current batch, and its samples in all processes
        if self.world > 1:
            given = {"len(dataset)": len(dataset), "batch_size": batch_size, "num_epochs": num_epochs, "seed": seed}
            fields = {f"config.{name}": value for name, value in self.state.config.to_dict().items()}
            check_alike({**given, **fields, **named_items(self._fingerprint(), "dataset")}, self.device)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; `num_epochs` once all are done."""
        return self.sampler.next_epoch

    @property
    def progress(self) -> float:
        """Finished share of the run, in [0, 1]; 1.0 once all epochs are done. The same in all processes."""
        if self.epoch >= self.num_epochs:
            return 1.0
        return self.sampler.progress(self._consumed)

    def __iter__(self) -> Iterator[Batch]:
        for epoch in self.epochs():
            yield from epoch

    def epochs(self) -> Iterator[Iterator[Batch]]:
        """For each remaining epoch an iterator of its batches, probes first.

        An epoch that is not iterated to its end comes again, and continues where it was left.

        Raises:
            RuntimeError: the next epoch is fetched, but no batch of this one was consumed.
        """
        if rank_and_world() != (self.rank, self.world):
            raise RuntimeError(
                f"GEKOLoader was made as process {self.rank} of {self.world}, but now torch.distributed says (rank, "
                f"processes) = {rank_and_world()}: make the loader after torch.distributed is initialised"
            )
        self._settle()
        where = dict(zip(("epoch", "samples", "probed"), self._place(), strict=True))
        check_alike({"the position in the run (load_state_dict in all processes, or in none)": where}, self.device)
        while self.epoch < self.num_epochs:
            before = self._place()
            yield self._batches(self.epoch)
            self._settle()
            if self._place() == before:
                raise RuntimeError(
                    f"no batch of epoch {self.epoch} was consumed before the next epoch was fetched: iterate each "
                    "epoch of loader.epochs() to its end"
                )
        self._end_epoch()

    def _place(self) -> tuple[int, int, int]:
        """Values that change with every consumed batch."""
        return self.epoch, self._consumed, self._probed

    def _batches(self, epoch: int) -> Iterator[Batch]:
        sampler, counts = self.sampler, self.counts
        try:
            counts.switch("selection")
            self._end_epoch()  # of a run that was left after an epoch's last batch
            if counts.open_epoch is None:
                counts.begin_epoch(epoch, counts.steps)
            yield from self._probes(epoch)
            if sampler.handed_out or sampler.plan is None:
                sampler.set_epoch(epoch)
                self._consumed = 0
            assert sampler.plan is not None
            counts.switch("steps")
            for data, ids, size in self._source.load(sampler.plan.ids[self._consumed :], self.seed + epoch):
                sampler.advance(self._consumed)
                yield from self._hand_out(Batch(data, ids, epoch, True, sampler.sample_weights(ids)), size)
            self._check_counted()
            self._consumed = sampler.position = len(sampler.plan.ids)
            for _ in sampler:  # marks the plan as handed out
                pass
            counts.switch("selection")
            self._end_epoch()
        finally:
            counts.switch(None)

    def _probes(self, epoch: int) -> Iterator[Batch]:
        while True:
            if self._due is None:
                self._due, self._probed = self.sampler.due_probes(epoch), 0
            if len(self._due) == 0:
                self._due = None
                return
            self.counts.switch("probes")
            for data, ids, size in self._source.load(self._due[self._probed :], self.seed + epoch):
                yield from self._hand_out(Batch(data, ids, epoch, False), size)
            self.counts.switch("selection")
            self.counts.flush_visits()  # a sample may be trained in the same epoch
            try:
                self.sampler.probed(self._due, epoch)
            except ValueError as error:
                raise RuntimeError(_UNCOUNTED.format(what="the probes", epoch=epoch)) from error
            self._due = None

    def _hand_out(self, batch: Batch, size: int) -> Iterator[Batch]:
        self._at_hand = self.counts.hand_out(batch.data, batch.ids, batch.trains), size
        yield batch
        self._consume()

    def _consume(self) -> None:
        """Count the current batch as consumed."""
        assert self._at_hand is not None
        batch, size = self._at_hand
        self.counts.add(batch)
        if batch.trains:
            self._consumed += size
        else:
            self._probed += size
        self._at_hand = None

    @property
    def _trains_at_hand(self) -> bool:
        return self._at_hand is not None and self._at_hand[0].trains

    def _size_visited(self) -> int:
        """Samples of the current batch, or 0 if no process has counted a visit of it. All processes call it."""
        size, visited = 0, torch.zeros((), dtype=torch.int32, device=self.device)
        if self._at_hand is not None:
            batch, size = self._at_hand
            visited = self.counts.visited(batch).any().int()
        if self.world > 1:
            dist.all_reduce(visited, dist.ReduceOp.MAX)
        return size * int(visited)

    def _settle(self) -> None:
        """After the iteration was left: the current batch is consumed if its visits were counted."""
        if self._size_visited():
            self._consume()
        self._at_hand = None

    def _check_counted(self) -> None:
        """Raise if no visit of the open epoch's training batches was counted, in all processes alike."""
        counts = self.counts
        counts.collect()
        before = counts.mark["train"]
        if counts.train["samples"] > before["samples"] and counts.train["labels"] == before["labels"]:
            raise RuntimeError(_UNCOUNTED.format(what="the batches", epoch=counts.open_epoch))

    def _end_epoch(self) -> None:
        """Close the record of an epoch whose batches are all consumed, if one is open."""
        counts = self.counts
        if counts.open_epoch is None or counts.open_epoch >= self.epoch:
            return
        self._check_counted()
        marks = {"end": float(self.epoch), **self.sampler.epoch_marks_()}
        counts.samples_standard = self.epoch * len(self.state)
        counts.end_epoch(counts.steps, marks)

    def write_report(self, folder: str | Path) -> Path:
        """Write `geko_report.json`, `report.html` and its PNGs into `folder`; returns the page's path.

        Up to 200,000 samples it also writes `samples.jsonl`, whose lists and texts the page shows. For the contents see
        `geko_kernels/training/report/efficiency.py`; figures that a loop does not reveal (see `LoopCounts`) are None
        and are named on the page. Of several processes the first writes. Before the run's end the figures are those of
        the last epoch or `state_dict`.

        Raises:
            ImportError: matplotlib or jinja2 is missing.
        """
        counts = self.counts
        if self.world == 1:
            counts.collect()
        counts.samples_standard = round(self.progress * self.num_epochs * len(self.state))
        if self.rank:
            return Path(folder) / "report.html"
        if len(self.state) <= MOST_SAMPLES:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.write_samples(Path(folder) / SAMPLES_NAME)
        summary = run_summary(self.state, self.sampler, counts.report(), []) | label_figures(self.dataset, self.state)
        skipped = getattr(self.dataset, "skipped_rows", ())
        return write_run(folder, {**summary, "run": loader_facts(self)}, counts.not_measured, skipped)

    def write_samples(self, path: str | Path) -> None:
        """Write the statistics of each sample, one row a sample, as `.jsonl`, `.csv` or `.parquet`.

        The columns are those of `GEKOTrainer.write_samples`; `hits` is null unless all batches have one label a sample.
        Of several processes the first writes. Before the run's end they are those of the last epoch or `state_dict`.

        Raises:
            ValueError: another ending. ImportError: pandas or pyarrow is missing for `.parquet`.
        """
        if self.rank:
            return
        if self.world == 1:
            self.counts.flush_visits()
        rows = sample_rows(self.state, self.sampler, self.counts.log.visits(), self.dataset)
        write_rows(path, rows if self.counts.shows_hits else ({**row, "hits": None} for row in rows))

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to continue; tensors are copies. Of several processes all call it.

        The run continues with the current batch, or with the next one if visits of the current batch have been counted.
        So call it before a batch is trained, after its optimizer step, or between epochs.
        """
        return position_of(self)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; start a new iteration afterwards.

        Raises:
            ValueError: a value is missing or damaged, or the run had other data, or another batch_size, num_epochs,
                seed, config or number of processes; names it.
        """
        go_on_from(self, values)

    def _fingerprint(self) -> dict[str, Any]:
        if self._items is None:
            self._items = fingerprint(self.dataset, in_worker=self.num_workers > 0)
        return self._items
