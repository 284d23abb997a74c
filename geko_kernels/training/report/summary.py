"""`geko_report.json`, as `efficiency.py` documents it, put together at the end of a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState
from geko_kernels.training.planning.sampler import GEKOSampler
from geko_kernels.training.report.forecast import forecast

MOST_FORGOTTEN, MOST_QUARANTINED = 100, 10_000


def run_summary(
    state: SampleState,
    sampler: GEKOSampler,
    efficiency: dict[str, Any],
    log_history: list[dict[str, Any]],
    skipped_rows: Sequence[int] = (),
) -> dict[str, Any]:
    """The dict of `geko_report.json`; its ids also count the `skipped_rows` (ascending) that the dataset leaves out."""
    times = sampler.forgotten.int()
    order = torch.argsort(times, descending=True, stable=True)[:MOST_FORGOTTEN]
    columns = (order, times[order], state.last_loss[order], state.bucket[order])
    held = state.quarantined.nonzero()[:, 0]
    by_loss = torch.argsort(state.last_loss[held], descending=True, stable=True)
    return {
        "version": 1,
        "num_samples": len(state),
        "config": state.config.to_dict(),
        "efficiency": efficiency,
        "log_history": log_history,
        "most_forgotten": [
            {"id": row_of(sample, skipped_rows), "times": count, "loss": loss, "bucket": Bucket(bucket).name}
            for sample, count, loss, bucket in zip(*(column.tolist() for column in columns), strict=True)
            if count
        ],
        "num_quarantined": len(held),
        "quarantined": [row_of(sample, skipped_rows) for sample in held[by_loss[:MOST_QUARANTINED]].tolist()],
        "num_doubtful": sampler.doubtful,
        "forecast": None if state.config.auto_stop else forecast(efficiency["epochs"], state.config),
    }


def row_of(sample: int, skipped_rows: Sequence[int]) -> int:
    """The row of the user's data that is item `sample` of a dataset without the `skipped_rows` (ascending)."""
    before = range(len(skipped_rows))
    return sample + bisect_right(before, sample, key=lambda k: skipped_rows[k] - k)
