"""`auto_stop`: a trainer's run that evaluates held-back samples, ends by a rule and keeps averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from geko_kernels.losses.results import SampleStats
from geko_kernels.training.audit import bypassed
from geko_kernels.training.checkpoint import STATE_NAME
from geko_kernels.training.planned import PlannedMixin
from geko_kernels.training.processes import check_same
from geko_kernels.training.random_numbers import RandomNumbers, fixed_random_numbers
from geko_kernels.training.resumed import ResumeError
from geko_kernels.training.stopping.average import WeightAverage
from geko_kernels.training.stopping.files import (
    KEPT,
    is_of_auto_stop,
    load_run,
    load_values,
    path_of,
    save_run,
    save_values,
)
from geko_kernels.training.stopping.items import WithoutGroups
from geko_kernels.training.stopping.looked_at import FEWEST, FEWEST_EVALUATED, Swapped, looked_at, places_of, sentinels
from geko_kernels.training.stopping.rule import Look, StopRule
from geko_kernels.training.stopping.run import DECIDED, LOOKS, TOO_LATE, StoppingRun, constant_rate

logger = logging.get_logger(__name__)
_CONSTANT = ("constant", "constant_with_warmup")


class StoppingMixin(PlannedMixin):
    """`transformers.Trainer` that finds its own length with `auto_stop`, and is unchanged without it.

    Training continues from the raw weights. Evaluation, the model weights of checkpoints and the end of the run use the
    averaged ones.
    """

    data_collator: Any
    _stopping: StoppingRun | None = None
    _trial: Any = None

    # Settings that conflict

    def _check_stopping(self) -> None:
        if not self.config.auto_stop:
            return
        if self.is_deepspeed_enabled:
            raise ValueError("auto_stop averages weights, to which DeepSpeed gives no access: use DDP or FSDP2")
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise ValueError("auto_stop needs FSDP2: set fsdp_config={'version': 2}, or use DDP")

    def _load(self, checkpoint: str) -> None:
        written = is_of_auto_stop(checkpoint)
        if written != self.config.auto_stop and (Path(checkpoint) / STATE_NAME).is_file():
            raise ResumeError(
                f"{checkpoint} was written with auto_stop={written}, but this run has auto_stop={not written}: resume "
                "with the setting of the checkpoint's run, or load the model from the checkpoint and start a new run"
            )
        super()._load(checkpoint)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        collator = super()._get_collator_with_removed_columns(data_collator, description)
        return WithoutGroups(collator) if self.config.auto_stop else collator

    # The rate

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; with `auto_stop` the rate is constant after the warm-up."""
        args = self.args
        given: Any = self.lr_scheduler
        if self.config.auto_stop and given is not None:
            logger.warning(
                f"auto_stop: your {type(given).__name__} is kept. If its rate falls over the longest possible run, "
                "it has not fallen when auto_stop ends the run earlier."
            )
        elif self.config.auto_stop:
            kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
            if kind not in _CONSTANT:
                logger.warning(
                    f"auto_stop: the run's length is not known before its end, so lr_scheduler_type={kind!r} is "
                    "replaced by 'constant_with_warmup'."
                )
            warmup = 0 if kind == "constant" else args.get_warmup_steps(self._standard.epoch_steps)
            given = constant_rate(optimizer or self.optimizer, warmup, self._cools_down, self._progress)
            self.lr_scheduler = given
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _cools_down(self) -> bool:
        return self._stopping is not None and self._stopping.by_heart

    # The run

    def _begin_run(self) -> None:
        super()._begin_run()
        self._stopping = None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.config.auto_stop:
            with self.efficiency.timed("selection"):
                self._begin_stopping(Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        return prepared

    def _begin_stopping(self, checkpoint: Path | None) -> None:
        average, values = WeightAverage(self.model), None
        if checkpoint is not None:
            values = load_run(checkpoint, self._shard, average, self._kept if self._writes else None)
        args, numbers = self.args, RandomNumbers(self.args.device, self.model)
        collate = self._get_collator_with_removed_columns(self.data_collator, "evaluation")
        with fixed_random_numbers():  # the same items in all processes, if they are random
            if values is None:
                seed = args.seed if args.data_seed is None else args.data_seed
                held = sentinels(self.train_dataset, seed, args)
            else:
                held = torch.tensor(values["held"], dtype=torch.int64)
            at = looked_at(self, held, collate)
        numbers.restore()
        check_same("the samples that auto_stop holds back", held, args.device)
        check_same("the made-up items of auto_stop's swap test", places_of(at), args.device)
        run = StoppingRun(average, StopRule(self.config.auto_measure), held, at)
        if run.at is None:
            logger.warning(
                f"auto_stop: none of the {len(self.train_dataset):,} samples of train_dataset is held back (that needs "
                f"{FEWEST:,} samples, in groups of less than a twentieth), and there is no suitable eval_dataset: the "
                f"run trains to its end, and ends with the averaged weights. An eval_dataset needs a length, at least "
                f"{FEWEST_EVALUATED} samples, and labels if those of train_dataset have them."
            )
        elif run.at.swapped is None:
            run.rule.armed = True
        if values is not None:
            run.load_state_dict(values)
        self._stopping = run
        if len(held) and not run.by_heart:
            marks = torch.zeros(len(self.train_dataset), dtype=torch.bool)
            marks[held] = True
            self._planned().held_back = marks.to(self._planned().state.device)

    def _run_epoch(self, *args: Any, **named: Any) -> None:
        if self._stopping is not None and self._stopping.ended:
            self.control.should_training_stop = True  # resumed after its end
            return
        super()._run_epoch(*args, **named)
        if self.config.auto_stop and self._stopping is None:
            raise bypassed(self, "no weights are averaged", ("_prepare_for_training",))
        if self._stopping is not None and self._stopping.stepped != self.state.global_step > 0:
            raise bypassed(self, "the average lacks the last step", ("_maybe_log_save_evaluate",))

    def train(self, *args: Any, **named: Any) -> TrainOutput:
        """As `Trainer.train`."""
        output: TrainOutput = super().train(*args, **named)
        if self._stopping is not None and self._stopping.average is not None:
            raise bypassed(self, "the run did not end with the averaged weights", ("_finalize_training",))
        return output

    def _maybe_log_save_evaluate(self, *args: Any, **named: Any) -> None:
        run = self._stopping
        if run is not None and run.stepped != self.state.global_step:
            run.stepped = self.state.global_step
            self._after_step(run)
        super()._maybe_log_save_evaluate(*args, **named)

    def _after_step(self, run: StoppingRun) -> None:
        """Add the step to the average, and evaluate if a quarter of an epoch has passed."""
        if run.average is None:
            return
        if not self.accelerator.optimizer_step_was_skipped:
            run.average.update()
        quarter = int(LOOKS * self._epoch() + 1e-6)
        if run.at is None or quarter <= run.quarters:
            return
        run.quarters = quarter
        self._look(run, quarter / LOOKS)
        if run.rule.stops():
            run.ended = self.control.should_training_stop = True
        elif run.rule.by_heart and DECIDED <= self._progress() < TOO_LATE:
            run.by_heart, run.average, self._planned().held_back = True, None, None
            if self._writes:
                self._kept.unlink(missing_ok=True)

    def _finalize_training(self, *args: Any, **named: Any) -> Any:
        run = self._stopping
        if run is not None:
            run.cut = not run.ended and self._progress() < 1 - 1e-6
            run.idle = self._epoch_batches == 0
        if run is not None and run.average is not None:
            if run.at is not None and run.looked != self.state.global_step > 0:
                self._look(run, self._epoch())
            self._take_kept(run)
        return super()._finalize_training(*args, **named)

    def _take_kept(self, run: StoppingRun) -> None:
        """Give the model the kept weights, or the final average if no evaluation can be trusted."""
        average = run.average
        assert average is not None
        values = average.values
        if run.kept is not None and self._writes:
            values = [value.to(own.device) for value, own in zip(load_values(self._kept, average), values, strict=True)]
        if self._writes:
            self._kept.unlink(missing_ok=True)
        if self._several and self._shard is None:
            for value in values:
                dist.broadcast(value, 0)
        _reshard(self.model)
        average.copy_to_model(values)
        run.average = None  # from now on the model's own weights are evaluated

    # Looks

    def _look(self, run: StoppingRun, epoch: float) -> None:
        """Evaluate the held-back samples with the averaged weights, and keep these if they are the best so far."""
        at, rule, model = run.at, run.rule, self.model_wrapped
        assert at is not None and run.average is not None
        with self.efficiency.timed("probes"):
            numbers = RandomNumbers(self.args.device, model)
            with self._averaged():
                with nullcontext() if at.source == "held_back" else self.efficiency.unrecorded():
                    held, right, labelled = self._losses(model, at.dataset, at.held)
                held_swapped, seen, seen_swapped = held, torch.empty(0), torch.empty(0)
                if at.swapped is not None and not rule.armed:
                    with self.efficiency.unrecorded():
                        held_swapped = self._swapped_losses(model, at.swapped[0], len(held))
                        seen, _, _ = self._losses(model, self.train_dataset, at.seen)
                        seen_swapped = self._swapped_losses(model, at.swapped[1], len(seen))
            numbers.restore()
            model.train()
        run.looked = self.state.global_step
        losses = held[labelled], held_swapped[labelled], seen, seen_swapped
        suspects = self._mislabelled(run) if at.source == "held_back" else 0.0
        best = rule.add(Look(epoch, *losses, float(right[labelled].mean())), suspects)
        self._log_look(*rule.curve[-1][1:])
        if best and self._writes:
            with self.efficiency.timed("checkpoints"):
                save_values(self._kept, run.average)

    def _log_look(self, loss: float, accuracy: float) -> None:
        due = self.control.should_log  # an entry of any kind clears it, and the step's own is still to come
        self.log({"geko/held_out_loss": loss, "geko/held_out_accuracy": accuracy})
        self.control.should_log = due

    def _mislabelled(self, run: StoppingRun) -> float:
        """Share of the training samples that the noise guard holds back."""
        quarantined = self._planned().state.quarantined
        return float(quarantined.count_nonzero()) / max(len(quarantined) - len(run.held), 1)

    def _losses(self, model: nn.Module, dataset: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n,) each for `ids` (ascending): mean loss, whether every token is right, whether there is a label."""
        sums = torch.zeros(3, len(ids), dtype=torch.float64, device=self.args.device)
        for stats in self._forwards(model, ids, dataset, update=False):
            real = (stats.sample_ids >= 0) & (stats.num_tokens > 0)
            places = torch.searchsorted(ids.to(real.device), stats.sample_ids[real])
            right = stats.accuracy[real] > 1 - 1e-6
            sums[:, places] = torch.stack([stats.loss[real].double(), right.double(), torch.ones_like(places).double()])
        if self.efficiency.reduce is not None:
            self.efficiency.reduce(sums)
        loss, right, labelled = sums.cpu().unbind()
        return loss, right, labelled > 0

    def _swapped_losses(self, model: nn.Module, swapped: Swapped, size: int) -> Tensor:
        """(size,) mean losses of the made-up items, at the index of their samples; NaN for a sample without one."""
        losses = torch.full((size,), torch.nan, dtype=torch.float64)
        losses[swapped.places] = self._losses(model, swapped.items, torch.arange(len(swapped.items)))[0]
        return losses

    def _forwards(self, model: nn.Module, ids: Tensor, dataset: Any, update: bool = True) -> Iterator[SampleStats]:
        raise NotImplementedError

    # Averaged weights for others

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside the context the model has the averaged weights, if a run is training."""
        average = self._stopping.average if self._stopping is not None and self.is_in_train else None
        if average is None:
            yield
            return
        _reshard(self.model)
        with average.in_place():
            try:
                yield
            finally:
                _reshard(self.model)  # drops parameters gathered from the averaged shards

    def evaluate(self, *args: Any, **named: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; during a run with `auto_stop`, of its averaged weights."""
        with self._averaged():
            return super().evaluate(*args, **named)

    def predict(self, *args: Any, **named: Any) -> Any:
        """As `Trainer.predict`; during a run with `auto_stop`, with its averaged weights."""
        with self._averaged():
            return super().predict(*args, **named)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; during a run with `auto_stop`, of its averaged weights."""
        run = self._stopping
        if run is not None and _internal_call and output_dir is not None and self._writes:  # of a checkpoint
            save_run(Path(output_dir), self._shard, run.average, run.state_dict(), self._kept)
        with self._averaged():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._averaged() if self.is_fsdp_enabled else nullcontext():  # saves the model too
            super()._save_optimizer_and_scheduler(output_dir)

    # Files

    @property
    def _several(self) -> bool:
        return self.args.world_size > 1 and dist.is_initialized()

    @property
    def _shard(self) -> int | None:
        """The number of this process if each holds other weights, else None."""
        return self.args.process_index if self.is_fsdp_enabled else None

    @property
    def _writes(self) -> bool:
        return self._shard is not None or self.is_world_process_zero()

    @property
    def _kept(self) -> Path:
        return path_of(self._get_output_dir(trial=self._trial), KEPT, self._shard)

    def _stopping_report(self, skipped_rows: Sequence[int]) -> dict[str, Any]:
        if self._stopping is None:
            return {}
        report = self._stopping.report(skipped_rows)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            report["why"] += " Then load_best_model_at_end loaded the best checkpoint's weights instead."
            report["kept"] = None
        return {"stopping": report}


def _reshard(model: nn.Module) -> None:
    """Make FSDP2 drop the parameters that it has gathered, so that it gathers them again from the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
