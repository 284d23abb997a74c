"""Checks of the ops' arguments: tensors must fit each other, and ranges must lie inside them. Values are not checked.

The public functions never pass bad arguments; these checks protect callers of `torch.ops.geko`, where a kernel would
otherwise read or write foreign memory. They take a few microseconds; calls that bypass the dispatcher skip them. An
index inside a tensor is checked where it is used: on the CPU it raises, on a GPU its row is left out or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geko_kernels.columns import COLUMNS, NAMES

_REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STATISTICS = (torch.float32, torch.float64)
_INT64, _INT32, _FLOAT32 = (torch.int64,), (torch.int32,), (torch.float32,)


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Raise unless `tensor` has this shape (None: any size), one of the dtypes, the device, and memory of its own."""
    mine = tensor.shape
    fits = len(mine) == len(shape) and all(size is None or size == own for size, own in zip(shape, mine, strict=True))
    if (
        not fits
        or tensor.dtype not in dtypes
        or tensor.device != device
        or (contiguous and not tensor.is_contiguous())
        or (tensor.numel() and not tensor.data_ptr())
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "")
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        how = "" if tensor.is_contiguous() else ", not contiguous" if contiguous else ""
        raise ValueError(
            f"{name} must be {'contiguous, ' if contiguous else ''}({sizes}) {kinds} on {device}, got "
            f"{tuple(mine)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}{how}"
            + (", without memory" if tensor.numel() and not tensor.data_ptr() else "")
        )


def _check_range(name: str, start: int, stop: int, size: int) -> None:
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{name} must lie in [0, {size}), got [{start}, {stop})")


def _check_batch(labels: Tensor, sample_ids: Tensor | None, shape: tuple[int | None, int | None]) -> None:
    _check("labels", labels, shape, _INT64, labels.device, contiguous=False)
    if sample_ids is not None:
        ids = labels.shape if sample_ids.dim() == 2 else labels.shape[:1]
        _check("sample_ids", sample_ids, tuple(ids), _INT64, labels.device, contiguous=False)


def _token_stats(
    logits: Tensor, labels: Tensor, sample_ids: Tensor | None, ignore_index: int, shift: bool, softcap: float
) -> None:
    _check("logits", logits, (None, None, None), _REAL, labels.device, contiguous=False)
    _check_batch(labels, sample_ids, (logits.shape[0], logits.shape[1]))


def _check_update(
    labels: Tensor,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
) -> None:
    device = labels.device
    _check("rules", rules, (10,), _FLOAT32, device)
    _check("weights", weights, (4,), _FLOAT32, device)
    if num_items is not None:
        _check("num_items", num_items, (), _FLOAT32, device)
    if error is not None:
        _check("error", error, (), _INT64, device)
    if len(columns) not in (0, len(COLUMNS)):
        raise ValueError(
            f"the columns of a state, {NAMES[0]} to {NAMES[-1]}, must be given all or none, got {len(columns)} of "
            f"{len(COLUMNS)}"
        )
    for (name, declared), column in zip(COLUMNS.items(), columns, strict=False):
        if column is None:  # the dispatcher accepts it
            raise ValueError(f"{name} must be a tensor, got None")
        _check(name, column, (*columns[0].shape[:1], *declared.row), (declared.dtype,), device)


def _check_visit_weights(
    labels: Tensor,
    sample_ids: Tensor | None,
    dtype: torch.dtype,
    token_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> None:
    real = (torch.float64,) if dtype == torch.float64 else _FLOAT32
    if token_weights is not None:
        _check("token_weights", token_weights, tuple(labels.shape), real, labels.device)
    if sample_weights is not None:
        packed = sample_ids is not None and sample_ids.dim() == 2
        _check("sample_weights", sample_weights, tuple(labels.shape[: 1 + packed]), real, labels.device)


def _check_reduction(reduction: int) -> None:
    if reduction not in (0, 1, 2, 3):
        raise ValueError(f"reduction must be 0, 1, 2 or 3, got {reduction}")


def _sample_update(
    statistics: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    vocab: int,
    reduction: int,
    *options: Any,
) -> None:
    _check_batch(labels, sample_ids, (None, None))
    _check("tokens", statistics, (5, labels.numel()), _STATISTICS, labels.device)
    _check_update(labels, rules, weights, num_items, columns, error)
    _check_reduction(reduction)
    _check_visit_weights(labels, sample_ids, statistics.dtype, *options[3:])


def _loss_forward(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    reduction: int,
    *options: Any,
) -> None:
    _token_stats(logits, labels, sample_ids, 0, False, 0.0)
    _check_update(labels, rules, weights, num_items, columns, error)
    _check_reduction(reduction)
    _check_visit_weights(labels, sample_ids, logits.dtype, *options[4:])


def _logits_grad(
    grad_output: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    coeff: Tensor,
    scale: Tensor,
    token_visit: Tensor,
    shift: bool,
    softcap: float,
) -> None:
    _token_stats(logits, labels, None, 0, shift, softcap)
    count, device = labels.numel(), labels.device
    real = (torch.float64,) if logits.dtype == torch.float64 else _FLOAT32
    packed = token_visit.numel() > 0
    _check("tokens", statistics, (5, count), real, device)
    _check("coeff", coeff, (count,), real, device)
    _check("scale", scale, (), real, device)
    _check("token_visit", token_visit, (count if packed else 0,), _INT32, device)
    visits = () if not grad_output.dim() else (count if packed else labels.shape[0],)
    _check("grad_output", grad_output, visits, _REAL, device, contiguous=False)


def _logits_grad_(grad_output: Tensor, logits: Tensor, *rest: Any) -> None:
    _logits_grad(grad_output, logits, *rest)
    end = 0  # the place of the last element in the dimensions so far
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= end:
            raise ValueError(f"logits must not overlap themselves to be written over, got strides {logits.stride()}")
        end += stride * (size - 1)


def _scored_rows(labels: Tensor, sample_ids: Tensor | None, vocab: int, ignore_index: int, shift: bool) -> None:
    _check_batch(labels, sample_ids, (None, None))


def _score_rows(
    logits: Tensor,
    rows: Tensor,
    targets: Tensor,
    statistics: Tensor,
    fused: bool,
    slot: int,
    start: int,
    count: int,
    vocab: int,
    softcap: float,
    entropy: Tensor | None = None,
) -> None:
    device = logits.device
    _check("logits", logits, (None, None), _REAL, device)
    _check("rows", rows, (None,), _INT64, device)
    _check("targets", targets, tuple(rows.shape), _INT64, device)
    _check("tokens", statistics, (5, None), _STATISTICS, device)
    if entropy is not None:
        _check("entropy", entropy, tuple(statistics.shape[1:]), _STATISTICS, device)
    _check_range("slots", slot, slot + count, len(logits))
    _check_range("rows [start, start + count)", start, start + count, len(rows))
    _check_range("columns", 0, vocab, logits.shape[1])


def _kept_rows(
    coeff: Tensor, rows: Tensor, positions: Tensor, sources: Tensor, held: int, start: int, count: int
) -> None:
    device = coeff.device
    _check("coeff", coeff, (None,), _STATISTICS, device)
    _check("rows", rows, (None,), _INT64, device)
    _check("positions", positions, (None,), _INT64, device)
    _check("sources", sources, (None,), _INT64, device)
    _check_range("rows [start, start + count)", start, start + count, len(rows))
    _check_range("slots [held, held + count)", held, held + count, min(len(positions), len(sources)))


def _gradient_rows(
    logits: Tensor,
    positions: Tensor,
    sources: Tensor | None,
    end: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    first: int,
    last: int,
    ready_from: int,
    vocab: int,
    shift: bool,
    softcap: float,
) -> None:
    device = logits.device
    _check("logits", logits, (None, None), _REAL, device)
    _check("positions", positions, (None,), _INT64, device)
    _check_batch(labels, None, (None, None))
    _check("tokens", statistics, (5, labels.numel()), _STATISTICS, device)
    slots = min(len(logits), len(positions))
    if sources is not None:
        _check("sources", sources, (None,), _INT64, device)
        slots = min(slots, len(sources))
    if end is not None:
        _check("end", end, (), _INT32, device)
    _check_range("slots [first, last)", first, last if end is None else first, slots)
    _check_range("columns", 0, vocab, logits.shape[1])


def _gather_rows(hidden: Tensor, positions: Tensor, coeff: Tensor, count: int) -> None:
    _check("hidden", hidden, (None, None), _REAL, hidden.device)
    _check("positions", positions, (None,), _INT64, hidden.device)
    _check("coeff", coeff, (len(hidden),), _STATISTICS, hidden.device)
    _check_range("positions", 0, count, len(positions))


def _scatter_rows(out: Tensor, product: Tensor, positions: Tensor, coeff: Tensor, first: int) -> None:
    _check("out", out, (None, None), _REAL, out.device)
    _check("product", product, (None, out.shape[1]), _REAL, out.device)
    _check("positions", positions, (None,), _INT64, out.device)
    _check("coeff", coeff, (len(out),), _STATISTICS, out.device)
    _check_range("positions", first, first + len(product), len(positions))


def _clear_rows(tile: Tensor, positions: Tensor, coeff: Tensor) -> None:
    _check("tile", tile, (None, None), _REAL, tile.device)
    _check("positions", positions, (len(tile),), _INT64, tile.device)
    _check("coeff", coeff, (None,), _STATISTICS, tile.device)


def _column_sums(tile: Tensor, by_row: Tensor) -> None:
    _check("tile", tile, (None, None), _REAL, tile.device)
    _check("by_row", by_row, (len(tile),), _STATISTICS, tile.device)


def _rescale(values: Tensor, factor: Tensor) -> None:
    _check("values", values, tuple(values.shape), _REAL, values.device)
    _check("factor", factor, (), _REAL, values.device)


def _kept_rows_product(tile: Tensor, positions: Tensor, coeff: Tensor, tokens: int, end: Tensor) -> None:
    _check("tile", tile, (None, None), _REAL, tile.device)
    _check("positions", positions, (len(tile),), _INT64, tile.device)
    _check("coeff", coeff, (tokens,), _STATISTICS, tile.device)
    _check("end", end, (), _INT32, tile.device)


def _weight_product(out: Tensor, tile: Tensor, hidden: Tensor, positions: Tensor, coeff: Tensor, end: Tensor) -> None:
    _check("hidden", hidden, (None, None), (tile.dtype,), tile.device)
    _kept_rows_product(tile, positions, coeff, len(hidden), end)
    _check("out", out, (tile.shape[1], hidden.shape[1]), _REAL, tile.device)


def _hidden_product(out: Tensor, tile: Tensor, weight: Tensor, positions: Tensor, coeff: Tensor, end: Tensor) -> None:
    _check("out", out, (None, None), _REAL, tile.device)
    _kept_rows_product(tile, positions, coeff, len(out), end)
    _check("weight", weight, (tile.shape[1], out.shape[1]), (tile.dtype,), tile.device)


CHECKS: dict[str, Callable[..., None]] = {
    "token_stats": _token_stats,
    "sample_update_": _sample_update,
    "loss_forward_": _loss_forward,
    "logits_grad": _logits_grad,
    "logits_grad_": _logits_grad_,
    "scored_rows": _scored_rows,
    "score_rows_": _score_rows,
    "kept_rows_": _kept_rows,
    "gradient_rows_": _gradient_rows,
    "gather_rows": _gather_rows,
    "scatter_rows_": _scatter_rows,
    "clear_rows_": _clear_rows,
    "column_sums": _column_sums,
    "rescale_": _rescale,
    "weight_product_": _weight_product,
    "hidden_product_": _hidden_product,
}
