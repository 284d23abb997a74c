"""Wrong labels found by `samples.jsonl` of one run, and by cleanlab with cross-validation, on plain_loop.py's toy.

python -m benchmarks.training.label_errors [--out FILE] [--seeds 3]     # on the CPU, two minutes; pip install cleanlab

One row a method. `at_errors`: share of wrong labels among as many samples with the highest scores as there are wrong
labels, which is precision and recall at once. `found`: samples that the method itself calls wrong. All train the same
network: `geko` and `uniform` once (a GEKOTrainer with `recommended()`, `uniform()`), cleanlab five times on four fifths
of the data, which gives each sample a prediction of a network that has not trained it; seconds are of all of it.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

import geko_kernels as gk
from benchmarks.results import RESULTS, append, environment
from benchmarks.training.plain_loop import BATCH, CLASSES, RATE, Toy, make_model, make_toy, train_cross_entropy
from geko_kernels.training.report.samples import read_samples

SAMPLES, EPOCHS, FOLDS, NOISE = 4000, 10, 5, (0.1, 0.3)
CONFIGS = {
    "geko": gk.GEKOConfig.recommended(),  # noise_guard_margin=3
    "geko_margin_1": gk.GEKOConfig.recommended(noise_guard_margin=1.0),
    "uniform": gk.GEKOConfig.uniform(),
}
Verdict = tuple[np.ndarray, np.ndarray]  # (N,) scores, higher where a label looks wrong; (N,) bool: called wrong


class Classifier(torch.nn.Module):
    """The toy's network with named logits."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(inputs)}


def by_samples(toy: Toy, config: gk.GEKOConfig, seed: int) -> Verdict:
    """`label_error` and `suspected` of a run's samples; none is suspected where the run judged nothing."""
    with TemporaryDirectory() as folder:
        args = gk.GEKOTrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = [{"inputs": x, "labels": y} for x, y in zip(toy.inputs, toy.labels, strict=True)]
        trainer = gk.GEKOTrainer(Classifier(make_model("mlp", seed)), args, train_dataset=data, config=config)
        trainer.train()
        rows = read_samples(folder)
    assert rows is not None
    return np.array([row["label_error"] for row in rows]), np.array([bool(row["suspected"]) for row in rows])


def by_cleanlab(toy: Toy, seed: int) -> Verdict:
    """Its default score (the label's predicted probability) and its default filter."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    fold = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed)) % FOLDS
    predicted = torch.empty(SAMPLES, CLASSES)
    for held_out in (fold == part for part in range(FOLDS)):
        model = make_model("mlp", seed)
        part = toy._replace(inputs=toy.inputs[~held_out], labels=toy.labels[~held_out])
        train_cross_entropy(model, part, seed, EPOCHS)
        with torch.no_grad():
            predicted[held_out] = model(toy.inputs[held_out]).softmax(1)
    labels, probabilities = toy.labels.numpy(), predicted.numpy()
    return -get_label_quality_scores(labels, probabilities), find_label_issues(labels, probabilities)


def run(method: str, noise: float, seed: int) -> dict[str, Any]:
    toy = make_toy(SAMPLES, noise, seed)
    start = time.perf_counter()
    scores, called = by_cleanlab(toy, seed) if method == "cleanlab" else by_samples(toy, CONFIGS[method], seed)
    seconds, wrong = time.perf_counter() - start, toy.wrong.numpy()
    worst = np.argsort(-scores, kind="stable")[: wrong.sum()]
    found = {"found": int(called.sum()), "found_wrong": int(wrong[called].sum())}
    row = {"method": method, "samples": SAMPLES, "noise": noise, "seed": seed, "wrong": int(wrong.sum())}
    return {**row, "at_errors": float(wrong[worst].mean()), **found, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "label_errors_cpu_2026-11-27.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # so small a network is slower on more
    where, rows = environment(torch.device("cpu")), defaultdict(list)
    for noise in NOISE:
        for method in (*CONFIGS, "cleanlab"):
            for seed in range(given.seeds):
                row = run(method, noise, seed)
                append(given.out, {**row, **where})
                rows[noise, method].append(row)
    print("| wrong labels | method | at the number of errors | called wrong: precision | recall | seconds |")
    for (noise, method), found in rows.items():
        called, right, wrong = (sum(row[name] for row in found) for name in ("found", "found_wrong", "wrong"))
        shares = f"{right / called:.1%} | {right / wrong:.1%}" if called else "- | -"
        at, seconds = mean(row["at_errors"] for row in found), mean(row["seconds"] for row in found)
        print(f"| {noise:.0%} | {method} | {at:.1%} | {shares} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
