"""The head in chunks: a buffer limits how many logits exist at once, and only rows of nonzero weight get gradients.

The buffer is filled with logits, whose statistics give the visits' weights. Rows of nonzero weight are turned into
gradients and kept at the front of the buffer until it is half full, so that the gradient GEMMs run at full size. An
asynchronous copy tells the host how many rows are kept. Where earlier calls or fills have kept nearly all, the host
does not wait for it: the next fill takes all rows, those of weight 0 as zeros. Nor does it where earlier calls have
kept few: then the GEMMs read the number on the device.

A fill ends with a visit where that costs little room. If a visit continues in the next fill, its weight is estimated
from the rows scored so far; if the estimate was wrong, the rows of that visit are computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geko_kernels import ops
from geko_kernels.host_copy import HostCopy
from geko_kernels.losses.linear_blocks import add_blocks
from geko_kernels.losses.linear_expected import Expected
from geko_kernels.losses.linear_gradients import HeadGradients
from geko_kernels.losses.linear_head import Budget, Head, LabelBatch
from geko_kernels.losses.results import ForwardResult
from geko_kernels.reference.visits import real_dtype
from geko_kernels.zero_share import ZeroShare

AHEAD = 1e11  # multiply-adds queued while the host waits for the row count: 0.3 ms of an H200
SAMPLE = 1024  # first rows, which show whether most rows are kept, if no earlier call has shown it
FUSED_SHARE = 0.75  # share of kept rows above which one launch for statistics and gradients is faster than two
DENSE_SHARE = 0.95  # share of kept rows above which it is faster not to ask how many are kept, and to take all
LEAST_FILL = 0.75  # a fill ends before a visit, rather than in it, if it still takes this share of its rows
NEARLY_ALL = 0.9  # share of scored tokens from which on the next call takes room for all tokens
EARLY_MIB = 512  # a buffer of up to this size for all tokens is taken before it is known how many are scored


class Scored:
    """The tokens of a batch that predict something; the host learns their number later. See `ops.scored_rows`."""

    def __init__(self, batch: LabelBatch, vocab: int) -> None:
        self.rows, self.targets, visits = ops.direct.scored_rows(
            batch.labels, batch.sample_ids, vocab, batch.ignore_index, batch.shift
        )
        self.copy = HostCopy(visits)


class Chunks:
    """Passes over a batch with one buffer of logits.

    Args:
        budget: how many rows of logits the buffer holds.
        gradients: what takes the gradients; None to score only.
        expects_all: every row is expected to be kept. Then nothing waits to learn how many are; if some are not, that
            costs time only.
        zero_share: what the state's calls so far say about that; this call adds to it. None if there is no state.
        entropy: (T,) output, the entropy of each scored token; None if not asked for.

    Attributes:
        fused: whether one launch computes a row's statistics and gradient; None until that is decided.
        dense: whether the next fill takes all rows, those of weight 0 as zeros. Then the host does not wait for it.
    """

    def __init__(
        self,
        head: Head,
        batch: LabelBatch,
        budget: Budget,
        gradients: HeadGradients | None,
        expects_all: bool = False,
        zero_share: ZeroShare | None = None,
        entropy: Tensor | None = None,
    ) -> None:
        self.head, self.batch, self.budget = head, batch, budget
        self.gradients, self.entropy = gradients, entropy
        able = gradients is not None and ops.backend_name(head.hidden.device, head.weight.dtype) == "triton"
        self.able = able  # to launch work over rows whose number is not known yet
        self.zero_share = zero_share if able else None
        self.expected = Expected(self.zero_share, expects_all)
        self.fused = (None if self.expected.share is None else self.expected.above(FUSED_SHARE)) if able else False
        self.dense = able and self._may_be_dense and self.expected.above(DENSE_SHARE)
        self.buffer = head.hidden.new_empty(0, 0)
        self.used: Tensor | None = None  # (T,) coefficients used in flushes, once one was estimated

    @property
    def _may_be_dense(self) -> bool:
        """float16 fits its range to the kept rows, and a row of weight 0 may be infinite."""
        return self.head.weight.dtype != torch.float16

    def hold(self, rows: int) -> None:
        """Take the memory of `rows` slots; that of earlier ones is given back before."""
        weight = self.head.weight
        self.buffer = weight.new_empty(0, weight.shape[0])
        self.buffer = weight.new_empty(rows, weight.shape[0])
        self.positions = torch.empty(rows, dtype=torch.int64, device=weight.device)  # token of each slot
        self.sources = torch.empty_like(self.positions)

    def run(
        self,
        scored: Scored,
        update: Callable[[Tensor, bool], ForwardResult],
        factor: Callable[[ForwardResult], Tensor | float],
    ) -> ForwardResult:
        """Score all rows, and sum the gradients of those of nonzero weight, times `coeff * factor`.

        Args: update: statistics (5, T) -> `ForwardResult`, with True at its last call, when all statistics are there.
        """
        gradients = self.gradients
        count, ahead, room = self._begin(scored)
        if self.budget.by_blocks(count):  # score only, at first
            self.gradients, self.fused = None, False
        crossing: dict[int, Tensor] = {}  # rows of each visit that did not fit into one fill
        part, held, kept = slice(0, 0), 0, None
        while part.stop < count:
            part = self._next(part.stop, count, room - held)
            ready_from = self._score(part, held, ahead, update)
            ahead = 0
            if self.gradients is None or part.stop == count:
                continue
            crossing |= self._foresee(part.stop)
            if crossing and self.used is None:
                self.used = torch.zeros_like(self.statistics[0])
            result = update(self.statistics, False)
            coeff = result.coeff * factor(result)
            before, held = held, self._keep(result, coeff, part, held, ready_from)
            share = (held - before) / (part.stop - part.start)
            self.fused = self.fused is not False and share > FUSED_SHARE
            if self.dense or 2 * held > room:  # a dense fill has the front of the buffer, however short it is
                self._flush(coeff, held, last=False)
                held = 0
                self.dense = self.dense or (self.fused and share > DENSE_SHARE and self._may_be_dense)
        result = update(self.statistics, True)
        if self.gradients is not None:
            coeff = result.coeff * factor(result)
            alone = count > 0 and part == slice(0, count) and not (self.fused or self.dense)  # the only fill
            if alone and self.expected.few(count, self.head, self.gradients):
                end, kept = self._list(result.coeff, part, held, ready_from)
                self.gradients.add_all(self.buffer[:count], self.positions[:count], coeff, end)
            else:
                held = self._keep(result, coeff, part, held, ready_from, last=True) if count else 0
                self._finish(coeff, held, list(crossing.values()))
        elif gradients is not None:
            self._by_blocks(gradients, count, result.coeff, result.coeff * factor(result))
        self.expected.tell(count, kept, result.coeff)
        return result

    def _begin(self, scored: Scored) -> tuple[int, int, int]:
        """Learn how many rows are scored, take the buffer, and compute the first logits.

        They may come before the host knows that number, see `_begins`.

        Returns: the scored rows, how many have logits, and how many the buffer is for.
        """
        self.rows, self.targets = scored.rows, scored.targets
        tokens = self.rows.shape[0]
        most = self._room(tokens)
        ahead = self._ahead(tokens, most)
        begun = ahead > 0 and self._begins(most) and not scored.copy.arrived()
        if begun:
            self.hold(most)
            self._first_logits(ahead)
        dtype = real_dtype(self.head.weight)
        self.statistics = torch.zeros(5, tokens, dtype=dtype, device=self.rows.device)
        found = scored.copy.wait().numpy()
        count, self.visit = int(found[0]), found[1 : 1 + int(found[0])]
        if self.zero_share is not None:
            self.zero_share.scored_share = count / tokens if tokens else 0.0
        room = self._room(count)
        if not begun or room < ahead or room > most or self.budget.by_blocks(count) != self.budget.by_blocks(tokens):
            ahead = min(ahead, room)
            self.hold(room)
            self._first_logits(ahead)
        return count, ahead, room

    def _by_blocks(self, gradients: HeadGradients, count: int, weights: Tensor, coeff: Tensor) -> None:
        """The gradients of the scored rows whose weight (T,) is not 0, by blocks of the vocabulary."""
        self.buffer = self.buffer.new_empty(0, 0)
        positions, sources = torch.empty_like(self.rows), torch.empty_like(self.rows)
        lists = (self.rows, positions, sources, 0, 0, count)
        kept = int(HostCopy(ops.direct.kept_rows_(weights, *lists)).wait())
        self.expected.count(count, kept)
        rows = self.statistics, positions[:kept], coeff
        add_blocks(self.head, self.batch, gradients, *rows, self.budget.columns(kept))

    def _begins(self, most: int) -> bool:
        """Whether room for `most` rows, all or what the budget holds, is taken before the host knows how many it needs.

        That is so if the state's last call scored nearly all tokens; or if it has no last call, and the room is small.
        """
        if self.zero_share is not None and self.zero_share.scored_share >= NEARLY_ALL:
            return True
        return self.fused is None and most * self.budget.row <= EARLY_MIB * 2**20

    def _ahead(self, tokens: int, most: int) -> int:
        """How many of the first rows' logits are a GEMM of their own, which may run before the host knows the others.

        They always are, so that results do not depend on when a count arrives. Without a state there is no such GEMM.
        """
        if not most or (self.fused is not None and self.zero_share is None):
            return 0
        fill = -(-tokens // -(-tokens // most))
        return min(max(SAMPLE, int(AHEAD / max(self.head.weight.numel(), 1))), fill)

    def _first_logits(self, ahead: int) -> None:
        """Logits of the first `ahead` rows, in each case from a copy of their hidden states: cuBLAS minds addresses."""
        if ahead:
            self.head.logits(self.rows[:ahead], self.buffer[:ahead])

    def _room(self, scored: int) -> int:
        if self.gradients is None or self.budget.by_blocks(scored):
            return self.budget.score_rows(scored)
        return self.budget.rows(scored)

    def _next(self, start: int, count: int, room: int) -> slice:
        """The scored rows of the next fill: fills of about equal size, each to the end of a visit where one is near.

        Only gradients need the weight of a visit that goes on in the next fill, so only for them a fill ends early.
        """
        left = count - start
        stop = start - (-left // -(-left // room))
        if stop < count:
            first, end = (int(self.visit.searchsorted(self.visit[stop - 1], side)) for side in ("left", "right"))
            if end - start <= room:
                stop = end
            elif self.gradients is not None and first - start >= LEAST_FILL * (stop - start):
                stop = first
        return slice(start, stop)

    def _score(self, part: slice, held: int, ahead: int, update: Callable[[Tensor, bool], ForwardResult]) -> int:
        """Statistics of the scored rows `part`; their logits go to slots from `held` on, where the first `ahead` are.

        If no earlier call or fill has shown it, the share of kept rows among the first ones decides whether the same
        launch writes the gradients. The host learns that share while the other logits are computed. Returns: the first
        slot that holds a gradient.
        """
        count, sample, done = part.stop - part.start, min(SAMPLE, ahead), 0
        kept: HostCopy | None = None
        if self.fused is None and 0 < sample < count:
            self._statistics(held, part.start, sample, False)
            self._foresee(part.start + sample)
            coeff, done = update(self.statistics, False).coeff, sample
            where = (self.rows, self.positions, self.sources, held, part.start, sample)
            kept = HostCopy(ops.direct.kept_rows_(coeff, *where))
        self._logits(part.start + ahead, part.stop, held + ahead)
        if kept is not None:
            self.fused = int(kept.wait()) - held > FUSED_SHARE * sample
        fused = bool(self.fused)
        self._statistics(held + done, part.start + done, count - done, fused)
        return held + (done if fused else count)

    def _logits(self, start: int, stop: int, slot: int) -> None:
        """Logits of the scored rows [start, stop) to the slots from `slot` on."""
        if start < stop:
            every = len(self.visit) == len(self.rows)
            rows = slice(start, stop) if every else self.rows[start:stop]
            self.head.logits(rows, self.buffer[slot : slot + stop - start])

    def _statistics(self, slot: int, start: int, count: int, fused: bool) -> None:
        where = (self.rows, self.targets, self.statistics, fused, slot, start, count)
        ops.direct.score_rows_(self.buffer, *where, self.head.vocab, self.batch.softcap, self.entropy)

    def _foresee(self, stop: int) -> dict[int, Tensor]:
        """If a visit continues after scored row `stop`, estimate its other rows by those that are scored.

        That gives an estimate of its weight. Returns: {its first row: its rows}, or {}.
        """
        if self.visit[stop] != self.visit[stop - 1]:
            return {}
        start, end = (int(self.visit.searchsorted(self.visit[stop], side)) for side in ("left", "right"))
        scored, batch = self.rows[start:stop], self.batch
        expected = self.statistics.index_select(1, scored)
        if batch.token_weights is None:
            expected = expected.mean(1, keepdim=True)
        else:
            by_token = batch.token_weights.flatten().index_select(0, scored + batch.shift)
            expected = (expected * (by_token / by_token.sum())).sum(1, keepdim=True)
        self.statistics.index_copy_(1, self.rows[stop:end], expected.expand(-1, end - stop))
        return {start: self.rows[start:end]}

    def _list(self, coeff: Tensor, part: slice, held: int, ready_from: int) -> tuple[Tensor, HostCopy]:
        """Turn the logits of the kept rows of `part`, in slots from `held` on, into gradients from there on.

        Returns: the first slot behind them, () int32, and that on the host.
        """
        batch, count = self.batch, part.stop - part.start
        self.tokens = self.positions
        end = ops.direct.kept_rows_(coeff, self.rows, self.positions, self.sources, held, part.start, count)
        copy = HostCopy(end)
        where = (self.positions, self.sources, end, batch.labels, self.statistics, held, held + count)
        ops.direct.gradient_rows_(self.buffer, *where, ready_from, self.head.vocab, batch.shift, batch.softcap)
        return end, copy

    def _keep(
        self, result: ForwardResult, coeff: Tensor, part: slice, held: int, ready_from: int, last: bool = False
    ) -> int:
        """`_list`, and wait for the number of kept rows; or take all rows. `last`: a flush will follow.

        Returns: the new `held`.
        """
        count = part.stop - part.start
        if self.dense:
            self.tokens = self.rows[part]
            return count
        _, kept = self._list(result.coeff, part, held, ready_from)
        foreseen = (self.fused or (last and self.able)) and self.buffer.dtype != torch.float16
        if self.gradients is not None:
            ahead = held + count if foreseen and not kept.arrived() else 0
            self.gradients.scale_ahead(self.positions, coeff, ahead)
        now = int(kept.wait())
        self.expected.count(count, now - held)
        return now

    def _flush(self, coeff: Tensor, held: int, last: bool) -> None:
        """Run the gradient GEMMs on the rows in slots [0, held)."""
        assert self.gradients is not None
        tile, tokens = self.buffer[:held], self.tokens[:held]
        if self.used is not None:
            self.used.index_copy_(0, tokens, coeff.index_select(0, tokens))
        if self.dense:
            ops.direct.clear_rows_(tile, tokens, coeff)
        self.gradients.add(tile, tokens, coeff, coeff, last)

    def _finish(self, coeff: Tensor, held: int, crossing: list[Tensor]) -> None:
        """The last flush; then the rows of visits whose weight differs from its estimate, once more."""
        assert self.gradients is not None
        wrong = 0
        if self.used is not None:
            tokens = self.tokens[:held]
            self.used.index_copy_(0, tokens, coeff.index_select(0, tokens))
            missing, rows = coeff - self.used, torch.cat(crossing)
            again, sources = torch.empty_like(rows), torch.empty_like(rows)
            wrong = int(HostCopy(ops.direct.kept_rows_(missing, rows, again, sources, 0, 0, len(rows))).wait())
        if held:
            self._flush(coeff, held, last=not wrong)
        else:
            self.gradients.ahead = None  # of rows none of which is kept
        if wrong:
            self.add_rows(self.statistics, again[:wrong], missing, coeff)

    def add_rows(self, statistics: Tensor, positions: Tensor, missing: Tensor, coeff: Tensor) -> None:
        """Add the gradients of the tokens `positions`, of which the statistics (5, T) are known.

        Args: missing (T,): the part of each token's coefficient to add; coeff (T,): the whole coefficient.
        """
        assert self.gradients is not None
        batch, step = self.batch, max(1, len(self.buffer))
        for start in range(0, len(positions), step):
            rows = positions[start : start + step]
            slots = self.buffer[: len(rows)]
            self.head.logits(rows, slots)
            where = (rows, None, None, batch.labels, statistics, 0, len(rows), len(rows))
            ops.direct.gradient_rows_(self.buffer, *where, self.head.vocab, batch.shift, batch.softcap)
            self.gradients.add(slots, rows, missing, coeff, last=start + len(rows) == len(positions))
