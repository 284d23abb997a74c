"""The arms: what each trains in an epoch, and with which weights. Everything else is the same for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import geko_kernels as gk
from benchmarks.end_to_end.engine import Batch, Engine

_WARM_UP = 0.03  # of the run
_LAST = 0.125  # InfoBatch's share of the run on all samples


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up, then a cosine to zero at progress 1."""
    if progress < _WARM_UP:
        return peak * progress / _WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


class Segment(NamedTuple):
    """Samples in the order drawn, and the stretch of the run's progress that they make."""

    ids: Tensor  # (n,) int64 on the CPU
    begin: float
    end: float
    factor: Tensor | None = None  # (n,) float32
    offset: int = 0  # samples of the epoch before this segment


class Arm:
    """Uniform: every epoch all samples in a new order, `budget` of `epochs` of them. Also the base of the others."""

    config = gk.GEKOConfig.uniform()
    ended = False  # before its last epoch

    def __init__(self, engine: Engine, epochs: int, budget: float, seed: int) -> None:
        self.engine, self.epochs, self.budget, self.seed = engine, epochs, budget, seed
        self.total = len(engine.train)
        self.looked = 0  # samples run forward-only
        self.seconds = {"selection": 0.0, "probes": 0.0}
        engine.reset(self.config)

    def run(self) -> Iterator[list[Segment]]:
        """The segments of each epoch; drawn once the one before has been trained."""
        whole = self.budget * self.epochs
        for epoch in range(math.ceil(whole - 1e-9)):
            part = min(1.0, whole - epoch)
            if round(part * self.total) == 0:
                return
            ids = self.order(epoch)[: round(part * self.total)]
            yield [Segment(ids, epoch / whole, (epoch + part) / whole)]

    def order(self, epoch: int) -> Tensor:
        return torch.randperm(self.total, generator=torch.Generator().manual_seed(1000 * self.seed + epoch))

    def look(self, ids: Tensor) -> Tensor:
        """The losses (n,) of `ids`, forward only."""
        start = self.engine.wait()
        losses = self.engine.look(ids)
        self.looked += len(ids)
        self.seconds["probes"] += self.engine.wait() - start
        return losses

    def rate(self, peak: float, progress: float) -> float:
        """The learning rate at a share of the run."""
        return learning_rate(peak, progress)

    def before(self, consumed: int) -> None:
        """`consumed` samples of the epoch have been trained."""

    def after(self, ids: Tensor, batch: Batch) -> None:
        """`ids` have been trained; `batch` holds what was seen."""

    def finish(self) -> None:
        """The run is over: the network gets the weights that it ends with."""

    def report(self) -> dict[str, Any]:
        """What else the run's row holds."""
        return {}


class Oracle(Arm):
    """Uniform on the samples whose labels are right: what a perfect noise guard would leave."""

    def order(self, epoch: int) -> Tensor:
        ids = super().order(epoch)
        return ids[~self.engine.train.wrong[ids]]


class RandomSubset(Arm):
    """RS2: each epoch a new random subset of `budget` of the samples."""

    def run(self) -> Iterator[list[Segment]]:
        for epoch in range(self.epochs):
            ids = self.order(epoch)[: round(self.budget * self.total)]
            yield [Segment(ids, epoch / self.epochs, (epoch + 1) / self.epochs)]


class Restarts(Arm):
    """Uniform, with a cosine that begins again from the peak at each epoch (SGDR, arXiv 1608.03983).

    What gekolib draws throws the model off course in the middle of R3, and it ends ahead of uniform training; here the
    rate alone does that. The warm-up comes once, and the last cosine ends at zero.
    """

    def starts(self) -> list[float]:
        """Shares of the run, from 0, at which a cosine begins."""
        whole = self.budget * self.epochs
        return [epoch / whole for epoch in range(math.ceil(whole - 1e-9))]

    def rate(self, peak: float, progress: float) -> float:
        if progress < _WARM_UP:
            return learning_rate(peak, progress)
        starts = self.starts()
        begin = max(start for start in starts if start <= progress + 1e-9)
        end = min([start for start in starts if start > progress + 1e-9], default=1.0)
        begin = max(begin, _WARM_UP)
        return peak * 0.5 * (1 + math.cos(math.pi * max(progress - begin, 0.0) / (end - begin)))


class PhaseRestarts(Restarts):
    """The same with a cosine for each phase of gekolib's curriculum, whose draws change there."""

    def starts(self) -> list[float]:
        return [0.0, 0.15, 0.35, 0.65, 0.85]


class InfoBatch(Arm):
    """Half of the samples below the mean loss are left out at random, the other half weighs 2; all at the end."""

    def run(self) -> Iterator[list[Segment]]:
        for epoch in range(self.epochs):
            ids, factor = self.order(epoch), None
            if 0 < epoch < (1 - _LAST) * self.epochs:
                last = self.engine.state.last_loss.cpu()
                low = (last < last.mean())[ids]
                kept = ~low | (torch.rand(self.total, generator=torch.Generator().manual_seed(epoch)) < 0.5)
                ids, factor = ids[kept], 1.0 + low[kept].float()
            yield [Segment(ids, epoch / self.epochs, (epoch + 1) / self.epochs, factor)]


class HighestLoss(Arm):
    """After a full first epoch, the `budget` of the samples whose last loss is highest."""

    def run(self) -> Iterator[list[Segment]]:
        keep = max(self.budget * self.epochs - 1, 0.0) / max(self.epochs - 1, 1)
        for epoch in range(self.epochs):
            ids = self.order(epoch)
            if epoch:
                worst = self.engine.state.last_loss.cpu().argsort(descending=True)[: max(round(keep * self.total), 1)]
                chosen = torch.zeros(self.total, dtype=torch.bool)
                chosen[worst] = True
                ids = ids[chosen[ids]]
            yield [Segment(ids, epoch / self.epochs, (epoch + 1) / self.epochs)]


class SelectiveBackprop(Arm):
    """All samples forward; trained with a probability of their loss's rank among the epoch's, after a full epoch."""

    def run(self) -> Iterator[list[Segment]]:
        for epoch in range(self.epochs):
            ids = self.order(epoch)
            if epoch:
                rank = self.look(ids).argsort().argsort().float() / self.total
                ids = ids[torch.rand(self.total, generator=torch.Generator().manual_seed(epoch)) < rank]
            yield [Segment(ids, epoch / self.epochs, (epoch + 1) / self.epochs)]


class Gekolib(Arm):
    """gekolib 0.3.1: its states, partitioner, curriculum and with-replacement sampling, fed one loss a sample."""

    def __init__(self, engine: Engine, epochs: int, budget: float, seed: int) -> None:
        super().__init__(engine, epochs, budget, seed)
        from geko import core, curriculum, partitioner, trainer

        states = {str(i): core.SampleState(str(i), core.Bucket.FOCUS, 0.5) for i in range(self.total)}
        config, whole = core.GEKOConfig(), epochs * self.total
        self.trainer = trainer.GEKOTrainer
        self.partitioner = partitioner.SamplePartitioner(config)
        self.its: Any = SimpleNamespace(
            sample_states=states,
            config=config,
            train_dataset=range(self.total),
            curriculum=curriculum.MountainCurriculum(whole, config),
            current_epoch=0,
        )

    def run(self) -> Iterator[list[Segment]]:
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.epochs):
            start = self.engine.wait()
            self.its.current_epoch = epoch
            self.partitioner.partition(self.its.sample_states, epoch)
            weights = torch.tensor(self.trainer._get_sample_weights(self.its))
            weights = weights if weights.sum() > 0 else torch.ones(self.total)
            ids = torch.multinomial(weights, self.total, replacement=True, generator=generator)
            self.seconds["selection"] += self.engine.wait() - start
            yield [Segment(ids, epoch / self.epochs, (epoch + 1) / self.epochs)]

    def after(self, ids: Tensor, batch: Batch) -> None:
        loss, confidence = (x[: len(ids)].cpu() for x in (batch.loss, batch.confidence))
        names = [str(i) for i in ids.tolist()]
        self.trainer._update_sample_states(self.its, names, loss, confidence, loss < 0.5)
        self.its.curriculum.step(len(ids))


class Geko(Arm):
    """GEKOSampler's plans: selection, probes, quarantine, weights, uniform finish, as `config` says."""

    answers = True  # those drawn in their turn weigh for those that rest

    def new_sampler(self, epochs: float) -> gk.GEKOSampler:
        return gk.GEKOSampler(self.engine.state, epochs, seed=1000 * self.seed)

    def run(self) -> Iterator[list[Segment]]:
        engine, state = self.engine, self.engine.state
        epochs = self.budget * self.epochs
        self.sampler = self.new_sampler(epochs)
        epoch, drawn, whole = 0, 0, round(epochs * self.total)
        while drawn < whole if self.config.spend_saved else epoch < epochs:
            begin = drawn / whole if self.config.spend_saved else None
            start = engine.wait()
            looking = self.seconds["probes"]
            while len(due := self.sampler.due_probes(epoch, begin)):
                self.look(due)
                self.sampler.probed(due, epoch, begin)
            self.sampler.set_epoch(epoch, begin)
            plan = self.sampler.plan
            assert plan is not None
            left = whole - drawn if self.config.spend_saved else None
            # torch would wake a thread a core to convert them
            ids, head = torch.from_numpy(plan.ids.numpy()[:left].astype(np.int64)), plan.selected
            self.seconds["selection"] += engine.wait() - start - (self.seconds["probes"] - looking)
            factor = self.sampler.sample_weights(ids[:head].to(state.device)) if self.answers else None
            segments = [
                Segment(ids[:head], plan.start, plan.turn, None if factor is None else factor.cpu()),
                Segment(ids[head:], plan.turn, plan.end, None, head),
            ]
            yield [segment for segment in segments if len(segment.ids)]
            epoch, drawn = epoch + 1, drawn + len(ids)
        state.sync()

    def before(self, consumed: int) -> None:
        self.sampler.advance(consumed)


def _geko(**fields: Any) -> type[Geko]:
    """GEKO as recommended, but for these settings."""
    return type("Geko", (Geko,), {"config": gk.GEKOConfig.recommended(**fields)})


class Original(Geko):
    config = gk.GEKOConfig.original()


ARMS: dict[str, type[Arm]] = {
    "A": Arm,
    "A-restarts": Restarts,
    "A-phases": PhaseRestarts,
    "B": Arm,
    "oracle": Oracle,
    "C": RandomSubset,
    "D": InfoBatch,
    "E": HighestLoss,
    "F": SelectiveBackprop,
    "G": Gekolib,
    "H": _geko(),
    "H-spend": _geko(spend_saved=True),
    "H-seed": Original,
    "H-selection": _geko(selection=False, probes=False),
    "H-probes": _geko(probes=False),
    "H-guard": _geko(noise_guard=False),
    "H+double": _geko(bucket_weights=(2, 2, 1)),
    "H+finish": _geko(uniform_finish=1 / 64),
    "H+weights": _geko(bucket_weights=(3, 1, 0)),
    "H+curriculum": _geko(use_curriculum=True),
}
BUDGETED = {"B": "H", "C": "H", "E": "H", "B-auto": "auto"}  # run at the budget that the other was measured to take
WHAT = {
    "A": "uniform",
    "A-restarts": "uniform, a cosine for each epoch",
    "A-phases": "uniform, a cosine for each phase of gekolib's curriculum",
    "B": "uniform at H's budget",
    "oracle": "uniform on the right labels alone",
    "C": "RS2 at H's budget",
    "D": "InfoBatch",
    "E": "highest losses at H's budget",
    "F": "Selective Backprop",
    "G": "gekolib 0.3.1",
    "H": "GEKO",
    "H-spend": "GEKO, the samples saved spent",
    "H-seed": "GEKO, the document's settings",
    "H-selection": "GEKO without selection",
    "H-probes": "GEKO without probes",
    "H-guard": "GEKO without the noise guard",
    "H+double": "GEKO, wrong and unsure samples at twice the weight",
    "H+finish": "GEKO, a 64th of the run uniform at its end",
    "H+weights": "GEKO, bucket weights 3, 1, 0",
    "H+curriculum": "GEKO, mountain curriculum",
}
