"""The columns of a state as kernel pointers, in the order of `geko_kernels.columns`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from torch import Tensor

from geko_kernels.columns import NAMES

NO_STATE = (None,) * len(NAMES)
QUARANTINED = NAMES.index("quarantined")
# those of `pointers` that `prepare_visits` reads, in its order
prepared_of = itemgetter(*map(NAMES.index, ("q_value", "loss_history", "times_seen", "bucket", "claim")))


def pointers(columns: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """One for each column; all None without a state."""
    return columns or NO_STATE
