"""The processes of torch.distributed: this one's rank, and whether all have the same settings and go the same way."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from geko_kernels.sync import gather_rows

_T = TypeVar("_T")


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def in_step(ask: Callable[[], _T]) -> _T:
    """`ask()` of the first process, in all processes; raises in all if it fails in one. All call it, one at a time.

    What follows is then the same in all, although rounding and memory differ between them.
    """
    world = rank_and_world()[1]
    if world == 1:
        return ask()
    result, error = None, None
    try:
        result = ask()
    except Exception as reason:  # any error of the user's model
        error = reason
    all_of: list[Any] = [None] * world
    dist.all_gather_object(all_of, (result, None if error is None else (isinstance(error, ValueError), str(error))))
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(all_of):
        if failed is not None:
            is_value_error, text = failed
            raise (ValueError if is_value_error else RuntimeError)(f"on process {rank}: {text}")
    return all_of[0][0]


def check_alike(values: Mapping[str, Any], device: torch.device) -> None:
    """Raise `ValueError` in all processes if one of `values` differs between them; names it and two ranks. All call it.

    Values are compared as JSON has them, others by their `str`. A name that a process lacks is not compared.
    """
    if rank_and_world()[1] == 1:
        return
    first, *others = _of_all(values, device)
    for rank, theirs in enumerate(others, 1):
        for name, value in first.items():
            if name in theirs and theirs[name] != value:
                raise ValueError(
                    f"{name} must be the same in all processes, got {value!r} in rank 0 and {theirs[name]!r} in rank "
                    f"{rank}"
                )


def check_same(name: str, values: Tensor, device: torch.device) -> None:
    """As `check_alike` for a tensor, by its length and a checksum of its bytes."""
    if rank_and_world()[1] > 1:
        checksum = zlib.crc32(values.detach().cpu().contiguous().numpy().data)
        check_alike({name: f"{len(values)} values with the checksum {checksum:08x}"}, device)


def _of_all(values: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """`values` of each process, in order of rank."""
    line = bytearray(json.dumps(values, default=str).encode() + b"\n")
    row = torch.frombuffer(line, dtype=torch.uint8)[:, None]
    try:
        everyone = gather_rows(row.to(device), None)
    except RuntimeError as error:
        if "device type" not in str(error):  # such as another process that has ended
            raise
        raise ValueError(
            f"device must be one that torch.distributed's backend {dist.get_backend()} supports, got {device}: {error}"
        ) from error
    return [json.loads(line) for line in everyone.cpu().numpy().tobytes().splitlines()]
