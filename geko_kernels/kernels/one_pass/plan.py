"""Calls whose forward reads the logits once and also writes the gradient, scaled by a predicted factor.

Where the prediction is right, three passes over the logits (read; read, write) become two (read, write). The forward
launches prediction, rows (CUDA, csrc/hopper) and sample update; the backward launches the correction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geko_kernels.kernels.launch import Launch
from geko_kernels.kernels.memory import starts
from geko_kernels.kernels.one_pass import hopper
from geko_kernels.kernels.one_pass.correct import correct_launch
from geko_kernels.kernels.one_pass.predict import predict_launch, predict_parts
from geko_kernels.kernels.plan import Plan
from geko_kernels.kernels.table import QUARANTINED, prepared_of
from geko_kernels.reference.ops import Reduction

# bytes of logits, and of a row, from which on this is faster on an H200: below, either the extra launch costs too much
# CPU time or the exchange between warps too much GPU time
SMALLEST = 2**27
SMALLEST_ROW = 2**15


class PredictedPlan(Plan):
    """A `Plan` whose forward also takes `gradient`: (grad, upstream), grad (B, S, V) or (B, V).

    Kept also has factor (T,), by which each row of grad was multiplied; 0: not written. Visits also have target (T,),
    coeff (T,) and counts (parts,) of `reference.one_pass.predict`.
    """

    def __init__(self, inplace: bool, grad: Tensor, *args: Any) -> None:
        """Args: grad (B, S, V); those of `Plan`."""
        super().__init__(*args)
        _, logits, labels, sample_ids, num_samples, reduction, ignore_index, shift, _, update = args
        vocab = logits.shape[2]
        self.predict = predict_launch(labels, sample_ids, num_samples, vocab, reduction, ignore_index, shift, update)
        parts = predict_parts(labels, self.packed)
        self.rows = hopper.RowsLaunch(
            *(logits.device, logits.dtype, tuple(logits.shape), logits.stride()[:2], grad.stride()[:2]),
            0 if reduction == Reduction.SUM else parts,
        )
        self.corrections: dict[int, Launch] = {}
        self.inplace = inplace
        self.factor, self.kept_words = starts(self.kept_words, self.count)
        self.target, self.predicted, self.counts, self.visit_words = starts(
            self.visit_words, self.count, self.count, parts
        )
        self.parts = parts

    def _work(self, kept: Tensor, visits: Tensor) -> tuple[Tensor, ...]:
        """statistics, scratch, factor, target, coeff, counts."""
        ints = visits.view(torch.int32)
        statistics, scratch = super()._work(kept, visits)
        return (
            *(statistics, scratch, kept[self.factor :][: self.count], ints[self.target :][: self.count]),
            *(visits[self.predicted :][: self.count], ints[self.counts :][: self.parts]),
        )

    def _work_at(self, kept: int, visits: int) -> tuple[int, ...]:
        return (
            *(*super()._work_at(kept, visits), kept + 4 * self.factor),
            *(visits + 4 * self.target, visits + 4 * self.predicted, visits + 4 * self.counts),
        )

    def _launch(self, batch: Any, rules: Any, table: Any, error: Any, work: Any, outputs: Any, entries: Any) -> None:
        logits, labels, sample_ids, grad, upstream = batch
        statistics, scratch, factor, target, coeff, counts = work
        _, weights, num_items = rules
        known = (*prepared_of(table), table[QUARANTINED], error, scratch)
        self.predict(labels, sample_ids, weights, *known, target, coeff, counts)
        self.rows(logits, grad, target, coeff, counts, num_items, upstream, statistics, factor)
        self.update_launch(statistics, labels, sample_ids, *rules, *table, None, None, scratch, *outputs, *entries)

    def correct(
        self,
        out: Tensor,
        kept: Tensor,
        grad_output: Tensor,
        logits: Tensor,
        labels: Tensor,
        upstream: Tensor,
        counts: Tensor,
    ) -> None:
        """Correct `out`, the forward's `grad`, to the gradient for `grad_output` ()."""
        at = grad_output.data_ptr()
        launch = self.corrections.get(at % 16)
        if launch is None:
            batch = (logits[:, None], labels[:, None]) if logits.dim() == 2 else (logits, labels)
            like = out[:, None] if out.dim() == 2 else out
            launch = self.corrections[at % 16] = correct_launch(like, *batch, self.shift, self.inplace)
        if launch.ready:
            by = kept.data_ptr()
            saved = (by, by + 4 * self.coeff, by + 4 * self.scale, by + 4 * self.factor)
            launch(
                out.data_ptr(), at, logits.data_ptr(), labels.data_ptr(), *saved, upstream.data_ptr(), counts.data_ptr()
            )
        else:
            statistics, coeff, scale, _ = self.saved(kept)
            factor = kept[self.factor :][: self.count]
            launch(out, grad_output, logits, labels, statistics, coeff, scale, factor, upstream, counts)


def predicted_plan(inplace: bool, *args: Any) -> PredictedPlan | None:
    """The plan of calls that need a gradient, if one pass less is faster; else None. Args: those of `Plan`."""
    _, logits, labels, _, _, reduction, _, _, softcap, _ = args
    if (
        reduction == Reduction.NONE
        or softcap
        or (inplace and logits.dtype == torch.float16)  # the gradient may be rescaled and must not have underflowed
        or logits.shape[2] * logits.element_size() < SMALLEST_ROW
        or logits.numel() * logits.element_size() < SMALLEST
        or hopper.missing(logits.device)  # last: it warns
    ):
        return None
    grad = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device="meta")
    return PredictedPlan(inplace, grad, *args) if hopper.serves(logits, grad) else None
