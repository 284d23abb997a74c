"""`GEKOTrainingArguments`: Transformers' arguments and the few that GEKO adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class GEKOTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and:

    probe_batch_size: samples per device in a forward-only probe batch; 4 * per_device_train_batch_size if left out.
        `GEKOConfig.probe_batch_size`, where it is given, is taken instead.
    shift_labels: whether position t predicts label t + 1. Left out: as in the model's own loss, which GEKOTrainer asks
        it for; for a module without one yes where labels are (B, S), no where they are (B,). Given: the cross-entropy
        of the logits is trained, whatever loss the model has of its own.
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
