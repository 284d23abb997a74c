"""When a left-out sample is probed."""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels.torch_private import version_of

MAX_INTERVAL = 64  # epochs
STAGGER = 8  # epochs over which the first probes of samples left out together are spread


class ProbeSchedule:
    """The times at which left-out samples are probed; 5 bytes a sample, on the state's device.

    A sample left out at epoch e is due at one of the epochs e + 1 to e + 8, by its id modulo 8. So each epoch probes
    one eighth of the samples that froze together. While a sample stays left out, its interval doubles from 8 up to 64
    epochs. `hurry_` makes all due at once.

    Columns: interval (N,) uint8, 0 for a sample that takes part; next_probe (N,) int32, an epoch.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self.interval = torch.zeros(num_samples, dtype=torch.uint8, device=device)
        self.next_probe = torch.zeros(num_samples, dtype=torch.int32, device=device)
        self._handed: tuple[Tensor, Tensor, int] | None = None  # ids, their visits, version of `times_seen`

    def due(self, left_out: Tensor, epoch: int) -> Tensor:
        """left_out (N,) bool -> ids (n,) int64 to probe before `epoch`, ascending."""
        due = self.next_probe <= epoch
        due &= left_out
        due &= self.interval > 0
        return due.nonzero()[:, 0]

    def hand_out_(self, ids: Tensor, times_seen: Tensor) -> None:
        """Remember that `ids` have been handed out for a visit."""
        self._handed = ids, times_seen[ids], _version(times_seen)

    def untouched(self, times_seen: Tensor) -> bool:
        """Whether no visit has been counted, nor an attempt made, since samples were handed out."""
        return self._handed is not None and _version(times_seen) == self._handed[2]

    def check_visited(self, times_seen: Tensor) -> None:
        """Raise `ValueError` if none of the samples handed out has been visited since."""
        assert self._handed is not None
        ids, seen, _ = self._handed
        if len(ids) and bool((times_seen[ids] == seen).all()):
            raise ValueError(
                f"none of the {len(ids)} samples that due_probes returned has been visited: run them through "
                "weighted_loss(..., update=True) under torch.no_grad() before you call probed()"
            )

    def probed_(self, ids: Tensor, epoch: int) -> None:
        """Double the interval of the probed `ids`; `follow_` resets those that return to training."""
        interval = (self.interval[ids] * 2).clamp(max=MAX_INTERVAL)
        self.interval[ids] = interval
        self.next_probe[ids] = epoch + interval.int()

    def hurry_(self, epoch: int) -> None:
        """Make all left-out samples due at `epoch`."""
        self.next_probe.clamp_(max=epoch)

    def follow_(self, left_out: Tensor, epoch: int) -> None:
        """Start the interval of samples newly left out of `epoch`, end it for those that take part."""
        fresh = left_out & (self.interval == 0)
        for part in range(STAGGER):
            self.next_probe[part::STAGGER].masked_fill_(fresh[part::STAGGER], epoch + 1 + part)
        self.interval.masked_fill_(fresh, STAGGER // 2)
        self.interval.masked_fill_(~left_out, 0)


def _version(tensor: Tensor) -> int:
    """How often `tensor` was written to; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else version_of(tensor)
