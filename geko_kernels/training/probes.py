"""When a left-out sample is looked at again."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_INTERVAL = 64  # epochs
STAGGER = 8  # epochs that the first probes of a crowd are spread over
_PART = 1 << 20  # samples whose ids are held as int64 at a time


class ProbeSchedule:
    """Re-check times of the samples that an epoch's plan leaves out; 5 bytes a sample, on the state's device.

    A sample left out at epoch e is due at one of e + 1 to e + 8, by its id modulo 8: of a crowd that froze together an
    eighth is looked at each epoch. While it stays left out the time to the next probe doubles, from 8 epochs on (up
    to 64). `hurry_` makes all due at once.

    Columns: interval (N,) uint8, 0 for a sample that takes part; next_probe (N,) int32, an epoch.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self.interval = torch.zeros(num_samples, dtype=torch.uint8, device=device)
        self.next_probe = torch.zeros(num_samples, dtype=torch.int32, device=device)

    def due(self, left_out: Tensor, epoch: int) -> Tensor:
        """left_out (N,) bool -> ids (n,) int32 to probe before `epoch`, ascending."""
        due = self.next_probe <= epoch
        due &= left_out
        due &= self.interval > 0
        ids = torch.empty(int(due.count_nonzero()), dtype=torch.int32, device=due.device)
        filled = 0
        for start, part in enumerate(due.split(_PART)):
            found = part.nonzero()[:, 0]
            ids[filled : filled + len(found)] = found + start * _PART
            filled += len(found)
        return ids

    def probed_(self, ids: Tensor, epoch: int) -> None:
        """Double the interval of `ids`, just probed; those that came back are reset by `follow_`."""
        for part in ids.split(_PART):
            at = part.long()
            self.interval[at] = (self.interval[at] * 2).clamp(max=MAX_INTERVAL)
            self.next_probe[at] = epoch + self.interval[at].int()

    def hurry_(self, epoch: int) -> None:
        """All that are left out are due at `epoch`."""
        self.next_probe.clamp_(max=epoch)

    def follow_(self, left_out: Tensor, epoch: int) -> None:
        """Start the clock of samples newly left out of `epoch`, stop it for those that take part."""
        fresh = left_out & (self.interval == 0)
        for part in range(STAGGER):
            self.next_probe[part::STAGGER].masked_fill_(fresh[part::STAGGER], epoch + 1 + part)
        self.interval.masked_fill_(fresh, STAGGER // 2)
        self.interval.masked_fill_(~left_out, 0)
