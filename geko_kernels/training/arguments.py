"""`GEKOTrainingArguments`: Transformers' arguments and those that GEKO adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class GEKOTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and:

    probe_batch_size: samples per device in a forward-only probe batch; 4 * per_device_train_batch_size by default.
        `GEKOConfig.probe_batch_size`, if set, takes precedence.
    shift_labels: whether position t predicts label t + 1. None: as in the model's own loss, which GEKOTrainer runs to
        find out; for a module without a loss, True for labels (B, S) and False for labels (B,). With True or False the
        cross-entropy of the logits is trained, whatever the model's own loss is.
    """

    probe_batch_size: int | None = field(
        default=None, metadata={"help": "Samples per device in a forward-only probe batch (4 x the training batch)."}
    )
    shift_labels: bool | None = field(
        default=None,
        metadata={"help": "Whether position t predicts label t + 1 (default: as in the model's own loss)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        batch, shift = self.probe_batch_size, self.shift_labels
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
            raise ValueError(f"probe_batch_size must be an integer of at least 1, or None, got {batch!r}")
        if shift is not None and not isinstance(shift, bool):
            raise ValueError(f"shift_labels must be True, False or None, got {shift!r}")
