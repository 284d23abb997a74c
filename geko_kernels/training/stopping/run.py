"""The state of a run that finds its own length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from geko_kernels.training.report.summary import row_of
from geko_kernels.training.resumed import ResumeError
from geko_kernels.training.stopping.average import WeightAverage
from geko_kernels.training.stopping.looked_at import LookedAt
from geko_kernels.training.stopping.rule import StopRule

LOOKS = 4  # looks in an epoch
DECIDED, TOO_LATE = 0.25, 0.75  # shares of the longest run; between them a run may be found to learn by heart
_PLAIN = ("quarters", "stepped", "looked", "ended", "by_heart")


@dataclass
class StoppingRun:
    """The average, the rule and the samples to evaluate."""

    average: WeightAverage | None  # None once the run is known to learn by heart, and after its end
    rule: StopRule
    held: Tensor  # (n,) int64: held back from training
    at: LookedAt | None
    quarters: int = 0  # quarters of an epoch that have passed
    stepped: int = 0  # the last step that the average contains
    looked: int = -1  # the last step that was evaluated
    ended: bool = False  # by the rule
    by_heart: bool = False
    cut: bool = False  # ended early by something other than the rule
    idle: bool = False  # its last epoch had nothing to train

    @property
    def kept(self) -> int | None:
        """The number of the look whose weights the run ends with; None: the last weights."""
        return self.rule.kept if self.rule.armed and not self.by_heart else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON, beside the average."""
        return {"rule": self.rule.state_dict(), "held": self.held.tolist(), **{n: getattr(self, n) for n in _PLAIN}}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        before = values["rule"]["measure"]
        if before != self.rule.measure:
            raise ResumeError(
                f"auto_measure was {before!r}, is {self.rule.measure!r}: the kept weights are the best by {before!r}, "
                "so resume with that"
            )
        try:
            self.rule.load_state_dict(values["rule"])
        except ValueError as error:
            raise ResumeError(
                f"the checkpoint was written by another version of geko_kernels ({error}): resume with that version, "
                "or load the model from the checkpoint and start a new run"
            ) from error
        for name in _PLAIN:
            setattr(self, name, values[name])
        if self.by_heart:
            self.average = None

    def report(self, skipped_rows: Sequence[int]) -> dict[str, Any]:
        """The entry `stopping` of `geko_report.json`."""
        rule = self.rule
        return {
            "why": self.why(),
            "ended": self.ended,
            "by_heart": self.by_heart,
            "measure": rule.measure,
            "kept": self.kept,
            "curve": [dict(zip(("epoch", "loss", "accuracy"), point, strict=True)) for point in rule.curve],
            "looked_at": None if self.at is None else self.at.source,
            "swap_test": self.at is not None and self.at.swapped is not None,
            "held_back": [row_of(sample, skipped_rows) for sample in self.held.tolist()],
        }

    def why(self) -> str:
        if self.at is None:
            return "There was nothing to evaluate, so the run went to its end; the weights are the final average."
        samples = "held-back samples" if self.at.source == "held_back" else "samples of eval_dataset"
        why = self.rule.why(samples, self.cut, self.idle)
        if self.by_heart:
            too = "The held-back samples were trained as well, and the" if len(self.held) else "The"
            return f"{why} {too} weights are those of the end."
        return f"{why} The weights are the final average." if self.kept is None else why


def cosine(progress: float) -> float:
    """From 1 to 0 over the run."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant_rate(
    optimizer: Optimizer | None, warmup: int, falls: Callable[[], bool], progress: Callable[[], float]
) -> LambdaLR:
    """A rate that rises over `warmup` steps and stays; if `falls()`, it continues as the cosine of the whole run."""

    def factor(step: int) -> float:
        rises = min(1.0, step / warmup) if warmup else 1.0
        return rises * cosine(progress()) if falls() else rises

    assert optimizer is not None
    return LambdaLR(optimizer, factor)
