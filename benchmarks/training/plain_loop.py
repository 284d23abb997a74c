"""The toy of examples/plain_loop.py with wrong labels: the cross-entropy loop against the loop over a GEKOLoader.

python -m benchmarks.training.plain_loop [--out FILE] [--seeds 5]     # on the CPU, under two minutes on two cores

One row a run: accuracy on clean samples that none has trained, samples trained, and what the noise guard holds at the
end. `cross_entropy_5` and `_2` are the same loop in so many epochs, in place of 10. `linear` has no hidden layer.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import geko_kernels as gk
from benchmarks.results import RESULTS, append, environment

CLASSES, BATCH, RATE, TEST = 5, 50, 1e-2, 10_000
PLAIN = {"cross_entropy": 10, "cross_entropy_5": 5, "cross_entropy_2": 2}  # epochs
GUARDS: dict[str, dict[str, float]] = {  # changes of GEKOConfig.recommended(), whose margin is 3 and least share 0.05
    "geko": {},
    "geko_margin_1": {"noise_guard_margin": 1.0},
    "geko_min_share_0": {"noise_guard_min_share": 0.0},
}
CASES = (  # (task, samples, share of wrong labels)
    ("mlp", 2000, 0.0),
    ("mlp", 2000, 0.3),
    ("mlp", 4000, 0.1),
    ("linear", 4000, 0.2),
)


class Toy(NamedTuple):
    inputs: Tensor
    labels: Tensor  # as trained
    wrong: Tensor  # bool
    test_inputs: Tensor
    test_labels: Tensor


def make_toy(samples: int, noise: float, seed: int) -> Toy:
    torch.manual_seed(seed)
    inputs, directions = torch.randn(samples + TEST, 16), torch.randn(4, CLASSES)
    clean = (inputs[:, :4] @ directions).argmax(1)
    wrong = torch.zeros(samples, dtype=torch.bool)
    wrong[torch.randperm(samples)[: round(noise * samples)]] = True
    others = (clean[:samples] + torch.randint(1, CLASSES, (samples,))) % CLASSES
    labels = torch.where(wrong, others, clean[:samples])
    return Toy(inputs[:samples], labels, wrong, inputs[samples:], clean[samples:])


def make_model(task: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    if task == "linear":
        return torch.nn.Linear(16, CLASSES)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, CLASSES))


def train_cross_entropy(model: torch.nn.Module, toy: Toy, seed: int, epochs: int) -> int:
    """The usual loop; how many samples it trained."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(toy.inputs, toy.labels), BATCH, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for inputs, labels in loader:
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return epochs * len(toy.labels)


def train_geko(model: torch.nn.Module, toy: Toy, seed: int, changes: dict[str, float]) -> gk.GEKOLoader:
    config = gk.GEKOConfig.recommended(**changes)
    loader = gk.GEKOLoader(TensorDataset(toy.inputs, toy.labels), BATCH, 10, config, "cpu", seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - loader.progress)
    for batch in loader:
        with torch.set_grad_enabled(batch.trains):
            x, y = batch.data
            loss = gk.weighted_loss(model(x), y, batch.ids, loader.state, sample_weights=batch.weights, update=True)
        if batch.trains:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return loader


def run(task: str, samples: int, noise: float, arm: str, seed: int) -> dict[str, Any]:
    toy, model = make_toy(samples, noise, seed), make_model(task, seed)
    row: dict[str, Any] = {"task": task, "samples": samples, "noise": noise, "arm": arm, "seed": seed}
    start = time.perf_counter()
    if arm in GUARDS:
        loader = train_geko(model, toy, seed, GUARDS[arm])
        held, counts = loader.state.quarantined, loader.counts.report()
        row |= {"trained": counts["samples_backward"], "probed": counts["samples_forward"] - counts["samples_backward"]}
        row |= {"held_wrong": int((held & toy.wrong).sum()), "held_right": int((held & ~toy.wrong).sum())}
        margins = loader.state.last_loss + loader.state.confidence.log()  # of the model's answer over the label, nats
        row |= {
            "wrong_margin": margins[toy.wrong].median().item() if noise else None,
            "beyond_3": int((margins > 3).sum()),
        }
        row["doubtful"] = loader.sampler.doubtful
    else:
        row["trained"] = train_cross_entropy(model, toy, seed, PLAIN[arm])
    row["seconds"] = time.perf_counter() - start
    with torch.no_grad():
        row["accuracy"] = (model(toy.test_inputs).argmax(1) == toy.test_labels).float().mean().item()
    return {**row, "wrong": int(toy.wrong.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "plain_loop_cpu_2026-11-27.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    where = environment(torch.device("cpu"))
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for task, samples, noise in CASES:
        for arm in (*PLAIN, *GUARDS):
            for seed in range(given.seeds):
                row = run(task, samples, noise, arm, seed)
                append(given.out, {**row, **where})
                found[task, samples, noise, arm].append(row)
    for case, rows in found.items():
        accuracy = [row["accuracy"] for row in rows]
        spread = stdev(accuracy) if len(rows) > 1 else 0.0
        trained = mean(row["trained"] for row in rows) / rows[0]["samples"]
        held = [sum(row.get(name, 0) for row in rows) for name in ("held_wrong", "held_right", "wrong")]
        print(
            f"{case[0]:7}{case[1]:5} {case[2]:4.0%} {case[3]:16} clean accuracy {mean(accuracy):.3f} +- {spread:.3f}, "
            f"{trained:4.1f} passes"
            + (f", held {held[0]} of {held[2]} wrong, {held[1]} right" if case[3] in GUARDS else "")
        )


if __name__ == "__main__":
    main()
