"""Tokens a second, share of the card's bf16 peak and peak memory of a whole training step.

    python -m benchmarks.training.training_step --models 135m 1b --lengths 512 2048 --budget-seconds 480

`transformers.Trainer` and TRL's `SFTTrainer` (its own fused head; left out where trl is missing), each with Liger's
kernels too where liger-kernel is installed, and PyTorch's bare loop, beside `GEKOTrainer` and `GEKOSFTTrainer`
with `GEKOConfig.recommended()`, and `GEKOTrainer` with `uniform()`. Every contender trains the same random tokens in
the same batches and order through its own `train()`: AdamW (fused), bf16 autocast, a random model. Only SFTTrainer and
GEKOSFTTrainer pack in their own ways. All samples are new, so that GEKO leaves none out.

On a GPU each contender has a process of its own: Liger replaces layers of Transformers for all that follows.
The time is that of 16 steps after 8, with the device idle at both ends. FLOPs are 6 a weight and token, 4 where the
weight is frozen, and 12 * layers * hidden * length a token for attention; padding counts as no token. Points run in the
order of their worth. What the budget leaves no time for, what is missing and what fails are rows too.
Rows go to results/training_step.jsonl. `--tiny` tries it out anywhere.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from benchmarks.results import RESULTS, append, environment
from benchmarks.training.models import MODELS
from benchmarks.training.training_step_data import TOKENS, WITHOUT_CUDNN, Point
from benchmarks.training.training_step_run import CONTENDERS, measure

FORMS = ("padded", "padding-free", "packed", "full")


def points(
    models: list[str],
    lengths: list[int],
    forms: list[str],
    compiled: tuple[bool, ...] = (True, False),
    checkpointing: tuple[bool, ...] = (False, True),
    attentions: tuple[str, ...] = ("sdpa",),
) -> list[Point]:
    """All of them, the most useful first: what is named first in more of the lists comes sooner."""

    def rank(point: Point) -> int:
        places = models.index(point.model), lengths.index(point.length), forms.index(point.form)
        others = checkpointing.index(point.checkpointing), attentions.index(point.attention)
        return sum(places) + 3 * sum(others) + compiled.index(point.compiled)

    found = product(models, lengths, forms, compiled, checkpointing, attentions)
    return sorted((Point(*each) for each in found), key=rank)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["point"].values())


def table(rows: list[dict[str, Any]]) -> str:
    """A line a row: tokens a second, memory, the share of the best other's; then a line a point: ours and theirs."""
    lines, summary = [], []
    for point in dict.fromkeys(key_of(row) for row in rows):
        mine = {row["contender"]: row for row in rows if key_of(row) == point and "ms" in row}
        speeds = {name: row["tokens_per_second"] for name, row in mine.items()}
        others = {name: speed for name, speed in speeds.items() if not name.startswith("geko") and name != "loop"}
        for name, row in mine.items():
            share = row["tokens_per_second"] / max(others.values()) if others else float("nan")
            of_peak = "" if row["peak_share"] is None else f"{row['peak_share']:.1%} of the peak, "
            memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB, "
            lines.append(
                f"{point} {name}: {row['ms']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s, {of_peak}{memory}"
                f"{share:.2f} of the best other"
            )
        ours = {name: speed for name, speed in speeds.items() if name.startswith("geko")}
        if ours and others:
            us, best = max(ours, key=ours.__getitem__), max(others, key=others.__getitem__)
            summary.append(
                f"{point}: {us} {ours[us]:,.0f}, {best} {others[best]:,.0f} tokens/s: {ours[us] / others[best]:.2f}"
            )
    failed = [f"{key_of(row)} {row['contender']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([*lines, *failed, "", "best of GEKO, best of the other trainers:", *summary])


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["135m", "1b", "8b-lora"], choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 128])
    parser.add_argument("--forms", nargs="+", default=list(FORMS[:3]), choices=FORMS)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--compile", nargs="+", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["on", "off"])
    parser.add_argument(
        "--attentions",
        nargs="+",
        choices=("flash_attention_2", "flex_attention", "sdpa", WITHOUT_CUDNN),
        help="default: FlashAttention where it is installed, and SDPA",
    )
    parser.add_argument(
        "--tokens", type=int, help="a step, padding included; by default what the model is given room for"
    )
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="stop measuring after so long")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="the top 25 ops of a step there, and no timing")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a dry run of the eager forms on a tiny model")
    args = parser.parse_args(given)
    if args.tiny:
        args.models, args.lengths, args.compile, args.checkpointing = ["tiny"], [16], ["off"], ["off"]
        if args.results == RESULTS:
            args.results = None
    return args


def versions(device: torch.device, commit: str | None) -> dict[str, Any]:
    shared = {**environment(device, commit), "command": " ".join(sys.argv)}
    for package in ("transformers", "accelerate", "trl", "peft", "liger-kernel", "flash-attn"):
        try:
            shared[package] = version(package)
        except PackageNotFoundError:
            shared[package] = None
    return shared


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fork of this process, which has imported everything and not used the GPU."""
    receives, sends = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: sends.send(function(*args)))
    child.start()
    sends.close()
    try:
        found = receives.recv()
    except EOFError:
        child.join()
        return {"error": f"its process ended with {child.exitcode}"}
    child.join()
    return found


def main() -> None:
    given = parse()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() begins nothing that a fork could not use
    for package in ("trl", "peft", "liger_kernel.transformers"):
        with suppress(ImportError):
            importlib.import_module(package)
    deadline, rows = time.perf_counter() + given.budget_seconds, []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = apart if device.type == "cuda" else lambda function, *args: function(*args)
    shared = run(versions, device, given.commit)
    switches = [tuple(word == "on" for word in words) for words in (given.compile, given.checkpointing)]
    attentions = given.attentions or (["flash_attention_2"] if is_flash_attn_2_available() else []) + ["sdpa"]
    for point in points(given.models, given.lengths, given.forms, *switches, tuple(attentions)):
        for name in given.contenders:
            tokens = given.tokens or TOKENS[point.model]
            profile = given.profile and given.profile / f"{name}_{'_'.join(map(str, point))}.txt"
            if time.perf_counter() > deadline:
                found: dict[str, Any] = {"tokens": tokens, "left_out": "not reached"}
            else:
                found = run(measure, name, point, tokens, device, deadline, profile)
            rows.append({"contender": name, "point": point._asdict(), **found})
            print(rows[-1], flush=True)
            if given.results is not None and profile is None:
                append(given.results / "training_step.jsonl", {**rows[-1], **shared})
            gc.collect()
            torch._dynamo.reset()
    print(table(rows))


if __name__ == "__main__":
    main()
