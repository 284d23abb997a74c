"""Checks of the learning state's columns before a file or a `state_dict` is loaded, or a column is replaced."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geko_kernels.columns import COLUMNS, Allowed

_PART = 1 << 20  # rows checked at a time


_WEIGHTS: Allowed = (lambda weights: (weights >= 0) & weights.isfinite(), "finite and >= 0")
_ALLOWED = {
    **{name: column.allowed for name, column in COLUMNS.items() if column.allowed is not None},
    "bucket_weights": _WEIGHTS,
}


def check_columns(columns: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> None:
    """Check that `columns` have the names, shapes and dtypes of `like`, and check every value.

    `source` names the columns' origin in errors. Tensors on the meta device have no values to check.

    Raises:
        ValueError: names the source, the column and the first row that does not fit.
    """
    if columns.keys() != like.keys():
        missing, unknown = sorted(like.keys() - columns.keys()), sorted(columns.keys() - like.keys())
        raise ValueError(f"{source} does not fit: missing {missing}, unknown {unknown}")
    for name, mine in like.items():
        theirs = columns[name]
        wanted = f"{source}[{name!r}] must be {tuple(mine.shape)} {mine.dtype}"
        if not isinstance(theirs, Tensor):
            raise ValueError(f"{wanted}, got {type(theirs).__name__}")
        if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            raise ValueError(f"{wanted}, got {tuple(theirs.shape)} {theirs.dtype}; the state of another dataset?")
    for name, (allows, words) in _ALLOWED.items():
        for start, part in _parts(columns[name]):
            _refuse(allows(part), part, f"{source}[{name!r}]", start, words)


def check_column(name: str, column: object, mine: Tensor) -> None:
    """Check that `column` may take the place of `mine`, whose memory the kernels read and write without a look.

    Raises:
        ValueError: names the column, what it must be and what came.
    """
    wanted = f"{name} must be contiguous, {tuple(mine.shape)} {mine.dtype} on {mine.device}"
    if not isinstance(column, Tensor):
        raise ValueError(f"{wanted}, got {type(column).__name__}")
    like = column.shape == mine.shape and column.dtype == mine.dtype and column.device == mine.device
    if not like or not column.is_contiguous():
        how = "" if column.is_contiguous() else ", not contiguous"
        raise ValueError(f"{wanted}, got {tuple(column.shape)} {column.dtype} on {column.device}{how}")


def check_streaks(columns: Mapping[str, Tensor], source: str) -> None:
    """Check that no sample has a longer streak of wrong visits than visits; for files only."""
    for start, part in _parts(columns["wrong_streak"]):
        seen = columns["times_seen"][start : start + len(part)]
        _refuse(part <= seen, part, f"{source}['wrong_streak']", start, "at most times_seen")


def _parts(column: Tensor) -> list[tuple[int, Tensor]]:
    """(first row, rows) of each part of a column; nothing for a column without values."""
    if column.is_meta:
        return []
    return [(start, column[start : start + _PART]) for start in range(0, len(column), _PART)]


def _refuse(fits: Tensor, part: Tensor, name: str, start: int, words: str) -> None:
    if bool(fits.all()):
        return
    row = int(fits.reshape(len(part), -1).all(1).logical_not().nonzero()[0])
    values = part.view(torch.uint8)[row] if part.dtype == torch.bool else part[row]
    raise ValueError(f"{name}[{start + row}] must be {words}, got {values.tolist()}")
