"""One run: a task, an arm, a seed. The training loop, its clock and what it reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import geko_kernels as gk
from benchmarks.end_to_end.arms import Arm
from benchmarks.end_to_end.data import Data, Split
from benchmarks.end_to_end.engine import Engine, Network, new_adder
from benchmarks.end_to_end.lengths import find_arm
from benchmarks.end_to_end.measures import by_class, expected_ratings, spearman
from benchmarks.end_to_end.tasks import Task

_WINDOW = 16  # batches whose samples are sorted by length
_SUBSET = 2000  # training samples evaluated after each epoch
_RARE = 20  # groups of fewer test samples are left out of the worst
_FEW = 12  # groups that are reported one by one


def batches(ids: Tensor, lengths: Tensor, size: int, seed: int) -> list[Tensor]:
    """Indices into `ids`: within windows samples of like length go together, and the batches are shuffled."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for window in torch.arange(len(ids)).split(_WINDOW * size):
        parts = window[lengths[ids[window]].argsort(stable=True)].split(size)
        found += [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    return found


def train(engine: Engine, task: Task, arm: Arm, lr: float) -> Iterator[dict[str, float]]:
    """Train the arm; after each epoch its progress, rows trained and seconds so far (evaluation is not in them)."""
    trained, seconds, start = 0, 0.0, engine.wait()
    for epoch, segments in enumerate(arm.run()):
        progress = 0.0
        for segment in segments:
            done, count = 0, len(segment.ids)
            for places in batches(segment.ids, engine.train.lengths, engine.size, arm.seed * 1000 + epoch):
                ids = segment.ids[places]
                factor = None if segment.factor is None else segment.factor[places]
                arm.before(segment.offset + done)
                progress = segment.begin + (segment.end - segment.begin) * done / count
                arm.after(ids, engine.train_batch(ids, factor, arm.rate(lr, progress)))
                done += len(ids)
                if arm.ended:
                    break
            trained, progress = trained + done, segment.end
            if arm.ended:
                break
        seconds += engine.wait() - start
        yield {"epoch": epoch + 1, "progress": progress, "rows_trained": trained, "seconds": seconds}
        start = engine.wait()


def measure(engine: Engine, split: Split, ids: Tensor, prefix: str) -> dict[str, float]:
    """Mean loss and exact match, per group and of the worst group too."""
    loss, hit = engine.evaluate(split, ids)
    groups, tokens = split.groups[ids], split.answer_tokens()[ids]
    named: dict[str, Any] = {f"{prefix}_loss": loss.mean().item(), f"{prefix}_accuracy": hit.float().mean().item()}
    named[f"{prefix}_token_loss"] = ((loss * tokens).sum() / tokens.sum()).item()
    named |= {f"{prefix}_{name}": value for name, value in by_class(hit, groups).items()}
    counts = torch.bincount(groups)
    per_group = [
        (loss[groups == g].mean().item(), hit[groups == g].float().mean().item())
        for g in range(len(counts))
        if counts[g] >= max(min(_RARE, len(ids) // len(counts)), 1)
    ]
    named[f"{prefix}_worst_loss"] = max(loss for loss, _ in per_group)
    named[f"{prefix}_worst_accuracy"] = min(accuracy for _, accuracy in per_group)
    if len(per_group) <= _FEW:
        named[f"{prefix}_groups"] = per_group
    return named


def measure_test(engine: Engine, data: Data) -> dict[str, float]:
    """`measure` of all test samples; where they are rated also how the ranks agree with the mean ratings."""
    found = measure(engine, data.test, torch.arange(len(data.test)), "test")
    if data.ratings is not None:
        found["test_spearman"] = spearman(expected_ratings(engine, data), data.ratings.means)
    return found


def run(
    engine: Engine, task: Task, data: Data, name: str, seed: int, lr: float, budget: float, ends: bool = False
) -> dict[str, Any]:
    """The row of one run; a budget in the arm's name goes before `budget`. With `ends` only its end is measured."""
    kind, its_own = find_arm(name)
    budget = budget if its_own is None else its_own
    arm = kind(engine, task.epochs, budget, seed)
    if task.network == "adder":
        tiny = engine.network.tail.norm.weight.numel() < 256
        engine.reset(arm.config, Network(new_adder(seed, tiny)).state_dict())
    state, total = engine.state, len(engine.train)
    recall = data.test is data.train  # then the training samples are what counts: all of them after each epoch
    subset = torch.randperm(total, generator=torch.Generator().manual_seed(99))[: total if recall else _SUBSET]
    history: list[dict[str, Any]] = []
    for entry in train(engine, task, arm, lr):
        if not ends:
            entry |= measure(engine, data.train, subset, "train")
        if not (recall or ends):
            entry |= measure_test(engine, data)
        entry["cost"] = (entry["rows_trained"] + arm.looked / 3) / (task.epochs * total)
        entry |= {"quarantined": int(state.quarantined.sum()), "buckets": state.bucket_counts().tolist()}
        history.append(entry)
    state.check()
    start = engine.wait()
    arm.finish()
    history[-1]["seconds"] += engine.wait() - start
    loss, hit = engine.evaluate(data.train, torch.arange(total))
    final = measure_test(engine, data) | {
        "train_loss": loss.mean().item(),
        "train_accuracy": hit.float().mean().item(),
    }
    frozen = (state.bucket == gk.Bucket.FREEZE).cpu()
    held = state.quarantined.cpu()
    wrong = data.train.wrong
    seconds = {"total": history[-1]["seconds"], **arm.seconds, "prepare": engine.prepare_seconds}
    trained = int(history[-1]["rows_trained"])
    return {
        "task": task.name,
        "arm": name,
        "seed": seed,
        "lr": lr,
        "budget": budget,
        "config": arm.config.to_dict(),
        "samples": total,
        "epochs": task.epochs,
        "batch": engine.size,
        "seconds": seconds,
        "rows_trained": trained,
        "rows_forward": trained + arm.looked,
        "cost": history[-1]["cost"],
        "final": final,
        "frozen_share": [entry["buckets"][gk.Bucket.FREEZE] / total for entry in history],
        "frozen_forgotten": (frozen & ~hit).sum().item() / max(int(frozen.sum()), 1),
        "quarantined_share": held.float().mean().item(),
        "quarantine_precision": (held & wrong).sum().item() / max(int(held.sum()), 1),
        "quarantine_recall": (held & wrong).sum().item() / max(int(wrong.sum()), 1),
        **arm.report(),
        "history": history,
    }
