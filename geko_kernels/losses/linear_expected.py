"""How many of its scored rows a call is expected to keep, so that the host need not wait until it knows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter

from geko_kernels.host_copy import HostCopy
from geko_kernels.losses.linear_gradients import HeadGradients
from geko_kernels.losses.linear_head import Head
from geko_kernels.zero_share import ZeroShare

# Multiply-adds of dX or dW up to which GEMMs that read the number of kept rows on the device cost less than waiting for
# it: on an H200, a tenth of 8192 rows kept at 4096 x 32000 is 1.1e11 and gains 7 %, a third of 16384 at 576 x 49152 is
# 1.5e11 and would gain nothing.
FEW = 1.25e11


class Expected:
    """What a state's calls so far have kept, for one more call; and what that one tells the next.

    Expectations decide what takes the least time, never what is right.

    Args:
        zero_share: of the state; None if there is none.
        all_kept: all rows will be kept, whatever the calls so far have kept. Then this one tells nothing.

    Attributes:
        share: the share of kept rows among the scored ones; None if nothing is known.
    """

    def __init__(self, zero_share: ZeroShare | None, all_kept: bool) -> None:
        zeros = zero_share.share if zero_share is not None else None
        self.share = 1.0 if all_kept else None if zeros is None else 1 - zeros
        self._told = None if all_kept else zero_share
        self._asked = self._kept = 0  # rows that the host asked about, and how many of them are kept

    def above(self, share: float) -> bool:
        return self.share is not None and self.share > share

    def few(self, scored: int, head: Head, gradients: HeadGradients) -> bool:
        """Whether gradients may be summed without the host knowing how many of the `scored` rows are kept."""
        if self.share is None or self.share * scored * head.weight.numel() > FEW:
            return False
        return _plain(head.weight) and gradients.counts_on_device()

    def count(self, asked: int, kept: int) -> None:
        self._asked, self._kept = self._asked + asked, self._kept + kept

    def tell(self, scored: int, kept: HostCopy | None, coeff: Tensor) -> None:
        """Tell the state how many of the call's `scored` rows are kept, at once if the host has asked about all.

        Args: kept: that number, if a copy is under way; coeff (T,): not 0 for a kept row.
        """
        if self._told is None or not scored:
            return
        if self._asked == scored:
            self._told.learn(self._asked - self._kept, self._asked)
        else:
            self._told.learn_later(kept or HostCopy(coeff.count_nonzero()), scored)


def _plain(weight: Tensor) -> bool:
    """Whether a kernel may read it from its address on, as PyTorch's own products need not."""
    return type(weight) in (Tensor, Parameter) and weight.is_contiguous() and not weight.is_neg()
