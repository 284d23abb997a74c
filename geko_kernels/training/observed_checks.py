"""Checks of `observe`: it refuses trainers, data and labels that it cannot record."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from geko_kernels.config import check_config
from geko_kernels.training.parallel import check_parallel
from geko_kernels.training.trainer import GEKOMixin


def check_trainer(trainer: Any, config: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    if isinstance(trainer, GEKOMixin):
        raise TypeError(f"{type(trainer).__name__} records its samples already: see its sample_state")
    check_config(config)
    if "compute_loss" in vars(trainer):
        raise ValueError("the trainer is observed already, or its compute_loss is patched: close() that first")
    check_parallel(trainer, "observe")
    data = trainer.train_dataset
    if data is None or isinstance(data, IterableDataset) or not has_length(data) or not len(data):
        raise ValueError("observe needs a train_dataset with items, a length and an index, not an iterable one")
    if trainer.label_smoother is not None:
        raise ValueError("observe does not work with label_smoothing_factor: set it to 0")


def check_rows(dataset: Any, observed: int) -> None:
    if len(dataset) != observed:
        raise ValueError(
            f"observe: train_dataset had {observed:,} items when observe was called, and has {len(dataset):,} now: "
            "close() the observation and call observe again"
        )


def check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point():
        raise ValueError(
            "observe needs the number of a class as label, since it records the cross-entropy of the logits: got "
            f"labels of {labels.dtype} and shape {tuple(labels.shape)}, as for regression or multi-label data"
        )
    if classes < 2:
        raise ValueError(f"observe needs logits of at least two classes, got {classes}")
