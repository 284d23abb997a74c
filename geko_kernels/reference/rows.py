"""The row ops of the linear path in plain PyTorch: which rows are scored, which are kept, and their gradient.

A backend that lacks one of them runs it from here. Shapes as in `reference`; a *slot* is a row of the logits buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels.reference.layout import layout
from geko_kernels.reference.ops import _cap, token_stats
from geko_kernels.reference.visits import sum_dtype

WIDE_ROWS = 64  # rows that are float32 at a time
SUMMED_ROWS = 16  # rows that one GEMV sums in float32, on some processors one by one


def scored_rows(
    labels: Tensor, sample_ids: Tensor | None, vocab: int, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The n tokens that predict something, in order.

    Args: labels (B, S) int64, sample_ids (B,), (B, S) or None.
    Returns:
        rows (T,) int64: `scored.nonzero()`, then zeros;
        targets (T,) int64: what each predicts, then zeros;
        visits (1 + T,) int32: n, then a number for the visit of each, growing along the batch; the rest undefined.
    """
    where = layout(labels, sample_ids, -1, vocab, ignore_index, shift)
    rows = torch.zeros(labels.numel(), dtype=torch.int64, device=labels.device)
    targets = torch.zeros_like(rows)
    visits = torch.full((1 + labels.numel(),), -1, dtype=torch.int32, device=labels.device)
    found = where.scored.nonzero()[:, 0]
    count = found.numel()
    rows[:count], targets[:count] = found, where.target[found]
    visits[0], visits[1 : 1 + count] = count, where.visit[found]
    return rows, targets, visits


def score_rows_(
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
    """`statistics[:, rows] = token_stats(logits)` of the scored rows [start, start + count).

    Their logits are in the slots from `slot` on.

    Args: logits (R, ld); rows, targets (T,) from `scored_rows`; statistics (5, T); fused: also write `softmax - onehot`
        over the logits, 0 beyond `vocab`; entropy (T,): also write `entropy[rows] = row_entropy(logits)`.
    """
    slots, part = slice(slot, slot + count), slice(start, start + count)
    target = targets[part]
    stats = token_stats(logits[slots, None, :vocab], target[:, None], None, -1, False, softcap)
    statistics.index_copy_(1, rows[part], stats)
    if entropy is not None:
        entropy.index_copy_(0, rows[part], row_entropy(logits[slots, :vocab], stats, softcap))
    if fused:
        x = logits[slots, :vocab].to(statistics.dtype)
        logits[slots, :vocab] = _gradient(x, target, stats[1, :, None], stats[2, :, None], softcap).to(logits.dtype)
        logits[slots, vocab:] = 0


def row_entropy(logits: Tensor, stats: Tensor, softcap: float) -> Tensor:
    """`-(p * p.log()).sum(-1)` with `p = softmax(logits)` and 0 for p = 0: (n,), of (n, V); stats (5, n)."""
    found = torch.empty_like(stats[0])
    for start in range(0, len(logits), WIDE_ROWS):  # float32 copies of a few rows only
        rows = slice(start, start + WIDE_ROWS)
        top, log_sum = stats[1:3, rows, None]
        found[rows] = torch.special.entr((_cap(logits[rows].to(stats.dtype), softcap) - top - log_sum).exp()).sum(-1)
    return found


def kept_rows_(
    coeff: Tensor, rows: Tensor, positions: Tensor, sources: Tensor, held: int, start: int, count: int
) -> Tensor:
    """Which slots the rows whose coefficient is not 0 move to, so that kept rows lie at the front of the buffer.

    Slots [0, held) are kept already, slots [held, held + count) hold rows [start, start + count). A kept row stays
    where it is if that is inside the front, else it fills a hole, so no slot is both read and written by different
    rows.

    Args: coeff (T,); rows (T,) int64 tokens; positions (R,) and sources (R,) int64, R >= held + count.
    Writes: positions[held:end], the token of each slot, and sources[held:end], the slot its logits are in.
    Returns: end, () int32.
    """
    new = rows[start : start + count]
    keep = coeff[new] != 0
    slots = torch.arange(held, held + count, device=rows.device)
    end = held + keep.sum()
    front = slots < end
    source = slots.clone()
    source[front & ~keep] = slots[~front & keep]
    source = source[front]
    sources[held : held + source.numel()] = source
    positions[held : held + source.numel()] = new[source - held]
    return end.int()


def gradient_rows_(
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
    """`logits[slot, :vocab] = softmax(z) - onehot(target)` for each slot of [first, min(last, end)), 0 beyond vocab.

    Args:
        logits (R, ld); positions (R,) and sources (R,) from `kept_rows_`: z is `logits[sources[slot]]`, without
            sources that of the slot itself; end () int32, without it `last`; labels (B, S); statistics (5, T);
        ready_from: sources from this slot on are gradients already and only move.
    """
    last = last if end is None else min(last, int(end))
    slots = torch.arange(first, last, device=logits.device)
    source = slots if sources is None else sources[slots]
    raw, at = logits[source], positions[slots]
    target = (labels.roll(-1, 1) if shift else labels).flatten()[at]
    top, log_sum = statistics[1:3, at, None]
    grad = torch.zeros_like(raw)
    grad[:, :vocab] = _gradient(raw[:, :vocab].to(statistics.dtype), target, top, log_sum, softcap).to(logits.dtype)
    logits[slots] = torch.where((source >= ready_from)[:, None], raw, grad)


def _gradient(x: Tensor, target: Tensor, top: Tensor, log_sum: Tensor, softcap: float) -> Tensor:
    z = _cap(x, softcap)
    grad = (z - top - log_sum).exp()
    grad.scatter_add_(1, target[:, None], -torch.ones_like(grad[:, :1]))
    return grad * (1 - (z / softcap).square()) if softcap else grad


def gather_rows(hidden: Tensor, positions: Tensor, coeff: Tensor, count: int) -> Tensor:
    """`hidden[at] * coeff[at]` with `at = positions[:count]`: (count, H), in the dtype of hidden (T, H).

    A coefficient of 0 gives zeros, whatever the row holds.
    """
    at = positions[:count]
    return _times(hidden[at], coeff[at, None]).to(hidden.dtype)


def scatter_rows_(out: Tensor, product: Tensor, positions: Tensor, coeff: Tensor, first: int) -> None:
    """`out[at] = product * coeff[at]` with `at = positions[first : first + len(product)]`, out (T, H) of any dtype.

    A coefficient of 0 gives zeros, whatever the row holds.
    """
    at = positions[first : first + len(product)]
    out[at] = _times(product, coeff[at, None]).to(out.dtype)


def _times(rows: Tensor, coeff: Tensor) -> Tensor:
    return (rows * coeff).masked_fill_(coeff == 0, 0)


def clear_rows_(tile: Tensor, positions: Tensor, coeff: Tensor) -> None:
    """`tile[coeff[positions] == 0] = 0`: tile (n, V), positions (n,) int64, coeff (T,)."""
    tile[coeff[positions] == 0] = 0


def column_sums(tile: Tensor, by_row: Tensor) -> Tensor:
    """`by_row.double() @ tile.double()`: (V,) float64, to float32's precision, from (n, V) and (n,) of float32.

    One GEMV over all rows would sum them one by one in float32. Here a GEMV sums a few, and float64 adds those sums.
    """
    total = torch.zeros(tile.shape[1], dtype=sum_dtype(tile.device), device=tile.device)
    for start in range(0, len(tile), SUMMED_ROWS):
        part = slice(start, start + SUMMED_ROWS)
        total += torch.mv(tile[part].t().to(by_row.dtype), by_row[part])
    return total


def rescale_(values: Tensor, factor: Tensor) -> None:
    """`values.mul_(factor)`; factor () float32. On a GPU a factor of 1 costs no memory traffic."""
    if factor != 1:
        values.mul_(factor)


def weight_product_(out: Tensor, tile: Tensor, hidden: Tensor, positions: Tensor, coeff: Tensor, end: Tensor) -> None:
    """`out = tile[:end].T @ gather_rows(hidden, positions, coeff, end)`: dW, out (V, H), summed in float32.

    Args: tile (R, V), hidden (T, H), positions (R,) int64, coeff (T,), end () int32, on the device.
    """
    count = int(end)
    scaled = gather_rows(hidden, positions, coeff, count).to(coeff.dtype)
    out.copy_(tile[:count].t().to(coeff.dtype) @ scaled)


def hidden_product_(out: Tensor, tile: Tensor, weight: Tensor, positions: Tensor, coeff: Tensor, end: Tensor) -> None:
    """`out.zero_()`, then `scatter_rows_(out, tile[:end] @ weight, positions, coeff, 0)`: dX, out (T, H).

    Args: tile (R, V), of which a backend may overwrite the rows from `end` on; weight (V, H), positions (R,) int64,
        coeff (T,), end () int32.
    """
    count = int(end)
    out.zero_()
    scatter_rows_(out, tile[:count].to(coeff.dtype) @ weight.to(coeff.dtype), positions, coeff, 0)
