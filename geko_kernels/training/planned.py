"""The run of a `GEKOTrainer`: planned epochs of their own lengths, progress, checkpoints and exact resume."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from geko_kernels.config import GEKOConfig
from geko_kernels.state import SampleState
from geko_kernels.training.checkpoint import SAMPLER_NAME, last_complete, load_files, save_files
from geko_kernels.training.efficiency import Efficiency, bucket_names
from geko_kernels.training.sampler import GEKOSampler
from geko_kernels.training.schedule import follow_progress

logger = logging.get_logger(__name__)


class PlannedTrainer(Trainer):
    """`transformers.Trainer` whose epochs are as long as the plans of a `GEKOSampler`.

    A subclass makes the sampler and its `_micro_batch` (samples in one batch of all processes) in
    `_get_train_sampler`, and looks at samples forward-only in `_probe`.
    """

    control: Any
    config: GEKOConfig
    sample_state: SampleState | None
    sampler: GEKOSampler | None
    efficiency: Efficiency
    _micro_batch: int
    _resume: dict[str, Any] | None  # the sampler's values of the checkpoint to go on from
    _seeds_anew: bool  # persistent workers start anew, whose seed the resumed run has drawn in its first epoch,
    _evaluates_anew: bool  # and those of the evaluation, which it drew before its first one
    _rng_to_keep: Tensor | None  # torch's generator before those workers drew their seed
    _counts_at_sync: Tensor  # (4,) samples per bucket when all processes last knew the same

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **named: Any) -> Any:
        """As `Trainer.train`; True resumes from the newest checkpoint that was saved to its end.

        A resumed run equals the one that never stopped, to the bit, where items and batches do not depend on random
        numbers: Trainer does not carry on those of loader workers, nor what a collator drew for batches fetched ahead.
        """
        if self.sample_state is None or len(self.sample_state) != len(self.train_dataset):
            if self.sample_state is not None:
                raise ValueError(
                    f"train_dataset has {len(self.train_dataset)} items, the learning state {len(self.sample_state)}: "
                    "another dataset needs a new GEKOTrainer"
                )
            raise ValueError("GEKOTrainer: training needs a train_dataset")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir, TRAINER_STATE_NAME)
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint in output_dir {self.args.output_dir}")
            logger.info(f"Resuming from {resume_from_checkpoint}")
        if self.config.spend_saved and self.args.max_steps <= 0:
            steps = math.ceil(len(self.train_dataset) / self.get_total_train_batch_size(self.args))
            self.args.max_steps = math.ceil(self.args.num_train_epochs * steps)
        self.efficiency, self._resume, self._rng_to_keep = self._new_efficiency(), None, None
        if resume_from_checkpoint:
            self._load(resume_from_checkpoint)
        elif self.model_init is not None:
            self.sample_state = self._new_state()  # another model, nothing learnt yet
        if self.sample_state is not None:
            self.efficiency.predictions = self.sample_state.predictions
        self._seeds_anew = bool(resume_from_checkpoint) and self.args.dataloader_persistent_workers
        self._evaluates_anew = False
        self.efficiency.switch("other")
        output = super().train(resume_from_checkpoint, *rest, **named)
        self._end_epoch()
        self.efficiency.switch(None)
        if self.is_world_process_zero():
            self._write_report()
        return output

    def _new_state(self) -> SampleState | None:
        if self.train_dataset is None:
            return None
        return SampleState(len(self.train_dataset), self.config, self.args.device)

    def _new_efficiency(self) -> Efficiency:
        several = dist.is_available() and dist.is_initialized() and self.args.world_size > 1
        return Efficiency(self.args.device, dist.all_reduce if several else None)

    def _load(self, checkpoint: str) -> None:
        assert self.sample_state is not None
        like = self.efficiency.state_dict()
        state, self._resume, counts = load_files(checkpoint, len(self.sample_state), self.args.device, like)
        self.efficiency.load_state_dict(counts)
        if state.config != self.config:
            logger.warning("The checkpoint was written with another GEKOConfig; going on with the trainer's own.")
        self.sample_state.load_state_dict(state.state_dict())
        self.sample_state.upstream.copy_(state.upstream)

    def _init_training_state(
        self, max_steps: int, num_update_steps: int, num_train_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, num_update_steps, num_train_epochs, checkpoint, trial)
        if self._resume is None or checkpoint is None:
            return epochs, batches
        evaluated = any(key.startswith("eval_") for entry in self.state.log_history for key in entry)
        self._evaluates_anew = self._seeds_anew and evaluated
        sampler = self._planned()
        try:
            sampler.load_state_dict(self._resume)
            if sampler.plan is None:
                raise ValueError("state_dict['plan'] is None: the run had not begun")
        except ValueError as error:
            raise ValueError(f"{Path(checkpoint) / SAMPLER_NAME}: {error}") from error
        sampler.position = 0  # the loader skips what has been trained
        finished = sampler.next_epoch > sampler.epoch
        batches = math.ceil(self._resume["position"] / self._micro_batch)
        self._place(batches, batches if finished else math.ceil(len(sampler) / self._micro_batch))
        if finished:
            return sampler.next_epoch, 0
        return sampler.epoch, 0 if self.args.ignore_data_skip else batches

    def _place(self, batches: int, epoch_batches: int) -> None:
        """The run stands behind so many of the epoch's batches."""
        accumulate = self.args.gradient_accumulation_steps
        self._batches, self._epoch_batches = batches, epoch_batches
        self._epoch_steps = math.ceil(epoch_batches / accumulate)
        self._first_step = self.state.global_step - math.ceil(batches / accumulate)  # at which the epoch began

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        values = super().set_initial_training_values(args, dataloader)
        self._place(0, 1)
        self._full_epoch_steps, self._full_run_steps = values[1], values[-1]
        # a run counted in steps goes on for as many planned epochs as they take
        return (sys.maxsize, *values[1:]) if args.max_steps > 0 else values

    def _run_epoch(
        self,
        *,
        model: nn.Module,
        epoch: int,
        train_dataloader: DataLoader,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        **rest: Any,
    ) -> None:
        resumed = resume_from_checkpoint is not None and epoch == epochs_trained
        done = steps_trained_in_current_epoch if resumed else 0
        if self.args.max_steps > 0 and self.state.global_step >= self.args.max_steps:
            self.control.should_training_stop = True  # resumed after its end
            return
        if resumed and done == 0:
            self._load_rng_state(resume_from_checkpoint)  # before the probes, as it was in the run that saved it
            resume_from_checkpoint = None
        if done == 0:
            self._begin_epoch(model, epoch)
        self._place(done, len(train_dataloader))
        if self.args.max_steps <= 0:
            later = max(self._full_run_steps - (epoch + 1) * self._full_epoch_steps, 0)
            self.state.max_steps = self._first_step + self._epoch_steps + later
        self._counts_at_sync = self._planned().state.bucket_counts()
        if self._epoch_batches == 0:
            self._pass_empty_epoch(model, epoch, rest)
            return
        if self._seeds_anew and done == 0:
            self._rng_to_keep, self._seeds_anew = torch.get_rng_state(), False
        with self.efficiency.timed("steps"):
            super()._run_epoch(
                model=model,
                epoch=epoch,
                train_dataloader=train_dataloader,
                resume_from_checkpoint=resume_from_checkpoint,
                epochs_trained=epochs_trained,
                steps_trained_in_current_epoch=steps_trained_in_current_epoch,
                **{**rest, "steps_in_epoch": self._epoch_batches, "num_update_steps_per_epoch": self._epoch_steps},
            )
            self.efficiency.collect()  # waits for the device, so the steps' time is theirs

    def _pass_empty_epoch(self, model: nn.Module, epoch: int, rest: dict[str, Any]) -> None:
        """Nothing is left to teach in this epoch: log, evaluate and save as after any other."""
        self.state.epoch = epoch + 1.0
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        last = self.state.global_step >= self.state.max_steps
        self.control.should_save |= last and self.args.save_strategy not in (SaveStrategy.NO, SaveStrategy.BEST)
        trial, ignored, start = rest["trial"], rest["ignore_keys_for_eval"], rest["start_time"]
        self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, ignored, start)

    def _begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Close the last epoch, probe what is due, draw the plan."""
        sampler, counts = self._planned(), self.efficiency
        start = self.state.global_step / self.args.max_steps if self.args.max_steps > 0 else None
        with counts.timed("selection"):
            self._end_epoch()
            counts.begin_epoch(epoch, self.state.global_step)
            due = sampler.due_probes(epoch, start)
        while len(due):
            with counts.timed("probes"):
                self._probe(model, due)
            with counts.timed("selection"):
                sampler.probed(due, epoch, start)
                due = sampler.due_probes(epoch, start)
        with counts.timed("selection"):
            sampler.set_epoch(epoch, start)

    def _end_epoch(self) -> None:
        sampler = self._planned()
        sampler.state.sync()
        sampler.note_forgotten_()
        marks = {
            "buckets": bucket_names(sampler.state.bucket_counts().tolist()),
            "quarantined": int(sampler.state.quarantined.count_nonzero()),
            "forgotten": int(sampler.lost),
        }
        sampler.lost.zero_()
        self.efficiency.samples_standard = self._samples_standard()
        self.efficiency.end_epoch(self.state.global_step, marks)

    def _planned(self) -> GEKOSampler:
        assert self.sampler is not None
        return self.sampler

    def _progress(self) -> float:
        """Finished share of the run once the batches fetched so far are trained."""
        steps = math.ceil(self._batches / self.args.gradient_accumulation_steps)
        if self.args.max_steps > 0:
            return min((self._first_step + steps) / self.args.max_steps, 1.0)
        if self.sampler is None or self.sampler.plan is None:
            return 0.0
        share = steps / self._epoch_steps if self._epoch_steps else 1.0
        return self.sampler.progress(len(self.sampler.plan.ids) * share)

    def _consumed(self) -> int:
        """Samples of the plan that the batches fetched so far hold."""
        plan = self._planned().plan
        if plan is None or self._batches >= self._epoch_batches:
            return 0 if plan is None else len(plan.ids)
        return min(self._batches * self._micro_batch, len(plan.ids))

    def _samples_standard(self) -> int:
        sampler = self._planned()
        return round(self._progress() * sampler.num_epochs * len(sampler.state))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not given:
            follow_progress(scheduler, self._progress, num_training_steps)
        return scheduler

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        self._planned().advance(self._consumed())
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rng_to_keep is not None:
            torch.set_rng_state(self._rng_to_keep)
            self._rng_to_keep = None
        self._batches += len(batches)
        return batches, num_items

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        sampler = self._planned()
        with self.efficiency.timed("checkpoints"):
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            sampler.state.sync()
            self._counts_at_sync = sampler.state.bucket_counts()
            self.efficiency.samples_standard = self._samples_standard()
            self.efficiency.collect()
            if self.args.should_save:
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # written last: its presence says all is there
                position = sampler.state_dict(self._consumed())
                save_files(folder, sampler.state, position, self.efficiency.state_dict())
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every rank's file is there before trainer_state.json

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        rng, anew = torch.get_rng_state(), self._evaluates_anew
        with self.efficiency.timed("evaluation"):
            metrics = super()._evaluate(*args, **kwargs)
        if anew:
            torch.set_rng_state(rng)
            self._evaluates_anew = False
        return metrics

    def _probe(self, model: nn.Module, ids: Tensor) -> None:
        raise NotImplementedError

    def _write_report(self) -> None:
        raise NotImplementedError
