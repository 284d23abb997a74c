"""How much memory a step takes at its highest, also on a CPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernels.timing import Step, peak_mib


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operators make while it is entered, as long as they live: `now` and `peak` in bytes.

    What an operator takes inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._add(tensor.untyped_storage(), counted=False)
        outputs = func(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            self._add(tensor.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage, counted: bool = True) -> None:
        """Know a storage until it is freed, as another may have its address then."""
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def step_mib(step: Step, device: torch.device) -> float:
    """MiB that one step takes at its highest in addition to what was taken before it."""
    if device.type == "cuda":
        return peak_mib(step)
    with LiveMemory() as memory:
        step()
    return memory.peak / 2**20
