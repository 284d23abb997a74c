"""`SampleState.sync`: copies the rows that any process has updated to all processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def sync_rows_(columns: Mapping[str, Tensor], changed: Tensor, claim: Tensor, group: dist.ProcessGroup | None) -> bool:
    """All-gather the rows of `columns` marked in `changed` and write them on every process; two collectives.

    If several processes have changed a row, the one with the most visits (`times_seen`) wins; among equals, the highest
    rank. With a single process only `changed` is cleared.

    Args: columns of (N, ...) by name, "times_seen" among them; changed (N,) bool, all False afterwards;
        claim (N,) int32: scratch, all 0 before and after.
    Returns: whether there are several processes.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
    if several:
        ids = changed.nonzero()[:, 0]
        gathered = gather_rows(torch.cat([_as_bytes(ids), *(_as_bytes(c[ids]) for c in columns.values())], 1), group)
        _write_latest_(columns, gathered, claim)
    changed.zero_()
    return several


def _as_bytes(rows: Tensor) -> Tensor:
    """(n, ...) -> (n, bytes of a row) uint8."""
    return rows.reshape(len(rows), _width(rows)).contiguous().view(torch.uint8)


def _width(rows: Tensor) -> int:
    return rows.shape[1] if rows.dim() > 1 else 1


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(n, b) uint8, n may differ between processes -> the rows of all, in order of rank."""
    world = dist.get_world_size(group)
    counts = torch.zeros(world, dtype=torch.int64, device=rows.device)
    counts[dist.get_rank(group)] = len(rows)
    dist.all_reduce(counts, group=group)
    sizes = counts.tolist()
    longest = max(sizes)
    if longest == 0:
        return rows
    padded = torch.zeros(longest, rows.shape[1], dtype=torch.uint8, device=rows.device)
    padded[: len(rows)] = rows
    everyone = torch.empty(world * longest, rows.shape[1], dtype=torch.uint8, device=rows.device)
    dist.all_gather_into_tensor(everyone, padded, group=group)
    return torch.cat([everyone[rank * longest : rank * longest + size] for rank, size in enumerate(sizes)])


def _write_latest_(columns: Mapping[str, Tensor], gathered: Tensor, claim: Tensor) -> None:
    """Write the rows of `gathered` (rows of `_as_bytes`, in order of rank), one winner per id."""
    widths = [8, *(column.element_size() * _width(column) for column in columns.values())]
    # clone: contiguous() leaves a single row its wide stride, which view(dtype) refuses
    split = [part.clone(memory_format=torch.contiguous_format) for part in gathered.split(widths, 1)]
    parts = dict(zip(["ids", *columns], split, strict=True))
    ids = parts["ids"].view(torch.int64)[:, 0]
    seen = parts["times_seen"].view(torch.int32)[:, 0]
    order = torch.argsort(seen, stable=True)  # most visits last; among equals, higher rank last
    place = torch.empty_like(order)
    place[order] = torch.arange(1, len(order) + 1, device=order.device)
    claim.scatter_reduce_(0, ids, place.to(claim.dtype), "amax")
    won = claim[ids] == place
    claim.index_fill_(0, ids, 0)
    at = ids[won]
    for name, column in columns.items():
        values = parts[name][won].view(column.dtype)
        column[at] = values.reshape(len(at), *column.shape[1:])
