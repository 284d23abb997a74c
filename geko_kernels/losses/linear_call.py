"""One call of `weighted_linear_loss`: its result and the head's gradients, in chunks or, if it is small, at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from geko_kernels import ops
from geko_kernels.losses.arguments import check_flag
from geko_kernels.losses.linear_chunks import Chunks, Scored
from geko_kernels.losses.linear_gradients import HeadGradients
from geko_kernels.losses.linear_head import Budget, Head, LabelBatch
from geko_kernels.losses.results import ForwardResult
from geko_kernels.losses.state_arguments import state_arguments
from geko_kernels.reference.rows import row_entropy
from geko_kernels.state import SampleState

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias
_AT_ONCE = 2**22  # elements of logits: 16 MiB
LEFT_OUT = 0.25  # share of a small call's rows; leaving out fewer saves less than moving the kept rows costs


@dataclass(frozen=True)
class Call:
    """One call's arguments but for hidden, weight and bias."""

    batch: LabelBatch
    scored: Scored
    state: SampleState | None
    num_items: Tensor | None
    reduction: int
    writes: bool
    stats: bool
    chunk_mib: float | None
    entropy: Tensor | None  # (T,), if it is asked for
    native: ModuleType | None  # the C++ backend, if it runs: it checks values itself

    def score(self, head: Head, gradients: HeadGradients | None) -> ForwardResult:
        """Compute the loss; `gradients` collects the gradients without the upstream factor."""
        budget = Budget(head, self.chunk_mib, *(gradients.wanted if gradients is not None else (False, False, False)))
        zero_share = self.state.zero_share if self.state is not None and gradients is not None else None
        chunks = Chunks(head, self.batch, budget, gradients, self._expects_all, zero_share, self.entropy)
        rules, weights, columns, error = state_arguments(self.state, head.hidden.device, eager=True)
        batch = self.batch

        def update(tokens: Tensor, last: bool) -> ForwardResult:
            inputs = tokens, batch.labels, batch.sample_ids, rules, weights, self.num_items
            options = head.vocab, self.reduction, batch.ignore_index, batch.shift
            by_weight, writes = (batch.token_weights, batch.sample_weights), self.writes and last
            if self.native is None:
                outcome = ops.direct_update_(columns, error, writes, inputs, options, *by_weight)
            else:
                told = self.stats and last
                call = (self.native, "sample_update_", columns, error, told, writes, inputs, options, *by_weight)
                outcome = ops.native_update_(*call)
            return ForwardResult._make((*outcome, tokens))

        result = chunks.run(self.scored, update, lambda result: result.scale)
        check_flag(error, self.state, head.vocab)
        return result

    @property
    def _all_kept(self) -> bool:
        return self.state is None and self.batch.sample_weights is None

    @property
    def _expects_all(self) -> bool:
        """Whether all rows are kept, or will be unless someone has changed the state's weights by hand."""
        if self.state is None or self.batch.sample_weights is not None:
            return self._all_kept
        config = self.state.config
        return min(config.freeze_weight, *config.bucket_weights) > 0 and not config.noise_guard

    def at_once(self, head: Head, needed: tuple[bool, bool, bool]) -> tuple[ForwardResult, Gradients] | None:
        """The result and gradients of `score` without chunks, or None if the call does not qualify.

        It qualifies in float32 on the C++ backend, if its logits fit into the budget and 16 MiB and it scores every
        token. This calls 6 ops instead of 15, each of which costs 3 us or more.
        """
        tokens, native = head.hidden.shape[0], self.native
        if (
            native is None
            or head.hidden.dtype != torch.float32
            or tokens * head.vocab > _AT_ONCE
            or int(self.scored.copy.values[0]) != tokens
            or (self.chunk_mib is not None and Budget(head, self.chunk_mib, False, True, True).rows(tokens) != tokens)
        ):
            return None
        hidden, batch = head.hidden, self.batch
        if head.bias is None:
            logits = torch.mm(hidden, head.weight.t())
        else:
            logits = torch.addmm(head.bias, hidden, head.weight.t())
        logits = logits.view(*batch.labels.shape, head.vocab)
        rules, weights, columns, error = state_arguments(self.state, hidden.device, eager=True)
        inputs = logits, batch.labels, batch.sample_ids, rules, weights, self.num_items
        options = self.reduction, batch.ignore_index, batch.shift, batch.softcap
        call = inputs, options, batch.token_weights, batch.sample_weights
        outcome = ops.native_update_(native, "loss_forward_", columns, error, self.stats, self.writes, *call)
        result = ForwardResult._make(outcome)
        check_flag(error, self.state, head.vocab)
        saved = result.statistics, result.coeff, result.scale, result.token_visit, batch.shift, batch.softcap
        if self.entropy is not None:
            self.entropy.copy_(row_entropy(logits.view(tokens, head.vocab), result.statistics, batch.softcap))
        native.logits_grad_(outcome[0].new_ones(()), logits, batch.labels, *saved)
        gradient, kept = logits.view(tokens, head.vocab), None
        if not self._all_kept and _leaves_out(result, tokens):
            kept = result.coeff.nonzero()[:, 0]
            gradient, hidden = gradient.index_select(0, kept), hidden.index_select(0, kept)
        return result, products(gradient, hidden, head, kept, needed)


def _leaves_out(result: ForwardResult, tokens: int) -> bool:
    """Whether rows of weight 0 stay out of the GEMMs: there are enough of them, or one may not be finite."""
    return tokens - int(result.coeff.count_nonzero()) > LEFT_OUT * tokens or not math.isfinite(result.loss)


def products(
    gradient: Tensor, hidden: Tensor, head: Head, kept: Tensor | None, needed: tuple[bool, bool, bool]
) -> Gradients:
    """The head's gradients from the logits' gradient (n, V) of the tokens `kept`, of all T if None."""
    of_hidden = of_weight = of_bias = None
    if needed[0]:
        of_hidden = torch.mm(gradient, head.weight)
        if kept is not None:
            of_hidden = torch.zeros_like(head.hidden).index_copy_(0, kept, of_hidden)
    if needed[1]:
        of_weight = torch.mm(gradient.t(), hidden)
    if needed[2]:
        of_bias = gradient.sum(0, dtype=torch.float64).to(gradient.dtype)
    return of_hidden, of_weight, of_bias


def autocast_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden` in the dtype in which `F.linear` would run."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            autocast = "" if hidden.dtype == torch.float64 else f', or run under torch.autocast("{kind}")'
            raise TypeError(
                f"{name} must be {hidden.dtype} like hidden, got {tensor.dtype}: pass {name}.to(hidden.dtype){autocast}"
            )
    return hidden
