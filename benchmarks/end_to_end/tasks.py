"""The end-to-end tasks: what is learnt, by which network, in how many epochs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import data
from benchmarks.end_to_end.instructions import instructions


@dataclass(frozen=True)
class Task:
    """One task.

    samples, test: training and held-out samples; R1 is measured on the training samples.
    lr: the learning rate where none has been tuned.
    sizes: lengths in tokens that batches are padded to.
    measure: what it is judged by at the end, "test_accuracy" (exact match) or "test_loss".
    """

    name: str
    what: str
    network: str  # "smollm2", all its layers trained, "adder", from scratch, or a small one, see end_to_end_small
    samples: int
    test: int
    epochs: int
    batch: int
    lr: float
    sizes: tuple[int, ...]
    noise: float = 0.0
    noise_kind: str = "uniform"
    seeds: int = 5
    deciding: tuple[str, ...] = ("H", "A", "B")  # arms run first; H before B, whose budget is H's cost
    measure: str = "test_accuracy"


def _noisy(share: float, kind: str = "uniform", name: str = "") -> Task:
    what = f"gloss -> class, {share:.0%} wrong labels" + (", of confusable classes" if kind == "pairs" else "")
    name = name or f"R2-{share:.0%}".rstrip("%")
    return Task(name, what, "smollm2", 20_000, 6000, 10, 256, 1e-4, (16, 24, 40), share, kind)


TASKS = {
    task.name: task
    for task in (
        Task("R1", "facts by heart: made-up name -> number", "smollm2", 8_000, 0, 20, 128, 3e-4, (24,)),
        _noisy(0.0),
        _noisy(0.1),
        _noisy(0.3),
        _noisy(0.3, "pairs", "R2-pairs"),
        Task(
            "R3",
            "instructions on word lists, 60 % near-duplicates, a long tail of operations",
            "smollm2",
            20_000,
            3000,
            8,
            256,
            1e-4,
            (32,),
            measure="test_loss",
        ),
        Task("R4", "gloss -> class, clean and saturating", "smollm2", 75_000, 6000, 4, 256, 1e-4, (16, 24, 40)),
        Task(
            "R5",
            "addition from scratch, short and long",
            "adder",
            200_000,
            4000,
            10,
            512,
            1e-3,
            (32,),
            seeds=10,
            deciding=("H-spend", "A", "H", "B"),
        ),
        Task("R6", "gloss -> class, one epoch", "smollm2", 75_000, 6000, 1, 256, 1e-4, (16, 24, 40)),
        Task("R1-small", "facts by heart, a small network", "small facts", 1200, 0, 40, 24, 7e-4, (24,), seeds=3),
        Task(
            "R3-small",
            "operations on lists of symbols, a small network",
            "small instructions",
            12_000,
            1800,
            8,
            64,
            3e-3,
            (17,),
            seeds=3,
            measure="test_loss",
        ),
    )
}
LARGE = [task.name for task in TASKS.values() if not task.name.endswith("-small")]


def best_lr(task: Task, rows: list[dict[str, Any]]) -> float:
    """The rate at which the uniform arm ended best, by the seeds that it ran at every rate; the same for all arms."""
    sign = 1 if task.measure == "test_accuracy" else -1
    ends: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["arm"] == "A":
            ends[row["lr"]][row["seed"]] = sign * row["final"][task.measure]
    seeds = set.intersection(*(set(of) for of in ends.values())) if len(ends) > 1 else set()
    return max(ends, key=lambda lr: sum(ends[lr][seed] for seed in seeds)) if seeds else task.lr


def make_data(task: Task, encode: data.Encode | None, wordnet: Path) -> data.Data:
    """The task's samples."""
    if task.network == "adder":
        return data.additions(task.samples, task.test)
    if task.name == "R3-small":
        from benchmarks.end_to_end.small import list_operations

        return list_operations(task.samples, task.test)
    assert encode is not None
    if task.name.startswith("R1"):
        return data.facts(encode, task.samples)
    rows: list[Any] = data.read_wordnet(wordnet)
    if task.name == "R3":
        return instructions(rows, encode, task.samples, task.test)
    return data.gloss_classes(rows, encode, task.samples, task.test, task.noise, task.noise_kind)
