"""The end-to-end tasks: what is learnt, by which network, in how many epochs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end import data
from benchmarks.end_to_end.instructions import instructions


@dataclass(frozen=True)
class Task:
    """One task.

    samples, test: training and held-out samples; R1 is measured on the training samples.
    lr: the learning rate where none has been tuned.
    sizes: lengths in tokens that batches are padded to.
    measure: what it is judged by at the end, "test_accuracy" (exact match), "test_macro_accuracy" (mean over the
        groups), "test_spearman" (of expected and mean rating), "test_loss" or "test_token_loss".
    per_token: a batch's loss is the mean over its tokens, as Trainer's; else over its samples.
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
    per_token: bool = False

    @property
    def higher(self) -> bool:
        """Whether more of the measure is better."""
        return not self.measure.endswith("loss")


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
        Task(
            "D1",
            "package -> its description",
            "smollm2",
            40_000,
            2000,
            3,
            64,
            3e-4,
            (64, 128, 192, 256),
            seeds=3,
            deciding=("auto", "A", "A-stop"),
            measure="test_token_loss",
            per_token=True,
        ),
        Task(
            "D2",
            "package description -> its section",
            "smollm2",
            20_000,
            3000,
            6,
            128,
            8e-4,
            (48, 80, 112),
            deciding=("auto", "H", "A", "B", "B-auto"),
            measure="test_macro_accuracy",
        ),
        Task(
            "V1",
            "text -> one rater's feeling about it",
            "smollm2",
            20_000,
            4000,
            6,
            128,
            1e-4,
            (32, 48, 64),
            deciding=("auto", "H", "A", "B", "B-auto"),
            measure="test_spearman",
        ),
        Task(
            "G1",
            "sum of three to five numbers -> its steps; few samples, many epochs",
            "smollm2",
            2000,
            1000,
            48,
            64,
            3e-4,
            (56, 72, 96),
            deciding=("auto", "H", "A", "B", "B-auto"),
            per_token=True,
        ),
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
LARGE = [name for name in TASKS if name.startswith("R") and not name.endswith("-small")]


def best_lr(task: Task, rows: list[dict[str, Any]]) -> float:
    """The rate at which the uniform arm ended best, by the seeds that it ran at every rate; the same for all arms."""
    sign = 1 if task.higher else -1
    ends: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["arm"] == "A":
            ends[row["lr"]][row["seed"]] = sign * row["final"][task.measure]
    seeds = set.intersection(*(set(of) for of in ends.values())) if len(ends) > 1 else set()
    return max(ends, key=lambda lr: sum(ends[lr][seed] for seed in seeds)) if seeds else task.lr


MADE_BY = {"D1": "texts", "D2": "sections", "V1": "raters", "G1": "sums"}  # which module makes the file of rows
_SHIFT = 26_000  # glosses beyond those of the R2 tasks


def make_data(
    task: Task, encode: data.Encode | None, wordnet: Path, texts: Path | None = None, choosing: bool = False
) -> data.Data:
    """The task's samples; with `choosing` others, by which rates and rules may be chosen and that are not reported."""
    if task.name in MADE_BY:
        return _from_texts(task, texts, choosing)
    if choosing and not task.name.startswith(("R1", "R2", "R3")):
        raise ValueError(f"{task.name} has no samples to choose by; R1, R2, R3, {', '.join(MADE_BY)} have")
    if task.network == "adder":
        return data.additions(task.samples, task.test)
    if task.name == "R3-small":
        from benchmarks.end_to_end.small import list_operations

        return list_operations(task.samples, task.test)
    assert encode is not None
    if task.name.startswith("R1"):
        return data.facts(encode, task.samples, 12 if choosing else 11)
    rows: list[Any] = data.read_wordnet(wordnet)
    if task.name == "R3":
        return instructions(rows, encode, task.samples, task.test, 8 if choosing else 7)
    rows = rows[_SHIFT:] if choosing else rows
    return data.gloss_classes(rows, encode, task.samples, task.test, task.noise, task.noise_kind)


def _from_texts(task: Task, texts: Path | None, choosing: bool) -> data.Data:
    from benchmarks.end_to_end.texts import load

    if texts is None:
        raise ValueError(f"{task.name} needs --texts, the file that benchmarks.end_to_end.{MADE_BY[task.name]} makes")
    found = load(texts)
    everyone = torch.arange(len(found.prompts))
    trained = torch.cat([ids for name, ids in found.parts.items() if name not in ("test", "choose")]).sort().values
    shape = task.sizes[-1], int((found.length(everyone) - found.prompts).max())
    groups = found.beside.get("groups", torch.zeros_like(everyone))

    def split(ids: Tensor) -> data.Split:
        rows = [found.tokens[found.offsets[i] : found.offsets[i + 1]].tolist() for i in ids.tolist()]
        starts = found.prompts[ids].tolist()
        cut = [(row[:start], row[start:]) for row, start in zip(rows, starts, strict=True)]
        return data.pack([a for a, _ in cut], [b for _, b in cut], groups[ids].tolist(), shape)

    tested = found.parts["choose" if choosing else "test"][: task.test]
    names = [f"group {i}" for i in range(int(groups.max()) + 1)]
    means = found.beside.get("means")
    rated = None if means is None else data.Ratings(found.beside["values"].tolist(), means[tested])
    return data.Data(split(trained[: task.samples]), split(tested), names, rated)
