"""Checks of the losses' arguments. An error names the argument; values are checked only where that is cheap."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from geko_kernels.reference.layout import layout
from geko_kernels.reference.ops import Reduction
from geko_kernels.state import SampleState, raise_flagged
from geko_kernels.torch_private import base_of, is_fake

ReductionName = Literal["none", "mean", "token_mean", "sum"]


class LossOptions(TypedDict, total=False):
    """Keyword arguments that both losses share, for their overloads."""

    reduction: ReductionName
    shift: bool
    ignore_index: int
    num_items: int | float | Tensor | None
    softcap: float | None
    token_weights: Tensor | None
    sample_weights: Tensor | None
    update: bool | None


class LinearOptions(LossOptions, total=False):
    """And what `weighted_linear_loss` takes besides."""

    bias: Tensor | None
    chunk_mib: int | float | None


REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "token_mean": Reduction.TOKEN_MEAN, "sum": Reduction.SUM}
_FLOAT32 = torch.finfo(torch.float32)
_IN_RANGE = f"in float32's range, {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g}"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_batch(
    name: str,
    inputs: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    reduction: str,
    ignore_index: int,
    softcap: float | None,
) -> tuple[int, float]:
    """Check a batch's types, shapes and devices, not its values; `inputs` is the argument `name`, one vector a token.

    Returns: `ignore_index` and `softcap` (0 for None) as Python numbers.
    """
    for key, tensor in ((name, inputs), ("labels", labels), ("sample_ids", sample_ids)):
        if type(tensor) is not Tensor:
            _check_kind(key, tensor)
        if tensor is not None and (tensor.layout is not torch.strided or tensor.is_nested):
            raise_layout(key, tensor)
    if state is not None and not isinstance(state, SampleState):
        raise TypeError(f"state must be a SampleState or None, got {type(state).__name__}")
    if inputs.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {inputs.dtype}")
    shape = labels.shape
    if inputs.dim() not in (2, 3) or inputs.shape[-1] < 1:
        size = "V" if name == "logits" else "H"
        raise ValueError(f"{name} must be (B, S, {size}) or (B, {size}) with {size} >= 1, got {tuple(inputs.shape)}")
    if labels.dtype != torch.int64:
        _raise_label_dtype(name, labels, inputs)
    if shape != inputs.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(inputs.shape[:-1])} for {name} of {tuple(inputs.shape)}, got {tuple(shape)}"
            + _shape_hint(name, inputs.shape, shape)
        )
    device = inputs.device
    for key, where in (("labels", labels), ("sample_ids", sample_ids)):
        if where is not None and where.device != device:
            raise ValueError(f"{key} must be on the device of {name}, {device}, got {where.device}")
    _check_ids(shape, device, sample_ids, state)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {tuple(REDUCTIONS)}, got {reduction!r}")
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = _ignore_index(ignore_index)
    return ignore_index, 0.0 if softcap is None else _softcap(softcap)


def check_switches(name: str, inputs: Tensor, shift: bool, update: bool | None, **others: bool) -> None:
    """`shift`, `update` and `others` are True or False (`update` also None), and `shift` has positions to shift."""
    for key, value in (("shift", shift), *others.items()):
        if value is not True and value is not False:
            raise TypeError(f"{key} must be True or False, got {value!r}")
    if update is not None and update is not True and update is not False:
        raise TypeError(f"update must be None, True or False, got {update!r}")
    if shift and inputs.dim() == 2:
        raise ValueError(f"shift=True needs {name} of 3 dimensions, got 2: there is no next position to predict")


def check_inplace(logits: Tensor) -> None:
    """Raise where `inplace=True` would overwrite a parameter, or several logits with one gradient."""
    leaf = base_of(logits)
    if logits.requires_grad and leaf is not None and leaf.is_leaf and leaf.requires_grad:
        what = "a leaf tensor" if leaf is logits else "the leaf tensor that the logits are a view of"
        raise ValueError(f"inplace=True would write the gradient over {what}; pass the output of a model")
    end = 0  # the last offset that the dimensions with smaller strides reach
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride == 0:
            raise ValueError("inplace=True cannot write over expanded logits (stride 0)")
        if size > 1 and stride <= end and logits.numel():
            raise ValueError(
                "inplace=True cannot write over logits that overlap in memory, got shape "
                f"{tuple(logits.shape)} with strides {logits.stride()}; pass logits.contiguous()"
            )
        end += stride * (size - 1)


def _check_kind(key: str, tensor: object) -> None:
    """Raise unless the argument `key` is a plain tensor, perhaps of a subclass; sample_ids may be None."""
    if not isinstance(tensor, Tensor) and not (key == "sample_ids" and tensor is None):
        raise TypeError(f"{key} must be a torch.Tensor, got {type(tensor).__name__}{kind_hint(key, tensor)}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"{key} must be a plain tensor, got a {type(tensor).__name__}; use {key}.full_tensor()")


def kind_hint(key: str, value: object) -> str:
    """What to pass instead of `value` as the argument `key`, as the end of a message."""
    if key == "logits" and (value is None or getattr(value, "logits", None) is not None):
        return "; this model returned no logits" if value is None else "; pass its logits"
    if key == "sample_ids" and isinstance(value, SampleState):
        return "; the ids come before the state: weighted_loss(logits, labels, sample_ids, state)"
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
        return f"; pass the one of them that holds the {key}"
    if isinstance(value, list | tuple) and any(isinstance(each, str) for each in value):
        return " of texts; number them from 0"
    if isinstance(value, list | tuple) or type(value).__module__ == "numpy":
        return f"; use torch.as_tensor({key})"
    return ""


def raise_layout(key: str, tensor: Tensor) -> None:
    """Raise for the argument `key`, which is nested or not strided."""
    if tensor.is_nested:
        how = f"a nested one; use torch.nested.to_padded_tensor({key}, padding) and labels of ignore_index there"
    else:
        how = f"one of layout {tensor.layout}; use {key}.to_dense()"
    raise TypeError(f"{key} must be a dense tensor, got {how}")


def _raise_label_dtype(name: str, labels: Tensor, inputs: Tensor) -> None:
    if not (labels.is_floating_point() or labels.is_complex()):
        raise TypeError(f"labels must be int64, got {labels.dtype}; use labels.long()")
    if labels.shape == inputs.shape or (name == "hidden" and labels.dim() == inputs.dim()):  # V is not known here
        raise TypeError(
            f"labels must be int64 class indices, one a token, got {labels.dtype} of shape {tuple(labels.shape)}: "
            "class probabilities are not supported; use F.cross_entropy for them"
        )
    raise TypeError(
        f"labels must be int64 class indices, got {labels.dtype}; use labels.long() if all are whole numbers, else "
        "this is a regression, which needs another loss"
    )


def _shape_hint(name: str, inputs: torch.Size, labels: torch.Size) -> str:
    """The probable cause of these shapes, as the end of a message."""
    if labels == inputs:
        return "; one-hot labels need labels.argmax(-1)"
    if labels == (*inputs[:-1], 1):
        return "; use labels.squeeze(-1)"
    if len(inputs) == 3 and labels == (inputs[0] * inputs[1],):
        return "; do not flatten them"
    if len(inputs) == 3 and labels == (inputs[0], inputs[2]):
        return f"; {name} with the classes in dimension 1, as F.cross_entropy takes them, need {name}.transpose(1, 2)"
    return ""


def _ignore_index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"ignore_index must be an int, got {value!r}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index must be within int64, as labels are, got {_shown(number)}")
    return number


def _shown(value: Any) -> str:
    """`value` in a message; Python writes out no integer of more than 4300 digits."""
    return str(value) if not isinstance(value, int) or abs(value) < 10**60 else f"an int of {value.bit_length()} bits"


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real)  # NumPy's numbers too


def _softcap(value: Any) -> float:
    if isinstance(value, bool) or not _is_real(value):
        raise TypeError(f"softcap must be a number above 0 or None, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"softcap must be a finite number above 0 or None, got {_shown(value)}")
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:
        raise ValueError(f"softcap must be {_IN_RANGE}, got {_shown(value)}")
    return float(value)


def _check_ids(shape: torch.Size, device: torch.device, sample_ids: Tensor | None, state: SampleState | None) -> None:
    if sample_ids is None:
        if state is not None:
            raise ValueError("sample_ids must be given with a state: they say which row each visit updates")
        return
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids must be int64, got {sample_ids.dtype}; use sample_ids.long()")
    if sample_ids.shape not in (shape[:1], shape):
        shapes = " or ".join(str(tuple(allowed)) for allowed in (shape[:1], shape)[: len(shape)])
        hint = "; do not flatten a batch of (B, S, ...): each row would be a visit" if len(shape) == 1 else ""
        raise ValueError(f"sample_ids must be {shapes}, got {tuple(sample_ids.shape)}{hint}")
    if state is not None and state.device != device:
        raise ValueError(
            f"state must be on the device of the labels, {device}, got {state.device}; make it with device=..."
        )


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the types, shapes and devices of the arguments that only `weighted_linear_loss` has."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            hint = "; pass its weight, and its bias as bias" if isinstance(tensor, torch.nn.Module) else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{name} must be a plain tensor, got a {type(tensor).__name__}: gather it first, by unshard() of its "
                "FSDP module, or by full_tensor() with the placements its gradient needs"
            )
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise_layout(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"weight must be (V, {hidden.shape[-1]}) with V >= 1 for this hidden, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])} for this weight, got {tuple(bias.shape)}")
    if hidden.is_meta or is_fake(hidden):
        raise NotImplementedError(
            "weighted_linear_loss does not run on meta or fake tensors: the number of kept rows depends on values; "
            "use weighted_loss of the logits for shapes"
        )
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "weighted_linear_loss cannot be captured in a CUDA graph: the host needs its row counts; capture "
            "weighted_loss of the logits instead"
        )


def chunk_budget(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not _is_real(value):
        raise TypeError(f"chunk_mib must be a number of MiB or None, got {value!r}")
    if not value > 0:
        raise ValueError(f"chunk_mib must be above 0, got {_shown(value)}")
    return float(min(value, _FLOAT32.max))  # an int may be too large for a float


def check_values(
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
) -> None:
    """Raise for a label or an id out of range before anything is counted; for the CPU, where this is cheap."""
    suspect = bool(((labels < 0) & (labels != ignore_index)).any() or (labels >= vocab).any())
    if sample_ids is not None and sample_ids.numel() and state is not None and not suspect:
        suspect = bool(sample_ids.min() < -1 or sample_ids.max() >= state.num_samples)
    if suspect:
        known = -1 if state is None else state.num_samples
        error = layout(labels, sample_ids, known, vocab, ignore_index, shift).error.clone()
        raise_flagged(error, known, vocab, counted=False)


def debugging() -> bool:
    """Whether GEKO_DEBUG asks for a check of every call."""
    return os.environ.get("GEKO_DEBUG", "0") not in ("", "0")


def check_flag(error: Tensor | None, state: SampleState | None, vocab: int) -> None:
    """With GEKO_DEBUG=1: raise at once for what the ops flagged."""
    if error is not None and debugging():
        raise_flagged(error, len(state) if state is not None else -1, vocab)


def num_items_tensor(num_items: Any, reduction: str, device: torch.device, eager: bool) -> Tensor | None:
    """`num_items` as a () float32 tensor on `device`.

    A tensor's value that cannot be read without waiting for a GPU is not checked: unless it is a finite number above 0
    it becomes float32's smallest number, whose inverse is infinite.
    """
    if num_items is None:
        return None
    if reduction not in ("mean", "token_mean"):
        raise ValueError(f"num_items divides only reduction='mean' or 'token_mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        return _items_of(num_items, device, eager)
    if not isinstance(num_items, (int, float)) and _is_real(num_items):
        num_items = float(num_items)
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"num_items must be a number or a tensor of one element, got {type(num_items).__name__}")
    _check_items(num_items)
    return torch.ones((), dtype=torch.float32, device=device) * num_items  # torch.full compiles for every number anew


def _items_of(num_items: Tensor, device: torch.device, eager: bool) -> Tensor:
    if num_items.layout is not torch.strided or num_items.is_nested:
        raise_layout("num_items", num_items)
    if num_items.numel() != 1:
        shape = tuple(num_items.shape)
        raise ValueError(f"num_items must be a number or a tensor of one element, got shape {shape}")
    if num_items.dtype == torch.bool or num_items.is_complex():
        raise TypeError(f"num_items must be a tensor of real numbers, got {num_items.dtype}")
    if num_items.is_meta and device.type != "meta":
        raise ValueError(f"num_items must hold a value, got a tensor on the meta device for a batch on {device}")
    visible = eager and num_items.device.type == "cpu"
    if visible:
        _check_items(num_items.item())
    items = num_items.detach().reshape(()).to(device, torch.float32, non_blocking=device.type != "cpu")
    if visible:
        return items
    least = _FLOAT32.smallest_normal * _FLOAT32.eps
    return items.nan_to_num(nan=least, posinf=least, neginf=least).clamp(min=least)


def _check_items(value: Any) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"num_items must be a finite number above 0, got {_shown(value)}")
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:
        raise ValueError(f"num_items must be {_IN_RANGE}, got {_shown(value)}")
