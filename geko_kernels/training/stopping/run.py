"""Where a run that finds its own length stands."""

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

LOOKS = 4  # an epoch
DECIDED, TOO_LATE = 0.25, 0.75  # shares of the longest run between which it may turn out to learn by heart
_PLAIN = ("quarters", "stepped", "looked", "ended", "by_heart")


@dataclass
class StoppingRun:
    """The average, the rule and what is looked at."""

    average: WeightAverage | None  # None once the run is known to learn by heart, and after its end
    rule: StopRule
    held: Tensor  # (n,) int64: held back from training
    at: LookedAt | None
    quarters: int = 0  # of an epoch that have passed
    stepped: int = 0  # the last step that the average has taken in
    looked: int = -1  # and the last one looked at
    ended: bool = False  # by the rule
    by_heart: bool = False
    cut: bool = False  # ended by something else than the rule, before its most
    idle: bool = False  # its last epoch had nothing to train

    @property
    def kept(self) -> int | None:
        """The number of the look whose weights the run ends with; None: those of its end."""
        return self.rule.kept if self.rule.armed and not self.by_heart else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON, beside the average."""
        return {"rule": self.rule.state_dict(), "held": self.held.tolist(), **{n: getattr(self, n) for n in _PLAIN}}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        before = values["rule"]["measure"]
        if before != self.rule.measure:
            raise ResumeError(
                f"auto_measure was {before!r}, is {self.rule.measure!r}: the kept weights are the best by the first, "
                "so resume with that"
            )
        try:
            self.rule.load_state_dict(values["rule"])
        except ValueError as error:
            raise ResumeError(
                f"the checkpoint was written by another version of geko_kernels, {error}: resume it with that version, "
                "or load the model from the checkpoint and start a new run"
            ) from error
        for name in _PLAIN:
            setattr(self, name, values[name])
        if self.by_heart:
            self.average = None

    def report(self, skipped_rows: Sequence[int]) -> dict[str, Any]:
        """What `geko_report.json` says of it."""
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
            return "There was nothing to look at, so the run went to its end; the weights are its average there."
        samples = "held-back samples" if self.at.source == "held_back" else "samples of eval_dataset"
        why = self.rule.why(samples, self.cut, self.idle)
        if self.by_heart:
            too = "The samples held back were trained too, and the" if len(self.held) else "The"
            return f"{why} {too} weights are those of the end."
        return f"{why} The weights are its average there." if self.kept is None else why


def cosine(progress: float) -> float:
    """From 1 to 0 over the run."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant_rate(
    optimizer: Optimizer | None, warmup: int, falls: Callable[[], bool], progress: Callable[[], float]
) -> LambdaLR:
    """A rate that rises over `warmup` steps and stays; where `falls()`, it goes on as the cosine of the whole run."""

    def factor(step: int) -> float:
        rises = min(1.0, step / warmup) if warmup else 1.0
        return rises * cosine(progress()) if falls() else rises

    assert optimizer is not None
    return LambdaLR(optimizer, factor)
