"""When a run has trained enough: the loss of held-back samples under averaged weights, and when it can be believed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PATIENCE = 0.5  # epochs without a lower loss after which the run ends, or
PATIENCE_SHARE = 0.25  # of the kept epoch, whichever is more: a slow curve's minimum is flat
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


def surely_above_without(share: float, higher: Tensor, lower: Tensor, least: float) -> bool:
    """As `surely_above`, for the means without the highest `share` of each: two trimmed means, not paired.

    Each is trimmed by itself, so where both are of one distribution neither is favoured. The errors are those of
    winsorized samples.
    """
    both = higher.isfinite() & lower.isfinite()
    values = torch.stack([higher[both], lower[both]]).double().sort().values  # (2, n)
    count = round((1 - share) * values.shape[1])
    if count < 2:
        return False
    means = values[:, :count].mean(1)
    variances = values.clamp(max=values[:, count - 1 : count]).var(1) * values.shape[1] / count**2
    return float(means[0] - means[1]) > max(least, _SURE * math.sqrt(float(variances.sum())))


class StopRule:
    """Keeps the point with the lowest loss of the held-back samples; says when it is certain enough to stop there.

    It is armed once a swap test shows that the model generalises: a held-back sample's loss rises when it is given
    another sample's answer. Where only the training samples' loss does, the run learns by heart, and no held-back
    sample can say when it is done.

    Where the noise guard holds a share of the training samples for mislabelled, as many of the held-back ones are: the
    better the model, the higher their loss. So that share of them, those with the highest loss, does not count, neither
    at this look nor at the one that is kept, nor in the swap test. The guard works only in runs that generalise, so
    while it holds samples back the run is not taken for one that learns by heart.

    Args:
        measure: "loss", or "accuracy": the point with the most held-back samples all right, the first of equals.

    Attributes:
        kept: the number of the look whose weights are kept; None before the first whose loss is a number.
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
        without = min(math.ceil(100 * self.mislabelled - 1e-9), 99)  # 100 * 0.07 is above 7
        losses = [means[without] for means in self.losses]
        return list(zip(self.epochs, losses, self.accuracies, strict=True))

    def add(self, look: Look, mislabelled: float = 0.0) -> bool:
        """Take in a look, and the guard's share; whether it is the best so far."""
        self.mislabelled = mislabelled
        self.epochs.append(look.epoch)
        self.losses.append(_means_of_lowest(look.held))
        self.accuracies.append(look.accuracy)
        self.armed = self.armed or surely_above(look.held_swapped, look.held, _GAIN)
        if mislabelled:
            self.armed = self.armed or surely_above_without(mislabelled, look.held_swapped, look.held, _GAIN)
        may = not self.armed and not mislabelled and bool(look.held.isfinite().any())
        self.by_heart = may and surely_above(look.seen_swapped, look.seen, 2 * _GAIN)
        values = self._values()
        best = math.isfinite(values[-1]) and (self.kept is None or values[-1] < values[self.kept])
        if best:
            self.kept = len(values) - 1
        return best

    def _values(self) -> list[float]:
        """What is to be low, of every look; infinite or NaN where it cannot be judged."""
        return [loss if self.measure == "loss" else -accuracy for _, loss, accuracy in self.curve]

    def stops(self) -> bool:
        """Has the run trained enough?"""
        if not self.armed or self.kept is None:
            return False
        now = self.curve[-1][0]
        return now >= EARLIEST and now - self.curve[self.kept][0] >= self.patience - 1e-9

    @property
    def patience(self) -> float:
        """Epochs without a better look after which the run ends."""
        kept = 0.0 if self.kept is None else self.curve[self.kept][0]
        return max(PATIENCE, PATIENCE_SHARE * kept)

    def why(self, samples: str = "held-back samples", cut: bool = False, idle: bool = False) -> str:
        """A sentence or two for the report.

        `cut`: something else ended the run before its most. `idle`: the last epoch had nothing to train.
        """
        end = "Something else than auto_stop (a callback, too few samples) ended the run" if cut else _TO_ITS_END
        if not self.epochs:
            return "No look has been taken."
        if self.kept is None:
            return (
                f"At no look was the mean loss of the {samples} a number: none of them has a label, or one had a loss "
                f"that was NaN or infinite. {end}."
            )
        epoch, loss, accuracy = self.curve[self.kept]
        value = f"loss {loss:.4f}" if self.measure == "loss" else f"accuracy {accuracy:.1%}"
        if self.measure == "loss" and self.mislabelled:
            value += f" without the highest {self.mislabelled:.0%}, as many as look mislabelled in training"
        best = f"the {samples} were best after {epoch:.2f} epochs ({value})"
        if self.by_heart:
            return (
                f"The task is learnt by heart: to the {samples} another sample's answer is as good as their own, to "
                f"training samples it is worse. So the {samples} cannot say when it is done. {end}."
            )
        if not self.armed:
            return f"No answer has become likelier for its own sample than for another. {end}."
        if self.stops():
            return f"The run ended because {best}, and for {self.patience:.2g} epochs not better.{self._given_up()}"
        longer = ""
        if not cut and not idle and self.kept == len(self.epochs) - 1:
            longer = " A longer run may be better: raise num_train_epochs or max_steps."
        return f"{end}; {best}.{longer}{self._given_up()}"

    def _given_up(self) -> str:
        """A look that the guard's later share calls better than the kept one, though it was not when it was taken."""
        values = self._values()
        assert self.kept is not None
        lowest = min(range(len(values)), key=values.__getitem__)
        if not values[lowest] < values[self.kept]:
            return ""
        return (
            f" Without the share that looks mislabelled now, {self.epochs[lowest]:.2f} epochs were better; the weights "
            "of then are gone, since less looked mislabelled at the time."
        )

    def state_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in _FIELDS}

    def load_state_dict(self, values: dict[str, object]) -> None:
        """
        Raises:
            ValueError: a value is missing; names all that are.
        """
        missing = [name for name in _FIELDS if name not in values]
        if missing:
            raise ValueError(f"the rule's {', '.join(missing)} are missing")
        for name in _FIELDS:
            setattr(self, name, values[name])


_TO_ITS_END = "The run went to its end"
_FIELDS = ("measure", "epochs", "losses", "accuracies", "mislabelled", "kept", "armed", "by_heart")


def _means_of_lowest(losses: Tensor) -> list[float]:
    """(100,): the mean of all `losses` (n,), of the lowest 99 % and so on; infinite with one that is no number."""
    rising = losses.double().nan_to_num(math.inf, math.inf, math.inf).sort().values
    totals, count = rising.cumsum(0).tolist(), len(rising)
    kept = [max(round(count * (100 - percent) / 100), 1) for percent in range(100)]
    return [totals[each - 1] / each for each in kept] if count else [math.inf] * 100
