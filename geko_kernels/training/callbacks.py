"""The progress bar with the bucket shares."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback


class BucketBar(ProgressCallback):
    """Transformers' progress bar; its end moves with the plans, and it shows what share of the samples is where."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and self.training_bar.total != state.max_steps:
            self.training_bar.total = state.max_steps
            self.training_bar.refresh()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "geko_freeze" in logs:
            shares = (f"{name} {logs[f'geko_{name}']:.0%}" for name in ("freeze", "light", "focus", "hard"))
            self.training_bar.set_postfix_str(", ".join(shares))
