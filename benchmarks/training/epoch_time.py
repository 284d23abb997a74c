"""Wall time of training epochs: `transformers.Trainer`, GEKOTrainer with all weights 1, and with half of them FREEZE.

    python -m benchmarks.training.epoch_time
    python -m benchmarks.training.epoch_time --model 1b --samples 128 --length 2048 --batch 4 --epochs 3

On one GPU, alone on it (the first about 6 minutes on an H200): a Llama with random weights in bf16, fixed-length
samples, the same data, order and collator in every arm. The learning rate is 0 and the rules are set so that a FREEZE
sample stays FREEZE and the others keep weight 1: every epoch is the same work. `step_ms` is the median of the steps
after the first eight. Rows go to results/epoch_time.jsonl. `--tiny` tries it out anywhere.

Arms: standard; uniform (the trainer's own overhead); half_frozen (probes off); half_frozen_probes; auto (all samples,
an average of the weights, evaluations of 16 more samples; it ends after 1.25 epochs, as nothing is learnt); planning
(drawing the plan of 10 million samples, and the memory it takes beside the state).
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

import geko_kernels as gk
from benchmarks.results import RESULTS, append, environment
from benchmarks.training.clocks import EpochClock, StepClock
from benchmarks.training.models import MODELS, new_model

# all samples count as right and sure; the Q-value, which the benchmark sets, decides who is FREEZE and who LIGHT
STEADY: dict[str, Any] = {
    "correct_loss": 1e6,
    "focus_confidence": 1e-9,
    "freeze_confidence": 1e-8,
    "min_q_for_freeze": 0.3,
    "bucket_weights": (1, 1, 1),
    "use_curriculum": False,
    "uniform_finish": 0.0,
    "noise_guard": False,
}
CONFIGS = {
    "standard": None,
    "uniform": gk.GEKOConfig.uniform(),
    "half_frozen": gk.GEKOConfig(**STEADY, probes=False),
    "half_frozen_probes": gk.GEKOConfig(**STEADY),
    "auto": gk.GEKOConfig.auto(selection=False, probes=False, noise_guard=False),
}
_EVALUATED, _WARM_UP = 16, 8


class Samples(torch.utils.data.Dataset):
    """Random tokens of one length, one tensor a sample."""

    def __init__(self, count: int, length: int, vocab: int) -> None:
        self.tokens = torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def trainer_of(arm: str, data: Samples, given: argparse.Namespace, folder: str) -> Trainer:
    model = new_model(given.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fields = {
        "per_device_train_batch_size": given.batch,
        "per_device_eval_batch_size": given.batch,
        "num_train_epochs": given.epochs,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "bf16": not given.tiny,
        "torch_compile": given.compile,
        "gradient_checkpointing": given.checkpointing,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    config = CONFIGS[arm]
    common: dict[str, Any] = {"train_dataset": data, "data_collator": default_data_collator}
    if arm == "auto":
        common["eval_dataset"] = Samples(_EVALUATED, given.length, MODELS[given.model]["vocab_size"])
    if config is None:
        return Trainer(model, TrainingArguments(folder, **fields), **common)
    trainer = gk.GEKOTrainer(model, gk.GEKOTrainingArguments(folder, **fields), config=config, **common)
    if arm.startswith("half_frozen"):
        state = trainer.sample_state
        assert state is not None
        frozen = torch.randperm(len(state), generator=torch.Generator().manual_seed(1))[: len(state) // 2]
        state.bucket.fill_(gk.Bucket.LIGHT), state.times_seen.fill_(1), state.q_value.fill_(0.0)
        state.loss_history.fill_(100.0)  # whatever the next loss is, it has not risen
        state.bucket[frozen], state.q_value[frozen] = int(gk.Bucket.FREEZE), 1.0
    return trainer


def run_arm(arm: str, data: Samples, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock, steps = trainer_of(arm, data, given, folder), EpochClock(), StepClock()
        trainer.add_callback(clock), trainer.add_callback(steps)
        gc.collect()  # the trainer before has cycles, and its model may be half of the memory
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    row: dict[str, Any] = {"arm": arm, "epoch_seconds": clock.seconds, "median": median(clock.seconds[1:])}
    row["step_ms"] = median(steps.steps_ms(_WARM_UP))
    row["mean"] = sum(clock.seconds[1:]) / len(clock.seconds[1:])
    row["max"] = max(clock.seconds[1:])
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    row["steps_per_epoch"] = trainer.state.global_step / given.epochs
    if isinstance(trainer, gk.GEKOTrainer):
        report = trainer.get_efficiency_report()
        row["seconds"] = report["seconds"]
        row["probes"] = [epoch["probes"] for epoch in report["epochs"]]
        row["samples"] = [epoch["samples"] for epoch in report["epochs"]]
        row["saved_compute"] = report["saved_compute"]
    return row


def planning(count: int) -> dict[str, Any]:
    """Median time of one epoch's sync, probes' choice and plan; peak device memory beside the state."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = gk.SampleState(count, gk.GEKOConfig(), device)
    state.times_seen.fill_(1), state.bucket[::2].fill_(gk.Bucket.FREEZE)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    sampler, seconds = gk.GEKOSampler(state, num_epochs=20), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for epoch in range(6):
        start = time.perf_counter()
        due = sampler.due_probes(epoch)
        state.times_seen[due.to(device)] += 1  # what probes would do
        sampler.probed(due, epoch)
        sampler.set_epoch(epoch)
        seconds.append(time.perf_counter() - start)
        next(iter(sampler))
        time.sleep(1)  # the epoch's training, while which the next order is made
    row: dict[str, Any] = {
        "arm": "planning",
        "num_samples": count,
        "plan_seconds": seconds,
        "median": median(seconds[1:]),
    }
    if device == "cuda":
        row["device_bytes_per_sample"] = (torch.cuda.max_memory_allocated() - before) / count
        row["host_bytes_per_sample"] = sampler.plan.ids.numel() * 4 / count  # type: ignore[union-attr]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=[*CONFIGS, "planning"], choices=[*CONFIGS, "planning"])
    parser.add_argument("--model", default="135m", choices=list(MODELS))
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5, help="the first warms up and is left out of the median")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in every arm")
    parser.add_argument("--compile", action="store_true", help="torch_compile of the model, in every arm")
    parser.add_argument("--tiny", action="store_true", help="a dry run: a tiny model, nothing is written")
    given = parser.parse_args()
    if given.tiny:
        given.model, given.samples, given.length, given.batch = "tiny", 96, 16, 8
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = {name: version(name) for name in ("transformers", "accelerate")}
    shared = {**environment(device), **packages, "command": " ".join(sys.argv), "compile": given.compile}
    sizes = {name: getattr(given, name) for name in ("model", "samples", "length", "batch", "checkpointing")}
    data = Samples(given.samples, given.length, MODELS[given.model]["vocab_size"])
    standard = None
    for arm in given.arms:
        row = planning(10**5 if given.tiny else 10**7) if arm == "planning" else {**run_arm(arm, data, given), **sizes}
        standard = row["median"] if arm == "standard" else standard
        if standard and arm != "planning":
            row["of_standard"], row["of_standard_mean"] = row["median"] / standard, row["mean"] / standard
            row["of_standard_max"] = row["max"] / standard
        print({key: value for key, value in row.items() if key not in ("epoch_seconds", "samples")}, flush=True)
        if not given.tiny:
            append(RESULTS / "epoch_time.jsonl", {**row, **shared})


if __name__ == "__main__":
    main()
