"""Arms that find their own length by looking at held-back samples: `auto()`'s rules, and early stopping beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import geko_kernels as gk
from benchmarks.end_to_end.arms import ARMS, WHAT, Arm, Geko, Segment
from benchmarks.end_to_end.data import Split, pack
from benchmarks.end_to_end.engine import Batch, Engine
from geko_kernels.training.stopping.average import WeightAverage
from geko_kernels.training.stopping.rule import PATIENCE, Look, StopRule
from geko_kernels.training.stopping.run import DECIDED, LOOKS, TOO_LATE, cosine
from geko_kernels.training.stopping.sentinels import hold_back, how_many, near_duplicates

_SEEN = 400  # training samples looked at, and pairs of the swap test
_WARM_UP = 0.1  # of an epoch, where the rate is constant after it
_LOOKS_OF_PATIENCE = 2


class Watched(Arm):
    """Holds samples back, the same for every arm of a seed, and looks at them four times an epoch."""

    def __init__(self, engine: Engine, epochs: int, budget: float, seed: int) -> None:
        super().__init__(engine, epochs, budget, seed)
        self.seconds["looks"] = 0.0
        self.ended, self.epoch, self.quarters, self.step = False, 0, 0, 0
        start = engine.wait()
        split = engine.train
        self.held = hold_back(
            near_duplicates(*parts_of(split, torch.arange(self.total), 24)), how_many(self.total), seed
        )
        others = torch.ones(self.total, dtype=torch.bool)
        others[self.held] = False
        seen = others.nonzero()[:, 0]
        self.seen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))[:_SEEN]]
        self.swapped = [swap(split, ids[:_SEEN]) for ids in (self.held, self.seen)]
        self.seconds["setup"] = engine.wait() - start  # before the clock of the run starts
        self.best: list[Tensor] | None = None
        self.curve: list[tuple[float, float, float]] = []

    @property
    def parameters(self) -> list[Tensor]:
        return [p.data for p in self.engine.network.parameters() if p.requires_grad]

    def order(self, epoch: int) -> Tensor:
        ids = super().order(epoch)
        return ids[~torch.isin(ids, self.held)]

    def after(self, ids: Tensor, batch: Batch) -> None:
        self.done += len(ids)
        self.step += 1
        epoch = self.epoch + self.done / self.planned
        self.stepped()
        quarter = int(LOOKS * epoch + 1e-6)
        if quarter > self.quarters:
            self.quarters = quarter
            start = self.engine.wait()
            self.watch(quarter / LOOKS)
            self.seconds["looks"] += self.engine.wait() - start

    def stepped(self) -> None:
        """An optimizer step has been made."""

    def watch(self, epoch: float) -> None:
        raise NotImplementedError

    def begin_epoch(self, epoch: int, planned: int) -> None:
        self.epoch, self.planned, self.done = epoch, planned, 0

    def keep(self) -> None:
        self.best = [p.clone() for p in self.parameters]

    def finish(self) -> None:
        if self.best is not None:
            torch._foreach_copy_(self.parameters, self.best)

    def report(self) -> dict[str, Any]:
        return {"looks": self.curve, "ended_after": self.epoch + self.done / self.planned}


class EarlyStopping(Watched):
    """Uniform, a cosine over the most epochs, the weights of the look with the least loss; patience of two looks."""

    def run(self) -> Iterator[list[Segment]]:
        for epoch in range(self.epochs):
            ids = self.order(epoch)
            self.begin_epoch(epoch, len(ids))
            yield [Segment(ids, epoch / self.epochs, (epoch + 1) / self.epochs)]
            if self.ended:
                return

    def watch(self, epoch: float) -> None:
        loss, hit = self.engine.evaluate(self.engine.train, self.held)
        self.looked += len(self.held)
        self.curve.append((epoch, float(loss.mean()), float(hit.float().mean())))
        losses = [loss for _, loss, _ in self.curve]
        best = losses.index(min(losses))
        if best == len(losses) - 1:
            self.keep()
        self.ended = len(losses) - 1 - best >= _LOOKS_OF_PATIENCE


class _Impatient(StopRule):
    patience = PATIENCE


class Auto(Geko, Watched):
    """`GEKOConfig.auto()`: a constant rate, averaged weights, `StopRule`."""

    config = gk.GEKOConfig.auto()
    trims = True  # the losses of as many held-back samples as look mislabelled in training
    grows = True  # the patience, with the kept epoch

    def run(self) -> Iterator[list[Segment]]:
        self.average: WeightAverage | None = WeightAverage(self.engine.network)
        self.rule, self.by_heart = (StopRule if self.grows else _Impatient)(self.config.auto_measure), False
        for epoch, segments in enumerate(super().run()):
            self.begin_epoch(epoch, sum(len(segment.ids) for segment in segments))
            yield segments
            if self.ended:
                break

    def new_sampler(self, epochs: float) -> gk.GEKOSampler:
        sampler = super().new_sampler(epochs)
        marks = torch.zeros(self.total, dtype=torch.bool)
        marks[self.held] = True
        sampler.held_back = marks.to(self.engine.device)
        return sampler

    def rate(self, peak: float, progress: float) -> float:
        rises = min(1.0, (self.step + 1) / max(round(_WARM_UP * self.total / self.engine.size), 1))
        return peak * rises * (cosine(progress) if self.by_heart else 1.0)

    def stepped(self) -> None:
        if self.average is not None:
            self.average.update()

    def watch(self, epoch: float) -> None:
        rule, engine, average = self.rule, self.engine, self.average
        if average is None:
            return
        with average.in_place():
            held, hit = engine.evaluate(engine.train, self.held)
            held_swapped, seen, seen_swapped = held, held[:0], held[:0]
            self.looked += len(self.held)
            if not rule.armed:
                held_swapped, seen = torch.full_like(held, torch.nan), engine.evaluate(engine.train, self.seen)[0]
                seen_swapped = torch.full_like(seen, torch.nan)
                for (split, places), losses in zip(self.swapped, (held_swapped, seen_swapped), strict=True):
                    losses[places] = engine.evaluate(split, torch.arange(len(split)))[0]
                    self.looked += len(split)
            look = Look(epoch, held, held_swapped, seen, seen_swapped, float(hit.float().mean()))
            quarantined = engine.state.quarantined
            wrong = float(quarantined.count_nonzero()) / (self.total - len(self.held)) if self.trims else 0.0
            best = rule.add(look, wrong)
            if best:
                self.keep()
        self.curve = rule.curve
        progress = epoch / (self.budget * self.epochs)
        if rule.stops():
            self.ended = True
        elif rule.by_heart and DECIDED <= progress < TOO_LATE:
            self.by_heart, self.average, self.best, self.sampler.held_back = True, None, None, None

    def finish(self) -> None:
        if self.average is None:
            return
        if not self.ended and self.rule.curve[-1][0] < self.epoch + self.done / self.planned - 1e-6:
            self.watch(self.epoch + self.done / self.planned)
        if not self.rule.armed or self.best is None:
            self.average.copy_to_model()
        else:
            super().finish()

    def report(self) -> dict[str, Any]:
        why = {"why": self.rule.why(), "kept": self.rule.kept, "armed": self.rule.armed, "by_heart": self.by_heart}
        return {**super().report(), **why}


def parts_of(split: Split, ids: Tensor, most: int | None = None) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens that each sample asks with, and those that it has to answer; the first `most` of them."""
    at = ids.to(split.tokens.device)
    starts, tokens = split.positions[at, 0].tolist(), split.tokens[at, :most].tolist()
    prompts = [row[: start + 1] for row, start in zip(tokens, starts, strict=True)]
    return prompts, [[label for label in row if label >= 0] for row in split.labels[at, :most].tolist()]


def swap(split: Split, ids: Tensor) -> tuple[Split, Tensor]:
    """Each sample with the answer of the next, where both differ; and its place in `ids`."""
    prompts, answers = parts_of(split, ids)
    nexts = [*range(1, len(ids)), 0]
    pairs = [(i, j) for i, j in enumerate(nexts) if prompts[i] != prompts[j] and answers[i] != answers[j]]
    width, answer = split.tokens.shape[1], split.labels.shape[1]
    given = [answers[j][: min(answer, max(width - len(prompts[i]), 1))] for i, j in pairs]
    made = pack([prompts[i] for i, _ in pairs], given, [0] * len(pairs), (width, answer)).to(split.tokens.device)
    return made, torch.tensor([i for i, _ in pairs])


ARMS |= {"auto": Auto, "A-stop": EarlyStopping, "B-auto": Arm}
WHAT |= {
    "auto": "GEKO, auto()",
    "A-stop": "uniform, early stopping on the same held-back samples",
    "B-auto": "uniform at auto's budget",
}
PRESETS = {"H": gk.GEKOConfig.recommended, "auto": gk.GEKOConfig.auto}


def find_arm(name: str) -> tuple[type[Arm], float | None]:
    """An arm and the budget that its name gives: "H", "B:budget=0.6", "H:freeze_confidence=0.95,probes=false".

    After H and auto stand fields of GEKOConfig that differ from the preset's, as JSON.
    """
    base, _, text = name.partition(":")
    try:
        fields = json.loads(re.sub(r"(\w+)=", r'"\1": ', f"{{{text}}}"))
    except json.JSONDecodeError:
        base, fields = "", {}
    budget = fields.pop("budget", None)
    own = {name: False for name in ("answers", "trims", "grows") if fields.pop(name, True) is False}
    if base not in ARMS or (fields and base not in PRESETS):
        raise ValueError(f"{name}: an arm is one of {', '.join(ARMS)}, one with :budget=0.5, or H:field=value,...")
    if not (fields or own):
        return ARMS[base], budget
    return type(base, (ARMS[base],), {"config": PRESETS[base](**fields), **own}), budget
