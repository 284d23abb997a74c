"""States, plans and visits that the tests of the sampler, its probes and its noise guard share."""

from __future__ import annotations

import torch

import geko_kernels as gk

FREEZE, LIGHT, FOCUS, HARD = range(4)
PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}


def state_of(buckets: list[int], device: str = "cpu", **fields) -> gk.SampleState:
    """A state whose samples have been seen once and are in `buckets`."""
    state = gk.SampleState(len(buckets), gk.GEKOConfig(**{**PLAIN, **fields}), device)
    state.bucket.copy_(torch.tensor(buckets))
    state.times_seen.fill_(1)
    return state


def plan_of(sampler: gk.GEKOSampler, epoch: int, **kwargs) -> list[int]:
    sampler.set_epoch(epoch, **kwargs)
    return list(sampler)


def visit(state: gk.SampleState, ids: torch.Tensor, margin: float) -> None:
    """One forward in which the samples have this margin for the right class, or against it for one of nine others."""
    logits = torch.zeros(len(ids), 10)
    logits[:, 0 if margin > 0 else 1] = abs(margin)
    gk.weighted_loss(logits, torch.zeros(len(ids), dtype=torch.long), ids.long(), state)
