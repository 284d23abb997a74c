"""`load_dataset`: data in the usual file formats, encoded for a trainer."""

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

    Reads the same data as `geko train --data`. docs/data.md describes the formats, which tokens of each are trained,
    and how records longer than `max_length` are cut. For classification, pad with `DataCollatorWithPadding` and give
    the model `num_labels=len(dataset.class_names)`.

    Args:
        data: a file, a folder, a directory written by `Dataset.save_to_disk` or a hub name `owner/name`; or an iterable
            of records, each a mapping, such as a `datasets.Dataset`.
        tokenizer: of Transformers; conversations use its chat template.
        max_length: the most tokens of an item, at least 2.
        label_column: the column with the class, beside `text`, if it is not `label`.
        class_names: `model.config.id2label` of a model that already has classes, whose order is kept.

    Raises:
        TypeError, ValueError: `data` or `max_length` is of another kind.
        DataError (a ValueError): the data do not exist or have none of the formats; names the record.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length must be an integer of at least 2, got {max_length!r}")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be a tokenizer of Transformers, got {tokenizer!r}: AutoTokenizer makes one")
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
    """`encode`, with `notes`, in which `limit` is the name of `max_length`.

    Raises:
        DataError: no record has a token to train.
    """
    encoded = encode(records, tokenizer, max_length, labels)
    encoded.notes = [*records.notes, *encoding_notes(records, encoded, limit)]
    if not len(encoded):
        raise DataError(
            f"{records.source}: none of the {len(records.rows):,} records has a token to train within {limit}: raise "
            "it, and check that conversations have turns of the assistant"
        )
    left_out = set(encoded.skipped_rows)
    encoded.excerpts = [told for row, told in enumerate(excerpts_of(records)) if row not in left_out]
    return encoded
