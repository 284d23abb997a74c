"""The results of a run's visits, kept on the host: the losses of each sample by epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geko_kernels._files import load_tensors, save_tensors
from geko_kernels.training.report.pending import Visited

VISITS_NAME = "geko_visits.safetensors"
_FORMAT = "geko_kernels.VisitLog"
_DTYPES = {
    "sample": torch.int32,
    "loss": torch.float32,
    "hit": torch.float16,
    "epochs": torch.int32,
    "ends": torch.int64,
}


class Visits(NamedTuple):
    """V visits, sorted by sample, and those of a sample by time."""

    sample: np.ndarray  # (V,) int32
    epoch: np.ndarray  # (V,) int32: the planned epoch, from 0; a probe counts for the epoch that it precedes
    loss: np.ndarray  # (V,) float32: mean over the valid tokens, nats, before weighting
    hit: np.ndarray  # (V,) float16: share of the valid tokens whose label has the largest logit

    @property
    def label_probability(self) -> np.ndarray:
        """(V,) float32: exp(-loss), the geometric mean of the label's probability over the tokens."""
        return np.exp(-self.loss)


class VisitLog:
    """Every visit with a label and a finite loss: 10 bytes a visit on the host, 8 a sample on the device.

    `add` writes to the sample's row on the device, without a sync. `flush` moves the rows written since the last
    flush to the host. If a sample is visited more than once between flushes, only its last visit is kept.

    Args:
        num_samples: N.
        device: of the statistics.
        reduce_max: takes the maximum of a tensor over all processes in place; None for one process.
    """

    def __init__(
        self, num_samples: int, device: torch.device, reduce_max: Callable[[Tensor], object] | None = None
    ) -> None:
        self.num_samples, self.reduce_max = num_samples, reduce_max
        # loss, hit; the last row is a spare one
        self._new = torch.full((2, num_samples + 1), -math.inf, dtype=torch.float32, device=device)
        self._parts: list[tuple[int, Tensor, Tensor, Tensor]] = []  # epoch; sample, loss, hit

    def add(self, visited: Visited) -> None:
        """Record visits."""
        ids, loss = visited.sample_ids, visited.loss
        known = (ids >= 0) & (ids < self.num_samples) & (visited.num_tokens > 0) & loss.isfinite()
        at, order = torch.where(known, ids, self.num_samples).sort(stable=True)
        earlier = at[1:] == at[:-1]  # another visit of the sample follows
        at[:-1].masked_fill_(earlier, self.num_samples)
        self._new.index_copy_(1, at, torch.stack([loss, visited.accuracy])[:, order].float())

    def flush(self, epoch: int) -> None:
        """Move the new visits to the host as visits of `epoch`. All processes call it, and then all have all visits."""
        if self.reduce_max is not None:
            self.reduce_max(self._new)
        sample = (self._new[0, :-1] > -math.inf).nonzero()[:, 0]
        if len(sample):
            loss, hit = self._new[:, sample].cpu()
            self._parts.append((epoch, sample.int().cpu(), loss.clone(), hit.half()))
        self._new.fill_(-math.inf)

    def visits(self) -> Visits:
        """The flushed visits, by sample."""
        sample, loss, hit = self._columns()
        order = np.argsort(sample.numpy(), kind="stable")
        lengths = [len(part[1]) for part in self._parts]
        epoch = np.repeat(np.array([part[0] for part in self._parts], np.int32), lengths)
        return Visits(*(column[order] for column in (sample.numpy(), epoch, loss.numpy(), hit.numpy())))

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        parts = self._parts
        sample = torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *(part[1] for part in parts)])
        loss = torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *(part[2] for part in parts)])
        hit = torch.cat([torch.empty(0, dtype=torch.float16, device="cpu"), *(part[3] for part in parts)])
        return sample, loss, hit

    def mark(self) -> int:
        """The current end of the log, for `rewind`."""
        return len(self._parts)

    def rewind(self, mark: int) -> None:
        """Forget what came after `mark`, flushed or not."""
        del self._parts[mark:]
        self._new.fill_(-math.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """The flushed visits."""
        sample, loss, hit = self._columns()
        epochs = torch.tensor([part[0] for part in self._parts], dtype=torch.int32, device="cpu")
        ends = torch.tensor([len(part[1]) for part in self._parts], dtype=torch.int64, device="cpu").cumsum(0)
        return {"sample": sample, "loss": loss, "hit": hit, "epochs": epochs, "ends": ends}

    def load_state_dict(self, columns: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`, which `is_whole` has checked."""
        sample, loss, hit = (columns[name].cpu().clone() for name in ("sample", "loss", "hit"))
        ends = columns["ends"].tolist()
        bounds = zip([0, *ends][:-1], ends, columns["epochs"].tolist(), strict=True)
        self.rewind(0)
        self._parts = [(epoch, sample[a:b], loss[a:b], hit[a:b]) for a, b, epoch in bounds]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the flushed visits."""
        path = os.path.join(folder, VISITS_NAME)
        save_tensors(path, _FORMAT, self.state_dict(), {"num_samples": str(self.num_samples)})

    def load(self, folder: str | os.PathLike[str]) -> bool:
        """Continue from the file that `save` wrote; False, with nothing changed, if there is no such file.

        Raises:
            ValueError: damaged, or of another number of samples; names the file.
        """
        path = os.path.join(folder, VISITS_NAME)
        if not os.path.isfile(path):
            return False
        columns, metadata = load_tensors(path, _FORMAT, "GEKOTrainer")
        if not is_whole(columns) or metadata.get("num_samples") != str(self.num_samples):
            raise ValueError(
                f"{path} does not hold the visits of {self.num_samples} samples: resume with the dataset that the run "
                "was started with"
            )
        self.load_state_dict(columns)
        return True


def is_whole(columns: Any) -> bool:
    """Whether these are the tensors of `VisitLog.state_dict`."""
    known = isinstance(columns, Mapping) and columns.keys() == _DTYPES.keys()
    if not known or not all(isinstance(column, Tensor) and column.dim() == 1 for column in columns.values()):
        return False
    sample, loss, hit, epochs, ends = (columns[name] for name in _DTYPES)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    fit = len(sample) == len(loss) == len(hit) == int(lengths.sum()) and len(epochs) == len(ends)
    return fit and not (lengths < 0).any() and all(columns[name].dtype == kind for name, kind in _DTYPES.items())
