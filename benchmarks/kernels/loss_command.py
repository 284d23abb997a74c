"""The command line that loss.py and linear_loss.py share: options, rows, targets, exit status."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, Row, append, environment


def arguments(doc: str, file: str, contenders: Iterable[str], frontier: Iterable[str] = ()) -> argparse.Namespace:
    """Options, all contenders by default; an unknown one ends the program with a message.

    With `frontier`, the contenders under `--frontier`, there is that option.
    """
    contenders, frontier = list(contenders), list(frontier)
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if frontier:
        parser.add_argument(
            "--frontier", action="store_true", help="time against memory, at several budgets and chunks"
        )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="the first shapes, or one of each kind, instead of all")
    parser.add_argument("--contenders", help=f"some of {','.join(contenders)}; by default all")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"where {file} is appended to")
    parser.add_argument("--commit", help="goes into the rows where the source is no git checkout")
    options = parser.parse_args()
    known = frontier if frontier and options.frontier else contenders
    options.contenders = options.contenders or ",".join(known)
    unknown = sorted(set(options.contenders.split(",")) - set(known))
    if unknown:
        parser.error(f"--contenders: no such contender {', '.join(unknown)}")
    return options


def run_all(
    options: argparse.Namespace,
    file: str,
    shapes: dict[str, Any],
    run: Callable[..., Iterator[Row]],
    show: Callable[[Row], str],
    targets: Callable[[list[Row]], Iterable[Any]],
    draw: Callable[[list[Row], Path], None] | None = None,
) -> int:
    """Run all, append each row to `file` at once, print rows and targets; the exit status, 1 if one of ours failed."""
    # a slow stand-in is not what is to be measured
    warnings.filterwarnings("error", message="geko_kernels: the .* backend is not available")
    device = torch.device(options.device)
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    common, rows = environment(device, options.commit), []
    print(" ".join(f"{key}={value}" for key, value in common.items()), flush=True)
    for row in run(shapes[options.device], dtypes, options.contenders.split(","), device):
        rows.append(row | common)
        append(options.results / file, rows[-1])
        print(show(row), flush=True)
    print("\nTargets: measured, bar, what")
    for target in targets(rows):
        print(target)
    if draw is not None:
        draw(rows, options.results)
    return int(any(row["reason"] and row["contender"].startswith("geko") for row in rows))
