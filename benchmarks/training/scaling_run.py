"""One process of `scaling.py`'s launches: both arms in turn, then what their planning and probes take.

`[torchrun] scaling_run.py MODEL KIND OUT [--cpu]`; rank 0 writes OUT/rows.json, first without, then with the latter.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, default_data_collator
from transformers.utils import logging

import geko_kernels as gk
from benchmarks.results import Row
from benchmarks.training.clocks import StepClock
from benchmarks.training.epoch_time import Samples
from benchmarks.training.models import SMOLLM2_135M, TINY
from benchmarks.training.scaling_rows import selection_row, step_row

ONE_BILLION = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "135M": {"sizes": SMOLLM2_135M, "compile": True, "batch": 32},
    "1B": {"sizes": ONE_BILLION, "compile": False, "batch": 16},
    "tiny": {"sizes": TINY, "compile": False, "batch": 4},
}
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
ROUNDS, WARM_UP, STEPS = 3, 5, 20
TABLE, EPOCHS = 10_000_000, 3


def trainer_of(arm: str, given: argparse.Namespace) -> Trainer:
    settings, shards = MODELS[given.model], given.kind == "fsdp2"
    fields: dict[str, Any] = {
        "per_device_train_batch_size": settings["batch"],
        "probe_batch_size": settings["batch"],  # the steps' shape: nothing is compiled for a dynamic one
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "bf16": not given.cpu,
        "torch_compile": settings["compile"],
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": given.cpu,
    }
    if WORLD > 1 and given.cpu:
        fields["ddp_backend"] = "gloo"
    if shards:
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        fields.update(fsdp=True, fsdp_config={**wrap, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
    args = gk.GEKOTrainingArguments(str(given.out / "trainer"), **fields)
    if given.cpu and shards:
        PartialState().distributed_type = DistributedType.MULTI_GPU  # accelerate takes CPUs for DDP only
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM(LlamaConfig(**settings["sizes"], max_position_embeddings=2048, use_cache=False))
    count = (STEPS + WARM_UP) * settings["batch"] * WORLD
    common = {
        "train_dataset": Samples(count, given.length, settings["sizes"]["vocab_size"]),
        "data_collator": default_data_collator,
    }
    if arm == "standard":
        return Trainer(model, args, **common)
    return gk.GEKOTrainer(model, args, config=gk.GEKOConfig.uniform(), **common)


def steps_of(trainer: Trainer) -> list[float]:
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.steps_ms(WARM_UP)


def free() -> None:
    """Give back what the last trainer, already out of reach, held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(given: argparse.Namespace) -> None:
    samples = MODELS[given.model]["batch"] * WORLD
    compiled = "by regions" if MODELS[given.model]["compile"] else None
    common = {"batch": samples // WORLD, "length": given.length, "compiled": compiled}
    steps: dict[str, list[list[float]]] = {"standard": [], "geko": []}
    for turn in range(ROUNDS):
        for arm, rounds in steps.items():
            trainer = trainer_of(arm, given)
            rounds.append(steps_of(trainer))
            common["sharded"] = all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
            if turn < ROUNDS - 1 or arm == "standard":
                trainer.accelerator.free_memory()
                del trainer
                free()
    rows = {arm: {**common, **step_row(rounds, samples, given.length)} for arm, rounds in steps.items()}
    write(rows, given.out)
    assert isinstance(trainer, gk.GEKOTrainer) and trainer.sample_state is not None and trainer.sampler is not None
    assert trainer.sampler.plan is not None
    equal = {"plans_equal": same(trainer.sampler.plan.ids), "buckets_equal": same(trainer.sample_state.bucket)}
    probe_step_ms = probe(trainer, samples)
    device = trainer.args.device
    trainer.accelerator.free_memory()
    del trainer
    free()
    selection = selection_of_many(device, 100_000 if given.cpu else TABLE)
    rows["geko"] |= selection_row(selection, rows["geko"]["step_ms"], probe_step_ms, samples)
    for name, value in equal.items():
        rows["geko"][name] &= value
    write(rows, given.out)


def probe(trainer: gk.GEKOTrainer, samples: int) -> float:
    """Milliseconds of looking at `samples` samples forward-only."""
    ids, times = torch.arange(samples * 8, dtype=torch.int32), []
    for _ in range(3):
        start = now()
        trainer._probe(trainer.model_wrapped, ids)
        times.append((now() - start) / 8)
    return 1e3 * median(times[1:])


def selection_of_many(device: torch.device, table: int) -> Row:
    """Epochs over a table, half of it FREEZE, each rank changing the rows of its part of the plan.

    `selection_seconds` of each epoch's sync and planning, the samples `planned` and `probed` in it, and whether plans
    and buckets of the last are the same on every rank.
    """
    state = gk.SampleState(table, gk.GEKOConfig(), device)
    state.times_seen.fill_(1), state.bucket[::2].fill_(gk.Bucket.FREEZE), state.bucket[1::2].fill_(gk.Bucket.HARD)
    sampler = gk.GEKOSampler(state, num_epochs=20)
    row: Row = {"table": table, "selection_seconds": [], "planned": [], "probed": []}
    for epoch in range(EPOCHS + 1):
        if sampler.plan is not None:
            mine = sampler.plan.ids[RANK::WORLD].long().to(device)
            state.times_seen[mine] += 1
            state.bucket[mine] = int(gk.Bucket.LIGHT if epoch % 2 else gk.Bucket.HARD)
            state.changed[mine] = True
        start = now()
        due = sampler.due_probes(epoch)
        state.times_seen[due.to(device)] += 1  # what probes would do
        sampler.probed(due, epoch)
        sampler.set_epoch(epoch)
        seconds = now() - start
        assert sampler.plan is not None
        if epoch > 0:  # the first warms up
            row["selection_seconds"].append(seconds)
            row["planned"].append(len(sampler.plan.ids))
            row["probed"].append(len(due))
        if epoch < EPOCHS:
            next(iter(sampler))
            time.sleep(table / TABLE)  # the epoch's training, while which the next order is made
    return {**row, "plans_equal": same(sampler.plan.ids), "buckets_equal": same(state.bucket)}  # type: ignore[union-attr]


def now() -> float:
    """Seconds, once all ranks' devices have come this far."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


def same(values: Tensor) -> bool:
    """Are they equal on every rank?"""
    digests: list[Any] = [None] * WORLD
    digest = hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()
    if dist.is_initialized():
        dist.all_gather_object(digests, digest)
    return len(set(digests)) == 1


def write(rows: dict[str, Row], out: Path) -> None:
    if RANK == 0:
        (out / "rows.json").write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("kind", choices=("single", "ddp", "fsdp2"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    given.length = 16 if given.cpu else 512
    logging.set_verbosity_error()
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"  # one block for all layers: seconds, not minutes
    run(given)
    if dist.is_initialized():
        dist.barrier()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down


if __name__ == "__main__":
    main()
