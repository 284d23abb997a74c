"""The results of a call: what the forward op returns, and `SampleStats` made of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SampleStats(NamedTuple):
    """What one call saw, one entry a visit in order of position; unused entries have sample_ids -1, 0 tokens, loss 0.

    M = B with one id a row; with one id a token M = B * S, used entries first.
    """

    sample_ids: Tensor  # (M,) int64
    num_tokens: Tensor  # (M,) int64: valid tokens without those of token weight 0
    loss: Tensor  # (M,) float32: nats, before the sample's weight; a mean by token_weights, like the next two
    confidence: Tensor  # (M,) float32: mean of max(softmax)
    accuracy: Tensor  # (M,) float32: share of tokens whose label has the largest logit
    correct: Tensor  # (M,) bool
    quality: Tensor  # (M,) float32
    q_value: Tensor  # (M,) float32
    bucket: Tensor  # (M,) uint8, a Bucket
    weight: Tensor  # (M,) float32: the bucket's times the sample's; 0 where the visit has no valid token


class ForwardResult(NamedTuple):
    """The forward op's results, which the backward and `SampleStats` use. See `reference.sample_update_`."""

    loss: Tensor
    scale: Tensor
    coeff: Tensor
    token_visit: Tensor
    floats: Tensor
    ints: Tensor
    flags: Tensor
    statistics: Tensor

    def stats(self) -> SampleStats:
        return stats_of(self.floats, self.ints, self.flags)


def stats_of(floats: Tensor, ints: Tensor, flags: Tensor) -> SampleStats:
    loss, confidence, accuracy, quality, q_value, weight = floats.unbind()
    sample_ids, num_tokens = ints.unbind()
    bucket, correct = flags.unbind()
    return SampleStats(
        sample_ids, num_tokens, loss, confidence, accuracy, correct.bool(), quality, q_value, bucket, weight
    )
