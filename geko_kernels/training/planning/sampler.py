"""`GEKOSampler`: each epoch's plan, drawn from the learning state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from geko_kernels.config import Bucket
from geko_kernels.curriculum import MountainCurriculum
from geko_kernels.state import SampleState
from geko_kernels.training.planning.epoch_plan import EpochPlan
from geko_kernels.training.planning.guard import generalises, nearly_suspects, update_quarantine_
from geko_kernels.training.planning.orders import Orders, by_length, cut_after, in_turn, iterate_padded
from geko_kernels.training.planning.packing import Packer, iterate_packs
from geko_kernels.training.planning.position import PER_SAMPLE, check_position
from geko_kernels.training.planning.probes import ProbeSchedule

ALARM = 0.1  # share of probed samples that were forgotten, from which on all are probed
Row = tuple[float, float, float, float]  # weights by Bucket: (FREEZE, LIGHT, FOCUS, HARD)


class GEKOSampler(Sampler[int]):
    """Sample ids of one epoch without replacement, those left out that have nothing to teach now.

    With `perm = torch.randperm(N, generator=torch.Generator().manual_seed(seed + epoch))` the plan is
    `perm[keep[perm]]`, so with nothing left out it is what Transformers' Trainer draws. `keep` are the samples whose
    bucket has a weight above zero in the middle of the epoch (FREEZE never has one), that are not quarantined, and
    those never seen; of LIGHT each has its turn every `light_interval` epochs, and then `sample_weights`. The last
    `uniform_finish` of the run takes every sample but the quarantined.

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
    same plan everywhere. The sampler yields the whole plan; sharding is accelerate's part (`accelerator.prepare`).

    Args:
        state: the learning state; its config says what is left out.
        num_epochs: length of the run, in passes over the dataset; the last one may be partial.
        seed: of the order.
        shuffle: False keeps the order of the ids.
        pad_to: fill the plan up to a multiple of this with marked repeats: `~id`, which `IdDataset` turns into the
            sample with id -1. So accelerate never repeats a sample itself, and repeats count for nothing.
        lengths: (N,) sample lengths: windows of the plan are sorted by them, longest first.
        window: samples in such a window.
        present: (P,) int32 ids, ascending: the samples that there are; the others are never drawn. All, if left out.
        packer: cuts each plan into packs: lists of ids are yielded, and `pad_to` counts them.
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
        if not isinstance(state, SampleState):
            raise TypeError(f"state must be a SampleState, got {type(state).__name__}")
        if not num_epochs > 0:
            raise ValueError(f"num_epochs must be above 0, got {num_epochs}")
        if lengths is not None and len(lengths) != len(state):
            raise ValueError(f"lengths must have one entry for each of the {len(state)} samples, got {len(lengths)}")
        self.state = state
        self.num_epochs = float(num_epochs)
        self.last_slots: int | None = None  # samples of a partial last epoch, where a trainer makes whole steps of it
        self.shuffle, self.pad_to = shuffle, pad_to
        self.present, self.total = present, len(state) if present is None else len(present)
        self.orders = Orders(self.total, seed)
        self.lengths, self.window, self.packer = lengths, window, packer
        self.curriculum = MountainCurriculum()
        self.probes = ProbeSchedule(len(state), state.device)
        self.was_correct = torch.zeros(len(state), dtype=torch.bool, device=state.device)
        self.forgotten = torch.zeros(len(state), dtype=torch.uint8, device=state.device)  # times, up to 255
        self.doubtful = 0  # the most that `update_quarantine_` returned
        self.lost = torch.zeros((), dtype=torch.int64, device=state.device)  # forgotten since someone zeroed it
        self.held_back: Tensor | None = None  # (N,) bool on the state's device: samples that no plan and no probe has
        self.answering: Tensor | None = None  # (N,) bool: LIGHT in the plan at hand, so they answer for those that rest
        self._looked = -1  # the epoch before which `probed` was last called
        self._hurried = -1  # when all left-out samples were last made due
        self._guarded: bool | None = None  # is the noise guard on? known after the first epoch
        self.epoch = 0
        self.position = 0  # ids of the plan, or packs of it, handed out
        self.plan: EpochPlan | None = None
        self._finished = False  # the plan has been handed out to its end
        self._row: Row | None = None  # weights in force

    def __len__(self) -> int:
        """Ids in this epoch's plan, or packs, padding included; all samples' before the first plan is drawn."""
        size = self.all_units if self.plan is None else self.plan.units
        return math.ceil(size / self.pad_to) * self.pad_to

    @cached_property
    def all_units(self) -> int:
        """Ids, or packs, of all samples in the first epoch's order."""
        return self.total if self.packer is None else len(self.packer.pack(self._order(0))[1])

    @property
    def handed_out(self) -> bool:
        """Has the plan at hand been yielded to its end?"""
        return self._finished

    def __iter__(self) -> Iterator[Any]:
        if self.plan is None or self._finished:
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
        self.position, self._finished = 0, True

    @property
    def left_out(self) -> float:
        """Share of the samples that the plan at hand does not train."""
        assert self.plan is not None
        return max(1 - len(self.plan.ids) / self.total, 0.0)

    def set_epoch(self, epoch: int, start: float | None = None) -> None:
        """Draw the plan of `epoch`, unless that is the one at hand and not yet handed out.

        `start` is the finished share of the run where it is counted in samples drawn, so that a run of shorter
        epochs has more of them (`max_steps`); left out, epoch e begins at `e / num_epochs`.
        """
        if self._has_plan_of(epoch):
            return
        self.state.sync()
        if self._guards():
            self.doubtful = max(self.doubtful, update_quarantine_(self.state))
        self.note_forgotten_()
        self.plan = None  # frees its ids first
        self.plan = self._draw(epoch, start)
        self.epoch, self.position, self._finished = epoch, 0, False
        self.advance(0)

    def _has_plan_of(self, epoch: int) -> bool:
        return self.plan is not None and epoch == self.epoch and not self._finished

    def _span(self, epoch: int, start: float | None) -> tuple[float, float]:
        """Progress at the epoch's begin and its longest possible end."""
        begin = epoch / self.num_epochs if start is None else start
        return min(begin, 1.0), min(begin + 1 / self.num_epochs, 1.0)

    def _keep(self, epoch: int, start: float | None) -> Tensor:
        """(N,) bool: samples that the part of the epoch before the uniform finish trains."""
        state, config = self.state, self.state.config
        keep = ~self._barred()
        if config.selection:
            begin, end = self._span(epoch, start)
            row = self._weights_at((begin + end) / 2)
            taught = state.times_seen == 0
            for bucket in Bucket:
                if row[bucket] > 0:
                    taught |= state.bucket == bucket
            keep &= taught
            if config.light_interval > 1:
                keep &= in_turn(len(state), config.light_interval, epoch, state.device) | (state.bucket != Bucket.LIGHT)
        return keep

    def _barred(self) -> Tensor:
        """(N,) bool: samples that may not be trained now."""
        return self.state.quarantined if self.held_back is None else self.state.quarantined | self.held_back

    def _draw(self, epoch: int, start: float | None) -> EpochPlan:
        state, total = self.state, self.total
        begin, longest = self._span(epoch, start)
        finish = 1 - state.config.uniform_finish
        keep = self._keep(epoch, start)
        perm = self._order(epoch)
        kept = keep.cpu().index_select(0, perm)
        if start is None:  # a slot passes whether its sample is trained or not
            slots = round((longest - begin) * self.num_epochs * total)
            if slots < total and self.last_slots is not None:
                slots = self.last_slots
            cut = min(max(round((finish - begin) / max(longest - begin, 1e-12) * slots), 0), slots)
        else:  # only samples drawn count
            slots = total
            cut = cut_after(kept, round((finish - begin) * self.num_epochs * total))
        if cut < slots:
            kept[cut:] = (~self._barred()).cpu().index_select(0, perm[cut:])
        ids = torch.from_numpy(perm.numpy()[:slots][kept.numpy()[:slots]])  # masked_select needs 16 bytes a sample
        selected = int(np.count_nonzero(kept.numpy()[:cut]))  # torch would wake a thread a core: milliseconds
        left_out = ~keep if cut else state.quarantined
        if self.held_back is not None:
            left_out = left_out & ~self.held_back
        self.probes.follow_(left_out, self._clock(epoch, start))
        del left_out
        self._note_answering(keep, perm[cut:slots])
        if self.lengths is not None:
            ids = torch.cat([by_length(part, self.lengths, self.window) for part in (ids[:selected], ids[selected:])])
        ids, packs = self._packed(ids, selected)
        return EpochPlan(ids, selected, *self._stretch(epoch, start, selected, len(ids)), packs)

    def _note_answering(self, keep: Tensor, finish: Tensor) -> None:
        self.answering, config = None, self.state.config
        if config.selection and config.light_interval > 1:
            answering = self.state.bucket == Bucket.LIGHT
            answering &= keep
            answering[finish.to(answering.device).long()] = False  # there nobody rests
            self.answering = answering if bool(answering.any()) else None

    def sample_weights(self, ids: Tensor) -> Tensor | None:
        """`sample_weights` for `weighted_loss` of samples of the plan, float32 like `ids`; None where all are 1.

        A sample that was LIGHT when the plan was drawn counts `light_interval` times, as it answers for those that
        rest. So right samples do not weigh less in an epoch than wrong ones.

        Source: InfoBatch (arXiv 2303.04947), which rescales the gradients of the samples that it keeps.
        """
        if self.answering is None:
            return None
        return 1.0 + (self.state.config.light_interval - 1) * self.answering[ids.clamp(min=0)]

    def _order(self, epoch: int) -> Tensor:
        order = self.orders.of(epoch) if self.shuffle else torch.arange(self.total, dtype=torch.int32)
        return order if self.present is None else self.present[order.long()]

    def _packed(self, ids: Tensor, selected: int) -> tuple[Tensor, Tensor | None]:
        """The ids in the order of their packs, the selected ones in packs of their own, and where the packs end."""
        if self.packer is None:
            return ids, None
        (first, ends), (last, last_ends) = (self.packer.pack(part) for part in (ids[:selected], ids[selected:]))
        return torch.cat([first, last]), torch.cat([ends, last_ends + selected])

    def _stretch(self, epoch: int, start: float | None, selected: int, size: int) -> tuple[float, float, float]:
        """Progress at the begin of a plan of `size`, after its selected samples, and at its end."""
        begin, longest = self._span(epoch, start)
        if start is not None:
            drawn = self.num_epochs * self.total
            return begin, min(begin + selected / drawn, 1.0), min(begin + size / drawn, 1.0)
        return begin, min(max(1 - self.state.config.uniform_finish, begin), longest), longest

    def fill_up_(self, size: int, start: float | None = None) -> None:
        """Extend the plan at hand to `size` samples by others, in the epoch's order; quarantined ones stay out.

        Those after the selected ones have weight 1 where their batch begins after them. `start` as for `set_epoch`.
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
        """Place the plan at hand, drawn for a run of another length, within this one; `start` as for `set_epoch`."""
        if self.plan is not None:
            ids, selected = self.plan.ids, self.plan.selected
            self.plan = EpochPlan(ids, selected, *self._stretch(self.epoch, start, selected, len(ids)), self.plan.packs)

    def progress(self, consumed: float) -> float:
        """Finished share of the run, in [0, 1], after `consumed` samples of the plan."""
        if self.plan is None:
            return 0.0
        ids, selected, start, turn, end, _ = self.plan
        if consumed < selected:
            return start + (turn - start) * consumed / selected
        tail = len(ids) - selected
        return turn + (end - turn) * min((consumed - selected) / tail, 1.0) if tail else end

    def _weights_at(self, progress: float) -> Row:
        config = self.state.config
        if config.use_curriculum:
            hard, focus, light = self.curriculum.weights(progress)
        else:
            hard, focus, light = config.bucket_weights
        return (config.freeze_weight, light, focus, hard)

    def weights(self, consumed: float) -> Row:
        """Weights of (FREEZE, LIGHT, FOCUS, HARD) after `consumed` samples of the plan: the phase's, or 1 for all.

        In the first epoch FREEZE weighs what LIGHT does, unless a curriculum says otherwise: one visit proves nothing.
        """
        if self.plan is not None and consumed >= self.plan.selected and len(self.plan.ids) > self.plan.selected:
            return (1.0, 1.0, 1.0, 1.0)
        row = self._weights_at(self.progress(consumed))
        return row if self.epoch or self.state.config.use_curriculum else (row[Bucket.LIGHT], *row[1:])

    def advance(self, consumed: float) -> None:
        """Give the state the weights that hold after `consumed` samples of the plan; launches nothing in between."""
        row = self.weights(consumed)
        if row != self._row:
            for bucket, weight in zip(Bucket, row, strict=True):
                self.state.weights[bucket].fill_(weight)
            self._row = row

    def due_probes(self, epoch: int, start: float | None = None) -> Tensor:
        """ids (n,) int64 on the CPU that are due for a look, forward only, before `epoch` is drawn.

        Look with `weighted_loss(..., update=True)` under `torch.no_grad`, then call `probed`.

        Those are samples that it leaves out, and samples that one more wrong visit would send to quarantine. None
        where the uniform finish makes up most of the epoch and so looks at all of them anyway, nor where the plan of
        `epoch` is at hand, as after resuming in its middle.
        """
        if self._has_plan_of(epoch):
            return torch.empty(0, dtype=torch.int64)
        self.state.sync()
        begin, end = self._span(epoch, start)
        if not self.state.config.probes or (begin + end) / 2 >= 1 - self.state.config.uniform_finish:
            return torch.empty(0, dtype=torch.int64)
        self.note_forgotten_()
        due = self.probes.due(~self._keep(epoch, start), self._clock(epoch, start))
        if self._guards() and self._looked < epoch:
            due = torch.cat([due, nearly_suspects(self.state)])
        if self.held_back is not None:
            due = due[~self.held_back[due]]
        self.probes.hand_out_(due, self.state.times_seen)
        return due.cpu()

    @property
    def guarded(self) -> bool:
        """Did the noise guard judge labels in this run? Settled after the first epoch."""
        return bool(self._guarded)

    def _guards(self) -> bool:
        """Is the noise guard on? Settled after the first epoch, by what the model made of samples new to it."""
        if self._guarded is None and int(self.state.times_seen.count_nonzero()) > 0.5 * self.total:
            self._guarded = self.state.config.noise_guard and generalises(self.state)
        return bool(self._guarded)

    def probed(self, ids: Tensor, epoch: int, start: float | None = None) -> None:
        """`ids` have been run forward-only: their next probe is twice as far off, unless they came back.

        Were more than a tenth of the frozen ones forgotten, all that are left out are due: ask `due_probes` again.

        Raises:
            ValueError: no call has counted a visit since `due_probes`. Samples without a valid label or with a NaN
                loss are never counted and may be among them.
        """
        idle = self.probes.untouched(self.state.times_seen)  # by this process; the sync brings the others' visits
        self.state.sync()
        if idle:
            self.probes.check_visited(self.state.times_seen)
        self._looked = epoch
        clock = self._clock(epoch, start)
        at = ids.to(self.state.device).long()
        frozen = at[(self.probes.interval[at] > 0) & ~self.state.quarantined[at]]
        lost = int((self.state.bucket[frozen] > Bucket.LIGHT).count_nonzero())
        if lost > ALARM * len(frozen) and self._hurried < clock:
            self.probes.hurry_(clock)
            self._hurried = clock
        self.probes.probed_(at, clock)

    def _clock(self, epoch: int, start: float | None) -> int:
        """Passes over the dataset that the run could have made by now: what the intervals between probes count."""
        return epoch if start is None else int(start * self.num_epochs)

    def note_forgotten_(self) -> None:
        """Count samples that were right when last looked at and are wrong now, in `forgotten` and `lost`."""
        correct = (self.state.bucket <= Bucket.LIGHT) & (self.state.times_seen > 0)
        lost = self.was_correct & ~correct
        self.forgotten += (lost & (self.forgotten < 255)).to(self.forgotten.dtype)
        self.was_correct.copy_(correct)
        self.lost += lost.count_nonzero()  # sum() of bools takes 8 bytes a sample on the CPU

    @property
    def next_epoch(self) -> int:
        """The epoch to go on with: that of the plan at hand until it has been handed out, then the one after it."""
        return self.epoch + self._finished

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """What resuming in the middle of an epoch needs, beside the SampleState; tensors are not copies.

        `consumed` is how many samples of the plan have been trained. The sampler only knows how many it has handed
        out, and a loader fetches ahead. Padding may be counted in.
        """
        if isinstance(consumed, bool) or not isinstance(consumed, int):
            raise TypeError(f"consumed must be an int, the samples of the plan trained so far, got {consumed!r}")
        if consumed < 0:
            raise ValueError(f"consumed must be at least 0, got {consumed}")
        plan = self.plan
        size = 0 if plan is None else len(plan.ids)
        return {
            **{name: getattr(self._owner(name), name) for name in PER_SAMPLE},
            "plan": None if plan is None else plan.ids,
            **({} if plan is None or plan.packs is None else {"packs": plan.packs}),
            **({} if plan is None or self.answering is None else {"answering": self.answering}),
            "spans": None if plan is None else list(plan[1:5]),
            "lost": int(self.lost),
            "doubtful": self.doubtful,
            "epoch": self.epoch,
            "position": min(consumed, size),
            "finished": plan is not None and consumed >= size,
            "guarded": self._guarded,
            "hurried": self._hurried,
            "num_epochs": self.num_epochs,
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Carry on from `state_dict()`: iterating hands out what its plan has left, `next_epoch` is its epoch.

        Raises:
            ValueError: a value is missing, unknown or damaged, or of a run over other data; names it. Nothing is
                changed then.
        """
        check_position(values, len(self.state))
        self._check_packs(values)
        for name in PER_SAMPLE:
            getattr(self._owner(name), name).copy_(values[name])
        self.answering = values["answering"].to(self.state.device) if "answering" in values else None
        self.lost.fill_(values["lost"])
        self.doubtful = values["doubtful"]
        packs = values["packs"].cpu() if "packs" in values else None
        self.plan = None
        if values["plan"] is not None:
            self.plan = EpochPlan(values["plan"].cpu(), *values["spans"])._replace(packs=packs)
        self.epoch, self._finished = values["epoch"], values["finished"]
        self.position = 0 if self._finished or self.plan is None else self.plan.units_of(values["position"])
        self._guarded, self._hurried = values["guarded"], values["hurried"]
        self._row = None
        if values["num_epochs"] != self.num_epochs:
            self.relocate_()

    def _check_packs(self, values: dict[str, Any]) -> None:
        packed, packs = "packs" in values, self.packer is not None
        if values["plan"] is not None and packed != packs:
            had, has = ("packs", "single samples") if packed else ("single samples", "packs")
            raise ValueError(
                f"the epoch at hand is planned in {had}, and this run plans {has}: resume with packing and "
                "batch_tokens set or left out as the run was started"
            )

    def _owner(self, column: str) -> Any:
        return self.probes if column in ("interval", "next_probe") else self
