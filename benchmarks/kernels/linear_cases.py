"""The inputs all contenders of the linear benchmark share, and the truth each is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEEP_SHARES = (1.0, 2 / 3, 1 / 3, 0.1, 0.0)
MASKED_SHARES = (0.0, 0.5)
IGNORED = -100
LENGTH = 128  # tokens a sample
_CHUNK = 2**27  # logits looked at in float64 at once
_NOISE = 2.0  # standard deviation of the logits of tokens that are not meant


@dataclass(frozen=True)
class Shape:
    """`tokens` hidden states of `hidden` numbers, and a vocabulary."""

    tokens: int
    hidden: int
    vocab: int

    @property
    def samples(self) -> int:
        return self.tokens // LENGTH

    @property
    def aligned_vocab(self) -> int:
        return -(-self.vocab // 64) * 64


SHAPES = {
    "cuda": (
        Shape(8192, 4096, 128256),
        Shape(16384, 768, 50257),
        Shape(16384, 768, 50304),
        Shape(8192, 2048, 151936),
        Shape(8192, 4096, 32000),
        Shape(16384, 576, 49152),
    ),
    "cpu": (Shape(512, 576, 49152), Shape(512, 768, 50257)),
}
QUICK_SHAPES = {"cuda": SHAPES["cuda"][:3], "cpu": SHAPES["cpu"][:1]}


@dataclass
class Case:
    """hidden (T, H), weight (V, H), labels (T,), ids of the samples (B,), the tokens' weights (T,) under GEKO."""

    shape: Shape
    keep_share: float
    masked_share: float
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    sample_ids: Tensor
    kept: Tensor

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def kept_rows(self) -> float:
        """The share of labelled tokens at weight 1: `keep_share` to the nearest whole sample."""
        return self.kept.mean().item()


def make_case(shape: Shape, dtype: torch.dtype, keep_share: float, masked_share: float, device: torch.device) -> Case:
    """Hidden states as a trained model has them: the softmax of each has one peak, at one token's row of the weight.

    The other logits are N(0, 2). In a learnt sample the peak is at the label, 4 above the log-sum-exp of the rest: loss
    0.02 and confidence 0.98 put it into FREEZE. In the others it is elsewhere, 1 above: wrong, weight 1. Of each
    sample the first `masked_share` of the labels are ignored, as a prompt is.
    """
    random = torch.Generator(device).manual_seed(0)
    tokens, columns, vocab = shape.tokens, shape.hidden, shape.vocab
    weight = torch.randn(vocab, columns, generator=random, device=device) * 0.02
    order = torch.randperm(shape.samples, generator=random, device=device)
    kept = (order < round(keep_share * shape.samples)).float().repeat_interleave(LENGTH)
    labels = torch.randint(vocab, (tokens,), generator=random, device=device)
    elsewhere = (labels + torch.randint(1, vocab, (tokens,), generator=random, device=device)) % vocab
    peak = torch.where(kept > 0, elsewhere, labels)
    rest = torch.tensor(float(vocab)).log().item() + _NOISE**2 / 2
    height = torch.where(kept > 0, rest + 1, rest + 4)[:, None]
    noise = torch.randn(tokens, columns, generator=random, device=device) * _NOISE / (0.02 * columns**0.5)
    direction = weight[peak]
    direction = direction / direction.square().sum(1, keepdim=True)
    overlap = (noise * weight[peak]).sum(1, keepdim=True)
    hidden = noise + (height - overlap) * direction
    position = torch.arange(tokens, device=device) % LENGTH
    labels = torch.where(position < round(masked_share * LENGTH), IGNORED, labels)
    ids = torch.randperm(shape.samples, generator=random, device=device)
    return Case(shape, keep_share, masked_share, hidden.to(dtype), weight.to(dtype), labels, ids, kept)


Truth = tuple[Tensor, Tensor, Tensor]


def truth(case: Case) -> Truth:
    """loss, dX and dW in float64.

    `(kept * F.cross_entropy(hidden @ weight.T, labels, reduction="none")).sum() / labelled`: with samples of equal
    length the mean over samples and that over tokens agree.
    """
    weight = case.weight.double()
    total = torch.zeros((), dtype=torch.float64, device=case.device)
    hidden_grad, weight_grad = torch.zeros_like(case.hidden, dtype=torch.float64), torch.zeros_like(weight)
    labelled = case.labels != IGNORED
    rows = (labelled & (case.kept > 0)).nonzero()[:, 0]
    for part in rows.split(max(1, _CHUNK // case.shape.vocab)):
        hidden, labels = case.hidden[part].double(), case.labels[part, None]
        log_p = (hidden @ weight.t()).log_softmax(-1)
        total -= log_p.gather(1, labels).sum()
        grad = log_p.exp_().scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float64))
        grad /= labelled.sum()
        hidden_grad[part] = grad @ weight
        weight_grad.addmm_(grad.t(), hidden)
    return total / labelled.sum(), hidden_grad, weight_grad


def errors(found: Sequence[Tensor], exact: Truth) -> list[float]:
    """Relative errors in the 2-norm; absolute where the truth is 0."""
    return [(_distance(ours, theirs) / (theirs.norm() or 1)).item() for ours, theirs in zip(found, exact, strict=True)]


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """`(ours.double() - theirs).norm()` without a copy of all of `ours` in float64."""
    parts = zip(ours.flatten().split(_CHUNK), theirs.flatten().split(_CHUNK), strict=True)
    return torch.stack([(a.double() - b).norm() for a, b in parts]).norm()
