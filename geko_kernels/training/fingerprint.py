"""A fingerprint of the training set for checkpoints: digests of a few of its items."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from geko_kernels.training.random_numbers import fixed_random_numbers

ITEMS = 64  # at most, evenly spaced from the first to the last
_NUMBERS = {"i": np.int64, "u": np.int64, "b": np.int64, "f": np.float64}  # a list and an array are equal


def fingerprint(dataset: Any, in_worker: bool = False, context: Any = None) -> dict[str, Any]:
    """{"length": len(dataset), "items": a digest, or None, for each of up to 64 rows at fixed positions}.

    None stands for an item that cannot be compared: it changes from one read to the next, cannot be read here, or has
    only values of unknown types. Values of unknown types are ignored, and so are rows between those read. The global
    random state is the same for each read and restored afterwards, so random augmentation does not count as a change.

    in_worker: read the items in a loader worker, as training does: a dataset may open files that must not be shared
        with a process forked later. `context` is the loader's multiprocessing context.
    """
    length = len(dataset)
    rows = _rows(length)
    if in_worker:
        options = {"num_workers": 1, "multiprocessing_context": context, "generator": torch.Generator()}
        loader: Any = DataLoader(_Digests(dataset), sampler=rows, batch_size=None, **options)
        return {"length": length, "items": list(loader)}
    return {"length": length, "items": [_digest(dataset, row) for row in rows]}


def _rows(length: int) -> list[int]:
    return sorted({round(k * (length - 1) / (ITEMS - 1)) for k in range(ITEMS)}) if length else []


def named_items(print_of: dict[str, Any], name: str) -> dict[str, str]:
    """{"name[row]": what to say of the item} of a fingerprint, for the items that can be compared."""
    rows = zip(_rows(print_of["length"]), print_of["items"], strict=True)
    return {f"{name}[{row}]": f"an item with the digest {item}" for row, item in rows if item is not None}


def changed_items(before: dict[str, Any], now: dict[str, Any]) -> tuple[int, int]:
    """(how many items differ, how many can be compared) in two fingerprints of equal length."""
    pairs = [(a, b) for a, b in zip(before["items"], now["items"], strict=True) if a is not None and b is not None]
    return sum(a != b for a, b in pairs), len(pairs)


class _Digests(Dataset[str | None]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> str | None:
        return _digest(self.dataset, row)


def _digest(dataset: Any, row: int) -> str | None:
    readings = []
    for _ in range(2):
        hasher = hashlib.sha256()
        try:
            with fixed_random_numbers():
                known = _feed(hasher, dataset[row])
        except Exception:  # any error of the user's dataset: training will raise it too
            return None
        readings.append(hasher.hexdigest()[:16] if known else None)
    return readings[0] if readings[0] == readings[1] else None


def _feed(hasher: Any, value: Any) -> bool:
    """Add `value` to the digest; False if it has nothing of a known type."""
    if isinstance(value, Mapping):
        known = False
        for name in sorted(value, key=str):
            hasher.update(f"key {name}".encode())
            known |= _feed(hasher, value[name])
        return known
    if isinstance(value, (str, bytes)):
        data = value.encode() if isinstance(value, str) else value
        hasher.update(b"text %d " % len(data) + data)
        return True
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    numbers = _numbers(value)
    if numbers is not None:
        hasher.update(f"numbers {numbers.shape}".encode() + numbers.tobytes())
        return True
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        hasher.update(f"list {len(value)}".encode())
        parts = [_feed(hasher, item) for item in value]
        return any(parts)
    hasher.update(type(value).__name__.encode())
    if callable(getattr(value, "tobytes", None)):  # an image
        hasher.update(value.tobytes())
        return True
    return value is None


def _numbers(value: Any) -> np.ndarray | None:
    if not isinstance(value, (bool, int, float, list, tuple, np.ndarray, np.generic)):
        return None
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # ragged
        return None
    kind = _NUMBERS.get(array.dtype.kind)
    return None if kind is None else np.ascontiguousarray(array, dtype=kind)
