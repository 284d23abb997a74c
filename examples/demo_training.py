"""The two arms of demo.py: one plain PyTorch loop, with the standard loss or with GEKO."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from glosses import Glosses, batch, evaluate, standard_losses
from rich.progress import Progress, TaskID
from smollm2 import Tail, autocast
from torch import Tensor

import geko_kernels as gk

EPOCHS = 6
BATCH = 16
LEARNING_RATE = 2e-4


class Epoch(NamedTuple):
    """The end of an epoch; seconds and counts are of the whole run so far, evaluation left out."""

    seconds: float
    forwarded: int  # samples
    backpropagated: int  # samples
    loss: float  # held-out
    accuracy: float  # held-out
    buckets: list[int]  # samples in FREEZE, LIGHT, FOCUS, HARD; empty for the standard loss


class Data(NamedTuple):
    """A split and what the frozen layers make of it."""

    glosses: Glosses
    hidden: Tensor  # (N, S, H)


@dataclass
class Arm:
    """The standard loss if there is no state, else GEKO: both from the same weights, in the same order of samples."""

    name: str
    tail: Tail
    state: gk.SampleState | None
    forwarded: int = 0
    backpropagated: int = 0
    seconds: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.tail.parameters() if p.requires_grad], fused=True)

    def train_epoch(self, train: Data, test: Data, progress: Progress, bar: TaskID) -> None:
        """Draw from the samples that are not frozen; every second epoch, re-check the frozen ones."""
        start, epoch = time.perf_counter(), len(self.epochs)
        order = torch.randperm(len(train.glosses), generator=torch.Generator().manual_seed(epoch))
        frozen = self.frozen(order)
        steps = chunks(order[~frozen], BATCH)
        progress.update(bar, total=self.backpropagated + (EPOCHS - epoch) * int((~frozen).sum()))
        for step, ids in enumerate(steps):
            self.step(train, ids, done=(epoch + step / len(steps)) / EPOCHS)
            progress.update(bar, completed=self.backpropagated)
            if step % 8 == 0:
                progress.update(bar, buckets=self.shares())
        if epoch % 2 == 1 and epoch + 1 < EPOCHS:
            self.recheck(train, order[frozen])
        if train.hidden.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        loss, accuracy = evaluate(self.tail, test.glosses, test.hidden)
        buckets = self.state.bucket_counts().tolist() if self.state else []
        self.epochs.append(Epoch(self.seconds, self.forwarded, self.backpropagated, loss, accuracy, buckets))

    def step(self, train: Data, ids: Tensor, done: float) -> None:
        set_learning_rate(self.optimizer, done)
        samples = batch(train.glosses, train.hidden, ids)
        with autocast(train.hidden.device):
            logits = self.tail(samples.hidden, samples.positions)  # (B, C, V)
        if self.state is None:
            loss = standard_losses(logits, samples.labels).mean()
        else:
            loss = gk.weighted_loss(logits, samples.labels, samples.ids, self.state)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.forwarded += len(ids)
        self.backpropagated += len(ids)

    def frozen(self, ids: Tensor) -> Tensor:
        """Which of `ids` are frozen, (B,) bool on the CPU."""
        if self.state is None:
            return torch.zeros(len(ids), dtype=torch.bool)
        return self.state.bucket.cpu()[ids] == gk.Bucket.FREEZE

    def recheck(self, train: Data, ids: Tensor) -> None:
        """Update the state of frozen samples without a backward: one that has been forgotten thaws."""
        for some in chunks(ids, 4 * BATCH):
            samples = batch(train.glosses, train.hidden, some)
            with torch.no_grad(), autocast(train.hidden.device):
                logits = self.tail(samples.hidden, samples.positions)
            gk.weighted_loss(logits, samples.labels, samples.ids, self.state)  # not under no_grad, so it counts
            self.forwarded += len(some)

    def shares(self) -> str:
        """Bucket shares for the progress bar."""
        if self.state is None:
            return ""
        shares = (100 * self.state.bucket_counts() / len(self.state)).tolist()
        return "  ".join(f"{bucket.name} {share:.0f}%" for bucket, share in zip(gk.Bucket, shares, strict=True))


def chunks(ids: Tensor, size: int) -> tuple[Tensor, ...]:
    """`ids.split(size)`, which makes one empty chunk of no ids."""
    return ids.split(size) if len(ids) else ()


def set_learning_rate(optimizer: torch.optim.Optimizer, done: float) -> None:
    """By the finished share of the run, so that it decays to zero however short the epochs get."""
    warm_up = min(1.0, 0.05 + 10 * done)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * warm_up * (1 - done)
