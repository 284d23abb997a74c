"""What is measured beside loss and exact match: classes counted alike, and the correlation of ratings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.end_to_end.data import Data, Split
from benchmarks.end_to_end.engine import Engine


def by_class(hit: Tensor, groups: Tensor) -> dict[str, float]:
    """Mean over the groups of their share of hits, and over the tenth of the groups (rounded up) with the least."""
    counts = torch.bincount(groups)
    shares = (torch.bincount(groups, hit.float()) / counts)[counts > 0].sort().values
    worst = shares[: math.ceil(len(shares) / 10)]
    return {"macro_accuracy": shares.mean().item(), "worst_tenth_accuracy": worst.mean().item()}


def expected_ratings(engine: Engine, data: Data) -> Tensor:
    """(N,) of the test samples: the mean value, the lowest 0, under the softmax over the values alone."""
    assert data.ratings is not None
    split, ids = data.test, torch.arange(len(data.test))
    tokens, positions, labels, *rest = split
    asked = (Split(tokens, positions, torch.full_like(labels, token), *rest) for token in data.ratings.tokens)
    losses = [engine.evaluate(each, ids)[0] for each in asked]
    shares = (-torch.stack(losses)).softmax(0)  # (values, N)
    return (shares * torch.arange(len(shares)).unsqueeze(1)).sum(0)


def spearman(first: Tensor, second: Tensor) -> float:
    """Equal to `scipy.stats.spearmanr(first, second).statistic`: equal values share the mean of their ranks."""
    ranks = []
    for values in (first, second):
        _, place, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2).double()[place])
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
