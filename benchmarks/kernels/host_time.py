"""What a call costs the host, and what the ways around the dispatcher and Triton's launcher save of it.

    python -m benchmarks.kernels.host_time [--rounds 15] [--calls 300]

Forward and backward of `weighted_loss` at shapes where the GPU waits for the host, and a training step of a small
classifier, each as microseconds a call: the median over rounds in which the variants take turns. Prints one line a
case and writes `benchmarks/results/host_time.jsonl`. It wants the host to itself.

- `as is`: eager calls bypass the dispatcher, repeated launches start their binary by addresses;
- `launcher`: the dispatcher is bypassed, each launch goes through Triton's own launcher, with tensors;
- `dispatcher`: the op `geko::loss_forward_`, repeated launches start their binary with tensors;
- `plain`: the op, and Triton's own launcher;
- `F.cross_entropy`: torch's, for scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import geko_kernels as gk
from benchmarks.results import append, environment
from geko_kernels import ops
from geko_kernels.kernels.launch import Launch

SHAPES = ((8, 10), (64, 1000), (512, 32000))
VARIANTS = ("as is", "launcher", "dispatcher", "plain", "F.cross_entropy")


def _own_launcher(launch: Launch, *pointers: object) -> None:
    numbers = launch._arguments[: len(launch._arguments) - len(launch._constants) * launch.ready]
    launch._kernel[launch._grid](*pointers, *numbers, **launch._constants, num_warps=launch._warps)


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Within, calls take the way of that name; plans and launches are made anew."""
    from geko_kernels.kernels import plan

    plan._plans.clear()
    patches = []
    if name in ("dispatcher", "plain"):
        patches.append(mock.patch.object(ops, "planned_loss_forward", lambda *_: None))
    if name in ("launcher", "plain"):
        patches.append(mock.patch.object(Launch, "__call__", _own_launcher))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        plan._plans.clear()


def loss_call(batch: int, classes: int, device: str, plain: bool) -> Callable[[], None]:
    """Forward and backward of the loss alone."""
    logits = torch.randn(batch, classes, device=device, requires_grad=True)
    labels = torch.randint(classes, (batch,), device=device)
    ids = torch.arange(batch, device=device)
    state = gk.SampleState(batch, device=device)

    def run() -> None:
        loss = nn.functional.cross_entropy(logits, labels) if plain else gk.weighted_loss(logits, labels, ids, state)
        (_,) = torch.autograd.grad(loss, logits)

    return run


def training_step(batch: int, classes: int, device: str, plain: bool) -> Callable[[], None]:
    """A step of a small classifier: three layers, SGD with fused updates."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes))
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=device == "cuda")
    inputs: Tensor = torch.randn(batch, 64, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    ids = torch.arange(batch, device=device)
    state = gk.SampleState(batch, device=device)

    def run() -> None:
        logits = model(inputs)
        loss = nn.functional.cross_entropy(logits, labels) if plain else gk.weighted_loss(logits, labels, ids, state)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(make: Callable[..., Callable[[], None]], shape: tuple[int, int], device: str, rounds: int, calls: int):
    """{variant: microseconds a call}, medians."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    runs = {name: make(*shape, device, name == "F.cross_entropy") for name in VARIANTS}
    for _ in range(rounds):
        for name, run in runs.items():
            with variant(name):
                for _ in range(10):
                    run()
                _wait(device)
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                _wait(device)
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for make in (loss_call, training_step):
        for shape in SHAPES if make is loss_call else SHAPES[:2]:
            found = measure(make, shape, options.device, options.rounds, options.calls)
            told = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            print(f"{make.__name__} {shape[0]} x {shape[1]}: {told} us", flush=True)
            row = {"case": make.__name__, "shape": shape, "us": found}
            append(options.results / "host_time.jsonl", row | environment(torch.device(options.device), options.commit))


if __name__ == "__main__":
    main()
