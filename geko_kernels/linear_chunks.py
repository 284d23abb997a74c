"""The head in chunks: no more logits at once than a buffer holds, gradients only of rows whose weight is not zero.

The buffer is filled with logits, whose statistics give the visits' weights; the rows with weight turn into gradients
and stay at the front of the buffer until it is half full, so that the gradient GEMMs run at full size. How many there
are reaches the host by an asynchronous copy. The weight of a visit that goes on in the next fill is foreseen from the
rows that are scored; where it turns out otherwise, the rows of that visit are done again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geko_kernels import ops
from geko_kernels.linear_gradients import HIDDEN_BYTES, HeadGradients
from geko_kernels.loss import Visits

AHEAD = 1024  # rows scored while the host learns how many there are
FUSED_SHARE = 0.75  # of rows kept: above, one pass for statistics and gradients moves less (4 bytes against 2 + 4 p)


@dataclass(frozen=True)
class Head:
    """`logits = hidden @ weight[:vocab].T + bias[:vocab]`; rows of the weight beyond `vocab` are zeros."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (ld, H)
    bias: Tensor | None  # (ld,)
    vocab: int

    def logits(self, rows: Tensor | slice, out: Tensor) -> None:
        """Write the logits of tokens `rows`, padding included, to `out` (len(rows), ld)."""
        hidden = self.hidden[rows] if isinstance(rows, slice) else self.hidden.index_select(0, rows)
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)


@dataclass(frozen=True)
class Batch:
    """What the logits are scored against; see `weighted_loss`."""

    labels: Tensor  # (B, S)
    sample_ids: Tensor | None
    ignore_index: int
    shift: bool
    softcap: float


class HostCopy:
    """`values` on the host, without making the device wait: the copy is asynchronous, only `wait` blocks."""

    def __init__(self, values: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.values = values
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.values


def buffer_rows(head: Head, budget: int, narrow: bool) -> int:
    """How many rows of logits to hold within `budget` bytes.

    Several flushes sum a dW of 2 bytes (`narrow`) in float32, which takes as much again as dW. Where all rows fit into
    the budget and that memory, they are held: one flush writes dW at once.
    """
    tokens, columns = head.hidden.shape
    row = head.weight.shape[0] * head.weight.element_size()
    budget -= HIDDEN_BYTES + HIDDEN_BYTES // 4  # for the making of dX
    spared = head.weight.numel() * 2 if narrow else 0
    if tokens * row <= budget + spared:
        return tokens
    return min(tokens, max(budget // (row + columns * head.weight.element_size()), 8))


class Chunks:
    """Passes over a batch with one buffer of logits.

    Args:
        rows: how many rows of logits the buffer holds.
        gradients: what takes the gradients; None to score only.
        all_kept: expect that every row is kept.
    """

    def __init__(
        self, head: Head, batch: Batch, rows: int, gradients: HeadGradients | None, all_kept: bool = False
    ) -> None:
        self.head, self.batch, self.gradients, self.all_kept = head, batch, gradients, all_kept
        self.may_fuse = gradients is not None and ops.backend_name(head.weight.device, head.weight.dtype) == "triton"
        device = head.hidden.device
        self.buffer = torch.empty(rows, head.weight.shape[0], dtype=head.weight.dtype, device=device)
        self.positions = torch.empty(rows, dtype=torch.int64, device=device)  # token of each slot of the buffer
        self.sources = torch.empty_like(self.positions)

    def run(self, update: Callable[[Tensor, bool], Visits], factor: Callable[[Visits], Tensor | float]) -> Visits:
        """Score all rows, and add up the gradients of those with weight, times `coeff * factor`.

        Args: update: statistics (5, T) -> `Visits`, with True at its last call, when all statistics are there.
        """
        batch, room = self.batch, len(self.buffer)
        self.rows, self.targets, visits = ops.scored_rows(
            batch.labels, batch.sample_ids, self.head.vocab, batch.ignore_index, batch.shift
        )
        wanted = HostCopy(visits)
        ahead = min(AHEAD, room)
        self.head.logits(self.rows[:ahead], self.buffer[:ahead])  # keeps the device busy meanwhile
        found = wanted.wait().numpy()
        count, visit = int(found[0]), found[1 : 1 + int(found[0])]
        real = torch.float64 if self.buffer.dtype == torch.float64 else torch.float32
        self.tokens = torch.zeros(5, len(self.rows), dtype=real, device=self.buffer.device)
        self.used = torch.zeros_like(self.tokens[0])  # coefficient of each token in what was flushed
        crossing: dict[int, Tensor] = {}  # rows of each visit that did not fit into one fill
        done = held = kept = 0
        fused = self.may_fuse and self.all_kept
        while done < count:
            fills = -(-(count - done) // (room - held))
            stop = done + -(-(count - done) // fills)
            if not done and self.may_fuse and not self.all_kept:
                stop = min(ahead, count)  # a sample of the rows, from which it is seen how many are kept
            self._score(slice(done, stop), held, ahead, fused, gather=count < len(self.rows))
            ahead, part, done = 0, slice(done, stop), stop
            if self.gradients is None or done == count:
                continue
            if visit[stop] == visit[stop - 1]:
                start, end = (int(visit.searchsorted(visit[stop], side)) for side in ("left", "right"))
                crossing[start] = self.rows[start:end]
                self._foresee(self.rows[start:stop], self.rows[stop:end])
            visits = update(self.tokens, False)
            before, held = held, self._keep(visits, part, held, fused)
            kept += held - before
            fused = self.may_fuse and kept > FUSED_SHARE * done
            if 2 * held > room:
                self._flush(visits.coeff * factor(visits), held, last=False)
                held = 0
        visits = update(self.tokens, True)
        if self.gradients is not None:
            held = self._keep(visits, part, held, fused) if count else 0
            self._finish(visits.coeff * factor(visits), held, list(crossing.values()))
        return visits

    def _score(self, part: slice, held: int, ahead: int, fused: bool, gather: bool) -> None:
        """Statistics of the scored rows `part`, whose logits go to slots from `held` on; the first `ahead` are there.

        fused: the gradients too, over the logits.
        """
        count = part.stop - part.start
        slots, ahead = self.buffer[held : held + count], min(ahead, count)
        if ahead < count:
            rows = slice(part.start + ahead, part.stop)
            self.head.logits(self.rows[rows] if gather else rows, slots[ahead:])
        vocab, targets, softcap = self.head.vocab, self.targets[part], self.batch.softcap
        if fused:
            statistics = ops.score_rows_(slots, targets, vocab, softcap)
        else:
            statistics = ops.token_stats(slots[:, None, :vocab], targets[:, None], None, -1, False, softcap)
        self.tokens.index_copy_(1, self.rows[part], statistics)

    def _foresee(self, scored: Tensor, to_come: Tensor) -> None:
        """Expect of a visit's rows to come what its scored rows showed, so that its weight can be foreseen."""
        expected = self.tokens.index_select(1, scored).mean(1, keepdim=True)
        self.tokens.index_copy_(1, to_come, expected.expand(-1, len(to_come)))

    def _keep(self, visits: Visits, part: slice, held: int, fused: bool) -> int:
        """Turn the logits of the rows `part`, in slots from `held` on, into gradients; returns the new `held`."""
        end = ops.kept_rows_(visits.coeff, self.rows[part], self.positions, self.sources, held)
        kept = HostCopy(end)
        last = held + part.stop - part.start
        where = (self.positions, self.sources, end, self.batch.labels, self.tokens, held, last)
        ops.gradient_rows_(self.buffer, *where, self.head.vocab, self.batch.shift, self.batch.softcap, fused)
        return int(kept.wait())

    def _flush(self, coeff: Tensor, held: int, last: bool) -> None:
        """Run the gradient GEMMs on the rows in slots [0, held)."""
        assert self.gradients is not None
        positions = self.positions[:held]
        coeff = coeff.index_select(0, positions)
        self.used.index_copy_(0, positions, coeff)
        self.gradients.add(self.buffer[:held], positions, coeff, coeff, last)

    def _finish(self, coeff: Tensor, held: int, crossing: list[Tensor]) -> None:
        """The last flush, then again the rows of visits whose weight turned out other than foreseen."""
        wrong = 0
        if crossing:
            positions = self.positions[:held]
            self.used.index_copy_(0, positions, coeff.index_select(0, positions))
            missing, rows = coeff - self.used, torch.cat(crossing)
            again, sources = torch.empty_like(rows), torch.empty_like(rows)
            wrong = int(HostCopy(ops.kept_rows_(missing, rows, again, sources, 0)).wait())
        if held:
            self._flush(coeff, held, last=not wrong)
        if wrong:
            self.add_rows(self.tokens, again[:wrong], missing, coeff)

    def add_rows(self, tokens: Tensor, positions: Tensor, missing: Tensor, coeff: Tensor) -> None:
        """Add the gradients of the tokens `positions`, of which the statistics (5, T) are known.

        Args: missing (T,) what is to be added of each token's coefficient, coeff (T,) what that makes in all.
        """
        assert self.gradients is not None
        step = max(1, len(self.buffer))
        for start in range(0, len(positions), step):
            rows = positions[start : start + step]
            slots = self.buffer[: len(rows)]
            self.head.logits(rows, slots)
            where = (rows, None, None, self.batch.labels, tokens, 0, len(rows))
            ops.gradient_rows_(self.buffer, *where, self.head.vocab, self.batch.shift, self.batch.softcap, False)
            self.gradients.add(slots, rows, missing[rows], coeff[rows], last=start + len(rows) == len(positions))
