"""`observe`: the learning state of each sample, recorded beside the training of any `transformers.Trainer`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from geko_kernels.config import Bucket, GEKOConfig
from geko_kernels.losses.logits import weighted_loss
from geko_kernels.state import SampleState
from geko_kernels.training.data import IGNORED, IdCollator, IdDataset, label_of
from geko_kernels.training.report.summary import row_of
from geko_kernels.training.trainer import GEKOMixin

_PATCHED = ("_get_dataloader", "compute_loss")
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; 0.02 where the model may have rounded its loss


def observe(trainer: Trainer, config: GEKOConfig | None = None) -> Observation:
    """Record what `trainer` sees of each sample; its losses and weights stay those of the run without it.

    Args:
        trainer: a Trainer before `train()`, in one process, whose loss is the cross-entropy of the model's logits.
        config: rules of the learning state (default: `GEKOConfig()`).

    Raises:
        TypeError: no Trainer, a GEKOTrainer (which records already), or a config of another type.
        ValueError: several processes or DataParallel, a dataset without length or index, label smoothing, a trainer
            that is observed already; at the first batch a model without logits, several samples joined in one row, or
            a loss that is no cross-entropy of the logits.
    """
    _check(trainer, config)
    return Observation(trainer, config)


class Observation(TrainerCallback):
    """What `observe` recorded; row e of each array is the e-th epoch, NaN where a sample was not seen in it.

    Attributes:
        state: the SampleState, one row per item of `train_dataset`.
        losses: (epochs, N) float32, mean over the valid tokens.
        label_probabilities: (epochs, N) float32, mean probability of the label over the valid tokens.
        hits: (epochs, N) float32, share of the valid tokens whose label has the largest logit.
    """

    def __init__(self, trainer: Trainer, config: GEKOConfig | None) -> None:
        self.state = SampleState(len(trainer.train_dataset), config, device=trainer.args.device)
        self._trainer, self._records = trainer, list[Tensor]()  # each (3, N)
        self._shift: bool | None = None
        self._called = False  # has the trainer asked for a loss of training?
        self._loader: Callable[..., Any] = trainer._get_dataloader
        self._loss: Callable[..., Any] = trainer.compute_loss
        self._before = {name: vars(trainer)[name] for name in _PATCHED if name in vars(trainer)}
        vars(trainer).update(_get_dataloader=self._get_dataloader, compute_loss=self._compute_loss)
        trainer.add_callback(self)

    @property
    def losses(self) -> Tensor:
        return self._stacked()[:, 0]

    @property
    def label_probabilities(self) -> Tensor:
        return self._stacked()[:, 1]

    @property
    def hits(self) -> Tensor:
        return self._stacked()[:, 2]

    def close(self) -> None:
        """Put the trainer back as it was; the records stay."""
        if vars(self._trainer).get("compute_loss") != self._compute_loss:
            return
        for name in _PATCHED:
            del vars(self._trainer)[name]
        vars(self._trainer).update(self._before)
        self._trainer.remove_callback(self)

    def write_samples(self, path: str | Path) -> None:
        """One JSON line a sample: id, losses, label_probabilities, hits (a list each, null where unseen), bucket."""
        columns = [values.T.tolist() for values in (self.losses, self.label_probabilities, self.hits)]
        buckets = self.state.bucket.tolist()
        skipped = getattr(self._trainer.train_dataset, "skipped_rows", ())
        with open(path, "w", encoding="utf-8") as file:
            for i, bucket in enumerate(buckets):
                lists = [[x if math.isfinite(x) else None for x in column[i]] for column in columns]
                names = ("losses", "label_probabilities", "hits")
                row = {"id": row_of(i, skipped), **dict(zip(names, lists, strict=True)), "bucket": Bucket(bucket).name}
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._records.append(torch.full((3, len(self.state)), math.nan, device=args.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if not self._called:
            raise RuntimeError(
                f"observe: a step was trained without compute_loss, by which it sees the samples: "
                f"{type(self._trainer).__name__}.training_step has to call it (Transformers {transformers.__version__})"
            )

    def _stacked(self) -> Tensor:
        return torch.stack(self._records).cpu() if self._records else torch.empty(0, 3, len(self.state))

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if not is_training:
            return self._loader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        trainer, collator = self._trainer, self._trainer.data_collator
        wrapped = collator
        if is_datasets_available() and hasattr(dataset, "remove_columns"):
            dataset = trainer._remove_unused_columns(dataset, description=description)
        else:
            wrapped = trainer._get_collator_with_removed_columns(collator, description=description)
        sampler = None if sampler_fn is None else lambda identified: sampler_fn(identified.dataset)
        label_names = trainer.label_names or ["labels"]
        trainer.data_collator = IdCollator(wrapped, label_names=label_names)
        vars(trainer)["_get_collator_with_removed_columns"] = lambda given, description=None: given
        try:
            return self._loader(IdDataset(dataset), description, batch_size, sampler, is_training, dataloader_key)
        finally:
            trainer.data_collator = collator
            del vars(trainer)["_get_collator_with_removed_columns"]

    def _compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs.pop("sample_ids", None)
        if ids is None:
            if model.training and self._trainer.is_in_train:
                raise ValueError("observe: the training batch has no sample_ids; the trainer makes its own dataloader")
            return self._loss(model, inputs, return_outputs, num_items_in_batch)
        self._called = True
        if ids.dim() != 1:
            raise ValueError("observe needs one row a sample: the data collator joined several samples in one row")
        name = label_of(inputs, self._trainer.label_names or ["labels"])
        assert name is not None  # IdCollator has seen to it
        labels = inputs[name]
        loss, outputs = self._loss(model, inputs, True, num_items_in_batch)
        logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(f"observe needs the model's logits, and its outputs ({type(outputs).__name__}) have none")
        with torch.no_grad():
            self._record(logits.detach(), labels.to(logits.device), ids, loss.detach(), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _record(self, logits: Tensor, labels: Tensor, ids: Tensor, loss: Tensor, num_items: Any) -> None:
        shift = self._shift
        if shift is None:
            if not bool((labels != IGNORED).any()):
                return
            shift, certain = _find_shift(logits, labels, loss, num_items)
            self._shift = shift if certain else None
        _, stats = weighted_loss(logits, labels, ids, self.state, shift=shift, update=True, return_stats=True)
        chances = _label_probabilities(logits, labels, shift)
        new = torch.stack([stats.loss, chances, stats.accuracy])
        row = self._records[-1]
        row[:, ids] = torch.where(stats.num_tokens > 0, new, row[:, ids])


def _check(trainer: Any, config: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    if isinstance(trainer, GEKOMixin):
        raise TypeError(f"{type(trainer).__name__} records its samples already: see its sample_state")
    if config is not None and not isinstance(config, GEKOConfig):
        raise TypeError(f"config must be a GEKOConfig, got {type(config).__name__}")
    if "compute_loss" in vars(trainer):
        raise ValueError("the trainer is observed already, or its compute_loss is patched: close() that first")
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise ValueError("observe works in one process on one device, without DataParallel")
    data = trainer.train_dataset
    if data is None or isinstance(data, IterableDataset) or not has_length(data) or not len(data):
        raise ValueError("observe needs a train_dataset with items, a length and an index, not an iterable one")
    if trainer.label_smoother is not None:
        raise ValueError("observe does not combine with label_smoothing_factor: set it to 0")


def _find_shift(logits: Tensor, labels: Tensor, loss: Tensor, num_items: Any) -> tuple[bool, bool]:
    """Is the trainer's loss the cross-entropy of shifted labels? And is that certain, or do both fit this batch?"""
    found = {}
    for shift in (False, True) if logits.dim() == 3 else (False,):
        plain = weighted_loss(logits, labels, reduction="token_mean", shift=shift)
        means = [float(plain)]
        if num_items is not None:
            means.append(float(weighted_loss(logits, labels, reduction="token_mean", shift=shift, num_items=num_items)))
        found[shift] = min(abs(mean - float(loss)) for mean in means)
    best = min(found, key=lambda shift: found[shift])
    allowed = _CLOSE.get(logits.dtype, 0.02) * abs(float(loss)) + 1e-6
    if not found[best] <= allowed:
        raise ValueError(
            f"observe needs a loss that is the cross-entropy of the logits: the trainer's is {float(loss):.6g}, and "
            f"the nearest cross-entropy is {found[best]:.6g} away"
        )
    return best, sum(distance <= allowed for distance in found.values()) == 1


def _label_probabilities(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """(B,) mean probability of the label over the valid tokens."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    valid = labels != IGNORED
    index = labels.where(valid, 0).unsqueeze(-1)
    logits = logits.float()
    chances = (logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)).exp() * valid
    return chances.reshape(len(labels), -1).sum(1) / valid.reshape(len(labels), -1).sum(1)
