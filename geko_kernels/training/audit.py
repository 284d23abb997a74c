"""GEKO works through Trainer's hooks. If a subclass or another release of Transformers skips one, training stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from geko_kernels.training.overrides import METHODS

_MAKE_BATCHES = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader", "_get_collator_with_removed_columns")
_TRAIN_BATCHES = ("compute_loss", "training_step", "_prepare_inputs")


def bypassed(trainer: Any, what: str, hooks: tuple[str, ...]) -> RuntimeError:
    """The error that says `what` went wrong; names the replaced ones of `hooks`, and what each has to do."""
    own = [(_replaced_by(type(trainer), hook), hook) for hook in hooks]
    reasons = [f"{cls.__name__}.{hook} {METHODS[hook].advice}" for cls, hook in own if cls is not None]
    if not reasons:
        one = len(hooks) == 1
        hooked, them = (f"{hooks[0]} is not", "it") if one else (f"none of {', '.join(hooks)} is", "them")
        reasons = [
            f"{hooked} replaced by a subclass, so this Trainer (Transformers {transformers.__version__}) does not call "
            f"{them} as geko_kernels expects: install a release of Transformers that geko_kernels was tested with"
        ]
    return RuntimeError(f"GEKOTrainer: {what}. {'; '.join(reasons)}")


def _is_users(cls: type, hook: str) -> bool:
    """Whether one of the user's classes, below or above GEKO's, defines `hook`."""
    owners = [base for base in cls.__mro__ if hook in vars(base)]
    return any(base.__module__.split(".")[0] not in ("geko_kernels", "transformers", "trl") for base in owners)


def _replaced_by(cls: type, hook: str) -> type | None:
    """The class outside geko_kernels and Transformers whose `hook` runs; None if theirs runs."""
    owner = next((base for base in cls.__mro__ if hook in vars(base)), None)
    if owner is None or owner.__module__.split(".")[0] in ("geko_kernels", "transformers"):
        return None
    return owner


class Audit:
    """Checks during a run that every epoch is planned, and that the visits of every training batch are counted.

    Hooks report their calls with `saw`. Code that depends on a hook calls `need`, as Trainer may no longer call the
    hook. `check` finds a skipped hook within a step. Nothing runs on the device.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.fetched = 0  # training batches
        self.called: set[str] = set()  # hooks that Trainer has called in this run

    def saw(self, *hooks: str) -> None:
        """Record that Trainer has called `hooks`."""
        self.called.update(hooks)

    def need(self, hook: str, otherwise: str, caller: str | None = None) -> None:
        """Raise an error that says `otherwise` if `hook` was not called.

        `caller` is the hook that should call it. There is no error if the user replaces `hook` or `caller`.
        """
        if hook in self.called:
            return
        if caller is None or not any(_is_users(type(self.trainer), each) for each in (hook, caller)):
            raise bypassed(self.trainer, otherwise, (hook,))

    def planned(self) -> None:
        """Check at the start of the run, once the loader exists."""
        if self.trainer.sampler is None:
            raise bypassed(self.trainer, "training batches are not drawn by its sampler", _MAKE_BATCHES)
        self.need("_inner_training_loop", "the run did not begin with it")
        self.need("get_train_dataloader", "training batches are not those of its dataset")
        self.need("_get_collator_with_removed_columns", "its own collator was not made: a batch has no 'sample_ids'")

    def fetch(self, batches: list[Any]) -> None:
        """Check `batches` that are about to be trained."""
        trainer, sampler = self.trainer, self.trainer.sampler
        self.fetched += len(batches)
        if trainer.efficiency.open_epoch is None:
            raise bypassed(trainer, "the epoch was not planned", ("_run_epoch", "set_initial_training_values"))
        self.need("_run_epoch", "the epoch was not planned")
        for batch in batches:
            if not isinstance(batch, Mapping) or "sample_ids" not in batch:
                raise bypassed(trainer, "a training batch has no 'sample_ids'", _MAKE_BATCHES)
        dispatched = trainer.args.accelerator_config.dispatch_batches  # other processes' samplers are not used
        if batches and sampler.position == 0 and not sampler.handed_out and not dispatched:
            raise bypassed(trainer, "training batches are not drawn by its sampler", _MAKE_BATCHES)

    def check(self) -> None:
        """Check that everything fetched so far has been trained."""
        counted = self.trainer.efficiency.batches
        if counted < self.fetched:
            what = f"{self.fetched - counted} of {self.fetched} training batches were trained without its loss"
            raise bypassed(self.trainer, what, _TRAIN_BATCHES)

    def end(self, steps: int) -> None:
        """Check an epoch, or the run, that ended after `steps` optimizer steps; batches may be left over."""
        if steps and not self.fetched:
            raise bypassed(
                self.trainer, "training batches did not pass through it", ("get_batch_samples", "_run_epoch")
            )
        if self.fetched and not self.trainer.efficiency.batches:
            self.check()
