"""The learning state: one row per sample, kept as flat tensors on the training device."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geko_kernels._files import load_tensors, save_tensors
from geko_kernels.columns import COLUMNS, NAMES, SAVED
from geko_kernels.config import Bucket, GEKOConfig, check_config
from geko_kernels.reference.visits import quality_of
from geko_kernels.state_checks import check_column, check_columns, check_streaks
from geko_kernels.sync import sync_rows_
from geko_kernels.zero_share import NO_LOOK, ZeroShare

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing in some builds of torch

NO_ERROR = torch.iinfo(torch.int64).max
_FORMAT = "geko_kernels.SampleState"
# 2 added a checksum; 3 has "bucket_weights" in order of Bucket, earlier ones "weights" (HARD, FOCUS, LIGHT, FREEZE)
_VERSION, _EARLIER = "3", ("2",)
_METADATA = {"format", "config", "upstream"}  # of files of the first layout, without version and checksum


class SampleState:
    """The statistics of each of `num_samples` training samples, which `weighted_loss` reads and updates.

    Columns, indexed by sample id (40 bytes a sample in all; `geko_kernels.columns` declares them):
        q_value (N,) float32: moving average of how small the loss is, in [0, 1]; starts at 0.5.
        confidence (N,) float32: mean token confidence at the last visit.
        loss_history (N, 5) float32: mean token losses of the last visits in nats, newest last.
        times_seen (N,) int32: visits counted.
        bucket (N,) uint8: a `Bucket`; FOCUS before the first visit.
        wrong_streak (N,) uint8: how many visits in a row, up to 255, the sample has not been correct.
        quarantined (N,) bool: weight 0 whatever the bucket (set by the sampler's noise guard).
        changed (N,) bool: updated since the last `sync`.
    `columns` lists them, as every op takes them.
    Derived: `quality` (N,) and `last_loss` (N,), infinite before the first visit.

    Use a state on one stream at a time. Sample ids at or above `num_samples` are flagged, see `check`.

    Args:
        num_samples: number of rows, at least 1.
        config: thresholds and rules; `GEKOConfig()` by default.
        device: the device of the logits.
    """

    q_value: Tensor
    confidence: Tensor
    loss_history: Tensor
    times_seen: Tensor
    bucket: Tensor
    wrong_streak: Tensor
    changed: Tensor
    claim: Tensor  # scratch: which visit writes a row
    quarantined: Tensor

    def __init__(
        self, num_samples: int, config: GEKOConfig | None = None, device: torch.device | str | int = "cpu"
    ) -> None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int):
            sized = hasattr(num_samples, "__len__")  # a dataset, which may be long
            got = f"{type(num_samples).__name__}; pass its length" if sized else repr(num_samples)
            raise TypeError(f"num_samples must be an int, got {got}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        check_config(config)
        self.num_samples = num_samples
        self.config = config or GEKOConfig()
        self.columns: list[Tensor] = []
        for name, (dtype, start, row, *_) in COLUMNS.items():
            self.columns.append(torch.full((num_samples, *row), start, dtype=dtype, device=device))
            super().__setattr__(name, self.columns[-1])
        self.device = self.q_value.device
        self.error = torch.full((), NO_ERROR, dtype=torch.int64, device=device)
        self.rules = rules_tensor(self.config, self.device)
        weights = (self.config.freeze_weight, *reversed(self.config.bucket_weights))
        self.weights = torch.tensor(weights, dtype=torch.float32, device=device)  # by Bucket

        # for prediction: the last upstream gradient; how many token gradients were (predicted right, corrected). What
        # share of the tokens has weight 0, by which both losses choose their path
        self.upstream = torch.ones((), dtype=torch.float32, device=device)
        self.predictions = torch.zeros(2, dtype=torch.int64, device=device)
        self.zero_share = ZeroShare()

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return f"SampleState(num_samples={self.num_samples}, device='{self.device}')"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COLUMNS:  # the list that the ops take has to follow
            check_column(name, value, getattr(self, name))
            self.columns[NAMES.index(name)] = value
        super().__setattr__(name, value)

    @property
    def bucket_weights(self) -> Tensor:
        """(4,) float32 on the device: the weight of each bucket in the next call, indexed by `Bucket`.

        Write into it (`[Bucket.HARD] = 5`, or `copy_` of four), or assign three numbers (HARD, FOCUS, LIGHT) as in the
        config and `MountainCurriculum`; that leaves FREEZE unchanged. Neither causes a recompilation.
        """
        return self.weights

    @bucket_weights.setter
    def bucket_weights(self, weights: Tensor | tuple[float, float, float]) -> None:
        if weights is self.weights:  # after `state.bucket_weights *= 2`
            return
        if not _are_numbers(weights):
            raise TypeError(f"bucket_weights must be assigned three numbers (HARD, FOCUS, LIGHT), got {weights!r}")
        if len(weights) != 3:
            raise ValueError(
                f"bucket_weights must be assigned three weights (HARD, FOCUS, LIGHT), got {len(weights)}; for all "
                "four use bucket_weights.copy_ in order of Bucket"
            )
        if isinstance(weights, Tensor):
            self.weights[Bucket.LIGHT :].copy_(weights.flip(0))
            return
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"bucket_weights must be three finite numbers >= 0 (HARD, FOCUS, LIGHT), got {weights}")
        for bucket, weight in zip((Bucket.HARD, Bucket.FOCUS, Bucket.LIGHT), weights, strict=True):
            self.weights[bucket].fill_(weight)  # unlike a copy from the host, this does not wait for the device

    @property
    def freeze_weight(self) -> Tensor:
        """() float32 on the device: the weight of FREEZE, 0 unless the config or a uniform phase sets another."""
        return self.weights[Bucket.FREEZE]

    @property
    def quality(self) -> Tensor:
        """(N,) float32: how steady each sample's last losses are, in [0, 1]; 1 before the second visit."""
        return quality_of(self.loss_history, self.times_seen, self.rules)

    @property
    def last_loss(self) -> Tensor:
        """(N,) float32: mean token loss at the last visit, in nats; infinite before the first."""
        return self.loss_history[:, -1].masked_fill(self.times_seen == 0, float("inf"))

    def bucket_counts(self) -> Tensor:
        """(4,) int64 on the device: samples per bucket, indexed by `Bucket`.

        Equal to `torch.bincount(state.bucket, minlength=4)`, without its host sync.
        """
        return torch.stack([(self.bucket == bucket).count_nonzero() for bucket in Bucket])

    def sync(self, group: ProcessGroup | None = None) -> None:
        """Copy the rows that any process of `group` has updated since the last sync to all; clears `changed`.

        Every process of the group calls it. If several have updated a row, the one with the most visits wins, among
        equals the highest rank. With one process, or without torch.distributed, nothing is sent.

        Args: group: a process group whose backend supports tensors on `device`; None is the default one.
        """
        if sync_rows_({name: getattr(self, name) for name in SAVED}, self.changed, self.claim, group):
            self.zero_share = ZeroShare()  # each process has another, and a checkpoint holds that of one

    def check(self) -> None:
        """Raise if a call since the last check was given a bad label or sample id; waits for the device.

        Raises:
            IndexError: names the first bad value (lowest position). The flag is cleared.
        """
        raise_flagged(self.error, self.num_samples)

    def state_dict(self) -> dict[str, Tensor]:
        """The saved columns by name, and `bucket_weights`; not copies."""
        return {**{name: getattr(self, name) for name in SAVED}, "bucket_weights": self.weights}

    def load_state_dict(self, columns: dict[str, Tensor]) -> None:
        """Load `state_dict()`, also an earlier release's ("weights" for "bucket_weights").

        Raises:
            ValueError: a column is missing, unknown, of the wrong shape, or holds an impossible value; names the column
                and the first such row. The state is then unchanged.
        """
        self._copy_in(columns, "state_dict")

    def _copy_in(self, columns: dict[str, Tensor], source: str) -> None:
        own, columns = self.state_dict(), _by_bucket(columns)
        check_columns(columns, own, source)
        for name, mine in own.items():
            mine.copy_(columns[name])
        self.changed.fill_(False)
        self.claim.zero_()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the config and a checksum.

        If it fails, or the process is killed meanwhile, the old file is still whole.
        """
        upstream = float(self.upstream)
        metadata = {
            "config": json.dumps(self.config.to_dict()),
            "upstream": str(upstream if math.isfinite(upstream) else 1.0),  # only a guess at the next one
            "zero_share": json.dumps(self.zero_share.values()),
        }
        save_tensors(path, _FORMAT, self.state_dict(), metadata, _VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | int = "cpu") -> SampleState:
        """The state that `save` wrote, also of an earlier release, with its config.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a state file, damaged, of a newer layout, or with an impossible value; names the file, the
                column and the first such row.
        """
        columns, metadata = load_tensors(path, _FORMAT, "SampleState.save", _VERSION, _EARLIER)
        if "config" not in metadata or "times_seen" not in columns:
            raise ValueError(f"{path} is a safetensors file, but not one that SampleState.save wrote")
        if "version" not in metadata and not metadata.keys() <= _METADATA:
            raise ValueError(f"{path} is damaged: it has metadata {sorted(metadata)}")
        try:
            config = GEKOConfig.from_dict(json.loads(metadata["config"]))
            upstream = float(metadata.get("upstream", 1))
            if not abs(upstream) <= torch.finfo(torch.float32).max:
                raise ValueError(f"upstream must be a finite float32, got {upstream}")
            state = cls(columns["times_seen"].numel(), config, device)
            state.zero_share = ZeroShare(json.loads(metadata["zero_share"]) if "zero_share" in metadata else NO_LOOK)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        state._copy_in(columns, str(path))
        check_streaks(columns, str(path))
        state.upstream.fill_(upstream)
        return state


def _by_bucket(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """`columns`, with an earlier release's "weights" (HARD, FOCUS, LIGHT, FREEZE) turned into "bucket_weights"."""
    weights = columns.get("weights")
    if not isinstance(weights, Tensor) or not weights.dim() or "bucket_weights" in columns:
        return columns
    rest = {name: column for name, column in columns.items() if name != "weights"}
    return {**rest, "bucket_weights": weights.flip(0)}


def _are_numbers(values: Any) -> bool:
    """Whether it has one dimension, an order, and numbers."""
    if isinstance(values, Tensor):
        return values.dim() == 1
    ordered = hasattr(values, "__len__") and not isinstance(values, Mapping | Set)
    return ordered and all(hasattr(value, "__float__") for value in values)


def rules_tensor(config: GEKOConfig, device: torch.device) -> Tensor:
    """(10,) float32: the numbers of `config` that the kernels read, in the order of `reference.visits.Rules`."""
    return torch.tensor(
        [
            config.freeze_confidence,
            config.freeze_quality,
            config.focus_confidence,
            config.correct_loss,
            config.correct_accuracy,
            config.q_value_lr,
            config.q_value_loss_scale,
            config.min_q_for_freeze,
            float(config.correctness == "accuracy"),
            float(config.quality == "std"),
        ],
        dtype=torch.float32,
        device=device,
    )


def raise_flagged(error: Tensor, num_samples: int = -1, vocab: int = -1, *, counted: bool = True) -> None:
    """Raise the `IndexError` that a kernel flagged in `error` () int64, and clear it; see `reference.layout.error_key`.

    `num_samples` and `vocab`, where known (>= 0), go into the message. `counted`: the rest of its batch was counted.
    """
    key = int(error)
    if key == NO_ERROR:
        return
    error.fill_(NO_ERROR)
    position, is_label, value = key >> 33, (key >> 32) & 1, key & 0xFFFFFFFF
    value -= (value >> 31) << 32
    if is_label:
        name, allowed = "labels", "ignore_index nor " + (f"in [0, {vocab})" if vocab >= 0 else "inside the vocabulary")
        advice = "Labels count from 0 and end below the number of logits: raise num_labels, or check ignore_index"
    else:
        name, allowed = "sample_ids", "-1 (padding) nor " + (f"in [0, {num_samples})" if num_samples >= 0 else "a row")
        advice = "An id is the sample's number in the dataset, and the state is as long: SampleState(len(dataset))"
    done = "its visit was left out of the loss and the state" if counted else "no loss was computed, no visit counted"
    raise IndexError(
        f"{name}: {value} (token {position} of the flattened batch) is neither {allowed}; {done}. {advice}"
    )
