"""Counts of a user's own loop for the report, from the learning state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geko_kernels.state import SampleState
from geko_kernels.training.data import IGNORED, LABEL_KEYS
from geko_kernels.training.report.efficiency import Efficiency, count_tokens
from geko_kernels.training.report.visits import VisitLog

_TIE = 1e-5  # nats: the label has the largest logit if loss + log(confidence) is 0 up to rounding
_UNKNOWN = {
    "tokens": "tokens (known from attention_mask and input_ids, or from labels)",
    "hits": "accuracy (known if batches have one label a sample)",
}
_BEYOND = "validation and checkpoints (within an epoch they are part of the steps' time)"


class HandedOut(NamedTuple):
    """The record of a batch, made before the user's loop gets it and perhaps changes its dict."""

    ids: Tensor  # (B,)
    trains: bool
    before: Tensor  # (B,) visits of each so far
    tokens: Tensor | None  # () tokens of its own samples, if known
    one_label: bool  # it has one label a sample


class LoopCounts(Efficiency):
    """`Efficiency` of a loop that passes on neither losses nor tokens. It never waits for the device.

    A sample's visit has been counted if its `times_seen` has grown since the batch was handed out; its loss is then
    `last_loss`. `loss` in the report is the mean over visits of the mean over tokens. `steps` are training batches, and
    `seconds["steps"]` runs from one to the next, loading included. `samples_uncounted` are those whose visit was not
    counted: without a label, with a loss that is not finite, or left out of the call.

    Not measured, and None in the report: `evaluation` and `checkpoints` in `seconds`, `samples_nonfinite`; `tokens_*`
    if batches do not show their tokens; `accuracy` if batches do not have one label a sample.
    """

    def __init__(
        self,
        state: SampleState,
        reduce: Callable[[Tensor], None] | None = None,
        reduce_max: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.log = VisitLog(len(state), state.device, reduce_max)
        super().__init__(state.device, reduce, self.log)
        self.state, self.predictions = state, state.predictions
        self.steps = 0  # training batches of all processes together count as one
        self.unknown: list[str] = []  # keys of _UNKNOWN

    def hand_out(self, data: Any, ids: Tensor, trains: bool) -> HandedOut:
        labels = find_labels(data, len(ids))
        one_label = labels is not None and labels.dim() == 1
        return HandedOut(ids, trains, self._seen(ids), count_batch(data, labels, ids), one_label)

    def _seen(self, ids: Tensor) -> Tensor:
        return self.state.times_seen[ids.clamp(min=0)]

    def visited(self, batch: HandedOut) -> Tensor:
        """(B,) bool: whether a visit has been counted since the batch was handed out."""
        return (self._seen(batch.ids) > batch.before) & (batch.ids >= 0)

    def add(self, batch: HandedOut) -> None:
        """Count a batch that the user's loop has finished."""
        state, ids, counted = self.state, batch.ids, self.visited(batch)
        at = ids.clamp(min=0)
        loss, bucket = state.loss_history[at, -1], state.bucket[at].long()
        tokens, hits = batch.tokens, torch.zeros_like(loss)
        if tokens is None:
            self._miss("tokens")
            tokens = torch.zeros((), dtype=torch.int64, device=ids.device)
        if batch.one_label:
            hits = (loss + state.confidence[at].log() <= _TIE).float()
        else:
            self._miss("hits")
        weight = state.weights[bucket] * ~state.quarantined[at]
        stats: Any = SimpleNamespace(
            sample_ids=ids,
            num_tokens=counted.long(),
            loss=torch.where(counted, loss, 0.0),
            accuracy=torch.where(counted, hits, 0.0),
            weight=weight,
        )
        self.count(stats, tokens, probe=not batch.trains)
        self.steps += batch.trains

    def _miss(self, what: str) -> None:
        if what not in self.unknown:
            self.unknown.append(what)

    @property
    def not_measured(self) -> list[str]:
        """The note on the report page."""
        return [_BEYOND, *(_UNKNOWN[what] for what in self.unknown)]

    @property
    def shows_hits(self) -> bool:
        return "hits" not in self.unknown

    def report(self) -> dict[str, Any]:
        values = super().report()
        values["samples_nonfinite"] = None
        values["samples_uncounted"] = round(sum(part["samples"] - part["labels"] for part in (self.train, self.probe)))
        values["seconds"] |= dict.fromkeys(("evaluation", "checkpoints"))
        if "tokens" in self.unknown:
            values |= dict.fromkeys(("tokens_forward", "tokens_backward"))
        for epoch in values["epochs"]:
            epoch["nonfinite"] = None
            if not self.shows_hits:
                epoch["accuracy"] = None
        return values

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps, "unknown": list(self.unknown)}


def find_labels(data: Any, size: int) -> Tensor | None:
    """The labels of a batch of `size`: found by name in a dict; the second of a pair (inputs, labels)."""
    if isinstance(data, Mapping):
        found = [data[name] for name in LABEL_KEYS if name in data]
    else:
        found = [data[1]] if isinstance(data, list | tuple) and len(data) == 2 else []
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].is_floating_point():
        return None
    return found[0] if found[0].dim() in (1, 2) and len(found[0]) == size else None


def count_batch(data: Any, labels: Tensor | None, ids: Tensor) -> Tensor | None:
    """() number of tokens of the batch's own samples: from its mask, its input_ids, or its labels."""
    if isinstance(data, Mapping):
        rows = [data.get(name) for name in ("attention_mask", "input_ids")]
        if any(isinstance(part, Tensor) and part.dim() == 2 and len(part) == len(ids) for part in rows):
            return count_tokens(dict(data), ids)
    if labels is None:
        return None
    return ((labels != IGNORED).reshape(len(ids), -1) & (ids >= 0)[:, None]).sum()
