"""`geko_report.json`: what `efficiency.py` documents, gathered at the end of a run."""

from __future__ import annotations

from typing import Any

import torch

from geko_kernels.config import Bucket
from geko_kernels.state import SampleState
from geko_kernels.training.planning.sampler import GEKOSampler

MOST_FORGOTTEN, MOST_QUARANTINED = 100, 10_000


def run_summary(
    state: SampleState, sampler: GEKOSampler, efficiency: dict[str, Any], log_history: list[dict[str, Any]]
) -> dict[str, Any]:
    """The dict of `geko_report.json`."""
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
            {"id": sample, "times": count, "loss": loss, "bucket": Bucket(bucket).name}
            for sample, count, loss, bucket in zip(*(column.tolist() for column in columns), strict=True)
            if count
        ],
        "num_quarantined": len(held),
        "quarantined": held[by_loss[:MOST_QUARANTINED]].tolist(),
        "num_doubtful": sampler.doubtful,
    }
