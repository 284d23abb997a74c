"""When a run has trained enough: the loss of held-back samples under averaged weights, and when it can be believed."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

PATIENCE = 0.5  # epochs without a lower loss after which the run ends
EARLIEST = 1.25  # epochs before which it never does: after the warm-up the average falls and rises once
_SURE = 3.0  # standard errors
_GAIN = 0.05  # nats a token by which a wrong answer must be worse


class Look(NamedTuple):
    """What was seen at one point of a run, with the averaged weights; losses are (n,) means over a sample's tokens."""

    epoch: float
    held: Tensor  # losses of the held-back samples
    held_swapped: Tensor  # the same with the answers of others
    seen: Tensor  # losses of as many training samples
    seen_swapped: Tensor
    accuracy: float  # share of the held-back samples whose every token is right


def surely_above(higher: Tensor, lower: Tensor, least: float) -> bool:
    """Is the mean of the paired differences above `least`, and above 0 by three standard errors?"""
    difference = (higher - lower).double()
    difference = difference[difference.isfinite()]
    if len(difference) < 2:
        return False
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) > max(least, _SURE * error)


class StopRule:
    """Keeps the point with the lowest loss of the held-back samples; says when it is certain enough to stop there.

    It is armed once a swap test shows that the model generalises: a held-back sample's loss rises when it is given
    another sample's answer. Where only the training samples' loss does, the run learns by heart, and no held-back
    sample can say when it is done.

    Args:
        measure: "loss", or "accuracy": the point with the most held-back samples all right, the first of equals.
    """

    def __init__(self, measure: str = "loss") -> None:
        self.measure = measure
        self.curve: list[tuple[float, float, float]] = []  # epoch, loss, accuracy
        self.armed = False
        self.by_heart = False

    @property
    def kept(self) -> int | None:
        """The number of the look whose weights are kept; None before the first."""
        if not self.curve:
            return None
        values = [loss if self.measure == "loss" else -accuracy for _, loss, accuracy in self.curve]
        finite = [value if math.isfinite(value) else math.inf for value in values]
        return finite.index(min(finite))

    def add(self, look: Look) -> bool:
        """Take in a look; whether it is the best so far."""
        held = look.held[look.held.isfinite()]
        loss = float(held.double().mean()) if len(held) == len(look.held) else math.inf
        self.curve.append((look.epoch, loss, look.accuracy))
        gains = surely_above(look.held_swapped, look.held, _GAIN)
        self.armed = self.armed or gains
        self.by_heart = not self.armed and surely_above(look.seen_swapped, look.seen, 2 * _GAIN)
        return self.kept == len(self.curve) - 1

    def stops(self) -> bool:
        """Has the run trained enough?"""
        if not self.armed or self.kept is None:
            return False
        now = self.curve[-1][0]
        return now >= EARLIEST and now - self.curve[self.kept][0] >= PATIENCE - 1e-9

    def why(self) -> str:
        """One sentence for the report."""
        if self.kept is None:
            return "No look has been taken."
        epoch, loss, accuracy = self.curve[self.kept]
        value = f"loss {loss:.4f}" if self.measure == "loss" else f"accuracy {accuracy:.1%}"
        best = f"the held-back samples were best after {epoch:.2f} epochs ({value})"
        if self.by_heart:
            return (
                "The task is learnt by heart: another sample's answer is as good as its own to a held-back sample, and "
                "worse to a training sample. Held-back samples cannot say when it is done, so the run went to its end."
            )
        if not self.armed:
            return "No answer has become likelier for its own sample than for another: the run went to its end."
        if self.stops():
            return f"The run ended because {best}, and for {PATIENCE} epochs not better."
        return f"The run went to its end; {best}."

    def state_dict(self) -> dict[str, object]:
        return {"measure": self.measure, "curve": self.curve, "armed": self.armed, "by_heart": self.by_heart}

    def load_state_dict(self, values: dict[str, object]) -> None:
        self.measure = str(values["measure"])
        self.curve = [tuple(point) for point in values["curve"]]  # type: ignore[attr-defined, misc]
        self.armed, self.by_heart = bool(values["armed"]), bool(values["by_heart"])
