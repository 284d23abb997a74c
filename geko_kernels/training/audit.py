"""GEKO works by hooks of Trainer. A subclass or another Transformers may pass them by: then training stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

_ADVICE = {
    "get_train_dataloader": "has to hand on the batches of super().get_train_dataloader(), 'sample_ids' included",
    "_get_train_sampler": "has to return the sampler of super()._get_train_sampler()",
    "_get_dataloader": "has to call super()._get_dataloader()",
    "_get_collator_with_removed_columns": "has to call super()._get_collator_with_removed_columns()",
    "compute_loss": "has to call super().compute_loss(model, inputs, ...) with the batch as it came, and may add to it",
    "training_step": "has to call super().training_step()",
    "_prepare_inputs": "has to leave 'sample_ids' in the batch",
    "get_batch_samples": "has to call super().get_batch_samples()",
    "_inner_training_loop": "has to call super()._inner_training_loop()",
    "_run_epoch": "has to call super()._run_epoch()",
    "set_initial_training_values": "has to call super().set_initial_training_values()",
}
_MAKE_BATCHES = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader", "_get_collator_with_removed_columns")
_TRAIN_BATCHES = ("compute_loss", "training_step", "_prepare_inputs")


def bypassed(trainer: Any, what: str, hooks: tuple[str, ...]) -> RuntimeError:
    """The error for `what` went wrong; it names those of `hooks` that a subclass replaces, and what they have to do."""
    own = [(_replaced_by(type(trainer), hook), hook) for hook in hooks]
    reasons = [f"{cls.__name__}.{hook} {_ADVICE[hook]}" for cls, hook in own if cls is not None]
    if not reasons:
        hooked = ", ".join(hooks)
        reasons = [
            f"none of {hooked} is replaced by a subclass, so this Trainer (Transformers {transformers.__version__}) "
            "does not call them as geko_kernels knows it: install the release of Transformers that it was tested with"
        ]
    return RuntimeError(f"GEKOTrainer: {what}. {'; '.join(reasons)}")


def _replaced_by(cls: type, hook: str) -> type | None:
    """The class outside geko_kernels and Transformers whose `hook` an instance runs; None where it runs theirs."""
    owner = next((base for base in cls.__mro__ if hook in vars(base)), None)
    if owner is None or owner.__module__.split(".")[0] in ("geko_kernels", "transformers"):
        return None
    return owner


class Audit:
    """Follows one run: every epoch has to be planned, and the visits of every training batch counted.

    `check` tells within a step. It costs nothing on the device.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.fetched = 0  # training batches

    def planned(self) -> None:
        """The run is about to begin: the loader has been made."""
        if self.trainer.sampler is None:
            raise bypassed(self.trainer, "training batches are not drawn by its sampler", _MAKE_BATCHES)

    def fetch(self, batches: list[Any]) -> None:
        """`batches` are about to be trained."""
        trainer, sampler = self.trainer, self.trainer.sampler
        self.fetched += len(batches)
        if trainer.efficiency.open_epoch is None:
            raise bypassed(trainer, "the epoch was not planned", ("_run_epoch", "set_initial_training_values"))
        for batch in batches:
            if not isinstance(batch, Mapping) or "sample_ids" not in batch:
                raise bypassed(trainer, "a training batch has no 'sample_ids'", _MAKE_BATCHES)
        dispatched = trainer.args.accelerator_config.dispatch_batches  # the other processes' samplers rest
        if batches and sampler.position == 0 and not sampler.handed_out and not dispatched:
            raise bypassed(trainer, "training batches are not drawn by its sampler", _MAKE_BATCHES)

    def check(self) -> None:
        """What was fetched so far has been trained."""
        counted = self.trainer.efficiency.batches
        if counted < self.fetched:
            what = f"{self.fetched - counted} of {self.fetched} training batches were trained without its loss"
            raise bypassed(self.trainer, what, _TRAIN_BATCHES)

    def end(self, steps: int) -> None:
        """An epoch, or the run, has ended after `steps` optimizer steps of this process; batches may be left over."""
        if steps and not self.fetched:
            raise bypassed(
                self.trainer, "training batches did not pass through it", ("get_batch_samples", "_run_epoch")
            )
        if self.fetched and not self.trainer.efficiency.batches:
            self.check()
