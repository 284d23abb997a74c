"""Which share of the tokens with a label has weight 0: a loss takes the path that is the fastest at that share.

Where the share is large, Hopper's one pass through given logits is slower than three. `weighted_loss` learns the share
by looks: every `INTERVAL` calls it copies the visits of one call asynchronously, and uses them `INTERVAL` calls later,
when they have long arrived. `weighted_linear_loss` learns how many rows each call has kept, at the latest when the next
one starts. So the path of a call follows from the calls before it, and never from when a copy arrives: the same run
takes the same paths, and gives the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geko_kernels.host_copy import HostCopy

INTERVAL = 16
NO_LOOK = (0, 0, 0, 0, 0, 0)  # the values at the start
# On an H200 both paths take the same time at a share of about 0.56 (V = 50257, 262144), 0.68 (151936), 0.73 (128256)
# and 0.77 (32000). At 0.9 three passes save 8 to 18 %; just below 0.7 they would save at most 8 %.
THREE_PASSES_FROM = 0.7
ONE_PASS_BELOW = 0.65  # apart, so that a share that sways about one of them does not change the path at each look


class ZeroShare:
    """The share in the calls of one `SampleState` so far; a look or linear call has half the weight of the next one.

    Args: values: another object's `values()`; this one then goes on as that one would.
    Raises: ValueError: values that no object has.

    Attributes:
        three_passes: whether calls take the path of three passes from now on.
        scored_share: of the tokens of the last linear call, the share with a label. It decides when memory is taken and
            no path, so `values` lacks it.
    """

    scored_share = 0.0

    def __init__(self, values: Sequence[float] = NO_LOOK) -> None:
        _check(values)
        left, three_passes, zero, tokens, *last = values
        self._left = int(left)  # calls before the next look
        self.three_passes = bool(three_passes)
        self._seen = zero, tokens  # by all looks but the last, and by all linear calls
        self._last: Callable[[], Sequence[float]] = lambda: last
        self._later: deque[tuple[HostCopy, int]] = deque()  # kept rows, tokens of linear calls that are not counted yet

    def values(self) -> list[float]:
        """All that decides the paths of later calls; waits for a copy that is under way."""
        self._catch_up()
        return [self._left, int(self.three_passes), *self._seen, *self._last()]

    def __reduce__(self) -> tuple[Any, ...]:
        return ZeroShare, (self.values(),)

    @property
    def share(self) -> float | None:
        """The share by now, the look under way apart; None if nothing is known. Waits for a linear call's copy."""
        self._catch_up()
        zero, tokens = self._seen
        return zero / tokens if tokens else None

    def learn(self, zero: int, tokens: int) -> None:
        """Count a linear call that has counted `tokens` with a label on the host, `zero` of them of weight 0."""
        before = self._seen  # read once: another thread may count a call meanwhile
        self._seen = before[0] / 2 + zero, before[1] / 2 + tokens

    def learn_later(self, kept: HostCopy, tokens: int) -> None:
        """Count a linear call at the next question: `kept` () of its `tokens` with a label have a nonzero weight."""
        self._later.append((kept, tokens))

    def _catch_up(self) -> None:
        while True:
            try:
                copy, tokens = self._later.popleft()
            except IndexError:  # none, or another thread took it
                return
            self.learn(tokens - int(copy.wait()), tokens)

    def due(self, device: torch.device) -> bool:
        """Count a call on `device`; whether it has to be given to `look`. Then `three_passes` is new, too.

        A call that is captured into a CUDA graph never is: its replays do not pass the host.
        """
        left = self._left  # read once: another thread may count a call meanwhile, and below 0 it would never be due
        if left:
            self._left = left - 1
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        self._catch_up()
        zero, tokens = (before / 2 + last for before, last in zip(self._seen, self._last(), strict=True))
        self._left, self._seen, self._last = INTERVAL - 1, (zero, tokens), lambda: (0, 0)
        bar = ONE_PASS_BELOW if self.three_passes else THREE_PASSES_FROM
        if tokens:
            self.three_passes = zero >= bar * tokens
        return True

    def look(self, visits: Tensor, count: Callable[[Tensor], tuple[int, int]]) -> None:
        """Start to copy a call's visits; `count` finds there how many tokens have a label: of weight 0, and all."""
        copy = HostCopy(visits)
        self._last = lambda: count(copy.wait())


def _check(values: Any) -> None:
    numbers = isinstance(values, list | tuple) and len(values) == 6 and all(type(v) in (int, float) for v in values)
    if not numbers or not _possible(*values):
        raise ValueError(f"zero_share must be six numbers as a state has them, got {str(values)[:100]}")


def _possible(left: float, three_passes: float, *seen: float) -> bool:
    shares = zip(seen[::2], seen[1::2], strict=True)
    return left in range(INTERVAL) and three_passes in (0, 1) and all(0 <= zero <= of < 2**63 for zero, of in shares)
