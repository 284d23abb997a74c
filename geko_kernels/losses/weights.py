"""Checks the losses' `token_weights` and `sample_weights`, and brings them into the form of the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels.losses.arguments import kind_hint, raise_layout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prepare_weights(
    labels: Tensor,
    sample_ids: Tensor | None,
    ignore_index: int,
    real: torch.dtype,
    token_weights: Tensor | None,
    sample_weights: Tensor | None,
    look: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The labels, with `ignore_index` for tokens of weight 0; the token weights (B, S) and sample weights for the ops.

    Args: labels (B, S) or (B,); real: the dtype in which the ops compute; look: whether to raise for a negative or
        non-finite value, which otherwise becomes NaN, as the loss does.
    """
    if token_weights is not None:
        token_weights = _checked("token_weights", token_weights, labels, labels.shape, "one a label")
        token_weights = _values("token_weights", token_weights, real, look)
        labels = torch.where(token_weights == 0, ignore_index, labels)
        token_weights = token_weights if labels.dim() == 2 else token_weights.unsqueeze(1)
    if sample_weights is not None:
        packed = sample_ids is not None and sample_ids.dim() == 2
        each = "one a token as sample_ids are" if packed else "one a row"
        shape = labels.shape if packed else labels.shape[:1]
        sample_weights = _checked("sample_weights", sample_weights, labels, shape, each)
        sample_weights = _values("sample_weights", sample_weights, real, look)
    return labels, token_weights, sample_weights


def _checked(name: str, weights: Tensor, labels: Tensor, shape: torch.Size, each: str) -> Tensor:
    """`weights`, the argument `name`, after checks of everything but its values."""
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor or None, got {type(weights).__name__}{kind_hint(name, weights)}"
        )
    if hasattr(weights, "full_tensor"):
        raise TypeError(f"{name} must be a plain tensor, got a {type(weights).__name__}; use {name}.full_tensor()")
    if weights.layout is not torch.strided or weights.is_nested:
        raise_layout(name, weights)
    if weights.dtype not in _DTYPES:
        hint = "" if weights.is_floating_point() or weights.is_complex() else f"; use {name}.float()"
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {weights.dtype}{hint}")
    if weights.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, {each}, got {tuple(weights.shape)}")
    if weights.device != labels.device:
        raise ValueError(f"{name} must be on the device of the labels, {labels.device}, got {weights.device}")
    if weights.requires_grad:
        raise ValueError(f"{name} must not require a gradient, since it is a constant; use {name}.detach()")
    return weights


def _values(name: str, weights: Tensor, real: torch.dtype, look: bool) -> Tensor:
    """`weights` in the dtype `real`, contiguous."""
    values = weights.to(real).contiguous()
    if not look:
        return torch.where((values >= 0) & (values < torch.inf), values, torch.nan)
    good = (values >= 0) & (values < torch.inf)
    if weights.dtype != real:
        good &= (values != 0) | (weights == 0)
    if not good.all():
        at = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"{name} must hold finite numbers of 0 or more, in the range of {str(real).removeprefix('torch.')}, got "
            f"{weights[tuple(at)].item()} at {at}"
        )
    return values
