"""Launch a compiled Triton kernel again without asking anew what to compile it for."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

_MOST = 1024  # launches remembered a kernel; varying sequence lengths would fill memory otherwise


class Launcher:
    """`kernel[(programs,)](*args, **constants, num_warps=warps)`, which costs the host several times less again.

    Triton looks at every argument at each launch (types, alignment, divisibility by 16) to find the binary. Where the
    caller has a `key` that settles all of it, the binary found the first time is launched straight away.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable, programs: int, args: tuple[Any, ...], constants: dict[str, Any], warps: int
    ) -> None:
        """Args: key, equal only for launches of one binary with one grid; None asks Triton; constants in its order."""
        again = self.compiled.get(key)
        if again is not None:
            again(*args, *constants.values())
            return
        binary = self.kernel[(programs,)](*args, **constants, num_warps=warps)
        if key is not None and binary is not None:  # the interpreter returns None
            if len(self.compiled) >= _MOST:
                self.compiled.clear()
            self.compiled[key] = binary[(programs, 1, 1)]


def cdiv(size: int, step: int) -> int:
    """`triton.cdiv` for the host, without the 4 us that serve constexpr arguments."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """`triton.next_power_of_2` for the host; see `cdiv`."""
    return 1 << (size - 1).bit_length()
