"""The run of a `GEKOTrainer`: planned epochs of varying length, checkpoints and exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from geko_kernels.training.agreement import check_loaded, check_processes
from geko_kernels.training.audit import bypassed
from geko_kernels.training.beginning import BeginningMixin, liger_layers_alone
from geko_kernels.training.checkpoint import (
    SAMPLER_NAME,
    drop_set_aside,
    last_complete,
    load_files,
    save_files,
    set_aside,
)
from geko_kernels.training.fingerprint import fingerprint
from geko_kernels.training.overrides import check_trainer
from geko_kernels.training.planning.schedule import read_progress_
from geko_kernels.training.report.visits import VISITS_NAME
from geko_kernels.training.resumed import check_data, differences, holds_only_the_model, run_settings

logger = logging.get_logger(__name__)


class PlannedMixin(BeginningMixin):
    """`transformers.Trainer` whose epochs are as long as the plans of a `GEKOSampler`.

    A subclass runs probes in `_probe` and writes the report in `_write_report`.
    """

    control: Any
    _probe: Callable[[nn.Module, Tensor], None]
    _write_report: Callable[[], None]
    _resume: dict[str, Any] | None  # the sampler's values in the checkpoint to resume from
    _seeds_anew: bool  # persistent workers restart; the interrupted run drew their seed in its first epoch
    _evaluates_anew: bool  # the same for the evaluation's workers, whose seed it drew before its first evaluation
    _rng_to_keep: Tensor | None  # the state of torch's generator before those workers' seed is drawn
    _counts_at_sync: Tensor  # (4,) samples per bucket at the last sync

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **named: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the newest complete checkpoint.

        Called again, it keeps the model and the learning state, and starts a new plan, new counts and a new report. If
        `model_init` makes the model, or `trainer.model` has been replaced, the learning state is new as well.

        A resumed run equals the uninterrupted one bit for bit if items and batches do not depend on random numbers:
        Trainer restores neither those of loader workers nor those that a collator has drawn for prefetched batches.
        """
        check_trainer()
        if self.sample_state is None or len(self.sample_state) != len(self.train_dataset):
            if self.sample_state is not None:
                raise ValueError(
                    f"train_dataset has {len(self.train_dataset)} items, but the learning state has "
                    f"{len(self.sample_state)}: make a new GEKOTrainer for another dataset"
                )
            raise ValueError("GEKOTrainer: training needs a train_dataset")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir, TRAINER_STATE_NAME)
            if resume_from_checkpoint is None:
                told = "give the output_dir of the run that is to go on, or start without resume_from_checkpoint"
                raise ValueError(f"no whole checkpoint in output_dir {self.args.output_dir}: {told}")
            logger.info(f"Resuming from {resume_from_checkpoint}")
        self._forget_model()
        self._follow_model()
        self.efficiency, self._resume, self._snapshot = self._new_efficiency(), None, None
        self._fingerprint: dict[str, Any] | None = None
        self._saved, self._rng_to_keep, self._evaluates_anew = None, None, False
        self._seeds_anew = bool(resume_from_checkpoint) and self.args.dataloader_persistent_workers
        check_processes(self, resume_from_checkpoint)
        if resume_from_checkpoint:
            self._load(resume_from_checkpoint)
        self._begin_run()
        self._audit.saw("train")
        self.efficiency.predictions = self.sample_state.predictions
        self.efficiency.switch("other")
        with ExitStack() as self._until_patched:
            self._until_patched.enter_context(liger_layers_alone(self.args))
            output = super().train(resume_from_checkpoint, *rest, **named)
        self._audit.end(self.state.global_step - self._begun_at[0])
        self._end_epoch()
        self.efficiency.switch(None)
        if self.is_world_process_zero():
            self._write_report()
        return output

    def _load(self, checkpoint: str) -> None:
        assert self.sample_state is not None
        state, self._resume, counts = load_files(
            checkpoint, len(self.sample_state), self.args.device, self.efficiency.state_dict()
        )
        check_data(checkpoint, self._resume.get("data"), self._data())
        if holds_only_the_model(checkpoint):
            logger.warning(
                f"{checkpoint} has no optimizer and no random numbers (save_only_model=True): the run continues with a "
                "new optimizer, so it will differ from an uninterrupted one."
            )
        self._resume["run"] = {**self._resume.get("run", {}), "GEKOConfig": state.config.to_dict()}
        self._saved = Path(checkpoint).resolve()
        self.efficiency.load_state_dict(counts)
        if self.efficiency.visits is not None and not self.efficiency.visits.load(checkpoint):
            logger.warning(
                f"{checkpoint} has no {VISITS_NAME}, as an earlier geko_kernels wrote it. The losses of each sample "
                "are recorded from now on."
            )
        self.sample_state.load_state_dict(state.state_dict())
        self.sample_state.upstream.copy_(state.upstream)
        self.sample_state.zero_share = state.zero_share
        check_loaded(self, self._resume["position"])

    def _data(self) -> dict[str, Any]:
        if self._fingerprint is None:
            workers, context = self.args.dataloader_num_workers, self.args.dataloader_multiprocessing_context
            self._fingerprint = fingerprint(self.train_dataset, workers > 0, context)
            if getattr(self.train_dataset, "skipped_rows", ()):
                self._fingerprint["skipped_rows"] = list(self.train_dataset.skipped_rows)
        return self._fingerprint

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        self._audit.saw("_init_training_state")
        self._audit.need("set_initial_training_values", "the run's length is not known")
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.num_train_epochs = self._num_epochs
        if self._resume is not None and resume_from_checkpoint is not None:
            evaluated = any(key.startswith("eval_") for entry in self.state.log_history for key in entry)
            self._evaluates_anew = self._seeds_anew and evaluated
            epochs, batches = self._go_on(self._resume, Path(resume_from_checkpoint))
        self._begun_at = self.state.global_step, self.efficiency.train["samples"]
        return epochs, batches

    def _go_on(self, resume: dict[str, Any], checkpoint: Path) -> tuple[int, int]:
        """(epoch, batches of it to skip) at which the checkpoint was written."""
        sampler, accumulate = self._planned(), self.args.gradient_accumulation_steps
        try:
            sampler.load_state_dict({name: value for name, value in resume.items() if name not in ("data", "run")})
            if sampler.plan is None:
                raise ValueError("state_dict['plan'] is None: the run had not begun")
        except ValueError as error:
            raise ValueError(f"{checkpoint / SAMPLER_NAME}: {error}") from error
        sampler.position = 0  # the loader skips what has been trained
        consumed, finished = resume["position"], sampler.next_epoch > sampler.epoch
        units, step = sampler.plan.units_of(consumed), self._micro_batch * accumulate
        batches = math.ceil(units / self._micro_batch) if finished else units // step * accumulate
        whole, rest = divmod(len(sampler), self._micro_batch)
        self._place(batches, batches if finished else whole + (rest > 0 and not self.args.dataloader_drop_last))
        now = {**run_settings(self), "GEKOConfig": self.config.to_dict()}
        changed = differences(resume["run"], now)
        if changed:
            sampler.relocate_(self._first_step / self._run_steps if self.counts_steps else None)
            logger.warning(
                "The run continues with other settings than its checkpoint has, so it will differ from an "
                "uninterrupted one. " + ". ".join(changed) + "."
            )
        if self.args.ignore_data_skip and batches and not finished:
            raise ValueError(
                f"{checkpoint} was written within an epoch, and ignore_data_skip=True would train that epoch's first "
                "samples again: set it to False. GEKOTrainer passes over what has been trained without loading it"
            )
        epoch = sampler.epoch + finished
        over = self.state.global_step >= self._run_steps if self.counts_steps else epoch >= self._num_epochs
        if over and changed:
            logger.warning(f"The checkpoint's run is past the end of this one (epoch {epoch}): nothing is trained.")
        return epoch, 0 if finished else batches

    def _run_epoch(self, *, model: nn.Module, epoch: int, **given: Any) -> None:
        self._audit.saw("_run_epoch")
        self._audit.need("_init_training_state", "the start of the run is not known")
        self._audit.need("create_scheduler", "the learning rate does not follow its epochs")
        checkpoint = given["resume_from_checkpoint"]
        resumed = checkpoint is not None and epoch == given["epochs_trained"]
        done = given["steps_trained_in_current_epoch"] if resumed else 0
        if self.counts_steps and self.state.global_step >= self._run_steps:
            self.control.should_training_stop = True  # resumed after its end
            return
        if resumed and done == 0:
            self._load_rng_state(checkpoint)  # before the probes, as in the run that saved it
            given["resume_from_checkpoint"] = None
        if done == 0:
            self._begin_epoch(model, epoch)
        after_empty = self._epoch_batches == 0
        self._place(done, len(given["train_dataloader"]))
        if after_empty and self._follows:
            read_progress_(self.lr_scheduler)
        if not self.counts_steps:
            later = max(self._run_steps - (epoch + 1) * self._standard.epoch_steps, 0)
            self.state.max_steps = self._first_step + self._epoch_steps + later
        self._counts_at_sync = self._planned().state.bucket_counts()
        if self._epoch_batches == 0:
            self._pass_empty_epoch(model, epoch, given)
            return
        if self._seeds_anew and done == 0:
            self._rng_to_keep, self._seeds_anew = torch.get_rng_state(), False
        with self.efficiency.timed("steps"):
            lengths = {"steps_in_epoch": self._epoch_batches, "num_update_steps_per_epoch": self._epoch_steps}
            super()._run_epoch(model=model, epoch=epoch, **{**given, **lengths})
            self.efficiency.collect()  # waits for the device, so that its time counts as that of the steps
        if not (self.control.should_epoch_stop or self.control.should_training_stop):
            self._audit.check()
        self._audit.end(self.state.global_step - self._begun_at[0])

    def _pass_empty_epoch(self, model: nn.Module, epoch: int, given: dict[str, Any]) -> None:
        """Log, evaluate and save after an epoch without a batch."""
        if self.counts_steps:  # the next epochs would also be empty
            self.control.should_training_stop = True
            logger.warning(self._why_nothing())
        args, step, last = self.args, self.state.global_step, self.state.global_step >= self.state.max_steps
        last |= self.control.should_training_stop
        self.state.epoch = self._epoch()
        self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        self.control.should_save |= last and args.save_strategy not in (SaveStrategy.NO, SaveStrategy.BEST)
        if last and args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= step:
            self.control.should_evaluate |= step % self.state.eval_steps != 0  # as Trainer does at its last step
        trial, ignored, start = given["trial"], given["ignore_keys_for_eval"], given["start_time"]
        self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, ignored, start)

    def _begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Close the last epoch, probe the samples that are due, draw the plan."""
        sampler, counts = self._planned(), self.efficiency
        start = self.state.global_step / self._run_steps if self.counts_steps else None
        falls = self._rate_falls()
        with counts.timed("selection"):
            self._end_epoch()
            counts.begin_epoch(epoch, self.state.global_step)
            due = sampler.due_probes(epoch, start)
        while len(due):
            with counts.timed("probes"):
                self._probe(model, due)
                counts.flush_visits()  # the epoch may visit the same samples again
            with counts.timed("selection"):
                sampler.probed(due, epoch, start)
                due = sampler.due_probes(epoch, start)
        with counts.timed("selection"):
            sampler.set_epoch(epoch, start)
            self._fill_up(epoch, start, falls)

    def _fill_up(self, epoch: int, start: float | None, falls: bool) -> None:
        """Fill up a plan that is too small to train, if the run could otherwise not end or its rate not fall.

        If the last epoch of a run counted in epochs is empty, it gets the epochs' average length.
        """
        sampler, counts = self._planned(), self.efficiency
        assert sampler.plan is not None
        size, batch = sampler.plan.units, self._micro_batch if self.args.dataloader_drop_last else 1
        if size >= batch:
            return
        before, wanted = len(sampler.plan.ids), 0
        if size or self.counts_steps:
            wanted = before + batch - size
        elif falls and epoch + 1 == self._num_epochs and self.state.global_step > 0:
            wanted = max(batch, math.ceil(counts.train["samples"] / self._num_epochs))
        while wanted > before:  # more samples need not make more packs
            sampler.fill_up_(wanted, start)
            added, before = len(sampler.plan.ids) - before, len(sampler.plan.ids)
            wanted = before + batch - sampler.plan.units if added else 0

    def _why_nothing(self) -> str:
        state, plan = self._planned().state, self._planned().plan
        held = int(state.quarantined.count_nonzero())
        drops = f", and dataloader_drop_last=True drops batches of fewer than {self._micro_batch}"
        return (
            f"GEKOTrainer stops at step {self.state.global_step} of {self._run_steps}: no batch can be trained. "
            f"{held} of {len(state)} samples are quarantined"
            + (drops if self.args.dataloader_drop_last and plan is not None and held < len(state) else "")
            + "."
        )

    def _end_epoch(self) -> None:
        marks = {"end": self._epoch(), **self._planned().epoch_marks_()}
        self.efficiency.samples_standard = self._samples_standard()
        self.efficiency.end_epoch(self.state.global_step, marks)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        self._audit.check()
        self._planned().advance(self._consumed())
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        told = "the labels of the batches were not counted the way its loss counts them"
        self._audit.need("_get_num_items_in_batch", told, caller="get_batch_samples")
        if self._rng_to_keep is not None:
            torch.set_rng_state(self._rng_to_keep)
            self._rng_to_keep = None
        self._batches += len(batches)
        self._audit.fetch(batches)
        return batches, num_items

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        try:
            return super().training_step(*args, **named)
        except TypeError as error:
            if "sample_ids" in str(error):  # the model got the batch with the ids
                raise bypassed(self, f"the model was called with 'sample_ids' ({error})", ("compute_loss",)) from error
            raise

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._audit.saw("_save_checkpoint")
        sampler = self._planned()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self._epoch_batches == 0 and self._saved == folder.resolve():
            return  # only empty epochs since then, which a resumed run repeats with the same result
        with self.efficiency.timed("checkpoints"):
            sampler.state.sync()
            self._counts_at_sync = sampler.state.bucket_counts()
            self.efficiency.samples_standard = self._samples_standard()
            self.efficiency.collect()
            self.efficiency.flush_visits()
            if self.args.should_save:
                set_aside(folder, TRAINER_STATE_NAME)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                about = {"run": run_settings(self), "data": self._data()}
                position = {**sampler.state_dict(self._consumed()), **about}
                save_files(folder, sampler.state, position, self.efficiency.state_dict())
                assert self.efficiency.visits is not None
                self.efficiency.visits.save(folder)
            super()._save_checkpoint(model, trial)  # trainer_state.json comes last and marks it complete
            if self.args.should_save:
                drop_set_aside(folder.parent)
            self._saved = folder.resolve()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every rank's file exists before trainer_state.json

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        rng, anew = torch.get_rng_state(), self._evaluates_anew
        with self.efficiency.timed("evaluation"):
            metrics = super()._evaluate(*args, **kwargs)
        if anew:
            torch.set_rng_state(rng)
            self._evaluates_anew = False
        return metrics
