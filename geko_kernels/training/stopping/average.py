"""The running average of a model's trainable parameters over a run at a constant rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geko_kernels.torch_private import foreach_lerp_

_SPAN = 5  # the average spans about a fifth of the steps so far


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a parameter; the tensor itself if it is not sharded."""
    own = tensor.detach()
    return own.to_local() if hasattr(own, "to_local") else own


class WeightAverage:
    """`average.lerp_(parameter, min(1, 5 / t))` after step t, in float32, of the parameters that require gradients.

    The span grows with the run, so the same rule serves runs of any length. Only those parameters are copied: of a
    model with adapters only the adapters, of a sharded model only this process's shard. It takes 4 bytes a trainable
    parameter, and inside `in_place` also a copy of the trainable parameters.

    Raises:
        ValueError: no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires a gradient, so there is nothing to train or average")
        self.names, parameters = zip(*trained, strict=True)
        self._parameters: tuple[Tensor, ...] = parameters
        self.values = [_local(p).to(torch.float32, copy=True) for p in parameters]
        self.step = 0

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values)

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters after an optimizer step to the average, in a few launches for all of them."""
        self.step += 1
        share = min(1.0, _SPAN / self.step)
        foreach_lerp_(self.values, [_local(parameter).float() for parameter in self._parameters], share)

    @torch.no_grad()
    def copy_to_model(self, values: Iterable[Tensor] | None = None) -> None:
        """Write the average, or `values`, into the model."""
        for parameter, value in zip(self._parameters, self.values if values is None else values, strict=True):
            _local(parameter).copy_(value)

    def own(self) -> dict[str, Tensor]:
        """The parameters themselves, by name."""
        return {name: _local(parameter) for name, parameter in zip(self.names, self._parameters, strict=True)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the context the model has the averaged weights; afterwards it has its own again, bit for bit."""
        own = [_local(p).clone() for p in self._parameters]
        self.copy_to_model()
        try:
            yield
        finally:
            self.copy_to_model(own)

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step), **dict(zip(self.names, self.values, strict=True))}

    def load_state_dict(self, values: dict[str, Tensor]) -> None:
        """
        Raises:
            ValueError: the values are of other parameters; names the first.
        """
        other = sorted({"step", *self.names} ^ set(values))
        if other:
            raise ValueError(f"the average has other parameters than the model, the first is {other[0]!r}")
        self.step = int(values["step"])
        for name, own in zip(self.names, self.values, strict=True):
            if own.shape != values[name].shape:
                shapes = f"{tuple(values[name].shape)}, but the model's is {tuple(own.shape)}"
                raise ValueError(f"the average of {name!r} has the shape {shapes}")
            own.copy_(values[name])
