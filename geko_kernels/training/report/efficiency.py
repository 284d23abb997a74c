"""The forward and backward work that a run has done, and what a standard run would have done.

`GEKOTrainer.get_efficiency_report()` returns this dict, and a checkpoint stores it:

    samples_standard   samples that `transformers.Trainer` would have trained by now: the same share of its run
    samples_forward    samples that went through a forward pass, with labels or without, probes included
    samples_backward   samples that went through a backward pass: every sample of a training batch
    samples_idle       those of samples_backward with weight zero or without a label: their gradient was zero
    samples_nonfinite  visits, probes included, whose loss was NaN or infinite; the state keeps their old rows
    gradients_predicted, gradients_corrected
                       tokens whose gradient the forward predicted right, and those that the backward had to correct;
                       both 0 if the loss does not predict gradients (it does for large batches on a Hopper GPU,
                       unless most tokens have weight zero)
    tokens_forward     tokens of the forward passes, padding left out
    tokens_backward    tokens of the backward passes
    saved_compute      1 - (samples_forward + 2 * samples_backward) / (3 * samples_standard): share of the standard
                       run's work not done, a backward counted as two forwards; negative if probes cost more than was
                       saved; 0 if steps were trained but nothing was counted
    seconds            {"total": in `train()`, "steps": training steps, "probes", "selection": sync and planning,
                       "evaluation", "checkpoints"}, wall time of this process; attempts that `auto_find_batch_size`
                       gave up count only in the total
    epochs             a list of one dict per planned epoch:
        epoch          counted from 0
        end            the `epoch` of `log_history` at its end
        samples        samples trained (forward and backward)
        probes         samples evaluated forward-only: left-out ones before the epoch, and those of `auto_stop` in it
        steps          optimizer steps
        loss           mean unweighted token loss over the training samples, nats; None if none was trained, NaN if
                       one was not finite
        accuracy       share of their tokens predicted right; None if none was trained
        nonfinite      training samples whose loss was NaN or infinite
        seconds        wall time, probes and selection included
        buckets        {"FREEZE": n, "LIGHT": n, "FOCUS": n, "HARD": n} of all samples at its end
        quarantined    samples that the noise guard holds back at its end
        forgotten      samples that were right before and were found wrong, by a probe before the epoch or in training

`train()` ends by writing `geko_report.json` into `output_dir` (of a hyperparameter search: the trial's). It is strict
JSON: NaN and infinity are null. A dict of:

    version            1
    num_samples        size of the training set
    config             `GEKOConfig.to_dict()`
    efficiency         the dict above
    log_history        `trainer.state.log_history`, the entries of `Trainer.log`; beside Transformers' own keys each
                       training entry has geko/loss, geko/accuracy, geko/freeze, geko/light, geko/focus, geko/hard,
                       geko/quarantined and geko/left_out (shares of the samples; the last of those that the epoch
                       does not train), geko/progress and geko/phase_hard, geko/phase_focus, geko/phase_light (the
                       current weights); if losses since the last entry were not finite, also geko/nonfinite (their
                       number), and geko/loss is NaN; with `auto_stop` an entry each quarter of an epoch has
                       geko/held_out_loss and geko/held_out_accuracy (of `stopping`'s curve)
    most_forgotten     up to 100 dicts {"id", "times", "loss", "bucket"}, most often forgotten first
    num_quarantined    how many samples are quarantined
    quarantined        up to 10,000 of their ids, highest loss first
    stopping           only with `auto_stop`: {"why": a sentence, "ended": by the rule, "by_heart", "measure", "kept":
                       the number of the evaluation whose weights the model has, None for the last weights, "curve": a
                       dict with "epoch", "loss" and "accuracy" of the averaged weights for each evaluation,
                       "looked_at": "held_back", "eval_dataset" or None, "swap_test": whether it was possible,
                       "held_back": ids}
    num_doubtful       the most samples at a time that a third of `noise_guard_margin` would also have made suspects
    forecast           what longer and shorter runs would save: the dict of `forecast.py`; null if that is unknown, and
                       with `auto_stop`, whose runs find their length themselves
    labels             what became of the samples of each label: "num_labels", "all" (the labelled samples together),
                       "listed" (up to 20 labels, the largest share quarantined or held back first, of equal ones the
                       rarest first) and "warning" (a sentence on labels whose samples are mostly quarantined or held
                       back, else null). Labels are whole numbers, true and false or texts, one an item, or the trained
                       tokens of an item, if there are at most 50 such answers and half as many as samples. null for a
                       dataset that is not a list, a `TensorDataset`, a `datasets.Dataset` or from `load_dataset`, and
                       if there are fewer than two labels. "all" and each of "listed" are a dict of
        label          as text: the class's name or number, or the text of an answer; not in "all"
        samples        how many have it
        left_out       share that epochs leave out at the end, since its bucket has weight zero: right when last seen
        quarantined    share that the noise guard holds back at the end
        held_back      share that `auto_stop` holds back
        right          share that was correct when last seen; None if there is no learning state
        visits         mean over its samples, probes included
    run                model, data, settings, device, date and versions in words, as far as known
    observed           true if `observe` has written it
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geko_kernels._files import write_whole
from geko_kernels.config import Bucket
from geko_kernels.losses.results import SampleStats
from geko_kernels.training.report.pending import PendingVisits, Visited
from geko_kernels.training.report.visits import VisitLog

logger = logging.getLogger(__name__)

REPORT_NAME = "geko_report.json"
_COUNTS = ("tokens", "samples", "idle", "labels", "loss", "hits", "nonfinite", "predicted", "corrected")
_PARTS = ("steps", "probes", "selection", "evaluation", "checkpoints", "other")


class Efficiency:
    """Counts on the device without a sync, collected at log steps, at epoch ends and in checkpoints.

    Args:
        device: where the statistics of the steps are.
        reduce: sums a tensor over all processes in place; None for one process.
        visits: records the visits themselves, and is flushed at epoch ends; None if they are not needed.
    """

    def __init__(
        self,
        device: torch.device,
        reduce: Callable[[Tensor], None] | None = None,
        visits: VisitLog | None = None,
    ) -> None:
        self.reduce, self.visits = reduce, visits
        self.sums = torch.zeros(2, len(_COUNTS), dtype=torch.float64, device=device)  # (train, probe) since collect
        self._pending, self._probes = PendingVisits(device), False  # of one kind, probes or not
        self.train = dict.fromkeys(_COUNTS, 0.0)
        self.probe = dict.fromkeys(_COUNTS, 0.0)
        self.spent = dict.fromkeys(_PARTS, 0.0)
        self.epochs: list[dict[str, Any]] = []
        self.samples_standard = 0
        self.batches = 0  # training batches counted by this process since it started
        self.predictions: Tensor | None = None  # of the run's `SampleState`
        self.open_epoch: int | None = None
        self.mark = self._marked(0)  # totals when the open epoch began
        self._part: str | None = None  # the part of `seconds` that counts now
        self._since = 0.0
        self._clock = time.perf_counter  # a loop left open is closed at Python's exit, when modules are gone

    def count(self, stats: SampleStats, tokens: Tensor, probe: bool = False) -> None:
        """Add one forward's visits; `tokens` () is the number of tokens that the model read for them."""
        self.batches += not probe
        self.sums[int(probe), 0].add_(tokens)
        if probe != self._probes:
            self._count_pending()
            self._probes = probe
        if not self._pending.add(stats):
            self._count_pending()
            if not self._pending.add(stats):
                self._add(Visited.of(stats))

    def _count_pending(self) -> None:
        visited = self._pending.take()
        if visited is not None:
            self._add(visited)

    def _add(self, visited: Visited) -> None:
        seen, labelled, finite = visited.sample_ids >= 0, visited.num_tokens > 0, visited.loss.isfinite()
        parts = [
            seen,
            seen & ((visited.weight == 0) | ~labelled),
            visited.num_tokens,
            torch.where(finite, visited.loss, 0) * visited.num_tokens,
            visited.accuracy * visited.num_tokens,
            labelled & ~finite,
        ]
        sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
        self.sums[int(self._probes), 1 : 1 + len(sums)].add_(sums)
        if self.visits is not None:
            self.visits.add(visited)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Count the block's forwards, but do not record their visits: their ids are not those of training samples."""
        self._count_pending()
        visits, self.visits = self.visits, None
        try:
            yield
            self._count_pending()
        finally:
            self._pending.take()
            self.visits = visits

    def switch(self, part: str | None) -> str | None:
        """Count wall time as `part` from now on; returns the part before."""
        now, before = self._clock(), self._part
        if before is not None:
            self.spent[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the block's wall time as `part`, and not as the part around it."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def collect(self) -> dict[str, float]:
        """Move the device's counts into the totals (all processes call it); returns those of training."""
        self._count_pending()
        if self.predictions is not None:
            self.sums[0, -2:] += self.predictions
            self.predictions.zero_()
        if self.reduce is not None:
            self.reduce(self.sums)
        train, probe = (dict(zip(_COUNTS, row, strict=True)) for row in self.sums.tolist())
        self.sums.zero_()
        if train["nonfinite"] + probe["nonfinite"] > 0 == self.train["nonfinite"] + self.probe["nonfinite"]:
            logger.warning(
                f"The loss of {round(train['nonfinite'] + probe['nonfinite'])} samples was NaN or infinite: geko/loss "
                "is NaN, and the learning state keeps their earlier rows. The model has probably diverged; a lower "
                "learning_rate or a max_grad_norm may help. This warning comes once; samples_nonfinite keeps counting."
            )
        for total, new in ((self.train, train), (self.probe, probe)):
            for name in _COUNTS:
                total[name] += new[name]
        return train

    def _marked(self, step: int) -> dict[str, Any]:
        spent = sum(self.spent[part] for part in ("steps", "probes", "selection"))
        return {"train": dict(self.train), "probe": dict(self.probe), "step": step, "spent": spent}

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Open the record of `epoch`, which begins after `step` optimizer steps; counts and time now go to it."""
        self.switch(self._part)
        self.open_epoch, self.mark = epoch, self._marked(step)

    def flush_visits(self) -> None:
        """Move the visits so far to the host, as visits of the open epoch; all processes call it."""
        if self.visits is not None and self.open_epoch is not None:
            self._count_pending()
            self.visits.flush(self.open_epoch)

    def end_epoch(self, step: int, marks: dict[str, Any]) -> None:
        """Append the open epoch's record, if one is open; `marks` adds end, buckets, quarantined and forgotten."""
        if self.open_epoch is None:
            return
        self.flush_visits()
        self.collect()
        self.switch(self._part)
        now, before = self._marked(step), self.mark
        train = {name: now["train"][name] - before["train"][name] for name in _COUNTS}
        labels = train["labels"]
        self.epochs.append(
            {
                "epoch": self.open_epoch,
                "samples": round(train["samples"]),
                "probes": round(now["probe"]["samples"] - before["probe"]["samples"]),
                "steps": step - before["step"],
                "loss": mean_loss(train),
                "nonfinite": round(train["nonfinite"]),
                "accuracy": train["hits"] / labels if labels else None,
                "seconds": now["spent"] - before["spent"],
                **marks,
            }
        )
        self.open_epoch = None

    def report(self) -> dict[str, Any]:
        """The dict described at the top of this file."""
        backward = round(self.train["samples"])
        forward = backward + round(self.probe["samples"])
        standard = self.samples_standard
        counted = forward > 0 or not any(epoch["steps"] for epoch in self.epochs)
        self.switch(self._part)
        seconds = {part: spent for part, spent in self.spent.items() if part != "other"}
        return {
            "samples_standard": standard,
            "samples_forward": forward,
            "samples_backward": backward,
            "samples_idle": round(self.train["idle"]),
            "samples_nonfinite": round(self.train["nonfinite"] + self.probe["nonfinite"]),
            "gradients_predicted": round(self.train["predicted"]),
            "gradients_corrected": round(self.train["corrected"]),
            "tokens_forward": round(self.train["tokens"] + self.probe["tokens"]),
            "tokens_backward": round(self.train["tokens"]),
            "saved_compute": 1 - (forward + 2 * backward) / (3 * standard) if standard and counted else 0.0,
            "seconds": {"total": sum(self.spent.values()), **seconds},
            "epochs": [dict(epoch) for epoch in self.epochs],
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `collect` first."""
        self.switch(self._part)
        names = ("train", "probe", "spent", "epochs", "samples_standard", "open_epoch", "mark")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Carry on from `state_dict()`."""
        self._pending.take()
        self.sums.zero_()
        self.batches = 0
        for name in self.state_dict():
            setattr(self, name, values[name])
        for epoch in self.epochs:  # JSON has no NaN
            epoch["loss"] = math.nan if epoch["nonfinite"] else epoch["loss"]


def count_tokens(inputs: dict[str, Any], sample_ids: Tensor) -> Tensor:
    """() tokens that the model reads for real samples (id >= 0): padding and repeated samples left out."""
    real = sample_ids >= 0
    if sample_ids.dim() == 2:
        return real.sum()
    mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.ne(0) & real[:, None]).sum()
    return real.sum() * (tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() == 2 else 1)


def bucket_names(counts: list[int]) -> dict[str, int]:
    """Counts in order of `Bucket` by name."""
    return {bucket.name: counts[bucket] for bucket in Bucket}


def mean_loss(counts: dict[str, float]) -> float | None:
    """The mean loss of a label; None if there was no label, NaN if a visit's loss was not finite."""
    if counts["nonfinite"]:
        return math.nan
    return counts["loss"] / counts["labels"] if counts["labels"] else None


def write_json(path: str | os.PathLike[str], values: dict[str, Any]) -> None:
    """Write strict JSON, whole or not at all; NaN and infinity become null."""
    text = json.dumps(strict(values), indent=1, allow_nan=False)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def strict(value: Any) -> Any:
    """`value` for strict JSON: None for a number that is not finite, a number for a tensor or array of one element."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (np.generic, Tensor)) and value.ndim == 0:
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
