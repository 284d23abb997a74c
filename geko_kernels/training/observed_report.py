"""The report of an observed run: `geko_report.json`, as described in `efficiency.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState
from geko_kernels.training.observed_tokens import ObservedVisits
from geko_kernels.training.processes import rank_and_world
from geko_kernels.training.report.efficiency import Efficiency, bucket_names, count_tokens
from geko_kernels.training.report.forecast import forecast
from geko_kernels.training.report.summary import run_summary

_MISSED = ["evaluation and checkpoints (within an epoch they are part of the steps' time)"]
_MISSED_WITHOUT_LOGITS = [
    "buckets, confidences and margins (the model's head is fused with its loss and computes no logits)"
]


class ObservedCounts(Efficiency):
    """`Efficiency` of a run that trains every sample with weight 1, so that it is its own standard run."""

    def __init__(self, state: SampleState, reduce: Callable[[Tensor], None] | None) -> None:
        super().__init__(state.device, reduce)
        self.state = state
        self.was_correct = torch.zeros(len(state), dtype=torch.bool)
        self.forgotten = torch.zeros(len(state), dtype=torch.uint8)  # times, up to 255

    def add(self, visits: ObservedVisits, inputs: Any, ids: Tensor) -> None:
        """Count a batch with these `ids`."""
        labelled = visits.num_tokens > 0
        means = torch.where(labelled, visits.means, 0.0)
        stats: Any = SimpleNamespace(
            sample_ids=visits.ids,
            num_tokens=visits.num_tokens,
            loss=means[0],
            accuracy=means[2],
            weight=torch.ones_like(means[0]),
        )
        self.count(stats, count_tokens(inputs, ids))

    def close_epoch(self, record: Tensor, step: int, end: float, fused: bool) -> None:
        """End the epoch that `record` (5, N), on the CPU, describes.

        A sample is forgotten if it was right when last seen, and is wrong in this epoch.
        """
        losses, hits = record[0], record[2]
        config, seen = self.state.config, ~losses.isnan()
        right = hits >= config.correct_accuracy if config.correctness == "accuracy" else losses < config.correct_loss
        lost = self.was_correct & seen & ~right
        self.forgotten += (lost & (self.forgotten < 255)).to(torch.uint8)
        self.was_correct = torch.where(seen, right, self.was_correct)
        unknown = {bucket.name: None for bucket in Bucket}
        marks = {
            "end": end,
            "buckets": unknown if fused else bucket_names(self.state.bucket_counts().tolist()),
            "quarantined": 0,
            "forgotten": int(lost.sum()),
        }
        self.end_epoch(step, marks)

    def drop_epoch(self) -> None:
        """Drop the open epoch; its forwards stay counted. All processes call it."""
        self.collect()
        self.open_epoch = None

    def report(self) -> dict[str, Any]:
        self.samples_standard = round(self.train["samples"])
        values = super().report()
        values["seconds"] |= dict.fromkeys(("evaluation", "checkpoints"))
        return values

    def not_measured(self, fused: bool) -> list[str]:
        """The note on the report page."""
        return [*_MISSED, *(_MISSED_WITHOUT_LOGITS if fused else ())]


def summary_of(
    state: SampleState, counts: ObservedCounts, records: Tensor, log_history: list[dict[str, Any]], fused: bool
) -> dict[str, Any]:
    """The dict of `geko_report.json`; records (epochs, 5, N)."""
    told: Any = SimpleNamespace(forgotten=counts.forgotten.to(state.device), doubtful=0)
    summary = run_summary(state, told, counts.report(), log_history)
    summary["forecast"] = forecast(summary["efficiency"]["epochs"], state.config, observed=True)
    summary["observed"] = True
    if fused:  # the learning state is empty
        for sample in summary["most_forgotten"]:
            losses = records[:, 0, sample["id"]]
            sample |= {"loss": float(losses[~losses.isnan()][-1]), "bucket": "not measured"}
    return summary


def merged(record: Tensor) -> Tensor:
    """(K, N) with the samples of all processes; if several saw a sample, the highest rank's."""
    rank, world = rank_and_world()
    if world == 1:
        return record
    seen = ~record[0].isnan()
    owner = torch.where(seen, rank, -1).to(record.device)
    dist.all_reduce(owner, dist.ReduceOp.MAX)
    known = record.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    values = torch.where(owner == rank, known, 0.0)
    unknown = torch.where(owner == rank, record.isnan(), False).int()
    dist.all_reduce(values)
    dist.all_reduce(unknown)
    return values.masked_fill((owner < 0) | (unknown > 0), math.nan)
