"""`observe`: records the learning state of each sample while any `transformers.Trainer` trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import Trainer, TrainerCallback

from geko_kernels.config import Bucket, GEKOConfig
from geko_kernels.losses.logits import weighted_loss
from geko_kernels.state import SampleState
from geko_kernels.training.data import IGNORED, label_of
from geko_kernels.training.loop_report import write_run
from geko_kernels.training.observed_batches import Samples, with_ids
from geko_kernels.training.observed_checks import check_labels, check_rows, check_trainer
from geko_kernels.training.observed_report import ObservedCounts, merged, summary_of
from geko_kernels.training.observed_tokens import (
    OF_LOGITS,
    QUANTITIES,
    ObservedVisits,
    check_fused_loss,
    find_shift,
    of_fused_head,
    of_logits,
)
from geko_kernels.training.processes import rank_and_world
from geko_kernels.training.report.facts import trainer_facts
from geko_kernels.training.report.label_errors import label_error_scores
from geko_kernels.training.report.labels import label_figures
from geko_kernels.training.report.samples import MOST_SAMPLES, SAMPLES_NAME, duplicate_groups, told_of, write_rows
from geko_kernels.training.report.summary import row_of

logger = logging.getLogger(__name__)
_PATCHED = ("_get_dataloader", "compute_loss")


def observe(trainer: Trainer, config: GEKOConfig | None = None) -> Observation:
    """Record the statistics of each sample in `trainer`'s run, without changing its losses and weights.

    A sample is an item of `train_dataset`, or, if that has a column `seq_lengths` (TRL's `packing=True`), one of the
    sequences in a row. TRL's SFTTrainer does not compute logits: only losses, label probabilities and hits are recorded
    then, and the learning state stays empty, since buckets need the confidence.

    Args:
        trainer: a Trainer before `train()`, whose loss is the cross-entropy of the model's logits.
        config: rules of the learning state (default: `GEKOConfig()`).

    Raises:
        TypeError: no Trainer, a GEKOTrainer (which records already), or a config of another type.
        ValueError: DataParallel, a dataset without length or index, label smoothing, a trainer that is observed
            already; at the first batch: a model without logits, several samples in one row that cannot be told apart,
            or a loss that is not a cross-entropy of the logits.
    """
    check_trainer(trainer, config)
    return Observation(trainer, config)


class Observation(TrainerCallback):
    """The records of `observe`; row e of each array is the e-th epoch, NaN if a sample was not seen in it.

    A further `train()` adds its epochs. An epoch interrupted by an error counts as one if it trained a step.

    Several processes: each records its own samples, and at the end of each epoch all get all records.

    Attributes:
        state: the SampleState, one row a sample.
        losses: (epochs, N) float32, mean over the valid tokens, nats.
        label_probabilities: (epochs, N) float32, mean probability of the label over the valid tokens.
        hits: (epochs, N) float32, share of the valid tokens whose label has the largest logit.
        confidences: (epochs, N) float32, mean of the largest probability; None if the model computes no logits.
        margins: (epochs, N) float32, mean of the label's logit less the largest other one; None likewise.
    """

    def __init__(self, trainer: Trainer, config: GEKOConfig | None) -> None:
        self.samples = Samples(trainer.train_dataset)
        self.state = SampleState(len(self.samples), config, device=trainer.args.device)
        self.counts = ObservedCounts(self.state, dist.all_reduce if trainer.args.world_size > 1 else None)
        self._trainer, self._records = trainer, list[Tensor]()  # each (5, N)
        self._shift: bool | None = None
        self._fused: bool | None = None  # whether the model's head computes no logits
        self._called = False  # whether the trainer has called compute_loss in training
        self._offset = 0.0  # epochs recorded before this call of train()
        self._progress: Any = None  # the TrainerState of the latest epoch; a further train() makes its own
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

    @property
    def confidences(self) -> Tensor | None:
        return None if self._fused else self._stacked()[:, 3]

    @property
    def margins(self) -> Tensor | None:
        return None if self._fused else self._stacked()[:, 4]

    def close(self) -> None:
        """Restore the trainer; the records are kept."""
        if vars(self._trainer).get("compute_loss") != self._compute_loss:
            return
        for name in _PATCHED:
            del vars(self._trainer)[name]
        vars(self._trainer).update(self._before)
        self._trainer.remove_callback(self)

    def write_samples(self, path: str | Path) -> None:
        """Write one row a sample, as `.jsonl`, `.csv` or `.parquet`: id, and a list for each array, null where unseen.

        The lists are named like the arrays; without logits there are no confidences and margins, and bucket is null.
        Packed rows also have `row` and `part`: the row of `train_dataset`, and the number of the sequence in it.
        `record_id`, `text`, `bucket`, `label_error` and `duplicate_group` are as in `GEKOTrainer.write_samples`. There
        are no suspects, and packed rows have no texts and groups.
        """
        write_rows(path, self._sample_rows())

    def _sample_rows(self) -> Iterator[dict[str, Any]]:
        names = [name for name in QUANTITIES if not (self._fused and name in OF_LOGITS)]
        records, data = self._stacked(), self._trainer.train_dataset
        columns = [values.T.tolist() for values in records[:, : len(names)].unbind(1)]
        state = self.state
        visited = (state.times_seen > 0).tolist()
        buckets = [Bucket(b).name if seen else None for b, seen in zip(state.bucket.tolist(), visited, strict=True)]
        rows, parts = self.samples.places() if self.samples.first is not None else ((), ())
        skipped = getattr(data, "skipped_rows", ())
        known = records[:, 1].isfinite()
        samples, p = known.nonzero()[:, 1].numpy(), records[:, 1][known].numpy()
        scores = label_error_scores(samples, p, np.zeros(len(buckets), bool)).tolist()
        groups = [None] * len(buckets) if rows else duplicate_groups(data, len(buckets))
        told = [] if rows else told_of(data)
        for i, bucket in enumerate(buckets):
            lists = [[x if math.isfinite(x) else None for x in column[i]] for column in columns]
            sample, group = i if rows else row_of(i, skipped), groups[i]
            row = {"id": sample, **(told[i] if told else {}), **dict(zip(names, lists, strict=True)), "bucket": bucket}
            row["label_error"] = scores[i] if math.isfinite(scores[i]) else None
            row["duplicate_group"] = None if group is None else row_of(group, skipped)
            yield row | ({"row": row_of(rows[i], skipped), "part": parts[i]} if rows else {})

    def write_report(self, folder: str | Path) -> Path:
        """Write `geko_report.json`, `report.html` and its PNGs into `folder`; returns the page's path.

        They are those of GEKOTrainer, for a run that trains every sample; figures that are not measured are named on
        the page. Up to 200,000 samples it also writes `samples.jsonl`, whose lists and texts the page shows. Of several
        processes the first writes.

        Raises:
            ImportError: matplotlib or jinja2 is missing.
        """
        if rank_and_world()[0]:
            return Path(folder) / "report.html"
        fused = bool(self._fused)
        logged = [
            {**row, "epoch": row["epoch"] + self._offset} if "epoch" in row else row
            for row in self._trainer.state.log_history
        ]
        summary = summary_of(self.state, self.counts, self._stacked(), logged, fused)
        skipped = () if self.samples.first is not None else getattr(self._trainer.train_dataset, "skipped_rows", ())
        summary["run"] = trainer_facts(self._trainer)
        visits, named = (~self._stacked()[:, 0].isnan()).sum(0), self._trainer.args.label_names or ()
        decode = getattr(self._trainer.processing_class, "decode", None)
        summary |= label_figures(self._trainer.train_dataset, self.state, None, visits, named, decode)
        if len(self.state) <= MOST_SAMPLES:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.write_samples(Path(folder) / SAMPLES_NAME)
        return write_run(folder, summary, self.counts.not_measured(fused), skipped)

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        check_rows(self._trainer.train_dataset, self.samples.rows)
        if self.counts.open_epoch is not None:  # interrupted by an error, or by `auto_find_batch_size`
            self._end_broken_off()
        if self.counts.epochs:
            self._offset = max(self.counts.epochs[-1]["end"] - (state.epoch or 0.0), 0.0)
        self.counts.switch("other")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._records.append(
            torch.full((len(QUANTITIES), len(self.state)), math.nan, dtype=torch.float32, device=args.device)
        )
        self._progress = state
        self.counts.begin_epoch(len(self._records) - 1, state.global_step)
        self.counts.switch("steps")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._end_epoch(state.global_step, state.epoch)

    def _end_epoch(self, step: int, epoch: float) -> None:
        self._records[-1] = merged(self._records[-1]).cpu()
        self.state.sync()
        self.counts.close_epoch(self._records[-1], step, self._offset + epoch, fused=bool(self._fused))
        self.counts.switch("other")

    def _end_broken_off(self) -> None:
        """Record the interrupted epoch as an epoch if it trained a step; else drop it."""
        reached = self._progress
        if reached.global_step > self.counts.mark["step"]:
            self._end_epoch(reached.global_step, reached.epoch)
        else:
            self._records.pop()
            self.counts.drop_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.counts.switch(None)

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if not self._called:
            raise RuntimeError(
                f"observe: a step was trained without compute_loss, through which observe sees the samples: "
                f"{type(self._trainer).__name__}.training_step has to call it (Transformers {transformers.__version__})"
            )

    def _stacked(self) -> Tensor:
        records = [record.cpu() for record in self._records]  # the open epoch's is on the device
        return torch.stack(records) if records else torch.empty(0, len(QUANTITIES), len(self.state))

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
        given = dataset, description, batch_size, sampler_fn
        return with_ids(self._trainer, self._loader, self.samples, *given, dataloader_key=dataloader_key)

    def _compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs.pop("sample_ids", None)
        if ids is None:
            if model.training and self._trainer.is_in_train:
                raise ValueError(
                    f"observe: the training batch has no sample_ids, since {type(self._trainer).__name__} makes its "
                    "own dataloader: let its get_train_dataloader return super().get_train_dataloader(), and override "
                    "_get_train_sampler for another order or data_collator for other batches"
                )
            return self._loss(model, inputs, return_outputs, num_items_in_batch)
        self._called = True
        name = label_of(inputs, self._trainer.label_names or ["labels"])
        assert name is not None  # checked by IdCollator
        labels, seen = inputs[name], list[Any]()
        hook = model.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs))
        try:
            result = self._loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()
        loss = result[0] if return_outputs else result
        with torch.no_grad():
            self._record(seen, labels, ids, loss.detach(), num_items_in_batch, inputs)
        return result

    def _record(self, seen: list[Any], labels: Tensor, ids: Tensor, loss: Tensor, num_items: Any, inputs: Any) -> None:
        fused = [outputs for outputs in seen if getattr(outputs, "log_probs", None) is not None]
        logits = [found for found in map(_logits_of, seen) if found is not None]
        if not fused and not logits:
            kinds = ", ".join(type(outputs).__name__ for outputs in seen) or "none were seen"
            hint = "; call the model with return_dict=True, so that its outputs have names" if "tuple" in kinds else ""
            if self._trainer.args.use_liger_kernel:
                hint += "; leave Liger's loss out: liger_kernel_config={'fused_linear_cross_entropy': False}"
            raise ValueError(f"observe needs the model's logits, but its outputs ({kinds}) have none{hint}")
        visits: ObservedVisits | None
        if fused:
            visits = self._of_fused_head(fused[-1], ids, loss, num_items)
        else:
            visits = self._of_logits(logits[-1].detach(), labels.to(logits[-1].device), ids, loss, num_items)
        if visits is None:
            return
        row, at = self._records[-1], visits.ids
        real = at >= 0
        row[:, at[real]] = torch.where(visits.num_tokens > 0, visits.means, row[:, at.clamp(min=0)])[:, real]
        self.counts.add(visits, inputs, ids)

    def _of_fused_head(self, outputs: Any, ids: Tensor, loss: Tensor, num_items: Any) -> ObservedVisits:
        if self._fused is None and bool(loss.isfinite()):
            check_fused_loss(outputs, loss, num_items, self._trainer.args.world_size)
            self._fused = True
            logger.warning(
                "observe: the model's head is fused with its loss and computes no logits. Losses, label probabilities "
                "and hits are recorded; confidences, margins and buckets are not."
            )
        return of_fused_head(outputs, ids)

    def _of_logits(
        self, logits: Tensor, labels: Tensor, ids: Tensor, loss: Tensor, num_items: Any
    ) -> ObservedVisits | None:
        shift = self._shift
        check_labels(labels, logits.shape[-1])
        if shift is None:
            if not bool((labels != IGNORED).any() & loss.isfinite()):
                return None  # nothing to compare
            shift, certain = find_shift(logits, labels, loss, num_items, self._trainer.args.world_size)
            self._shift, self._fused = shift if certain else None, False
        weighted_loss(logits, labels, ids, self.state, shift=shift, update=True)
        return of_logits(logits, labels, ids, shift)


def _logits_of(outputs: Any) -> Tensor | None:
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else None
