"""Start a compiled Triton kernel again without inspecting its arguments, on the device of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from geko_kernels.kernels.triton_private import start_of, watched

MOST = 1024  # launches cached per kind; varying sequence lengths would otherwise fill memory


def on_own_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, with its first tensor's device made the current one, to which launches go."""

    @functools.wraps(op)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return op(first, *rest)
        with torch.cuda.device_of(first):
            return op(first, *rest)

    return run


class Launch:
    """`kernel[(programs,)](*pointers, *numbers, **constants, num_warps=warps)`, with all but the pointers fixed.

    Triton inspects every argument of a launch (type, alignment, divisibility by 16) to find the binary. Here only the
    first call does; later ones start that binary directly. So a `Launch` serves pointers of one set of types,
    alignments and Nones, on one device. Once `ready`, it also takes addresses (int) instead of tensors.

    Args: numbers, constants: in the kernel's order, after its pointers.
    """

    __slots__ = ("_again", "_arguments", "_binary", "_constants", "_grid", "_kernel", "_warps", "ready")

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any], warps: int
    ) -> None:
        self._kernel, self._grid, self._warps = kernel, (programs, 1, 1), warps
        self._arguments, self._constants = numbers, constants
        self.ready = False  # always False under the interpreter, and if this Triton starts kernels in an unknown way

    def __call__(self, *pointers: Any) -> None:
        if not self.ready:
            self._first(pointers)
        elif watched():
            self._binary[self._grid](*pointers, *self._arguments)
        else:
            run, stream_of, device, about = self._again
            run(*self._grid, stream_of(device), *about, *pointers, *self._arguments)

    def _first(self, pointers: tuple[Any, ...]) -> None:
        binary = self._kernel[self._grid](*pointers, *self._arguments, **self._constants, num_warps=self._warps)
        again = start_of(binary)
        if again is not None:
            self._binary, self._again = binary, again
            self._arguments = (*self._arguments, *self._constants.values())
            self.ready = True


def cdiv(size: int, step: int) -> int:
    """`triton.cdiv` for the host, without 4 us of overhead for constexpr arguments."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """`triton.next_power_of_2` for the host; see `cdiv`."""
    return 1 << (size - 1).bit_length()
