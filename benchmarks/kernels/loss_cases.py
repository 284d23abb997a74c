"""The inputs all contenders of the loss benchmark share, and the truth each is checked against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO_SHARES = (0.0, 1 / 3, 2 / 3, 0.9, 1.0)
TOLERANCE = {torch.bfloat16: (1e-2, 1e-2), torch.float32: (1e-5, 1e-4)}  # relative error of (loss, gradient)
_LARGE = 2**27  # logits above which the time is that of memory and not of launches
_CHUNK = 2**26  # logits looked at in float32 at once


@dataclass(frozen=True)
class Shape:
    """(tokens, vocab) logits of samples of `length` tokens; `packed` rows hold several samples each, ids per token."""

    tokens: int
    vocab: int
    length: int = 64
    packed: int = 0

    @property
    def samples(self) -> int:
        return self.tokens // self.length

    @property
    def large(self) -> bool:
        return self.tokens * self.vocab >= _LARGE

    @property
    def batch(self) -> tuple[int, ...]:
        """The logits' shape in a model's output: (B, S, V), or (B, V) for samples of one token."""
        if self.packed:
            return self.packed, self.tokens // self.packed, self.vocab
        return (self.samples, self.length, self.vocab) if self.length > 1 else (self.tokens, self.vocab)


SHAPES = {
    "cuda": (
        Shape(8192, 128256),
        Shape(8192, 50257),
        Shape(512, 32000),
        Shape(16384, 32000),
        Shape(8192, 151936),
        Shape(4096, 262144),
        Shape(64, 2, length=1),
        Shape(64, 1000, length=1),
        Shape(16384, 128256, length=128, packed=8),
    ),
    "cpu": (Shape(512, 49152), Shape(512, 50257)),
}
QUICK_SHAPES = {"cuda": SHAPES["cuda"][:3], "cpu": SHAPES["cpu"][:1]}


@dataclass
class Case:
    """One set of inputs: logits (T, V), labels (T,), ids of the samples, and the tokens' weights (T,) under GEKO."""

    shape: Shape
    zero_share: float
    logits: Tensor
    labels: Tensor
    sample_ids: Tensor  # (B,), or (B, S) where packed
    weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def logits_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    @property
    def zero_rows(self) -> float:
        """The share of rows at weight 0: `zero_share` to the nearest whole sample."""
        return 1 - self.weight.mean().item()


def make_case(shape: Shape, dtype: torch.dtype, zero_share: float, device: torch.device) -> Case:
    """Random logits, N(0, 3), of which `zero_share` of the samples are learnt and the others predicted wrong.

    A learnt sample's labels stand 4 above the log-sum-exp of their rows: loss 0.02 and confidence 0.98, so its own
    statistics put it into FREEZE. The other labels have the smallest logit of their rows: HARD or FOCUS.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape.tokens, shape.vocab, dtype=dtype, device=device).normal_(0, 3, generator=generator)
    labels = logits.argmin(-1)
    order = torch.randperm(shape.samples, generator=generator, device=device)
    weight = (order >= round(zero_share * shape.samples)).float().repeat_interleave(shape.length)
    for rows in _row_chunks(shape):
        peak = (logits[rows].float().logsumexp(-1) + 4).to(dtype)
        at_label = labels[rows, None]
        kept = logits[rows].gather(1, at_label)
        logits[rows].scatter_(1, at_label, torch.where(weight[rows, None] == 0, peak[:, None], kept))
    ids = torch.randperm(shape.samples, generator=generator, device=device)
    if shape.packed:
        ids = ids.repeat_interleave(shape.length).view(shape.batch[:-1])
    return Case(shape, zero_share, logits, labels, ids, weight)


def errors(case: Case, loss: Tensor, grad: Tensor) -> tuple[float, float]:
    """Relative errors of the loss and, in the 2-norm, of its gradient against float32 maths.

    The truth is `(weight * F.cross_entropy(logits.float(), labels, reduction="none")).mean()`: with samples of equal
    length the mean over samples and that over tokens agree. Where the truth is 0 the errors are absolute.
    """
    total = torch.zeros((), dtype=torch.float64, device=case.device)
    wrong, norm = total.clone(), total.clone()
    grad = grad.view(case.logits.shape)
    for rows in _row_chunks(case.shape):
        log_p = case.logits[rows].float().log_softmax(-1)
        at_label = case.labels[rows, None]
        total -= (case.weight[rows] * log_p.gather(1, at_label)[:, 0]).double().sum()
        expected = log_p.exp_().scatter_add_(1, at_label, torch.full_like(at_label, -1, dtype=torch.float32))
        expected *= case.weight[rows, None] / case.shape.tokens
        norm += expected.square().sum()
        wrong += expected.sub_(grad[rows]).square().sum()
    truth = total / case.shape.tokens
    loss_error = (loss.detach().double() - truth).abs() / torch.where(truth > 0, truth, 1)
    grad_error = (wrong / torch.where(norm > 0, norm, 1)).sqrt()
    return loss_error.item(), grad_error.item()


def _row_chunks(shape: Shape) -> Iterator[slice]:
    step = max(1, _CHUNK // shape.vocab)
    for start in range(0, shape.tokens, step):
        yield slice(start, start + step)
