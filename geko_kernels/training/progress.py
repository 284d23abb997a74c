"""The progress of a run of planned epochs: the logged epoch and speeds, and the learning rate."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from geko_kernels.config import GEKOConfig
from geko_kernels.training.audit import Audit, bypassed
from geko_kernels.training.callbacks import RunEpoch
from geko_kernels.training.planning.sampler import GEKOSampler
from geko_kernels.training.planning.schedule import follow_progress
from geko_kernels.training.report.efficiency import Efficiency
from geko_kernels.training.standard import StandardRun

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class ProgressMixin(_Base):
    """A `transformers.Trainer` that counts in plans: each epoch is a share of the run, whatever its number of steps.

    A subclass makes the sampler in `_get_train_sampler`, and sets `_micro_batch`: the number of samples, or packs, in
    one batch of all processes.
    """

    config: GEKOConfig
    sampler: GEKOSampler | None
    efficiency: Efficiency
    _micro_batch: int
    _standard: StandardRun
    _num_epochs: int  # of a run counted in epochs

    def __init__(self, *args: Any, **named: Any) -> None:
        self._audit = Audit(self)
        super().__init__(*args, **named)
        self.callback_handler.callbacks.insert(0, RunEpoch(self._epoch, self._need))

    def _need(self, hook: str, otherwise: str) -> None:
        self._audit.need(hook, otherwise)

    @property
    def counts_steps(self) -> bool:
        """Whether the run's length is given in steps, with as many planned epochs as they take."""
        return self.args.max_steps > 0 or self.config.spend_saved

    def _planned(self) -> GEKOSampler:
        if self.sampler is None:
            raise bypassed(self, "no epoch was planned", ("_inner_training_loop", "get_train_dataloader"))
        return self.sampler

    def _begin_run(self) -> None:
        """Forget the progress of an earlier run."""
        self.sampler, self._audit = None, Audit(self)
        self._begun_at = 0, 0.0  # steps and samples trained before this call of `train`
        self._batches, self._epoch_batches, self._epoch_steps, self._first_step = 0, 1, 1, 0

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        self._audit.saw("set_initial_training_values")
        self._audit.planned()
        sampler, batches = self._planned(), len(dataloader) if has_length(dataloader) else 1
        if batches == 0 and args.max_steps <= 0:
            items = "items" if sampler.packer is None else "packs"
            raise ValueError(
                f"train_dataset has {sampler.all_units} {items}, fewer than the {self._micro_batch} of one batch, "
                "and dataloader_drop_last=True drops such a batch: nothing can be trained. Use a smaller batch, or set "
                "dataloader_drop_last=False"
            )
        values = super().set_initial_training_values(args, dataloader)
        self._num_epochs, self._run_steps = values[0], values[-1]
        accumulation = args.gradient_accumulation_steps
        samples = sampler.total
        mean = self._micro_batch if sampler.packer is None else samples * self._micro_batch / sampler.all_units
        self._standard = StandardRun(samples, mean, batches, accumulation, self._run_steps)
        sampler.num_epochs, sampler.last_slots = self._standard.passes, None
        if not self.counts_steps:
            sampler.num_epochs = self._run_steps / self._standard.epoch_steps
            sampler.last_slots = self._standard.last_samples
        # a run counted in steps has as many planned epochs as they take
        return (sys.maxsize, *values[1:]) if self.counts_steps else values

    def _place(self, batches: int, epoch_batches: int) -> None:
        """Record how many batches of this epoch have been trained."""
        accumulate = self.args.gradient_accumulation_steps
        self._batches, self._epoch_batches = batches, epoch_batches
        self._epoch_steps = math.ceil(epoch_batches / accumulate)
        self._first_step = self.state.global_step - math.ceil(batches / accumulate)  # the step at which the epoch began

    def _steps_fetched(self) -> int:
        return math.ceil(self._batches / self.args.gradient_accumulation_steps)

    def _share(self) -> float:
        """Finished share of the epoch once the batches fetched so far are trained."""
        return self._steps_fetched() / self._epoch_steps if self._epoch_steps else 1.0

    def _progress(self) -> float:
        """Finished share of the run once the batches fetched so far are trained."""
        if self.counts_steps:
            return min((self._first_step + self._steps_fetched()) / self._run_steps, 1.0)
        if self.sampler is None or self.sampler.plan is None:
            return 0.0
        return self.sampler.progress(len(self.sampler.plan.ids) * self._share())

    def _epoch(self) -> float:
        """`epoch` as Trainer logs it; in a run counted in steps, the passes over the data that they could make."""
        if self.counts_steps:
            return self._standard.epoch(self.state.global_step)
        epoch = self._planned().epoch
        share = self._batches / self._epoch_batches if self._epoch_batches else 1.0
        return epoch + share * self._standard.epoch(self._standard.steps_of(epoch))

    def _consumed(self) -> int:
        """Samples of the plan in the batches fetched so far."""
        plan = self._planned().plan
        if plan is None or self._batches >= self._epoch_batches:
            return 0 if plan is None else len(plan.ids)
        return plan.samples(self._batches * self._micro_batch)

    def _samples_standard(self) -> int:
        sampler = self.sampler
        if sampler is None or sampler.plan is None:
            return 0
        standard = self._standard
        if self.counts_steps:
            return standard.samples(self._first_step + self._steps_fetched())
        this = standard.samples(standard.steps_of(sampler.epoch))
        return sampler.epoch * standard.epoch_samples + round(self._share() * this)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._audit.saw("create_scheduler")
        given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._follows = not given
        self._rate_falls = (lambda: False) if given else follow_progress(scheduler, self._progress, num_training_steps)
        return scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; the final speeds count the samples and steps trained in this call of `train`."""
        seconds = logs.get("train_runtime")
        if self.is_in_train and seconds:
            self.efficiency.collect()
            steps, samples = self._begun_at
            logs["train_samples_per_second"] = round((self.efficiency.train["samples"] - samples) / seconds, 3)
            logs["train_steps_per_second"] = round((self.state.global_step - steps) / seconds, 3)
        super().log(logs, start_time)
