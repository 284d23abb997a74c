"""The processes of torch.distributed: this one's rank, and whether all have the same settings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def check_alike(values: Mapping[str, int], device: torch.device) -> None:
    """Raise `ValueError` in all processes if one of `values` differs between them; names it. All call it."""
    if rank_and_world()[1] == 1:
        return
    least = torch.tensor(list(values.values()), device=device)
    most = least.clone()
    try:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    except RuntimeError as error:
        raise ValueError(
            f"device must be one that torch.distributed's backend {dist.get_backend()} supports, got {device}: {error}"
        ) from error
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for name, low, high in zip(values, least.tolist(), most.tolist(), strict=True):
        if low != high:
            raise ValueError(f"{name} must be the same in all processes, got {low} and {high}")
