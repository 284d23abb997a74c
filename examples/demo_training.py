"""The two arms of demo.py: `transformers.Trainer` with the standard loss, and `GEKOTrainer`, all else equal."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import geko_kernels as gk

EPOCHS, BATCH, LEARNING_RATE = 10, 64, 5e-4
WIDTH, DROPOUT = 1024, 0.1
Item = dict[str, Any]


class Head(nn.Module):
    """What is trained: a hidden layer and the classes' scores. features (B, H) -> logits (B, C)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, WIDTH), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, classes))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(features)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Epoch(NamedTuple):
    """The end of an epoch; seconds and counts are of the whole run so far, evaluation left out."""

    seconds: float
    forwarded: int  # samples
    backpropagated: int  # samples
    accuracy: float  # held-out
    buckets: dict[str, int]  # samples by bucket; empty for the standard loss


class Arm(NamedTuple):
    name: str
    epochs: list[Epoch]


class Watch(TrainerCallback):
    """The arm's progress bar, with bucket shares, and its clock: seconds of the epochs, probes and plans included."""

    def __init__(self, progress: Progress, name: str, state: gk.SampleState | None) -> None:
        self.progress, self.state = progress, state
        self.bar = progress.add_task(name, total=None, note="")
        self.seconds: list[float] = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self._now()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self.begin)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **__: Any) -> None:
        if state.global_step % 8 and state.global_step < state.max_steps:
            return
        self.progress.update(self.bar, completed=state.global_step, total=state.max_steps)
        if self.state is not None:
            shares = (100 * self.state.bucket_counts() / len(self.state)).tolist()
            names = (f"{bucket.name.lower()} {share:.0f}" for bucket, share in zip(gk.Bucket, shares, strict=True))
            self.progress.update(self.bar, note=" ".join(names) + " %")


def train(name: str, data: tuple[list[Item], list[Item]], classes: int, seed: int, out: Path, watch: Progress) -> Arm:
    """Train a new `Head` on data[0], evaluated on data[1] after each epoch.

    `name` is "uniform", for transformers.Trainer, or "GEKO", whose report goes into `out`.
    """
    fields: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 500,
        "learning_rate": LEARNING_RATE,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "seed": seed,
        "report_to": [],
        "disable_tqdm": True,
    }
    common: dict[str, Any] = {"train_dataset": data[0], "eval_dataset": data[1], "compute_metrics": accuracy}
    torch.manual_seed(seed)
    head = Head(len(data[0][0]["features"]), classes)
    trainer: Trainer
    if name == "uniform":
        trainer = Trainer(head, TrainingArguments(str(out), **fields), **common)
    else:
        trainer = gk.GEKOTrainer(head, gk.GEKOTrainingArguments(str(out), **fields), **common)
    trainer.remove_callback(PrinterCallback)
    clock = Watch(watch, name, getattr(trainer, "sample_state", None))
    trainer.add_callback(clock)
    trainer.train()
    return Arm(name, list(epochs_of(trainer, clock.seconds, len(data[0]))))


def accuracy(outcome: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((outcome.predictions.argmax(1) == outcome.label_ids).mean())}


def epochs_of(trainer: Trainer, seconds: list[float], samples: int) -> Iterator[Epoch]:
    """An `Epoch` each: what was evaluated, and what GEKO's efficiency report counted."""
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    counted: list[dict[str, Any]] = [{"samples": samples, "probes": 0, "buckets": {}}] * len(evaluated)
    if isinstance(trainer, gk.GEKOTrainer):
        counted = trainer.get_efficiency_report()["epochs"]
    spent, forwarded, backpropagated = 0.0, 0, 0
    for row, counts, part in zip(evaluated, counted, seconds, strict=True):
        spent += part
        backpropagated += counts["samples"]
        forwarded += counts["samples"] + counts["probes"]
        yield Epoch(spent, forwarded, backpropagated, row["eval_accuracy"], counts["buckets"])
