"""Tests a model without side effects: restores its modes, buffers, counts and the random number generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from geko_kernels.torch_private import set_buffer
from geko_kernels.training.random_numbers import RandomNumbers

_PLAIN = (int, float, str, type(None), Tensor)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the context `model` is in eval mode without gradients, and what torch.compile has wrapped runs eagerly.

    Afterwards its modules' modes, buffers and attributes that are numbers, texts or tensors are restored, and so are
    the random number generators.
    """
    numbers = RandomNumbers(device, model)
    plain = [
        (module, {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)})
        for module in model.modules()
    ]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in plain
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
            for module, name, buffer, value in buffers:
                set_buffer(module, name, buffer.copy_(value))
    finally:
        for module, values in plain:  # `training` is one of them
            vars(module).update(values)
        numbers.restore()
