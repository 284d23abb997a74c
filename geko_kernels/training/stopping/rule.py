"""Decides when a run has trained enough, by the loss of held-back samples, and whether that loss can be trusted."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PATIENCE = 0.5  # epochs without a lower loss after which the run ends, or
PATIENCE_SHARE = 0.25  # of the kept epoch, whichever is more: a slow curve has a flat minimum
EARLIEST = 1.25  # epochs before which it never ends: after the warm-up, the average's loss falls and rises once
_SURE = 3.0  # standard errors
_GAIN = 0.05  # nats a token by which another sample's answer must be worse


class Look(NamedTuple):
    """The evaluation of one point of a run, with the averaged weights; losses are (n,) means over a sample's tokens."""

    epoch: float
    held: Tensor  # losses of the held-back samples
    held_swapped: Tensor  # the same with the answers of others
    seen: Tensor  # losses of as many training samples
    seen_swapped: Tensor
    accuracy: float  # share of the held-back samples whose every token is right


def surely_above(higher: Tensor, lower: Tensor, least: float) -> bool:
    """Whether the mean of the paired differences is above `least`, and above 0 by three standard errors."""
    difference = (higher - lower).double()
    difference = difference[difference.isfinite()]
    if len(difference) < 2:
        return False
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) > max(least, _SURE * error)


def surely_above_without(share: float, higher: Tensor, lower: Tensor, least: float) -> bool:
    """As `surely_above`, for the means without the highest `share` of each: two trimmed means, not paired.

    Each is trimmed separately, so that neither is favoured if both have the same distribution. The standard errors are
    those of winsorized samples.
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
    """Keeps the point with the lowest loss of the held-back samples, and says when the run may stop.

    It is armed once a swap test shows that the model generalises: a held-back sample's loss rises with another sample's
    answer. If only the training samples' loss rises, the run learns by heart, and held-back samples cannot show when it
    is done.

    If the noise guard finds a share of the training samples mislabelled, about the same share of the held-back ones is,
    and the better the model, the higher is their loss. So that share of the held-back samples, those with the highest
    loss, does not count: neither at this look, nor at the kept one, nor in the swap test. The guard acts only in runs
    that generalise, so while it holds samples back, the run does not count as learning by heart.

    Args:
        measure: "loss", or "accuracy": keep the point with the most held-back samples that are all right, the first
            among equals.

    Attributes:
        kept: the number of the look whose weights are kept; None before the first whose loss is a number.
    """

    def __init__(self, measure: str = "loss") -> None:
        self.measure = measure
        self.epochs: list[float] = []  # epochs of the looks
        self.losses: list[list[float]] = []  # (100,) each: the mean without the highest 0, 1, ... 99 % of the losses
        self.accuracies: list[float] = []
        self.mislabelled = 0.0  # mislabelled share of the training samples
        self.kept: int | None = None
        self.armed = False
        self.by_heart = False

    @property
    def curve(self) -> list[tuple[float, float, float]]:
        """(epoch, loss, accuracy) of every look, the losses without the share that now counts as mislabelled."""
        without = min(math.ceil(100 * self.mislabelled - 1e-9), 99)  # 100 * 0.07 is above 7
        losses = [means[without] for means in self.losses]
        return list(zip(self.epochs, losses, self.accuracies, strict=True))

    def add(self, look: Look, mislabelled: float = 0.0) -> bool:
        """Add a look and the guard's share; returns whether it is the best so far."""
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
        """The value to minimise, for every look; infinite or NaN if a look cannot be judged."""
        return [loss if self.measure == "loss" else -accuracy for _, loss, accuracy in self.curve]

    def stops(self) -> bool:
        """Whether the run has trained enough."""
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

        `cut`: something else ended the run early. `idle`: the last epoch had nothing to train.
        """
        end = "Something other than auto_stop (a callback, too few samples) ended the run" if cut else _TO_ITS_END
        if not self.epochs:
            return "The run was never evaluated."
        if self.kept is None:
            return (
                f"The mean loss of the {samples} was never a number: none of them has a label, or one had a loss that "
                f"was NaN or infinite. {end}."
            )
        epoch, loss, accuracy = self.curve[self.kept]
        value = f"loss {loss:.4f}" if self.measure == "loss" else f"accuracy {accuracy:.1%}"
        if self.measure == "loss" and self.mislabelled:
            value += f" without the highest {self.mislabelled:.0%}, the share that looks mislabelled in training"
        best = f"the {samples} were best after {epoch:.2f} epochs ({value})"
        if self.by_heart:
            return (
                f"The task is learnt by heart: for the {samples} another sample's answer is as good as their own, for "
                f"training samples it is worse. So the {samples} cannot show when training is done. {end}."
            )
        if not self.armed:
            return f"The model has not learnt to tell a sample's own answer from another sample's. {end}."
        if self.stops():
            since = f"did not improve for {self.patience:.2g} epochs"
            return f"The run ended because {best}, and {since}.{self._given_up()}"
        longer = ""
        if not cut and not idle and self.kept == len(self.epochs) - 1:
            longer = " A longer run may be better: raise num_train_epochs or max_steps."
        return f"{end}; {best}.{longer}{self._given_up()}"

    def _given_up(self) -> str:
        """A sentence on a look that is better than the kept one by the guard's present share, but was not before."""
        values = self._values()
        assert self.kept is not None
        lowest = min(range(len(values)), key=values.__getitem__)
        if not values[lowest] < values[self.kept]:
            return ""
        return (
            f" Without the share that looks mislabelled now, {self.epochs[lowest]:.2f} epochs were better; those "
            "weights were not kept, since fewer samples looked mislabelled at the time."
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
    """(100,): the mean of all `losses` (n,), of the lowest 99 % and so on; infinite if one is not a number."""
    rising = losses.double().nan_to_num(math.inf, math.inf, math.inf).sort().values
    totals, count = rising.cumsum(0).tolist(), len(rising)
    kept = [max(round(count * (100 - percent) / 100), 1) for percent in range(100)]
    return [totals[each - 1] / each for each in kept] if count else [math.inf] * 100
