"""Sample ids for `observe`: which sample each row or token of the trainer's batches belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_datasets_available

from geko_kernels.training.data import IGNORED, Collator, IdCollator, IdDataset, Identified, label_of

LENGTHS = "seq_lengths"  # TRL's column of packed rows: the length of each sequence in the row


class Samples:
    """The samples of a dataset: its rows, or the sequences in its rows if they have `seq_lengths`.

    Attributes:
        first: (rows + 1,) int64, the first sample of each row; None if a row is a sample.
    """

    def __init__(self, dataset: Any) -> None:
        self.first: Tensor | None = None
        self.rows = len(dataset)
        lengths = _lengths(dataset)
        if lengths is not None:
            self.first = torch.tensor([0, *map(len, lengths)]).cumsum(0)

    def __len__(self) -> int:
        return self.rows if self.first is None else int(self.first[-1])

    def places(self) -> tuple[list[int], list[int]]:
        """For each sample of packed rows: its row of the dataset, and its position in the row."""
        assert self.first is not None
        counts = self.first.diff()
        rows = torch.arange(self.rows).repeat_interleave(counts)
        return rows.tolist(), (torch.arange(len(self)) - self.first[rows]).tolist()


def _lengths(dataset: Any) -> Any:
    """The column `seq_lengths`, if there is one; items of a dataset that may compute them are not read."""
    if LENGTHS in (getattr(dataset, "column_names", None) or ()):
        return dataset[LENGTHS]
    plain = isinstance(dataset, list | tuple) and isinstance(dataset[0], Mapping) and LENGTHS in dataset[0]
    return [item[LENGTHS] for item in dataset] if plain else None


class ObservingCollator(IdCollator):
    """`IdCollator` with the ids of `Samples`: for packed rows one id a token, by `seq_lengths`.

    Raises:
        ValueError: a row has several samples, and `position_ids` do not show that they are kept apart, or there is no
            `seq_lengths`.
    """

    def __init__(self, collator: Collator, samples: Samples, label_names: Sequence[str]) -> None:
        given: Any = collator if samples.first is None else _Packed(collator, samples.first, label_names)
        super().__init__(given, label_names=label_names)

    def __call__(self, features: Sequence[Identified]) -> MutableMapping[str, Any]:
        batch = super().__call__(features)
        name = label_of(batch, self.label_names)
        assert name is not None  # checked by IdCollator
        _check_positions(batch, torch.as_tensor(batch[name]))
        return batch


class _Packed:
    """The collator, with one id for each token of its rows."""

    def __init__(self, collator: Collator, first: Tensor, label_names: Sequence[str]) -> None:
        self.collator, self.first, self.label_names = collator, first, label_names

    def __call__(self, items: list[Any], sample_ids: list[int]) -> Any:
        batch = self.collator(items)
        name = label_of(batch, self.label_names)
        if name is None:
            return batch  # IdCollator raises for it
        rows = [self._of_row(item, row) for item, row in zip(items, sample_ids, strict=True)]
        shape = tuple(torch.as_tensor(batch[name]).shape)
        total = sum(map(len, rows))
        ids = torch.full(shape, -1)
        if len(shape) == 2 and shape[0] == 1 and shape[1] >= total:  # joined end to end
            ids[0, :total] = torch.cat(rows)
        elif len(shape) == 2 and shape[0] == len(rows) and shape[1] >= max(map(len, rows)):
            for place, row in enumerate(rows):
                ids[place, : len(row)] = row
        else:
            raise ValueError(
                f"observe: the data collator made labels of shape {shape} out of {len(rows)} rows of {LENGTHS} "
                f"{[item[LENGTHS] for item in items]}, so it is unknown which token belongs to which sequence"
            )
        batch["sample_ids"] = ids
        return batch

    def _of_row(self, item: Any, row: int) -> Tensor:
        lengths = torch.as_tensor(item[LENGTHS])
        ids = torch.arange(len(lengths)) + self.first[row] if row >= 0 else torch.full_like(lengths, -1)
        return ids.repeat_interleave(lengths)


def _check_positions(batch: MutableMapping[str, Any], labels: Tensor) -> None:
    ids, positions = batch["sample_ids"], batch.get("position_ids")
    if ids.dim() == 1:
        mask = batch.get("attention_mask")
        if positions is not None and labels.dim() == 2 and _restarts(torch.as_tensor(positions), labels, mask).any():
            raise ValueError(
                "observe needs to know the samples of a packed row: position_ids restart within a row, but the dataset "
                f"has no column {LENGTHS}; add it (for each row, a list of the lengths of its sequences)"
            )
        return
    if positions is None:
        raise ValueError(
            "observe needs one row a sample, or position_ids that restart with each sample: the data collator joined "
            "several samples in one row without them, so they attend to each other"
        )
    begins = (ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] >= 0)
    if bool((torch.as_tensor(positions)[:, 1:][begins] != 0).any()):
        raise ValueError(
            f"observe: position_ids do not restart where the next sample begins (according to {LENGTHS} or the lengths "
            "of input_ids), so it is unknown which token belongs to which sample"
        )


def _restarts(positions: Tensor, labels: Tensor, mask: Any) -> Tensor:
    """Where a position is 0 again after another token and before a label, so not in padding on either side."""
    if positions.shape != labels.shape:
        return torch.zeros(0, dtype=torch.bool)
    labelled = labels != IGNORED
    follow = labelled.flip(1).cumsum(1).flip(1) > 0
    token = torch.as_tensor(mask) != 0 if mask is not None else (positions > 0) | labelled
    token = token if token.shape == labels.shape else torch.ones_like(labelled)
    return (positions[:, 1:] == 0) & follow[:, 1:] & token[:, :-1]


def with_ids(
    trainer: Any,
    make: Callable[..., Any],
    samples: Samples,
    dataset: Any,
    description: str,
    batch_size: int,
    sampler_fn: Any,
    **rest: Any,
) -> Any:
    """The trainer's training dataloader from its own `make`, with `sample_ids` in the batches; same order."""
    collator = trainer.data_collator
    wrapped = collator
    if is_datasets_available() and hasattr(dataset, "remove_columns"):
        dataset = trainer._remove_unused_columns(dataset, description=description)
    else:
        wrapped = trainer._get_collator_with_removed_columns(collator, description=description)
    sampler = None if sampler_fn is None else lambda identified: sampler_fn(identified.dataset)
    trainer.data_collator = ObservingCollator(wrapped, samples, trainer.label_names or ["labels"])
    vars(trainer)["_get_collator_with_removed_columns"] = lambda given, description=None: given
    try:
        return make(IdDataset(dataset), description, batch_size, sampler, is_training=True, **rest)
    finally:
        trainer.data_collator = collator
        del vars(trainer)["_get_collator_with_removed_columns"]
