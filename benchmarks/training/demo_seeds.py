"""`make demo` over ten seeds: another draw of wrong labels, another start and another order in each.

python -m benchmarks.training.demo_seeds [--out FILE] [--seeds 10] [--first 0]     # on the CPU, six minutes

Two rows a seed, with 30 % wrong labels and with none. `best` is the accuracy after uniform training's best epoch;
`cpu_seconds` are those of all threads, the evaluation after each epoch included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from demo import WRONG, Data, progress_bars
from demo_report import Found
from demo_training import train
from glosses import CLASSES, wrong_labels
from rich.console import Console

from benchmarks.results import RESULTS, append, environment


def run(data: Data, share: float, seed: int) -> dict[str, Any]:
    right, held_out = (glosses.labels for glosses, _ in data.splits)
    given = wrong_labels(right, share, seed)
    items = data.items(0, given), data.items(1, held_out)
    row: dict[str, Any] = {
        "seed": seed,
        "wrong_share": share,
        "samples": len(given),
        "wrong": int((given != right).sum()),
    }
    with TemporaryDirectory() as folder, progress_bars(Console(), disable=True) as progress:
        for name in ("uniform", "GEKO"):
            start = time.process_time()
            arm = train(name, items, len(CLASSES), seed, Path(folder), progress)
            end = arm.epochs[-1]
            row[name.lower()] = {
                "accuracy": end.accuracy,
                "best": max(epoch.accuracy for epoch in arm.epochs),
                "seconds": end.seconds,
                "cpu_seconds": time.process_time() - start,
                "forwarded": end.forwarded,
                "backpropagated": end.backpropagated,
            }
        found = Found(Path(folder), right, given)
    return {**row, "named": len(found.named), "named_wrong": len(found.true)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_cpu_2026-11-27.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model on few samples")
    given = parser.parse_args()
    logging.disable_progress_bar()
    where = environment(torch.device("cpu")) | {"transformers": version("transformers")}
    where["command"] = f"python -m benchmarks.training.demo_seeds --seeds {given.seeds} --first {given.first}"
    with progress_bars(Console()) as progress:
        data = Data(given.smoke, progress)
    rows: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for seed in range(given.first, given.first + given.seeds):
        for share in (WRONG, 0.0):
            row = run(data, share, seed)
            append(given.out, {**row, **where})
            rows[share].append(row)
    for share, found in rows.items():
        print(f"{share:.0%} of the labels wrong:")
        for name in ("accuracy", "best", "seconds", "cpu_seconds", "backpropagated"):
            print(f"  {name:15} uniform {_spread(found, 'uniform', name)}, GEKO {_spread(found, 'geko', name)}")
        gains = [row["geko"]["accuracy"] - row["uniform"]["accuracy"] for row in found]
        print(f"  GEKO's gain     {mean(gains):+.4f}, {min(gains):+.4f} to {max(gains):+.4f}")
        named, true, wrong = (sum(row[name] for row in found) for name in ("named", "named_wrong", "wrong"))
        print(f"  named as wrong  {named}, of which {true} are, of {wrong}")


def _spread(rows: list[dict[str, Any]], arm: str, name: str) -> str:
    values = [row[arm][name] for row in rows]
    return f"{mean(values):.4g} +- {stdev(values) if len(values) > 1 else 0.0:.2g}"


if __name__ == "__main__":
    main()
