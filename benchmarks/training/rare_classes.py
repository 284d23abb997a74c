"""Which settings lose a rare class: a small classifier of imbalanced Gaussian classes, on the CPU.

    python -m benchmarks.training.rare_classes --out benchmarks/results/rare_classes_cpu_2026-11-27.jsonl
    python -m benchmarks.training.rare_classes --out benchmarks/results/rare_classes_cpu_2026-11-27.jsonl --table

A task is 5000 points around class centres in 16 dimensions, of which some have a wrong label; the last class is the
rarest. The test set has 1000 right points a class. Same network, order and learning rate (a cosine) for all settings.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import geko_kernels as gk
from benchmarks.results import append, environment, read
from geko_kernels.training.report.labels import label_figures

_FIVE = (0.4, 0.3, 0.2, 0.08, 0.02)
_ZIPF = tuple(k**-1.5 / sum(j**-1.5 for j in range(1, 21)) for k in range(1, 21))


class Task(NamedTuple):
    shares: tuple[float, ...]  # of the classes
    distance: float  # of a centre from the origin; the points scatter by 1 in each dimension
    epochs: int = 8
    rate: float = 3e-3
    noise: float = 0.0  # share of wrong labels


TASKS = {
    "5 classes, 2 % rare, 3 epochs": Task(_FIVE, 2.2, epochs=3),
    "5 classes, 2 % rare": Task(_FIVE, 2.2),
    "5 classes, 2 % rare, 20 % wrong labels": Task(_FIVE, 2.2, noise=0.2),
    "2 classes, 10 % rare": Task((0.9, 0.1), 1.2),
    "2 classes, 6 % rare": Task((0.94, 0.06), 1.4),
    "20 classes by Zipf's law, 0.5 % rare": Task(_ZIPF, 3.0),
    "3 classes, 1 % rare, 15 epochs": Task((0.5, 0.49, 0.01), 2.0, epochs=15, rate=1e-2),
}
SETTINGS = {
    "uniform()": gk.GEKOConfig.uniform(),
    "recommended()": gk.GEKOConfig.recommended(),
    "GEKOConfig()": gk.GEKOConfig(),
    "original()": gk.GEKOConfig.original(),
    "recommended(noise_guard_min_share=0)": gk.GEKOConfig.recommended(noise_guard_min_share=0),
    "recommended(noise_guard_min_share=0, noise_guard_margin=1)": gk.GEKOConfig.recommended(
        noise_guard_min_share=0, noise_guard_margin=1
    ),
}


def points(task: Task, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels to train, and to test."""
    draw, classes = torch.Generator().manual_seed(seed), len(task.shares)
    centres = nn.functional.normalize(torch.randn(classes, 16, generator=draw)) * task.distance
    label = torch.cat([torch.full((round(share * 5000),), k) for k, share in enumerate(task.shares)])
    test = torch.arange(classes).repeat_interleave(1000)
    inputs, tested = (centres[y] + torch.randn(len(y), 16, generator=draw) for y in (label, test))
    wrong = torch.rand(len(label), generator=draw) < task.noise
    label[wrong] = (label[wrong] + torch.randint(1, classes, label[wrong].shape, generator=draw)) % classes
    return inputs, label, tested, test


def run(task: Task, config: gk.GEKOConfig, seed: int) -> dict[str, Any]:
    inputs, label, tested, test = points(task, seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, len(task.shares)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=task.rate)
    data = TensorDataset(inputs, label)
    loader = gk.GEKOLoader(data, batch_size=64, num_epochs=task.epochs, config=config, seed=seed)
    for batch in loader:
        optimizer.param_groups[0]["lr"] = task.rate * 0.5 * (1 + math.cos(math.pi * loader.progress))
        (x, y), given = batch.data, (batch.ids, loader.state)
        with torch.set_grad_enabled(batch.trains):
            loss = gk.weighted_loss(net(x), y, *given, sample_weights=batch.weights, update=True)
        if batch.trains:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    hit = net(tested).argmax(1) == test
    recalls = [hit[test == k].float().mean().item() for k in range(len(task.shares))]
    labels = label_figures(data, loader.state)["labels"]
    (rare,) = (row for row in labels["listed"] if row["label"] == str(len(task.shares) - 1))
    return {"recalls": recalls, "rare": rare, "all": labels["all"], "warning": labels["warning"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each task and setting the means over the seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["task"], row["setting"]].append(row)
    heads = "task | settings | recall of the rarest | of all classes | quarantined: rarest | all | warned of it"
    lines = [heads, " | ".join(["---"] * 7)]
    for (task, setting), runs in found.items():
        means = [mean(r["recalls"][-1] for r in runs), mean(mean(r["recalls"]) for r in runs)]
        means += [mean(r[part]["quarantined"] for r in runs) for part in ("rare", "all")]
        warned = sum(f"'{r['rare']['label']}'" in (r["warning"] or "") for r in runs)
        lines.append(" | ".join([task, f"`{setting}`", *(f"{m:.2f}" for m in means), f"{warned} of {len(runs)}"]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, required=True, help="rows are added to it")
    parser.add_argument("--table", action="store_true", help="only print the table of its rows")
    given = parser.parse_args()
    if given.table:
        print(table(read(given.out)))
        return
    torch.set_num_threads(1)
    shared = {**environment(torch.device("cpu")), "command": " ".join(sys.argv)}
    for name in given.tasks:
        for setting, config in SETTINGS.items():
            for seed in range(given.seeds):
                row = {"task": name, "setting": setting, "seed": seed, **run(TASKS[name], config, seed), **shared}
                append(given.out, row)


if __name__ == "__main__":
    main()
