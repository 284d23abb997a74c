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

    Where the noise guard holds a share of the training samples for mislabelled, as many of the held-back ones are: the
    better the model, the higher their loss. So that share of them, those with the highest loss, does not count, neither
    at this look nor at the one that is kept.

    Args:
        measure: "loss", or "accuracy": the point with the most held-back samples all right, the first of equals.

    Attributes:
        kept: the number of the look whose weights are kept; None before the first.
    """

    def __init__(self, measure: str = "loss") -> None:
        self.measure = measure
        self.epochs: list[float] = []  # of the looks
        self.losses: list[list[float]] = []  # (100,) each: the mean without the highest 0, 1, ... 99 % of the losses
        self.accuracies: list[float] = []
        self.mislabelled = 0.0  # share of the training samples
        self.kept: int | None = None
        self.armed = False
        self.by_heart = False

    @property
    def curve(self) -> list[tuple[float, float, float]]:
        """(epoch, loss, accuracy) of every look, the losses without the share that is held for mislabelled now."""
        without = min(math.ceil(100 * self.mislabelled), 99)
        losses = [means[without] for means in self.losses]
        return list(zip(self.epochs, losses, self.accuracies, strict=True))

    def add(self, look: Look, mislabelled: float = 0.0) -> bool:
        """Take in a look, and the guard's share; whether it is the best so far."""
        self.mislabelled = mislabelled
        self.epochs.append(look.epoch)
        self.losses.append(_means_of_lowest(look.held))
        self.accuracies.append(look.accuracy)
        gains = surely_above(look.held_swapped, look.held, _GAIN)
        self.armed = self.armed or gains
        self.by_heart = not self.armed and surely_above(look.seen_swapped, look.seen, 2 * _GAIN)
        values = [loss if self.measure == "loss" else -accuracy for _, loss, accuracy in self.curve]
        best = self.kept is None or values[-1] < values[self.kept]
        if best:
            self.kept = len(values) - 1
        return best

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
        if self.measure == "loss" and self.mislabelled:
            value += f" without the highest {self.mislabelled:.0%}, as many as look mislabelled in training"
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
        return {name: getattr(self, name) for name in _FIELDS}

    def load_state_dict(self, values: dict[str, object]) -> None:
        for name in _FIELDS:
            setattr(self, name, values[name])


_FIELDS = ("measure", "epochs", "losses", "accuracies", "mislabelled", "kept", "armed", "by_heart")


def _means_of_lowest(losses: Tensor) -> list[float]:
    """(100,): the mean of all `losses` (n,), of the lowest 99 % and so on; infinite with one that is no number."""
    rising = losses.double().nan_to_num(math.inf, math.inf, math.inf).sort().values
    totals, count = rising.cumsum(0).tolist(), len(rising)
    kept = [max(round(count * (100 - percent) / 100), 1) for percent in range(100)]
    return [totals[each - 1] / each for each in kept] if count else [math.inf] * 100
