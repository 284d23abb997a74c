"""Medians of repeated steps, and what else a step costs: launches, host time, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Step = Callable[[], object]
_SECONDS = {"cuda": 0.25, "cpu": 1.5}  # aimed at per measurement
_MOST = {"cuda": 100, "cpu": 300}  # repeats; on a GPU each begins with a flush of 2 to 3 ms
_FLUSH_BYTES, _FLUSHES = 2**30, 8  # many times the L2 of any GPU so far; together 2 to 3 ms of an H200 or H100


class Timing(NamedTuple):
    """Milliseconds a step."""

    median: float
    p20: float
    p80: float


def measure(step: Step, device: torch.device, reset: Step | None = None, inner: int = 1) -> Timing:
    """Median and 20/80 quantiles of `step`'s time; `reset` runs before each measurement, outside of it.

    On a GPU, device events enclose `inner` steps. With `inner` 1 the L2 is flushed first, for so long that dozens of
    launches queue up behind it, as they do behind a model's forward: the time is the device's, and where a step makes
    the host wait for the device, what follows comes late. With more, nothing lies between the steps: where the device
    waits for the host, the waiting counts. On a CPU it is the wall clock.
    """
    clock = _events if device.type == "cuda" else _wall
    guess = sorted(clock(step, reset, inner, 3))[1] * inner / 1e3
    repeats = int(min(max(_SECONDS[device.type] / guess, 7), _MOST[device.type]))
    times = torch.tensor(clock(step, reset, inner, repeats))
    return Timing(*times.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist())


def _wall(step: Step, reset: Step | None, inner: int, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        if reset:
            reset()
        start = time.perf_counter()
        for _ in range(inner):
            step()
        times.append((time.perf_counter() - start) * 1e3 / inner)
    return times


def _events(step: Step, reset: Step | None, inner: int, repeats: int) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda") if inner == 1 else None
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        if reset:
            reset()
        if flush is not None:
            for _ in range(_FLUSHES):
                flush.zero_()
        start.record()
        for _ in range(inner):
            step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / inner for start, end in pairs]


def launches(step: Step) -> int:
    """Kernels, fills and copies that one step puts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def host_us(forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], object]) -> tuple[float, float]:
    """Median microseconds the host is busy in `loss = forward()` and in `backward(loss)`, starting from an idle GPU."""
    times = []
    for _ in range(21):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = forward()
        middle = time.perf_counter()
        backward(loss)
        times.append((middle - start, time.perf_counter() - middle))
        del loss
    torch.cuda.synchronize()
    there, back = torch.tensor(times).median(0).values.tolist()
    return there * 1e6, back * 1e6


def peak_mib(step: Step) -> float:
    """MiB of GPU memory that one step takes at its highest on top of what was taken before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
