"""The progress bars, in terminals with the bucket shares, and the `epoch` of logs and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback


class BucketBar(ProgressCallback):
    """Transformers' progress bar, whose end follows the plans, with each bucket's share of the samples."""

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None and self.training_bar.total != state.max_steps:
            self.training_bar.total = state.max_steps
            self.training_bar.refresh()

    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(*args, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "geko/freeze" in logs:
            shares = (f"{name} {logs[f'geko/{name}']:.0%}" for name in ("freeze", "light", "focus", "hard"))
            self.training_bar.set_postfix_str(", ".join(shares))


class NotebookBarEnd(TrainerCallback):
    """Makes the end of Transformers' bar in notebooks, a `NotebookProgressCallback`, follow the plans."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar.training_tracker is not None:
            self.bar.training_tracker.total = state.max_steps


class RunEpoch(TrainerCallback):
    """Sets `state.epoch` to `epoch()` after each step, before other callbacks and the log see it.

    Trainer takes each epoch for a whole pass over the data. Log steps and saves that bypassed GEKO are reported to
    `need(hook, otherwise)`.
    """

    def __init__(self, epoch: Callable[[], float], need: Callable[[str, str], None]) -> None:
        self.epoch, self.need = epoch, need

    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.need("log", "its figures are not in the log")

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.need("_save_checkpoint", "the checkpoint has no learning state")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.epoch = self.epoch()
