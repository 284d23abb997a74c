"""Tests a model without side effects: restores its modes, buffers, counts and the random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from geko_kernels.torch_private import set_buffer

_PLAIN = (int, float, str, type(None), Tensor)


class RandomNumbers:
    """The current states of the generators of Python, NumPy and torch (CPU and `device`), and of those that modules of
    `model` have as attributes."""

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self.device = device
        self.python, self.numpy, self.cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        values = (value for module in model.modules() for value in vars(module).values())
        self.own = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)
        for generator, state in self.own:
            generator.set_state(state)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the context `model` is in eval mode without gradients.

    Afterwards its modules' modes, buffers and attributes with numbers, texts or tensors are restored, and so are the
    random number generators.
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
        with torch.no_grad():
            yield
            for module, name, buffer, value in buffers:
                set_buffer(module, name, buffer.copy_(value))
    finally:
        for module, values in plain:  # `training` is one of them
            vars(module).update(values)
        numbers.restore()
