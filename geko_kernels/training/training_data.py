"""A trainer's training data: batches with sample ids, in the order of a `GEKOSampler`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from geko_kernels.training.data import LABEL_KEYS, IdCollator, IdDataset
from geko_kernels.training.kept_columns import check_kept, without_columns
from geko_kernels.training.planning.packing import Packer
from geko_kernels.training.planning.sampler import GEKOSampler
from geko_kernels.training.random_numbers import fixed_random_numbers
from geko_kernels.training.stopping.mixin import StoppingMixin
from geko_kernels.training.token_batches import packer_of, sample_lengths
from geko_kernels.training.weights import drawable

_TRAINING = "Training"  # Trainer's name for its training dataloader


class DataMixin(StoppingMixin):
    """`transformers.Trainer` whose training batches are drawn by a `GEKOSampler` and have `sample_ids`."""

    label_names: list[str]
    _signature_columns: list[str]
    _weight_columns: tuple[str, ...]  # those of the training data
    _row_tokens: int | None = None  # the most tokens of a packed row; None without packing
    _present: Tensor | None = None  # (P,) int32 ids of train_dataset that can be drawn; None: all
    _drawn_from: tuple[Any, Tensor | None] | None = None  # the dataset, and those of `_present` whose weight is not 0
    _lengths: tuple[Any, Tensor] | None = None  # the dataset, and the number of tokens of each item

    def get_train_dataloader(self) -> DataLoader:
        self._audit.saw("get_train_dataloader")
        if self.train_dataset is None:
            raise ValueError("GEKOTrainer: training needs a train_dataset")
        batch_size = 1 if self.config.batch_tokens else self._train_batch_size  # a pack is a batch
        return self._id_dataloader(batch_size, self._get_train_sampler, self.train_dataset)

    def _id_dataloader(self, batch_size: int, sampler_fn: Any, dataset: Any) -> DataLoader:
        if hasattr(dataset, "remove_columns"):  # a datasets.Dataset: unused columns are not decoded
            dataset = self._without_unused_columns(dataset)
        return self._get_dataloader(IdDataset(dataset), _TRAINING, batch_size, sampler_fn, is_training=True)

    def _without_unused_columns(self, dataset: Any) -> Any:
        self._set_signature_columns_if_needed()
        before = self._signature_columns
        self._signature_columns = [*before, *(name for name in self._weight_columns if name in dataset.column_names)]
        try:
            kept = self._remove_unused_columns(dataset, description="training")
        finally:
            self._signature_columns = before
        check_kept(dataset.column_names, kept.column_names, self._names_of_labels(), type(self.model).__name__)
        return kept

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if description == _TRAINING:
            self._audit.saw("_get_collator_with_removed_columns")
        remover = super()._get_collator_with_removed_columns(data_collator, description)
        if description != _TRAINING:
            return remover
        remove = getattr(remover, "_remove_columns", None)
        if remove is not None:
            remove = partial(without_columns, remove, self._names_of_labels(), type(self.model).__name__)
        return IdCollator(data_collator, remove, self.label_names, self._weight_columns)

    def _names_of_labels(self) -> frozenset[str]:
        return frozenset((*self.label_names, *LABEL_KEYS, *self._weight_columns))

    def _drawable(self) -> Tensor | None:
        data = self.train_dataset
        if self._drawn_from is None or self._drawn_from[0] is not data:
            self._drawn_from = data, drawable(data, self._weight_columns, self._present)
        return self._drawn_from[1]

    def _packer(self) -> Packer | None:
        if not (self.config.batch_tokens or self._row_tokens):
            return None
        data = self.train_dataset
        if self._lengths is None or self._lengths[0] is not data:
            self._lengths = data, sample_lengths(data, self.args.length_column_name)
        return packer_of(self._lengths[1], self.data_collator, self.config.batch_tokens, self._row_tokens)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GEKOSampler:
        args, state = self.args, self.sample_state
        assert state is not None
        if args.max_steps <= 0 and args.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs must be above 0, got {args.num_train_epochs}")
        if self._train_batch_size < 1:
            raise ValueError(f"per_device_train_batch_size must be at least 1, got {self._train_batch_size}")
        if args.max_steps == 0:
            raise ValueError("max_steps must be at least 1, or -1 for num_train_epochs to count, got 0")
        lengths = None
        if args.train_sampling_strategy == "group_by_length":
            with fixed_random_numbers():  # the same lengths in all processes, if items are random
                lengths = torch.tensor(super()._get_train_sampler(self.train_dataset).lengths)
        step = self.get_total_train_batch_size(args)
        split = args.accelerator_config.split_batches
        self._micro_batch = self._train_batch_size if split else step // args.gradient_accumulation_steps
        if self.config.batch_tokens is not None:
            self._micro_batch = args.world_size
        even = args.world_size > 1 and not args.dataloader_drop_last
        sampler = GEKOSampler(
            state,
            1.0 if args.max_steps > 0 else args.num_train_epochs,  # a run sets its exact length
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            pad_to=self._micro_batch if even else 1,
            lengths=lengths,
            window=step * max(1, min(len(state) // (4 * step), 50)),  # as in Trainer
            present=self._drawable(),
            packer=self._packer(),
        )
        if self.sampler is None:  # another loader during a run does not replace the run's sampler
            self.sampler = sampler
        return sampler
