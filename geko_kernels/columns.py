"""The columns of the learning state, declared once, in the order in which every op takes them as one list.

For a new column only the code that reads or writes its values has to change as well; see `docs/architecture.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from geko_kernels.config import Bucket

HISTORY = 5  # losses kept per sample
_ROUNDING = 1e-3  # a float32 mean of values in [0, 1] may lie outside by less than this
_MOST = torch.iinfo(torch.int32).max - 1  # visits, so that one more still fits
Allowed = tuple[Callable[[Tensor], Tensor], str]  # which values a file may hold, and a description of them for errors

_SHARE: Allowed = (lambda column: (column >= -_ROUNDING) & (column <= 1 + _ROUNDING), "in [0, 1]")
_LOSS: Allowed = (lambda column: (column >= -_ROUNDING) & column.isfinite(), "finite and >= 0")
_VISITS: Allowed = (lambda column: (column >= 0) & (column <= _MOST), f"from 0 to {_MOST}")
_BUCKET: Allowed = (lambda column: column <= Bucket.HARD, "a Bucket, from 0 to 3")
_FLAG: Allowed = (lambda column: column.view(torch.uint8) <= 1, "0 or 1")


class Column(NamedTuple):
    """One column of N rows."""

    dtype: torch.dtype
    start: float  # value of a sample never seen
    row: tuple[int, ...] = ()  # shape of a row
    saved: bool = True  # in files, and synced between processes
    allowed: Allowed | None = None


COLUMNS = {
    "q_value": Column(torch.float32, 0.5, allowed=_SHARE),
    "confidence": Column(torch.float32, 0.0, allowed=_SHARE),
    "loss_history": Column(torch.float32, 0.0, row=(HISTORY,), allowed=_LOSS),
    "times_seen": Column(torch.int32, 0, allowed=_VISITS),
    "bucket": Column(torch.uint8, Bucket.FOCUS, allowed=_BUCKET),
    "wrong_streak": Column(torch.uint8, 0),
    "changed": Column(torch.bool, False, saved=False),
    "claim": Column(torch.int32, 0, saved=False),  # scratch: which visit writes a row
    "quarantined": Column(torch.bool, False, allowed=_FLAG),
}
NAMES = tuple(COLUMNS)
SAVED = tuple(name for name, column in COLUMNS.items() if column.saved)


def table_of(columns: Sequence[Tensor]) -> dict[str, Tensor]:
    """The columns by name; empty without a state."""
    return dict(zip(NAMES, columns, strict=True)) if columns else {}


def num_samples_of(columns: Sequence[Tensor]) -> int:
    """N, or -1 without a state."""
    return columns[0].shape[0] if columns else -1
