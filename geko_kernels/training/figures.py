"""What a `GEKOTrainer` logs, counts and reports."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from geko_kernels.config import Bucket
from geko_kernels.training.report.efficiency import REPORT_NAME, mean_loss, write_json
from geko_kernels.training.report.facts import trainer_facts
from geko_kernels.training.report.labels import label_figures
from geko_kernels.training.report.summary import run_summary
from geko_kernels.training.samples import SamplesMixin
from geko_kernels.training.stopping.mixin import StoppingMixin

logger = logging.getLogger(__name__)


class FiguresMixin(SamplesMixin, StoppingMixin):
    """`Trainer`'s log with GEKO's figures in it, and the report."""

    _logs_step = False  # whether Trainer's own entry of a step is to come, in all processes

    def _maybe_log_save_evaluate(self, *args: Any, **named: Any) -> None:
        self._logs_step = self.control.should_log
        try:
            super()._maybe_log_save_evaluate(*args, **named)
        finally:
            self._logs_step = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; entries of training steps also have the keys listed in `efficiency.py`."""
        self._audit.saw("log")
        if self._logs_step and "loss" in logs:
            self._logs_step = False  # an entry that a callback writes may be that of one process alone
            logs.update(self._measures())
        super().log(logs, start_time)

    def _measures(self) -> dict[str, float]:
        sampler, state = self._planned(), self._planned().state
        state.check()
        new = self.efficiency.collect()
        counts = state.bucket_counts()
        if self.efficiency.reduce is not None:  # each process knows only how its own rows moved since the last sync
            moved = counts - self._counts_at_sync
            self.efficiency.reduce(moved)
            counts = self._counts_at_sync + moved
        shares = [count / len(state) for count in counts.tolist()]
        weights = sampler.weights(self._consumed())
        names = [bucket.name.lower() for bucket in Bucket]
        measures = {
            "geko/progress": self._progress(),
            **{f"geko/{name}": share for name, share in zip(names, shares, strict=True)},
            "geko/quarantined": int(state.quarantined.count_nonzero()) / len(state),
            "geko/left_out": sampler.left_out,
            **{f"geko/phase_{name}": w for name, w in zip(names[1:], weights[1:], strict=True)},
        }
        loss = mean_loss(new)
        if loss is not None:
            measures["geko/loss"] = loss
            measures["geko/accuracy"] = new["hits"] / new["labels"]
        if new["nonfinite"]:
            measures["geko/nonfinite"] = new["nonfinite"]
        return measures

    def get_efficiency_report(self) -> dict[str, Any]:
        """The measured forward and backward work so far, next to a standard run's; see efficiency.py.

        With several processes the figures are those of the last log step, checkpoint or end of an epoch.
        """
        if self.efficiency.reduce is None and self.is_in_train:
            self.efficiency.collect()
            self.efficiency.samples_standard = self._samples_standard()
        return self.efficiency.report()

    def _write_report(self) -> None:
        sampler = self._planned()
        if self.state.global_step and not bool(sampler.state.times_seen.any()):
            logger.warning(
                "Nothing was learnt in this run: none of its samples has a label that counts (are all -100?), or every "
                "loss was NaN or infinite."
            )
        skipped = getattr(self.train_dataset, "skipped_rows", ())
        summary = run_summary(sampler.state, sampler, self.get_efficiency_report(), self.state.log_history, skipped)
        summary.update(self._stopping_report(skipped))
        decode = getattr(self.processing_class, "decode", None)
        named = self.args.label_names or ()
        summary.update(label_figures(self.train_dataset, sampler.state, sampler.held_back, None, named, decode))
        folder = self._get_output_dir(trial=self._trial)
        os.makedirs(folder, exist_ok=True)
        write_json(Path(folder) / REPORT_NAME, {**summary, "run": trainer_facts(self)})
        self._write_samples_at_end(folder)
