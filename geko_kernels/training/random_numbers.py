"""Saves and restores the states of the random number generators that a training step uses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class RandomNumbers:
    """The current states of the generators of Python, NumPy and torch.

    Args:
        device: the GPU whose generator is saved besides the CPU's, or the CPU; None for all GPUs.
        model: generators among its modules' attributes are saved as well.
    """

    def __init__(self, device: torch.device | None = None, model: nn.Module | None = None) -> None:
        self.python, self.numpy, self.cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        every = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        gpus = every if device is None else [device] if device.type == "cuda" else []
        self.gpus = [(gpu, torch.cuda.get_rng_state(gpu)) for gpu in gpus]
        values = (value for module in (() if model is None else model.modules()) for value in vars(module).values())
        self.own = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for gpu, state in self.gpus:
            torch.cuda.set_rng_state(state, gpu)
        for generator, state in self.own:
            generator.set_state(state)


@contextmanager
def fixed_random_numbers() -> Iterator[None]:
    """Inside the context the generators of Python, NumPy and torch's CPU start from seed 0; then they are restored."""
    before = RandomNumbers(torch.device("cpu"))
    try:
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        yield
    finally:
        before.restore()
