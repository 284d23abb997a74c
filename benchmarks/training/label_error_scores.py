"""Which score finds wrong labels in the visits of a run: precision and recall, beside cleanlab on the same visits.

    python -m venv CL && CL/bin/pip install cleanlab
    python -m benchmarks.training.label_error_scores --cleanlab CL/bin/python [--wordnet data.noun] [--seeds 3]

On the CPU, three and a half minutes of one core. `gloss` is WordNet's definition -> one of 26 classes, a bag of words;
`toy` is that of `plain_loop`. `geko` trains with the recommended settings, `uniform` trains every sample.

One row a run and finder. A ranking has the average precision, and the precision among as many as there are wrong
labels, which is its recall too. A set has its size, precision and recall. `cleanlab_*` read the mean of the softmax
over the visits of a run; of arm `folds`, which is how cleanlab is meant, that of models trained on the other three
quarters: the work of three runs more. `gloss_long` trains until most wrong labels are learnt by heart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import geko_kernels as gk
from benchmarks.end_to_end.data import CLASSES, confusable, read_wordnet
from benchmarks.results import RESULTS, append, environment
from benchmarks.training.plain_loop import make_toy
from geko_kernels.config import Bucket
from geko_kernels.training.planning.guard import KNOWN, _suspects

FOLDS, SIZE, BATCH = 4, 3000, 64
EPOCHS = {"toy": 8, "gloss": 8, "gloss_long": 24}
RATE = 1e-2
NOISE = (("symmetric", 0.05), ("symmetric", 0.1), ("symmetric", 0.2), ("symmetric", 0.3), ("neighbour", 0.3))
CASES = [(task, *noise) for task in ("toy", "gloss") for noise in NOISE] + [("gloss_long", "symmetric", 0.2)]
ARMS = {"geko": gk.GEKOConfig.recommended, "uniform": gk.GEKOConfig.uniform}
_WORDS, _LENGTH = 1 << 12, 24  # of the hashed vocabulary, and kept of a definition
_CLEANLAB = """
import json, sys, numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
given = np.load(sys.argv[1])
labels, found = given["labels"], {}
for arm in set(given) - {"labels"}:
    p = given[arm].astype(np.float64)
    p /= p.sum(1, keepdims=True)
    found[arm] = {"cleanlab_issues": find_label_issues(labels, p, n_jobs=1).tolist()}
    for method in ("self_confidence", "normalized_margin"):
        found[arm]["cleanlab_" + method] = (-get_label_quality_scores(labels, p, method=method)).tolist()
print(json.dumps(found))
"""


class Samples(NamedTuple):
    inputs: Tensor
    labels: Tensor  # (N,) as trained
    wrong: Tensor  # (N,) bool


class Record(NamedTuple):
    """What the visits of a run found, summed over those of each sample."""

    visits: Tensor  # (N,)
    probability: Tensor  # (N, C) of the softmax
    label_probability: Tensor  # (N,)
    loss: Tensor  # (N,)
    margin: Tensor  # (N,) the label's logit less the largest other one
    last_loss: Tensor  # (N,) of the last visit
    first_loss: Tensor  # (N,) of the first visit
    misses: Tensor  # (N,)


def classes_of(task: str) -> int:
    return 5 if task == "toy" else len(CLASSES)


def make_samples(task: str, kind: str, noise: float, seed: int, wordnet: Path) -> Samples:
    size, generator = SIZE, torch.Generator().manual_seed(seed)
    if task == "toy":
        toy = make_toy(size, 0.0, seed)
        inputs, true, other = toy.inputs, toy.labels, {c: (c + 1) % 5 for c in range(5)}
    else:
        rows = read_wordnet(wordnet)[size * seed : size * (seed + 1)]
        inputs = torch.tensor([_words(gloss) for _, _, gloss in rows])
        true, other = torch.tensor([number for _, number, _ in rows]), confusable()
    some = torch.randperm(size, generator=generator)[: round(noise * size)]
    wrong = torch.zeros(size, dtype=torch.bool)
    wrong[some] = True
    shift = torch.randint(1, len(other), (size,), generator=generator)
    false = torch.tensor([other[c] for c in true.tolist()]) if kind == "neighbour" else (true + shift) % len(other)
    return Samples(inputs, torch.where(wrong, false, true), wrong)


def _words(gloss: str) -> list[int]:
    """Hashes of the words; 0 fills up."""
    digests = [hashlib.blake2b(word.encode(), digest_size=4).digest() for word in gloss.lower().split()[:_LENGTH]]
    ids = [1 + int.from_bytes(digest, "big") % (_WORDS - 1) for digest in digests]
    return ids + [0] * (_LENGTH - len(ids))


def make_model(task: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if task == "toy":
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))
    bag = nn.EmbeddingBag(_WORDS, 64, mode="mean", padding_idx=0)
    return nn.Sequential(bag, nn.ReLU(), nn.Linear(64, len(CLASSES)))


def train(task: str, samples: Samples, config: gk.GEKOConfig, seed: int) -> tuple[gk.GEKOLoader, Record]:
    model, count = make_model(task, seed), len(samples.labels)
    dataset = TensorDataset(samples.inputs, samples.labels)
    loader = gk.GEKOLoader(dataset, BATCH, EPOCHS[task], config, "cpu", seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - loader.progress)
    zeros = [torch.zeros(count) for _ in range(7)]
    record = Record(zeros[0], torch.zeros(count, classes_of(task)), *zeros[1:])
    for batch in loader:
        with torch.set_grad_enabled(batch.trains):
            inputs, labels = batch.data
            logits = model(inputs)
            loss = gk.weighted_loss(logits, labels, batch.ids, loader.state, update=True)
        _add(record, batch.ids, logits.detach(), labels)
        if batch.trains:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return loader, record


def _add(record: Record, ids: Tensor, logits: Tensor, labels: Tensor) -> None:
    log_p = logits.log_softmax(1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    best_other = log_p.scatter(1, labels[:, None], -torch.inf).amax(1)
    record.first_loss[ids] = torch.where(record.visits[ids] == 0, -own, record.first_loss[ids])
    record.visits[ids] += 1
    record.probability[ids] += log_p.exp()
    record.label_probability[ids] += own.exp()
    record.loss[ids] -= own
    record.margin[ids] += own - best_other
    record.last_loss[ids] = -own
    record.misses[ids] += (own < best_other).float()


def suspects_of(state: gk.SampleState) -> Tensor:
    """(N,) bool: quarantined, or would be if there were more like them."""
    correct = (state.times_seen > 0) & (state.bucket <= Bucket.LIGHT)
    found = state.quarantined.clone()
    if int(correct.count_nonzero()) > KNOWN * len(state):
        found[_suspects(state, correct, state.config.noise_guard_margin)] = True
    return found


def scores_of(record: Record, suspected: Tensor) -> dict[str, Tensor]:
    """Candidates, higher where a wrong label is more likely."""
    doubt = 1 - record.label_probability / record.visits
    later = (record.label_probability - (-record.first_loss).exp()) / (record.visits - 1).clamp(min=1)
    ranks = doubt.argsort().argsort() / max(len(doubt) - 1, 1)
    return {
        "mean_probability": doubt,
        "mean_probability_after_first": torch.where(record.visits > 1, 1 - later, doubt),
        "mean_loss": record.loss / record.visits,
        "mean_margin": -record.margin / record.visits,
        "share_wrong": record.misses / record.visits,
        "first_loss": record.first_loss,
        "last_loss": record.last_loss,
        "suspected_first": (ranks + suspected) / 2,
    }


def out_of_fold(task: str, samples: Samples, seed: int) -> Tensor:
    """(N, C) of models that have not seen the sample, trained uniformly."""
    generator, size = torch.Generator().manual_seed(seed), len(samples.labels)
    fold = torch.randperm(size, generator=generator) % FOLDS
    found = torch.zeros(size, classes_of(task))
    for k in range(FOLDS):
        kept, model = (fold != k).nonzero()[:, 0], make_model(task, seed)
        batches = [
            ids
            for _ in range(EPOCHS[task])
            for ids in kept[torch.randperm(len(kept), generator=generator)].split(BATCH)
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        for step, ids in enumerate(batches):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / len(batches))
            nn.functional.cross_entropy(model(samples.inputs[ids]), samples.labels[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found[fold == k] = model(samples.inputs[fold == k]).softmax(1)
    return found


def ranked(score: Tensor, wrong: Tensor) -> dict[str, float]:
    order = score.argsort(descending=True, stable=True)
    hit = wrong[order].double()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    count = int(wrong.sum())
    return {
        "average_precision": (precision * hit).sum().item() / count,
        "precision_at_count": hit[:count].mean().item(),
    }


def found_set(found: Tensor, wrong: Tensor) -> dict[str, float | None]:
    size, right = int(found.sum()), int((found & wrong).sum())
    return {"size": size, "precision": right / size if size else None, "recall": right / int(wrong.sum())}


def ask_cleanlab(python: str, labels: Tensor, probability: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.npz"
        np.savez(path, labels=labels.numpy(), **{arm: p.numpy() for arm, p in probability.items()})
        told = subprocess.run([python, "-c", _CLEANLAB, str(path)], capture_output=True, text=True, check=True).stdout
    arms = json.loads(told.splitlines()[-1]).items()
    return {arm: {name: torch.tensor(values) for name, values in found.items()} for arm, found in arms}


def rows_of(task: str, kind: str, noise: float, seed: int, wordnet: Path, cleanlab: str) -> list[dict[str, Any]]:
    samples = make_samples(task, kind, noise, seed, wordnet)
    found, probability, seconds = {"folds": dict[str, Tensor]()}, {}, {}
    for arm, config in ARMS.items():
        start = time.perf_counter()
        loader, record = train(task, samples, config(), seed)
        seconds[arm], state = time.perf_counter() - start, loader.state
        suspected = suspects_of(state)
        found[arm] = {**scores_of(record, suspected), "quarantined": state.quarantined, "suspected": suspected}
        probability[arm] = record.probability / record.visits[:, None]
    start = time.perf_counter()
    probability["folds"] = out_of_fold(task, samples, seed)
    seconds["folds"] = time.perf_counter() - start
    about = {"task": task, "kind": kind, "noise": noise, "seed": seed, "epochs": EPOCHS[task]}
    about |= {"samples": len(samples.labels), "wrong": int(samples.wrong.sum())}
    rows = []
    for arm, of_cleanlab in ask_cleanlab(cleanlab, samples.labels, probability).items():
        for name, values in (found[arm] | of_cleanlab).items():
            measure: Callable[..., dict[str, Any]] = found_set if values.dtype == torch.bool else ranked
            row = {**about, "arm": arm, "seconds": seconds[arm], "finder": name}
            rows.append({**row, **measure(values, samples.wrong)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "label_error_scores_cpu_2026-11-27.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cleanlab", required=True, help="a Python that has cleanlab")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    given = parser.parse_args()
    torch.set_num_threads(1)  # small models: more only wait for each other
    where = environment(torch.device("cpu"))
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for task, kind, noise in CASES:
        for seed in range(given.seeds):
            for row in rows_of(task, kind, noise, seed, given.wordnet, given.cleanlab):
                append(given.out, {**row, **where})
                found[task, row["arm"], row["finder"], f"{noise:.0%} {kind}"].append(row)
    for case, rows in found.items():
        told = []
        for name in ("average_precision", "precision_at_count", "size", "precision", "recall"):
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                told.append(f"{name} {mean(values):.3f}" if name != "size" else f"size {mean(values):.0f}")
        print(f"{case[0]:11}{case[1]:8}{case[3]:14} {case[2]:29} {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
