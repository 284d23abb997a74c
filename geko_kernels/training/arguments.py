"""`GEKOTrainingArguments`: Transformers' arguments and the few that GEKO adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class GEKOTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and:

    probe_batch_size: samples per device in a forward-only probe batch; 4 * per_device_train_batch_size if left out.
    shift_labels: whether position t predicts label t + 1. Left out: as Transformers does for its own models; for any
        other module yes where labels are (B, S), no where they are (B,).
    """

    probe_batch_size: int | None = field(
        default=None, metadata={"help": "Samples per device in a forward-only probe batch (4 x the training batch)."}
    )
    shift_labels: bool | None = field(
        default=None, metadata={"help": "Whether position t predicts label t + 1 (default: as the model's class does)."}
    )
