"""Data as people have them, ready for a trainer: `load_dataset`."""

from __future__ import annotations

from typing import Any

from geko_kernels.training.formats.encode import EncodedDataset, encode, encoding_notes
from geko_kernels.training.formats.errors import DataError
from geko_kernels.training.formats.excerpts import excerpts_of
from geko_kernels.training.formats.labels import Classes, find_classes
from geko_kernels.training.formats.records import Records, read_records

__all__ = [
    "Classes",
    "DataError",
    "EncodedDataset",
    "Records",
    "encode_records",
    "find_classes",
    "load_dataset",
    "read_records",
]


def load_dataset(
    data: Any,
    tokenizer: Any,
    max_length: int = 1024,
    *,
    label_column: str = "",
    class_names: dict[int, str] | None = None,
) -> EncodedDataset:
    """The items of `data` with `input_ids` and `labels`, for `GEKOTrainer(train_dataset=...)` or any other Trainer.

    What `geko train --data` reads, in the same way: docs/data.md tells the formats, what is trained of each, and what
    of a record is cut where it is longer than `max_length`. For classes pad with `DataCollatorWithPadding`, and give
    the model `num_labels=len(dataset.class_names)`.

    Args:
        data: a file, a folder, a directory written by `Dataset.save_to_disk` or a hub name `owner/name`; or records,
            one mapping each, as of a `datasets.Dataset`.
        tokenizer: of Transformers; conversations take its chat template.
        max_length: most tokens of an item, at least 2.
        label_column: the name of the class beside `text`, where it is not `label`.
        class_names: `model.config.id2label` of a model that has classes already, whose order is kept.

    Raises:
        TypeError, ValueError: `data` or `max_length` is none of these.
        DataError: a ValueError; there are no such data, or they are in none of the formats; names the record.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length must be an integer of at least 2, got {max_length!r}")
    records = read_records(data, label_column)
    classes = find_classes(records, class_names or {}) if records.is_classification else None
    numbers = classes.numbers(records) if classes else None
    encoded = encode_records(records, tokenizer, max_length, numbers, f"max_length={max_length}")
    if classes:
        encoded.class_names = classes.names
        encoded.notes[:0] = [classes.note] if classes.note else []
    return encoded


def encode_records(
    records: Records, tokenizer: Any, max_length: int, labels: list[int] | None, limit: str
) -> EncodedDataset:
    """`encode`, with `notes`; `limit` says in them what `max_length` is.

    Raises:
        DataError: no record has a token to train.
    """
    encoded = encode(records, tokenizer, max_length, labels)
    encoded.notes = [*records.notes, *encoding_notes(records, encoded, limit)]
    if not len(encoded):
        raise DataError(
            f"{records.source}: none of the {len(records.rows):,} records has a token to train within {limit}: raise "
            "it, and look whether conversations have turns of the assistant"
        )
    left_out = set(encoded.skipped_rows)
    encoded.excerpts = [told for row, told in enumerate(excerpts_of(records)) if row not in left_out]
    return encoded
