"""The two arms of demo.py: `transformers.Trainer` with the standard loss, and `GEKOTrainer`, all else equal."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from glosses import Item, collate
from rich.progress import Progress
from smollm2 import Tail, autocast
from torch import Tensor
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

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
    buckets: dict[str, int]  # samples by bucket; empty for the standard loss


class Arm(NamedTuple):
    name: str
    epochs: list[Epoch]


class Watch(TrainerCallback):
    """The arm's progress bar, with bucket shares, and its clock: seconds of the epochs, probes and plans included."""

    def __init__(self, progress: Progress, name: str, state: gk.SampleState | None) -> None:
        self.progress, self.state = progress, state
        self.bar = progress.add_task(name, total=None, buckets="")
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
        self.progress.update(self.bar, completed=state.global_step, total=state.max_steps)
        if self.state is not None and state.global_step % 8 == 0:
            shares = (100 * self.state.bucket_counts() / len(self.state)).tolist()
            names = (f"{bucket.name} {share:.0f}%" for bucket, share in zip(gk.Bucket, shares, strict=True))
            self.progress.update(self.bar, buckets="  ".join(names))


def train(
    name: str,
    tail: Tail,
    data: tuple[list[Item], list[Item]],
    classes: Tensor,
    config: gk.GEKOConfig | None,
    out: Path,
    progress: Progress,
) -> Arm:
    """Train `tail` on data[0], evaluated on data[1] after each epoch; without a config, by the standard loss."""
    fields: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 4 * BATCH,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 10,
        "bf16": autocast(torch.device("cuda" if torch.cuda.is_available() else "cpu"))._enabled,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "report_to": [],
        "disable_tqdm": True,
    }
    common: dict[str, Any] = {
        "train_dataset": data[0],
        "eval_dataset": data[1],
        "data_collator": collate,
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: guesses(logits, classes),
    }
    trainer: Trainer
    if config is None:
        trainer = Trainer(tail, TrainingArguments(str(out), **fields), **common)
    else:
        arguments = gk.GEKOTrainingArguments(str(out), **fields, shift_labels=False)
        trainer = gk.GEKOTrainer(tail, arguments, config=config, **common)
    trainer.remove_callback(PrinterCallback)
    watch = Watch(progress, name, getattr(trainer, "sample_state", None))
    trainer.add_callback(watch)
    trainer.train()
    return Arm(name, list(epochs_of(trainer, watch.seconds, len(data[0]))))


def guesses(logits: Tensor, classes: Tensor) -> Tensor:
    """(B, C, V) -> (B,) int64: the class whose first token has the largest logit of the 26."""
    classes = classes.to(logits.device)
    return classes[logits[:, 0, classes].argmax(1)]


def accuracy(outcome: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((outcome.predictions == outcome.label_ids[:, 0]).mean())}


def epochs_of(trainer: Trainer, seconds: list[float], samples: int) -> Any:
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
        yield Epoch(spent, forwarded, backpropagated, row["eval_loss"], row["eval_accuracy"], counts["buckets"])
