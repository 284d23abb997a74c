"""The run that `transformers.Trainer` would make with the same arguments, for comparison."""

from __future__ import annotations

from typing import NamedTuple


class StandardRun(NamedTuple):
    """A run without selection.

    The last batch of an epoch may be shorter or dropped, and so may its last step.
    """

    num_samples: int
    batch: float  # samples in one batch of all processes; a mean if batches are sized by tokens
    batches: int  # in an epoch
    accumulation: int  # batches in an optimizer step
    steps: int  # optimizer steps of the whole run

    @property
    def epoch_steps(self) -> int:
        return max(-(-self.batches // self.accumulation), 1)

    @property
    def epoch_samples(self) -> int:
        return min(round(self.batches * self.batch), self.num_samples)

    @property
    def last_samples(self) -> int:
        """Samples of a partial last epoch, 0 if it is whole."""
        return min(round(self.steps % self.epoch_steps * self.accumulation * self.batch), self.num_samples)

    @property
    def passes(self) -> float:
        """Length of the run in passes over the dataset; the last one may be partial."""
        return self.steps // self.epoch_steps + self.last_samples / self.num_samples

    def samples(self, steps: int) -> int:
        """Samples trained by `steps` steps from the start."""
        whole, rest = divmod(steps, self.epoch_steps)
        return whole * self.epoch_samples + min(round(rest * self.accumulation * self.batch), self.epoch_samples)

    def epoch(self, steps: int) -> float:
        """What Trainer logs as `epoch` after `steps` steps."""
        whole, rest = divmod(steps, self.epoch_steps)
        return whole + min(rest * self.accumulation, self.batches) / max(self.batches, 1)

    def steps_of(self, epoch: int) -> int:
        """Steps of that epoch within the run; the last epoch may be partial. Epochs after the run's end are whole."""
        rest = self.steps - epoch * self.epoch_steps
        return min(rest, self.epoch_steps) if rest > 0 else self.epoch_steps
