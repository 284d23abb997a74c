"""The CUDA library in csrc/hopper: one pass over the logits for statistics and gradient, on sm_90.

A plain C library loaded by ctypes at the first call that can use it. It has its own CUDA runtime and takes addresses
only, so one binary serves every torch. Built against LibTorch's stable ABI, it would need a CUDA build of torch to
compile and to load.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geko_kernels.extras import REBUILD, warn_user
from geko_kernels.torch_private import stream_address

_GET = f"With nvcc on the path: {REBUILD}"
CAPABILITY = (9, 0)
_JOBS = ("geko_predicted_rows", "geko_score_rows")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCK_BYTES = 227 * 1024  # most shared memory of a block, of 228 KiB on a multiprocessor
_HALF_BYTES = 113 * 1024  # the same with two blocks on a multiprocessor
_STEP = 4  # vectors that a thread loads at once
_SLICE_BYTES = 160 * 1024  # the most that one block holds of a row: its other memory prefetches the next row


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("device", "job", "dtype", "warps", "blocks", "shared")),
        ("kernel", ctypes.c_void_p),
    ]


# struct PredictedRows: 9 pointers; strides of B and S of logits and grad; count, length, vocab, parts; struct Tiling
_ARGUMENTS = struct.Struct("@9Q 4q 8i")


class Tiling(NamedTuple):
    """How the `blocks` of a cluster share a row: a slice each, read in chunks; sizes in vectors of 16 bytes."""

    blocks: int
    warps: int
    slice: int
    chunk: int
    slots: int  # chunks in a block's memory
    shared: int  # bytes


def tiling_of(vocab: int, dtype: torch.dtype) -> Tiling | None:
    """The fastest tiling of those tried on an H200 for rows of this size; None if there is no kernel for them."""
    if dtype not in _DTYPES or vocab <= 0:
        return None
    per = 16 // dtype.itemsize
    vectors = (vocab + 2 * per - 2) // per  # of a row that does not start at a vector's boundary
    if 16 * vectors <= _HALF_BYTES - 1024:
        return _tiling(vectors, 1, 8, _HALF_BYTES)
    for blocks in (1, 2, 4, 8):
        if 16 * vectors <= blocks * _SLICE_BYTES:
            return _tiling(vectors, blocks, 24, _BLOCK_BYTES)
    return None


def _tiling(vectors: int, blocks: int, warps: int, shared: int) -> Tiling:
    size = -(-vectors // blocks)
    chunk = -(-size // -(-size // (warps * 32 * _STEP)))
    chunk = -(-chunk // 8) * 8
    room = shared - 4 * (blocks * warps * 16 + 8)  # without the warps' partial sums of four rows, and their barriers
    return Tiling(blocks, warps, size, chunk, min(room // (chunk * 16 + 16), 64), shared)


@functools.cache
def library() -> ctypes.CDLL:
    """The library; raises ImportError if it was not built or cannot be loaded."""
    found = sorted(Path(__file__).parents[2].glob("_hopper.*"))
    if not found:
        raise ImportError(f"geko_kernels._hopper was not built at install, as nvcc was missing or failed. {_GET}")
    try:
        loaded = ctypes.PyDLL(str(found[0]))  # PyDLL keeps the GIL: releasing it costs more than the launch
    except OSError as error:
        raise ImportError(f"geko_kernels._hopper does not load: {error}. {_GET}") from error
    try:
        for job in _JOBS:
            getattr(loaded, job).argtypes = [ctypes.c_void_p] * 3
    except AttributeError as error:
        raise ImportError(f"geko_kernels._hopper was built from other sources: {error}. {_GET}") from error
    loaded.geko_error.restype = ctypes.c_char_p
    return loaded


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why the kernel cannot run on `device`; None if it can. Warns, once, where it could and was left out."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"it is for compute capability 9.0, this is {capability[0]}.{capability[1]}"
    try:
        library()
        RowsLaunch(device, torch.bfloat16, (1, 1, 2048), (1, 1), (1, 1), 0)
    except ImportError as error:
        warn_user(f"geko_kernels: large losses take one pass more over the logits, in Triton: {error}")
        return str(error)
    except RuntimeError as error:
        return str(error)
    return None


class LibraryLaunch:
    """Launches of one kernel of the library in one shape.

    Args: job: its function in the library.
    Raises: RuntimeError if CUDA refuses it, here or at a launch.
    """

    def __init__(self, job: str, device: torch.device, dtype: torch.dtype, tiling: Tiling) -> None:
        self._library = library()
        self._device = device.index or 0
        sizes = (tiling.warps, tiling.blocks, tiling.shared)
        self._shape = _Shape(self._device, _JOBS.index(job), _DTYPES[dtype], *sizes)
        clusters = ctypes.c_int()
        self._check(self._library.geko_shape(ctypes.byref(self._shape), ctypes.byref(clusters)))
        self.tiling = (tiling.slice, tiling.chunk, tiling.slots, clusters.value)  # struct Tiling
        self._shape_at, self._start = ctypes.addressof(self._shape), getattr(self._library, job)

    def start(self, arguments: bytes) -> None:
        """On the current stream. Args: arguments: the job's struct."""
        error = self._start(self._shape_at, arguments, stream_address(self._device))
        if error:
            self._check(error)

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(f"geko_kernels._hopper: CUDA error {error}, {self._library.geko_error(error).decode()}")


class RowsLaunch(LibraryLaunch):
    """`reference.one_pass.predicted_rows_` on tensors of one layout, with all but the pointers fixed.

    Args: shape (B, S, V); logits_strides, grad_strides: of B and S; parts: the number of counts.
    Raises: ValueError for a shape without a kernel; RuntimeError at a launch, for rows not laid out as in `serves`.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        logits_strides: tuple[int, ...],
        grad_strides: tuple[int, ...],
        parts: int,
    ) -> None:
        batch, length, vocab = shape
        tiling = tiling_of(vocab, dtype)
        if tiling is None or not 0 < batch * length < 2**31 or parts < 0:
            raise ValueError(f"no kernel for {dtype} logits of shape {tuple(shape)} and {parts} counts")
        super().__init__("geko_predicted_rows", device, dtype, tiling)
        self._numbers = (*logits_strides, *grad_strides, batch * length, length, vocab, parts, *self.tiling)

    def __call__(self, *pointers: Tensor | int | None) -> None:
        """On the current stream: logits, grad, target, coeff, counts, num_items, upstream, statistics, factor."""
        at = [pointer.data_ptr() if isinstance(pointer, Tensor) else pointer or 0 for pointer in pointers]
        self.start(_ARGUMENTS.pack(*at, *self._numbers))


def serves(logits: Tensor, grad: Any) -> bool:
    """Whether rows of `logits` (B, S, V) and their gradient have the layout that the kernel needs."""
    per = 16 // logits.element_size()
    apart = (logits.data_ptr() - grad.data_ptr()) % 16
    return (
        logits.stride(2) == 1
        and not apart
        and not any((mine - its) % per for mine, its in zip(logits.stride()[:2], grad.stride()[:2], strict=True))
        and tiling_of(logits.shape[2], logits.dtype) is not None
    )
