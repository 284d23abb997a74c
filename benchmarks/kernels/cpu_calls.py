"""Forward and backward of both losses on the CPU against eager PyTorch, from calls of microseconds to milliseconds.

    python -m benchmarks.kernels.cpu_calls [--seconds 5] [--threads 1]

`weighted_loss` against `F.cross_entropy`, and `weighted_linear_loss` against `F.cross_entropy(F.linear(...))`, in
float32 with a state, `loss.backward()` included. The two take turns, some calls each, for `--seconds` a case. Prints
the ratio of the medians and that of the minima, which a busy machine disturbs less, and writes
`benchmarks/results/cpu_calls.jsonl`. Where other jobs take the cores, threads wait for each other: only `--threads 1`
says something then.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import geko_kernels as gk
from benchmarks.results import RESULTS, append, environment

# shape, (B, V) of the logits or (B, H, V) of a head: the most that ours may take of eager's time
TARGETS = {(8, 10): 2.5, (64, 1000): 1.5, (4096, 26): 1.5, (65536, 4): 1.5, (8, 64, 10): 4.0, (4096, 64, 26): 2.0}
_ROUND, _CALLS = 1e-3, 20  # seconds of calls in a row, and the most of them


def loss_calls(batch: int, vocab: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    """Ours and eager's forward, and the tensors that need gradients."""
    logits = torch.randn(batch, vocab, requires_grad=True)
    labels, ids, state = torch.randint(vocab, (batch,)), torch.arange(batch), gk.SampleState(batch)
    return lambda: gk.weighted_loss(logits, labels, ids, state), lambda: F.cross_entropy(logits, labels), [logits]


def head_calls(batch: int, width: int, vocab: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    hidden = torch.randn(batch, width, requires_grad=True)
    weight, bias = (torch.randn(vocab, *shape, requires_grad=True) for shape in ((width,), ()))
    labels, ids, state = torch.randint(vocab, (batch,)), torch.arange(batch), gk.SampleState(batch)
    return (
        lambda: gk.weighted_linear_loss(hidden, weight, labels, ids, state, bias=bias),
        lambda: F.cross_entropy(F.linear(hidden, weight, bias), labels),
        [hidden, weight, bias],
    )


def seconds_a_call(forward: Callable[[], Tensor], leaves: list[Tensor], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        forward().backward()
        for leaf in leaves:
            leaf.grad = None
    return (time.perf_counter() - start) / calls


def measure(shape: tuple[int, ...], seconds: float) -> dict[str, list[float]]:
    """{"geko" and "torch": microseconds a call, one entry a round}."""
    ours, eager, leaves = (loss_calls if len(shape) == 2 else head_calls)(*shape)
    for _ in range(5):
        guess = seconds_a_call(ours, leaves, 3), seconds_a_call(eager, leaves, 3)
    calls = min(max(1, int(_ROUND / min(guess))), _CALLS)
    times: dict[str, list[float]] = {"geko": [], "torch": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times["geko"].append(seconds_a_call(ours, leaves, calls) * 1e6)
        times["torch"].append(seconds_a_call(eager, leaves, calls) * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, help="by default as many as torch takes")
    parser.add_argument("--commit", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for shape, bar in TARGETS.items():
        times = measure(shape, options.seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        least = {name: min(values) for name, values in times.items()}
        ratio, ratio_least = median["geko"] / median["torch"], least["geko"] / least["torch"]
        print(
            f"{' x '.join(map(str, shape))}: geko {median['geko']:.1f} us, torch {median['torch']:.1f} us, "
            f"ratio {ratio:.2f} (of the minima {ratio_least:.2f}), at most {bar}",
            flush=True,
        )
        row = {"bench": "cpu_calls", "shape": shape, "median_us": median, "min_us": least, "bar": bar}
        row |= {"ratio": ratio, "ratio_of_minima": ratio_least}
        append(options.results / "cpu_calls.jsonl", row | environment(torch.device("cpu"), options.commit))


if __name__ == "__main__":
    main()
