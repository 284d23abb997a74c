"""`GEKOSampler`: each epoch's plan, drawn from the learning state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState
from geko_kernels.training.planning.drawing import PlanDrawer, Row
from geko_kernels.training.planning.epoch_plan import EpochPlan
from geko_kernels.training.planning.guard import generalises, nearly_suspects, update_quarantine_
from geko_kernels.training.planning.orders import iterate_padded
from geko_kernels.training.planning.packing import Packer, iterate_packs
from geko_kernels.training.planning.position import go_on_from, position_of
from geko_kernels.training.processes import check_same
from geko_kernels.training.report.efficiency import bucket_names

ALARM = 0.1  # share of probed samples that were forgotten, from which on all are probed
_DRAWN_FROM = "(drawn from the data's lengths and weights, the config, the seed and the learning state)"


class GEKOSampler(PlanDrawer, Sampler[int]):
    """Draws the sample ids of an epoch without replacement, and leaves out samples that have nothing to teach now.

    With `perm = torch.randperm(N, generator=torch.Generator().manual_seed(seed + epoch))` the plan is
    `perm[keep[perm]]`, so with nothing left out it is the order of Transformers' Trainer. `keep` are the samples never
    seen, and those whose bucket has a weight above zero in the middle of the epoch (FREEZE never has one), without the
    quarantined ones. A LIGHT sample takes part in one of `light_interval` epochs, and then has `sample_weights`. The
    last share `uniform_finish` of the run takes all samples but the quarantined.

    In a loop of your own, with `inputs` and `labels` of all samples on the device of the state:

        B, sampler = 32, GEKOSampler(state, num_epochs=3)
        loader = DataLoader(range(len(state)), batch_size=B, sampler=sampler)  # of sample ids
        for epoch in range(sampler.next_epoch, 3):  # from 0, or where load_state_dict has left it
            model.eval()
            with torch.no_grad():
                while len(due := sampler.due_probes(epoch)):
                    for ids in due.to(state.device).split(128):
                        weighted_loss(model(inputs[ids]), labels[ids], ids, state, update=True)  # counts the visit
                    sampler.probed(due, epoch)
            model.train()
            sampler.set_epoch(epoch)  # draws the plan: len(loader) is this epoch's
            for step, ids in enumerate(loader, sampler.position // B):
                sampler.advance(step * B)  # moves the weights along the curriculum
                ids = ids.to(state.device)
                given = labels[ids], ids, state
                weighted_loss(model(inputs[ids]), *given, sample_weights=sampler.sample_weights(ids)).backward()
                optimizer.step()
                optimizer.zero_grad()
                position = sampler.state_dict(consumed=(step + 1) * B)  # for a checkpoint, beside model and state

    Several processes: give every rank the same arguments; `due_probes` and `set_epoch` sync the state and draw the
    same plan everywhere, or raise `ValueError` in all. The sampler yields the whole plan, which accelerate shards
    (`accelerator.prepare`).

    Args:
        state: the learning state; its config says which samples are left out.
        num_epochs: length of the run, in passes over the dataset; the last one may be partial.
        seed: seed of the order.
        shuffle: False keeps the order of the ids.
        pad_to: fill the plan up to a multiple of this with marked repeats: `~id`, which `IdDataset` turns into the
            sample with id -1. So accelerate never repeats a sample itself, and repeats have no effect.
        lengths: (N,) sample lengths, by which windows of the plan are sorted, longest first.
        window: samples in such a window.
        present: (P,) int32 ids, ascending, of the samples that may be drawn; all by default.
        packer: cuts each plan into packs; then lists of ids are yielded, and `pad_to` counts packs.
    """

    def __init__(
        self,
        state: SampleState,
        num_epochs: float = 1.0,
        *,
        seed: int = 0,
        shuffle: bool = True,
        pad_to: int = 1,
        lengths: Tensor | None = None,
        window: int = 1,
        present: Tensor | None = None,
        packer: Packer | None = None,
    ) -> None:
        super().__init__(state, num_epochs, seed, shuffle, lengths, window, present, packer)
        self.pad_to = pad_to
        self.was_correct = torch.zeros(len(state), dtype=torch.bool, device=state.device)
        self.forgotten = torch.zeros(len(state), dtype=torch.uint8, device=state.device)  # how often, up to 255
        self.doubtful = 0  # the largest result of `update_quarantine_`
        self.lost = torch.zeros((), dtype=torch.int64, device=state.device)  # forgotten since it was last set to zero
        self.looked = -1  # the epoch before which `probed` was last called
        self.hurried = -1  # when all left-out samples were last made due
        self.guard_on: bool | None = None  # whether the noise guard is on; None until that is known
        self.position = 0  # ids of the plan, or packs of it, handed out
        self.handed_out = False  # whether the current plan has been yielded to its end
        self._row: Row | None = None  # current weights

    def __len__(self) -> int:
        """Ids, or packs, in this epoch's plan with its padding; those of all samples before the first plan is drawn."""
        size = self.all_units if self.plan is None else self.plan.units
        return math.ceil(size / self.pad_to) * self.pad_to

    @cached_property
    def all_units(self) -> int:
        """Ids, or packs, of all samples in the first epoch's order."""
        return self.total if self.packer is None else len(self.packer.pack(self._order(0))[1])

    def __iter__(self) -> Iterator[Any]:
        if self.plan is None or self.handed_out:
            self.set_epoch(self.next_epoch)
        assert self.plan is not None
        if self.shuffle:
            self.orders.prepare(self.epoch + 1)
        ids, packs = self.plan.ids, self.plan.packs
        left: Iterator[Any] = iterate_padded(ids, len(self), self.position)
        if packs is not None:
            left = iterate_packs(ids, packs, len(self), self.position)
        for unit in left:
            self.position += 1
            yield unit
        self.position, self.handed_out = 0, True

    @property
    def left_out(self) -> float:
        """Share of the samples that the current plan does not train; 0.0 before the first plan."""
        return 0.0 if self.plan is None else max(1 - len(self.plan.ids) / self.total, 0.0)

    def set_epoch(self, epoch: int, start: float | None = None) -> None:
        """Draw the plan of `epoch`, unless it is the current plan and not yet handed out.

        `start` is the finished share of a run that is counted in drawn samples (`max_steps`), so that shorter epochs
        mean more of them. Without it epoch e begins at `e / num_epochs`.
        """
        if self._has_plan_of(epoch):
            return
        self.state.sync()
        if self._guards():
            self.doubtful = max(self.doubtful, update_quarantine_(self.state))
        self.note_forgotten_()
        self.plan = None  # frees its ids
        self.plan = self._draw(epoch, start)
        check_same(f"the plan of epoch {epoch} {_DRAWN_FROM}", self.plan.ids, self.state.device)
        self.epoch, self.position, self.handed_out = epoch, 0, False
        self.advance(0)

    def _has_plan_of(self, epoch: int) -> bool:
        return self.plan is not None and epoch == self.epoch and not self.handed_out

    def sample_weights(self, ids: Tensor) -> Tensor | None:
        """`sample_weights` of planned samples for `weighted_loss`, float32 and shaped like `ids`; None if all are 1.

        A sample that was LIGHT when the plan was drawn counts `light_interval` times, also for those that rest.
        So right samples do not weigh less in an epoch than wrong ones.

        Source: InfoBatch (arXiv 2303.04947), which rescales the gradients of the samples that it keeps.
        """
        if self.answering is None:
            return None
        return 1.0 + (self.state.config.light_interval - 1) * self.answering[ids.clamp(min=0)]

    def fill_up_(self, size: int, start: float | None = None) -> None:
        """Extend the current plan to `size` samples by others in the epoch's order, without quarantined ones.

        The added samples have weight 1 in batches that begin after the selected ones. `start` as for `set_epoch`.
        """
        assert self.plan is not None
        ids, selected, packs = self.plan.ids, self.plan.selected, self.plan.packs
        others = ~self._barred().cpu()
        others[ids.long()] = False
        order = self._order(self.epoch)
        more, ends = self._packed(order[others[order.long()]][: max(size - len(ids), 0)], 0)
        begin, turn, end = self._stretch(self.epoch, start, selected, len(ids) + len(more))
        if packs is not None and ends is not None:
            packs = torch.cat([packs, ends + len(ids)])
        self.plan = EpochPlan(torch.cat([ids, more]), selected, begin, turn if selected else begin, end, packs)
        self.advance(0)

    def relocate_(self, start: float | None = None) -> None:
        """Fit the current plan, drawn for a run of another length, into this run; `start` as for `set_epoch`."""
        if self.plan is not None:
            ids, selected = self.plan.ids, self.plan.selected
            self.plan = EpochPlan(ids, selected, *self._stretch(self.epoch, start, selected, len(ids)), self.plan.packs)

    def advance(self, consumed: float) -> None:
        """Set the state's weights to those after `consumed` samples of the plan; if unchanged, launches nothing."""
        row = self.weights(consumed)
        if row != self._row:
            for bucket, weight in zip(Bucket, row, strict=True):
                self.state.weights[bucket].fill_(weight)
            self._row = row

    def forget_weights_(self) -> None:
        """Let the next `advance` write the state's weights, which something else may have changed."""
        self._row = None

    def due_probes(self, epoch: int, start: float | None = None) -> Tensor:
        """ids (n,) int64 on the CPU of samples to probe, forward only, before `epoch` is drawn.

        Run them through `weighted_loss(..., update=True)` under `torch.no_grad`, then call `probed`.

        They are left-out samples that are due, and samples that one more wrong visit would send to quarantine. None if
        the uniform finish makes up most of the epoch, as that visits all samples, or if the plan of `epoch` is the
        current one, as after resuming in its middle.
        """
        if self._has_plan_of(epoch):
            return torch.empty(0, dtype=torch.int64, device="cpu")
        self.state.sync()
        begin, end = self._span(epoch, start)
        if not self.state.config.probes or (begin + end) / 2 >= 1 - self.state.config.uniform_finish:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        self.note_forgotten_()
        due = self.probes.due(~self._keep(epoch, start), self._clock(epoch, start))
        if self._guards() and self.looked < epoch:
            due = torch.cat([due, nearly_suspects(self.state)])
        if self.held_back is not None:
            due = due[~self.held_back[due]]
        check_same(f"the samples to probe before epoch {epoch} {_DRAWN_FROM}", due, self.state.device)
        self.probes.hand_out_(due, self.state.times_seen)
        return due.cpu()

    @property
    def guarded(self) -> bool:
        """Whether the noise guard judges labels in this run; decided after the first epoch."""
        return bool(self.guard_on)

    def _guards(self) -> bool:
        """Whether the noise guard is on; decided after the first epoch, by the model's answers to samples new to it."""
        if self.guard_on is None and int(self.state.times_seen.count_nonzero()) > 0.5 * self.total:
            self.guard_on = self.state.config.noise_guard and generalises(self.state)
        return bool(self.guard_on)

    def probed(self, ids: Tensor, epoch: int, start: float | None = None) -> None:
        """Record that `ids` have been probed: the interval to the next probe doubles unless they return to training.

        If more than a tenth of the frozen ones were forgotten, all left-out samples are due: call `due_probes` again.

        Raises:
            ValueError: no visit has been counted since `due_probes`. Single samples without a valid label or with a NaN
                loss are never counted, which is no error.
        """
        idle = self.probes.untouched(self.state.times_seen)  # in this process; the sync adds other processes' visits
        self.state.sync()
        if idle:
            self.probes.check_visited(self.state.times_seen)
        self.looked = epoch
        clock = self._clock(epoch, start)
        at = ids.to(self.state.device).long()
        frozen = at[(self.probes.interval[at] > 0) & ~self.state.quarantined[at]]
        lost = int((self.state.bucket[frozen] > Bucket.LIGHT).count_nonzero())
        if lost > ALARM * len(frozen) and self.hurried < clock:
            self.probes.hurry_(clock)
            self.hurried = clock
        self.probes.probed_(at, clock)

    def note_forgotten_(self) -> None:
        """Count samples that were right at the last check and are wrong now, in `forgotten` and `lost`."""
        correct = (self.state.bucket <= Bucket.LIGHT) & (self.state.times_seen > 0)
        lost = self.was_correct & ~correct
        self.forgotten += (lost & (self.forgotten < 255)).to(self.forgotten.dtype)
        self.was_correct.copy_(correct)
        self.lost += lost.count_nonzero()  # sum() of bools takes 8 bytes a sample on the CPU

    def epoch_marks_(self) -> dict[str, Any]:
        """Sync, and return the report's counts at an epoch's end; resets `lost`."""
        self.state.sync()
        self.note_forgotten_()
        lost = int(self.lost)
        self.lost.zero_()
        return {
            "buckets": bucket_names(self.state.bucket_counts().tolist()),
            "quarantined": int(self.state.quarantined.count_nonzero()),
            "forgotten": lost,
        }

    @property
    def next_epoch(self) -> int:
        """The epoch to continue with: that of the current plan until it has been handed out, then the next one."""
        return self.epoch + self.handed_out

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """All that resuming in the middle of an epoch needs in addition to the SampleState; tensors are not copies.

        `consumed` is the number of samples of the plan that have been trained, perhaps with padding. The sampler itself
        only knows how many it has handed out, and a loader fetches ahead.
        """
        return position_of(self, consumed)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from `state_dict()`: iterating yields the rest of its plan, and `next_epoch` is its epoch.

        Raises:
            ValueError: a value is missing, unknown or damaged, or of a run over other data; names it. Then nothing is
                changed.
        """
        go_on_from(self, values)
