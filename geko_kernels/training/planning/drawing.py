"""Draws an epoch's plan from the learning state, and gives progress and weights at a position in it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from geko_kernels.config import Bucket
from geko_kernels.curriculum import MountainCurriculum
from geko_kernels.state import SampleState
from geko_kernels.training.planning.epoch_plan import EpochPlan
from geko_kernels.training.planning.orders import Orders, by_length, cut_after, in_turn
from geko_kernels.training.planning.packing import Packer
from geko_kernels.training.planning.probes import ProbeSchedule

Row = tuple[float, float, float, float]  # weights by Bucket: (FREEZE, LIGHT, FOCUS, HARD)


class PlanDrawer:
    """Draws the plans of `GEKOSampler`, which describes them and the arguments."""

    def __init__(
        self,
        state: SampleState,
        num_epochs: float,
        seed: int,
        shuffle: bool,
        lengths: Tensor | None,
        window: int,
        present: Tensor | None,
        packer: Packer | None,
    ) -> None:
        if not isinstance(state, SampleState):
            raise TypeError(f"state must be a SampleState, got {type(state).__name__}")
        if not num_epochs > 0:
            raise ValueError(f"num_epochs must be above 0, got {num_epochs}")
        if lengths is not None and len(lengths) != len(state):
            raise ValueError(f"lengths must have one entry for each of the {len(state)} samples, got {len(lengths)}")
        self.state = state
        self.num_epochs = float(num_epochs)
        self.last_slots: int | None = None  # samples of a partial last epoch, if a trainer makes whole steps of it
        self.shuffle = shuffle
        self.present, self.total = present, len(state) if present is None else len(present)
        self.orders = Orders(self.total, seed)
        self.lengths, self.window, self.packer = lengths, window, packer
        self.curriculum = MountainCurriculum()
        self.probes = ProbeSchedule(len(state), state.device)
        self.held_back: Tensor | None = None  # (N,) bool on the state's device: samples without plans and probes
        self.answering: Tensor | None = None  # (N,) bool: LIGHT in the current plan, so they answer for resting ones
        self.epoch = 0
        self.plan: EpochPlan | None = None

    def _span(self, epoch: int, start: float | None) -> tuple[float, float]:
        """Progress at the epoch's start and at its latest possible end."""
        begin = epoch / self.num_epochs if start is None else start
        return min(begin, 1.0), min(begin + 1 / self.num_epochs, 1.0)

    def _keep(self, epoch: int, start: float | None) -> Tensor:
        """(N,) bool: samples to train in the part of the epoch before the uniform finish."""
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
        """The plan of `epoch`; the probes follow the samples that it leaves out. `start` as for `set_epoch`."""
        state, total = self.state, self.total
        begin, longest = self._span(epoch, start)
        finish = 1 - state.config.uniform_finish
        keep = self._keep(epoch, start)
        perm = self._order(epoch)
        kept = keep.cpu().index_select(0, perm)
        if start is None:  # every slot counts, whether its sample is trained or not
            slots = round((longest - begin) * self.num_epochs * total)
            if slots < total and self.last_slots is not None:
                slots = self.last_slots
            cut = min(max(round((finish - begin) / max(longest - begin, 1e-12) * slots), 0), slots)
        else:  # only drawn samples count
            slots = total
            cut = cut_after(kept, round((finish - begin) * self.num_epochs * total))
        if cut < slots:
            kept[cut:] = (~self._barred()).cpu().index_select(0, perm[cut:])
        ids = torch.from_numpy(perm.numpy()[:slots][kept.numpy()[:slots]])  # masked_select needs 16 bytes a sample
        selected = int(np.count_nonzero(kept.numpy()[:cut]))  # torch would wake all threads, which takes milliseconds
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
        """Record which LIGHT samples of the plan answer for those that rest; none in the uniform `finish`."""
        self.answering, config = None, self.state.config
        if config.selection and config.light_interval > 1:
            answering = self.state.bucket == Bucket.LIGHT
            answering &= keep
            answering[finish.to(answering.device).long()] = False  # there no sample rests
            self.answering = answering if bool(answering.any()) else None

    def _order(self, epoch: int) -> Tensor:
        """(n,) int32: ids of the samples that there are, in the epoch's order."""
        order = self.orders.of(epoch) if self.shuffle else torch.arange(self.total, dtype=torch.int32, device="cpu")
        return order if self.present is None else self.present[order.long()]

    def _packed(self, ids: Tensor, selected: int) -> tuple[Tensor, Tensor | None]:
        """The ids in the order of their packs, the selected ones in separate packs, and where the packs end."""
        if self.packer is None:
            return ids, None
        (first, ends), (last, last_ends) = (self.packer.pack(part) for part in (ids[:selected], ids[selected:]))
        return torch.cat([first, last]), torch.cat([ends, last_ends + selected])

    def _stretch(self, epoch: int, start: float | None, selected: int, size: int) -> tuple[float, float, float]:
        """Progress at the start of a plan of `size` samples, after its selected ones, and at its end."""
        begin, longest = self._span(epoch, start)
        if start is not None:
            drawn = self.num_epochs * self.total
            return begin, min(begin + selected / drawn, 1.0), min(begin + size / drawn, 1.0)
        return begin, min(max(1 - self.state.config.uniform_finish, begin), longest), longest

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

        In the first epoch FREEZE weighs as much as LIGHT, unless there is a curriculum: one visit proves nothing.
        """
        if self.plan is not None and consumed >= self.plan.selected and len(self.plan.ids) > self.plan.selected:
            return (1.0, 1.0, 1.0, 1.0)
        row = self._weights_at(self.progress(consumed))
        return row if self.epoch or self.state.config.use_curriculum else (row[Bucket.LIGHT], *row[1:])

    def _clock(self, epoch: int, start: float | None) -> int:
        """Passes over the dataset that the run could have made by now; the unit of the intervals between probes."""
        return epoch if start is None else int(start * self.num_epochs)
