"""What the loss functions refuse: arguments of the wrong kind, by name, and bad values where looking is cheap."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from geko_kernels.reference import Reduction
from geko_kernels.reference_layout import layout
from geko_kernels.state import SampleState, raise_flagged

REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "token_mean": Reduction.TOKEN_MEAN, "sum": Reduction.SUM}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_batch(
    name: str,
    tokens: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    reduction: str,
    shift: bool,
    ignore_index: int,
    softcap: float | None,
) -> None:
    """What Python can see of a batch without its values; `tokens` is the argument `name`, one vector a token."""
    for key, tensor in ((name, tokens), ("labels", labels), ("sample_ids", sample_ids)):
        if type(tensor) is not Tensor:
            _check_kind(key, tensor)
    if state is not None and not isinstance(state, SampleState):
        raise TypeError(f"state must be a SampleState or None, got {type(state).__name__}")
    if tokens.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tokens.dtype}")
    if tokens.dim() not in (2, 3) or tokens.shape[-1] < 1:
        size = "V" if name == "logits" else "H"
        raise ValueError(f"{name} must be (B, S, {size}) or (B, {size}) with {size} >= 1, got {tuple(tokens.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}; use labels.long()")
    shape = labels.shape
    if shape != tokens.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(tokens.shape[:-1])} for {name} of {tuple(tokens.shape)}, got {tuple(labels.shape)}"
        )
    device = tokens.device
    for key, where in (("labels", labels), ("sample_ids", sample_ids)):
        if where is not None and where.device != device:
            raise ValueError(f"{key} must be on the device of {name}, {device}, got {where.device}")
    _check_ids(shape, device, sample_ids, state)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {tuple(REDUCTIONS)}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if shift and tokens.dim() == 2:
        raise ValueError(f"shift=True needs {name} of 3 dimensions: in 2 there is no next position to predict")
    _check_softcap(softcap)


def _check_kind(key: str, tensor: object) -> None:
    """`tensor`, the argument `key`, is no `Tensor` proper: a subclass will do, and None for sample_ids."""
    if not isinstance(tensor, Tensor) and not (key == "sample_ids" and tensor is None):
        hint = "; this model returned no logits" if key == "logits" and tensor is None else ""
        raise TypeError(f"{key} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"{key} must be a plain tensor, got a {type(tensor).__name__}; use {key}.full_tensor()")


def _check_softcap(softcap: float | None) -> None:
    if softcap is None:
        return
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a number above 0 or None, got {softcap!r}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number above 0 or None, got {softcap}")


def _check_ids(shape: torch.Size, device: torch.device, sample_ids: Tensor | None, state: SampleState | None) -> None:
    if sample_ids is None:
        if state is not None:
            raise ValueError("sample_ids must be given with a state: it says whose row each visit updates")
        return
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids must be int64, got {sample_ids.dtype}; use sample_ids.long()")
    if sample_ids.shape not in (shape[:1], shape):
        shapes = " or ".join(str(tuple(allowed)) for allowed in (shape[:1], shape)[: len(shape)])
        raise ValueError(f"sample_ids must be {shapes}, got {tuple(sample_ids.shape)}")
    if state is not None and state.device != device:
        raise ValueError(
            f"state must be on the device of the labels, {device}, got {state.device}; make it with device=..."
        )


def check_values(
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
) -> None:
    """On the CPU, where looking is cheap: raise before anything is counted."""
    suspect = bool(((labels < 0) & (labels != ignore_index)).any() or (labels >= vocab).any())
    if sample_ids is not None and sample_ids.numel() and state is not None and not suspect:
        suspect = bool(sample_ids.min() < -1 or sample_ids.max() >= state.num_samples)
    if suspect:
        rows = -1 if state is None else state.num_samples
        raise_flagged(layout(labels, sample_ids, rows, vocab, ignore_index, shift).error.clone(), rows, vocab)


def debugging() -> bool:
    """Whether GEKO_DEBUG asks for a check of every call."""
    return os.environ.get("GEKO_DEBUG", "0") not in ("", "0")


def check_flag(error: Tensor | None, state: SampleState | None, vocab: int) -> None:
    """With GEKO_DEBUG=1: raise what the ops flagged, at once."""
    if error is not None and debugging():
        raise_flagged(error, len(state) if state is not None else -1, vocab)


def num_items_tensor(num_items: int | float | Tensor | None, reduction: str, device: torch.device) -> Tensor | None:
    if num_items is None:
        return None
    if reduction not in ("mean", "token_mean"):
        raise ValueError(f"num_items divides only reduction='mean' or 'token_mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            shape = tuple(num_items.shape)
            raise ValueError(f"num_items must be a number or a tensor of one element, got shape {shape}")
        return num_items.detach().reshape(()).to(device, torch.float32, non_blocking=True)
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"num_items must be a number or a tensor of one element, got {type(num_items).__name__}")
    if not 0 < num_items < math.inf:
        raise ValueError(f"num_items must be a finite number above 0, got {num_items}")
    return torch.ones((), device=device) * num_items  # torch.full would compile anew for every number
