"""The launches, sizes and memory layout of one kind of call, computed once.

CPU overhead dominates for small shapes, and for large ones it delays the GPU. So an eager call only looks up its
`Plan`, allocates three pieces of memory, and starts the two launches with addresses.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from geko_kernels.columns import num_samples_of
from geko_kernels.kernels.launch import MOST, Launch
from geko_kernels.kernels.logits_grad import gradient_launch
from geko_kernels.kernels.memory import starts
from geko_kernels.kernels.sample_update.kernel import update_launch
from geko_kernels.kernels.sample_update.prepare import scratch_words
from geko_kernels.kernels.table import NO_STATE, pointers, prepared_of
from geko_kernels.kernels.token_stats import statistics_launch


class Plan:
    """Sizes are in words of 4 bytes, each part starts at a multiple of 16 bytes (T tokens, M entries, see `reference`):

    - kept for the backward: statistics (5, T), coeff (T,), scale (), token_visit (T,) or nothing;
    - visits, needed only for `SampleStats`: ints (2, M), floats (6, M), flags (2, M), scratch.

    Args: layout: see `layout_of`; logits (B, S, V); labels (B, S).
    """

    def __init__(
        self,
        layout: Hashable,
        logits: Tensor,
        labels: Tensor,
        sample_ids: Tensor | None,
        num_samples: int,
        reduction: int,
        ignore_index: int,
        shift: bool,
        softcap: float,
        update: bool,
    ) -> None:
        self.layout = layout
        self.packed = sample_ids is not None and sample_ids.dim() == 2
        self.count, self.shift, self.softcap = labels.numel(), shift, softcap
        self.entries = self.count if self.packed else labels.shape[0]
        self.statistics_launch = statistics_launch(
            logits, labels, sample_ids, True, num_samples, ignore_index, shift, softcap, update
        )
        self.update_launch = update_launch(
            labels, sample_ids, num_samples, logits.shape[-1], reduction, ignore_index, shift, update
        )
        self.gradients: dict[Hashable, Launch] = {}
        self.predicting: dict[bool, Any] = {}  # inplace -> `PredictedPlan` of the same calls, or None
        self.loss_shape = () if reduction else (self.entries,)
        self.coeff, self.scale, self.token_visit, self.kept_words = starts(
            5 * self.count, self.count, 1, self.count if self.packed else 0
        )
        self.floats, self.flags, self.scratch, self.visit_words = starts(
            4 * self.entries, 6 * self.entries, -(-self.entries // 2), scratch_words(labels, self.packed)
        )

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        sample_ids: Tensor | None,
        rules: Tensor,
        weights: Tensor,
        num_items: Tensor | None,
        columns: Sequence[Tensor],
        error: Tensor | None,
        apart: bool,
        *gradient: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, kept, visits); logits and labels also as (B, V) and (B,); for `gradient` see `PredictedPlan`.

        Unless `apart`, both are in one piece of memory, which the backward then keeps, and visits is None.
        """
        loss = weights.new_empty(self.loss_shape)
        kept = weights.new_empty(self.kept_words + (0 if apart else self.visit_words))
        visits = weights.new_empty(self.visit_words) if apart else None
        if self.update_launch.ready:
            at = kept.data_ptr()
            by = at + 4 * self.kept_words if visits is None else visits.data_ptr()
            ids = None if sample_ids is None else sample_ids.data_ptr()
            items = None if num_items is None else num_items.data_ptr()
            self._launch(
                (logits.data_ptr(), labels.data_ptr(), ids, *[tensor.data_ptr() for tensor in gradient]),
                (rules.data_ptr(), weights.data_ptr(), items),
                [column.data_ptr() for column in columns] or NO_STATE,
                None if error is None else error.data_ptr(),
                self._work_at(at, by),
                (loss.data_ptr(), at + 4 * self.scale, at + 4 * self.coeff, at + 4 * self.token_visit),
                (by + 4 * self.floats, by, by + 4 * self.flags),
            )
        else:
            _, coeff, scale, token_visit = self.saved(kept)
            rest = kept[self.kept_words :] if visits is None else visits
            self._launch(
                (logits, labels, sample_ids, *gradient),
                (rules, weights, num_items),
                pointers(columns),
                error,
                self._work(kept, rest),
                (loss, scale, coeff, token_visit),
                self.entries_of(rest),
            )
        return loss, kept, visits

    def _work(self, kept: Tensor, visits: Tensor) -> tuple[Tensor, ...]:
        """What the first launch writes and the second reads: statistics, scratch."""
        return self.saved(kept)[0], visits[self.scratch :].view(torch.int32)

    def _work_at(self, kept: int, visits: int) -> tuple[int, ...]:
        return kept, visits + 4 * self.scratch

    def _launch(self, batch: Any, rules: Any, table: Any, error: Any, work: Any, outputs: Any, entries: Any) -> None:
        """Both launches, with tensors or with addresses."""
        logits, labels, sample_ids = batch
        statistics, scratch = work
        self.statistics_launch(logits, labels, sample_ids, statistics, *prepared_of(table), error, scratch)
        self.update_launch(statistics, labels, sample_ids, *rules, *table, None, None, scratch, *outputs, *entries)

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether these have the forward's layout: saved-tensor hooks may have changed it."""
        return layout_of(logits, labels) == self.layout

    def saved(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(statistics, coeff, scale, token_visit) as the op has them."""
        statistics = kept[: 5 * self.count].view(5, self.count)
        token_visit = kept[self.token_visit :][: self.count if self.packed else 0].view(torch.int32)
        return statistics, kept[self.coeff :][: self.count], kept[self.scale], token_visit

    def entries_of(self, visits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(floats, ints, flags) as the op has them."""
        entries = self.entries
        floats = visits[self.floats :][: 6 * entries].view(6, entries)
        ints = visits[: 4 * entries].view(torch.int64).view(2, entries)
        flags = visits[self.flags : self.scratch].view(torch.uint8)[: 2 * entries].view(2, entries)
        return floats, ints, flags

    def zero_tokens(self, visits: Tensor) -> tuple[int, int]:
        """Tokens with a label in visits of weight 0, and in all; `visits` up to the flags, on the host."""
        words, entries = visits.numpy(), self.entries  # a call in numpy takes a fraction of one in torch
        tokens = words[2 * entries : 4 * entries].view("int64")
        weight = words[self.floats + 5 * entries :][:entries]
        return int(tokens[weight == 0].sum()), int(tokens.sum())

    def gradient(
        self, out: Tensor, kept: Tensor, grad_output: Tensor, logits: Tensor, labels: Tensor, inplace: bool
    ) -> None:
        """Fill `out`: the logits, or new and contiguous. The tensors have the layout of the forward's."""
        upstream = grad_output.data_ptr()
        key = (inplace, grad_output.dtype, grad_output.stride(), upstream % 16)
        launch = self.gradients.get(key)
        if launch is None:
            if len(self.gradients) >= MOST:
                self.gradients.clear()
            batch = (logits[:, None], labels[:, None]) if logits.dim() == 2 else (logits, labels)
            like = batch[0] if inplace else out.view(batch[0].shape)
            launch = gradient_launch(like, grad_output, *batch, self.packed, self.shift, self.softcap)
            self.gradients[key] = launch
        if launch.ready:
            at = kept.data_ptr()
            saved = (at, at + 4 * self.coeff, at + 4 * self.scale, at + 4 * self.token_visit)
            launch(out.data_ptr(), upstream, logits.data_ptr(), labels.data_ptr(), *saved)
        else:
            launch(out, grad_output, logits, labels, *self.saved(kept))


_plans: dict[Hashable, Plan] = {}


def layout_of(logits: Tensor, labels: Tensor) -> tuple[Hashable, ...]:
    """The properties of logits and labels that a plan depends on."""
    return (
        *(logits.shape, logits.stride(), logits.dtype, logits.get_device(), logits.data_ptr() % 16),
        *(labels.stride(), labels.data_ptr() % 16),
    )


def plan_of(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    reduction: int,
    ignore_index: int,
    shift: bool,
    softcap: float,
    update: bool,
    weighing: Hashable = (None, None),
) -> Plan:
    """The plan of such calls; logits (B, S, V) or (B, V); weighing: the alignment of token_weights and sample_weights.

    `Plan.forward` is for calls without those weights.
    """
    ids = None if sample_ids is None else (sample_ids.stride(), sample_ids.data_ptr() % 16)
    num_samples = num_samples_of(columns)
    # everything that binaries, grids and numbers depend on; new memory and the state are aligned
    items = None if num_items is None else num_items.data_ptr() % 16
    layout = layout_of(logits, labels)
    key = (
        *(layout, ids, num_samples, error is None, items),
        *(reduction, ignore_index, shift, softcap, update, weighing),
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST:
            _plans.clear()
        logits = logits.detach()
        batch = (logits[:, None], labels[:, None]) if logits.dim() == 2 else (logits, labels)
        plan = Plan(
            *(layout, *batch, sample_ids, num_samples, reduction, ignore_index, shift, softcap, update),
        )
        _plans[key] = plan
    return plan
