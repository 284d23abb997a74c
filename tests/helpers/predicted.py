"""Calls that predict their gradient, without a GPU: the CUDA launch emulated by its reference."""

from __future__ import annotations

import torch

from geko_kernels import ops
from geko_kernels.kernels.one_pass import hopper
from geko_kernels.kernels.one_pass import plan as predicted_plan
from geko_kernels.reference import one_pass as reference_predicted


class EmulatedRows:
    """`hopper.RowsLaunch` in plain PyTorch."""

    calls = 0

    def __init__(self, device, dtype, shape, logits_strides, grad_strides, parts) -> None:
        self.shape, self.parts = shape, parts

    @torch.no_grad()
    def __call__(self, logits, grad, target, coeff, counts, num_items, upstream, tokens, factor) -> None:
        type(self).calls += 1
        divisor = None
        if self.parts:
            divisor = counts.sum() if num_items is None else num_items
        shape = (logits.detach().view(self.shape), grad.detach().view(self.shape))
        for out, value in zip(
            (tokens, factor),
            reference_predicted.predicted_rows_(*shape, target, coeff, divisor, upstream),
            strict=True,
        ):
            out.copy_(value)


def emulate(monkeypatch) -> None:
    """From now on the Triton backend takes calls on the CPU and predicts their gradients."""
    monkeypatch.setattr(ops, "_override", "")
    monkeypatch.setattr(ops, "backend_name", lambda *_: "triton")
    monkeypatch.setattr(hopper, "missing", lambda _device: None)
    monkeypatch.setattr(hopper, "RowsLaunch", EmulatedRows)
    monkeypatch.setattr(predicted_plan, "SMALLEST", 0)
    monkeypatch.setattr(predicted_plan, "SMALLEST_ROW", 0)
    monkeypatch.setattr(EmulatedRows, "calls", 0)


def predicts(logits: torch.Tensor, inplace: bool = False) -> bool:
    """Whether the layout of `logits` is one for prediction."""
    grad = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype)
    return hopper.serves(logits, grad) and not (inplace and logits.dtype == torch.float16)
