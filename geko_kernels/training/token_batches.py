"""Batches sized by tokens: the length of each sample, and how the collator's batches count tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, TrainingArguments

from geko_kernels.training.data import takes_ids
from geko_kernels.training.planning.packing import Fill, Packer
from geko_kernels.training.random_numbers import fixed_random_numbers

_ROWS = 10_000  # rows of an Arrow table read at a time


def check_token_batches(args: TrainingArguments, batch_tokens: int | None) -> None:
    """Refuse settings that conflict with batches made of packs."""
    name, config = "packing" if batch_tokens is None else "batch_tokens", args.accelerator_config
    others = {"dispatch_batches": config.dispatch_batches}
    if batch_tokens is not None:
        others |= {"auto_find_batch_size": args.auto_find_batch_size, "split_batches": config.split_batches}
        if getattr(args, "probe_batch_size", None) is not None:
            raise ValueError(
                "probe_batch_size cannot be combined with batch_tokens, which also sets the size of probe batches: "
                "leave out one of them"
            )
    for other, given in others.items():
        if given:
            raise ValueError(f"{name} cannot be combined with {other}={given!r}: leave one of them out")


def packer_of(lengths: Tensor, collator: Any, batch_tokens: int | None, row_tokens: int | None) -> Packer | None:
    """The packer of plans: into rows by best fit with `row_tokens`, else into batches; None if batches count samples.

    With both, packs are batches. A collator is assumed to pad unless it says that it joins rows; in either case a batch
    has at most `batch_tokens` tokens.

    Raises:
        ValueError: a sample is longer than a pack.
    """
    tokens = batch_tokens or row_tokens
    if tokens is None:
        return None
    joins = isinstance(collator, DataCollatorWithFlattening) or takes_ids(collator)
    joins |= bool(getattr(collator, "padding_free", False))  # TRL's
    fill = Fill.BEST_FIT if row_tokens is not None else Fill.IN_ORDER if joins else Fill.PADDED
    multiple = getattr(collator, "pad_to_multiple_of", None) or 1
    packer = Packer(lengths, tokens, fill, 1 if batch_tokens is None else multiple)  # not each row is padded
    packer.check("max_length" if batch_tokens is None else "batch_tokens")
    return packer


def sample_lengths(dataset: Any, length_column: str = "length") -> Tensor:
    """(N,) int64 tokens of each item: of its `input_ids`, or else from `length_column`.

    A datasets.Dataset is read from its Arrow columns, unless it has a transform, which makes items when they are read.
    Any other dataset is read item by item.

    Raises:
        ValueError: an item has neither; names it.
    """
    columns = getattr(dataset, "column_names", None)
    kind = getattr(dataset, "format", None)
    if isinstance(columns, list) and isinstance(kind, dict) and kind.get("type") != "custom":
        if "input_ids" in columns:
            return _arrow_lengths(dataset)
        if length_column in columns:
            return torch.tensor(dataset.with_format(None)[length_column][:], dtype=torch.int64)
    with fixed_random_numbers():  # leaves those of training unchanged
        return torch.tensor([_length(dataset, row, length_column) for row in range(len(dataset))], dtype=torch.int64)


def _arrow_lengths(dataset: Any) -> Tensor:
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    rows = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=_ROWS)
    parts = [pc.fill_null(pc.list_value_length(table.column("input_ids")), -1).to_numpy() for table in rows]
    lengths = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    if int(lengths.min()) < 0:
        raise ValueError(f"train_dataset[{int(lengths.argmin())}] has no input_ids, which batch_tokens counts")
    return lengths


def _length(dataset: Any, row: int, length_column: str) -> int:
    item = dataset[row]
    tokens = item.get("input_ids") if isinstance(item, Mapping) else None
    if tokens is None and isinstance(item, Mapping) and length_column in item:
        return int(item[length_column])
    if tokens is None:
        found = f"the keys {sorted(item)}" if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(
            f"batch_tokens counts the input_ids of each item, but train_dataset[{row}] has {found}: tokenise the "
            f"dataset, add a column {length_column!r}, or leave batch_tokens out"
        )
    return len(tokens)
