"""Launches of the linear path, where numbers differ from call to call and the binary rarely does."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from geko_kernels.kernels.launch import MOST, Launch


class KeyedLaunch:
    """`kernel[(programs,)](*args, **constants, num_warps=warps)`, a `Launch` for each key.

    Pointers and numbers both change from call to call, so the key fixes what Triton would inspect: types, alignments,
    Nones, and whether a number is 1 or a multiple of 16, except for numbers that the kernel does not specialize.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: dict[Hashable, Launch] = {}

    def __call__(
        self, key: Hashable, programs: int, args: tuple[Any, ...], constants: dict[str, Any], warps: int
    ) -> None:
        """Args: constants in the kernel's order; the key fixes them, and warps."""
        launch = self.launches.get((key, programs))
        if launch is None:
            if len(self.launches) >= MOST:
                self.launches.clear()
            launch = self.launches[key, programs] = Launch(self.kernel, programs, (), constants, warps)
        launch(*args)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes that one program may take."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined,no-any-return]


def programs_for(work: int, each: int, tensor: Tensor) -> int:
    """Programs of a kernel that loops over `work` items: at most `each` on a multiprocessor of the tensor's device."""
    return min(work, each * multiprocessors(tensor.get_device())) if tensor.is_cuda else work
