"""The losses have a first derivative in reverse mode. Any other derivative raises, and is never silently zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from geko_kernels import torch_private

_PLAIN = {
    "weighted_loss": "F.cross_entropy",
    "weighted_linear_loss": "F.cross_entropy(F.linear(hidden, weight, bias), ...)",
}

_IN_TRACES = {
    "weighted_loss": " where the logits require a gradient: the trace would keep the value of this call",
    "weighted_linear_loss": ": the number of kept rows depends on values",
}


def check_transforms(name: str, *tensors: Tensor | None) -> None:
    """Raise `NotImplementedError` if a transform around the call of `name` would get no derivative or a wrong one."""
    if torch_private.forward_mode() and any(map(_has_tangent, tensors)):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (forward_ad, torch.func.jvp, jacfwd, hessian); use "
            f"{_PLAIN[name]} for one"
        )
    if torch.jit.is_tracing() and (name == "weighted_linear_loss" or _has_graph(tensors[0])):
        raise NotImplementedError(
            f"{name} does not run under torch.jit.trace{_IN_TRACES[name]}; use torch.compile or torch.export of "
            "weighted_loss instead"
        )
    if not torch_private.transformed():
        return
    if name == "weighted_linear_loss":
        raise NotImplementedError(
            "weighted_linear_loss does not run under the transforms of torch.func (grad, vjp, jacrev, vmap, jvp); use "
            "weighted_loss(F.linear(hidden, weight, bias), ...) there, or backward()"
        )
    if torch_private.levels("Functionalize"):
        raise NotImplementedError(
            "weighted_loss does not run under torch.func.functionalize: its state is updated in place; use "
            "torch.compile, which functionalizes what it can"
        )
    if torch_private.levels("Vmap"):
        raise NotImplementedError(
            "weighted_loss does not run under torch.vmap: its state is updated in place, a batch at a time. Give it "
            "the whole batch; reduction='none' returns the loss of each visit"
        )


def _has_graph(tensor: Tensor | None) -> bool:
    return tensor is not None and torch.is_grad_enabled() and tensor.requires_grad


def _has_tangent(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor):
        return False
    if forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    levels = torch_private.levels("Jvp")
    while levels and torch_private.is_wrapped(tensor):
        if torch_private.level_of(tensor) in levels:
            return True
        tensor = torch_private.get_unwrapped(tensor)
    return False


def check_upstream(name: str, grad_output: Tensor) -> None:
    """Raise `NotImplementedError` if `grad_output` of a backward of `name` has a tangent, which would be lost."""
    if torch_private.forward_mode() and _has_tangent(grad_output):
        raise NotImplementedError(
            f"the gradient of {name} has no forward-mode derivative (forward_ad or torch.func.jvp around a backward); "
            f"use {_PLAIN[name]} for one"
        )


def once(name: str, grad: Tensor, *sources: Tensor) -> Tensor:
    """`grad`, whose derivative raises; `sources` carry the graph of everything it depends on."""
    return _NoSecondDerivative.apply(name, grad, *sources) if torch.is_grad_enabled() else grad


def link(*tensors: Tensor | None) -> Tensor:
    """An empty tensor whose graph leads to `tensors`, for `once`: it keeps none of their values."""
    with torch.enable_grad():
        return super(torch.autograd.Function, _Link).apply(*tensors)  # bypasses torch.func, which is refused


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient under create_graph: usable as a value; its backward raises, so it is never silently a constant."""

    @staticmethod
    def forward(name: str, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(f"{ctx.name} has no second derivative; use {_PLAIN[ctx.name]} for one")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], name: str, grad: Tensor, *sources: Tensor) -> tuple[Tensor, Any]:
        return _NoSecondDerivative.apply(name, grad, *sources), in_dims[1]


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, ...]:
        raise AssertionError("behind _NoSecondDerivative, which raises")
