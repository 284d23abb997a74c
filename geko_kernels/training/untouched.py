"""Asking a model leaves nothing behind: its modes, its buffers and the random numbers to come are as before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class RandomNumbers:
    """The state of Python's, NumPy's and torch's generators when it was made; torch's of the CPU and of `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.python, self.numpy, self.cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, `model` is in eval mode without gradients; afterwards its modules' modes and buffers, and the random
    numbers to come, are as they were."""
    numbers = RandomNumbers(device)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        with torch.no_grad():
            yield
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
    finally:
        for module, trains in modes:
            module.training = trains
        numbers.restore()
