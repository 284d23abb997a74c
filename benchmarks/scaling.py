"""Weak scaling: `GEKOTrainer` beside `transformers.Trainer` under torchrun, DDP and FSDP2, constant batch per GPU.

`python benchmarks/scaling.py` on a host with one or more GPUs (about 8 minutes for one and two): random Llamas of
SmolLM2-135M's size (compiled) and of about 1B parameters in bf16, fixed-length samples. GEKOTrainer runs with all
weights 1, so every run is the same work. What it takes to synchronise the learning state of 10 million samples and
to draw their plan is measured apart, with as many changed rows as the run has trained. Rows go to
results/scaling.jsonl, the picture to results/scaling.png. `--cpu` tries it out with gloo and tiny sizes, and writes
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from epoch_time import SMOLLM2_135M, TINY, Samples
from matplotlib.figure import Figure
from results import RESULTS, Row, append, environment, runs
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, default_data_collator
from transformers.utils import logging

import geko_kernels as gk

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
LENGTH, STEPS, WARM_UP, TABLE = 512, 30, 10, 10_000_000
ARMS, KINDS = ("standard", "geko"), ("ddp", "fsdp2")


class StepClock(TrainerCallback):
    """When each optimizer step had ended on the device."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def trainer_of(arm: str, kind: str, model: str, folder: str, cpu: bool) -> Trainer:
    world, settings = int(os.environ.get("WORLD_SIZE", "1")), MODELS[model]
    length = 16 if cpu else LENGTH
    fields: dict[str, Any] = {
        "per_device_train_batch_size": settings["batch"],
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "bf16": not cpu,
        "torch_compile": settings["compile"],
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": cpu,
    }
    if world > 1 and cpu:
        fields["ddp_backend"] = "gloo"
    if kind == "fsdp2" and world > 1:
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        fields.update(fsdp=True, fsdp_config={**wrap, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**settings["sizes"], max_position_embeddings=2048))
    count = (STEPS + WARM_UP) * settings["batch"] * world
    common = {
        "train_dataset": Samples(count, length, settings["sizes"]["vocab_size"]),
        "data_collator": default_data_collator,
    }
    args = gk.GEKOTrainingArguments(folder, **fields)
    if arm == "standard":
        return Trainer(network, args, **common)
    return gk.GEKOTrainer(network, args, config=gk.GEKOConfig.uniform(), **common)


def train(arm: str, kind: str, model: str, out: Path, cpu: bool) -> None:
    """One process; rank 0 writes out/run.json."""
    logging.set_verbosity_error()
    trainer, clock = trainer_of(arm, kind, model, str(out / "trainer"), cpu), StepClock()
    trainer.add_callback(clock)
    trainer.train()
    world = trainer.args.world_size
    steps = [later - earlier for earlier, later in zip(clock.ends[WARM_UP:], clock.ends[WARM_UP + 1 :], strict=False)]
    batch = trainer.args.per_device_train_batch_size
    values: Row = {
        "step_ms": 1e3 * median(steps),
        "steps_per_second": len(steps) / sum(steps),
        "tokens_per_second": len(steps) / sum(steps) * batch * world * (16 if cpu else LENGTH),
        "batch": batch,
        "sharded": kind == "fsdp2" and world > 1,
    }
    if isinstance(trainer, gk.GEKOTrainer):
        seconds = trainer.get_efficiency_report()["seconds"]
        values["probe_share"] = seconds["probes"] / seconds["total"]
        values |= plan_of_many(trainer.args.device, changed=batch * (STEPS + WARM_UP), cpu=cpu)
        trained = (STEPS + WARM_UP) * values["step_ms"] / 1e3
        values["selection_share"] = values["sync_and_plan_seconds"] / (trained + values["sync_and_plan_seconds"])
        full_epoch = values["table"] / (batch * world) * values["step_ms"] / 1e3
        values["selection_share_full_epoch"] = values["sync_and_plan_seconds"] / full_epoch
    if trainer.is_world_process_zero():
        (out / "run.json").write_text(json.dumps(values))
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down


def plan_of_many(device: torch.device, changed: int, cpu: bool) -> Row:
    """Seconds of one epoch's sync and plan over a big table, each rank having changed other rows; do plans agree?"""
    table = 100_000 if cpu else TABLE
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    state = gk.SampleState(table, gk.GEKOConfig(), device)
    state.times_seen.fill_(1), state.bucket[::2].fill_(gk.Bucket.FREEZE)
    sampler, seconds = gk.GEKOSampler(state, num_epochs=20), []
    for epoch in range(5):
        mine = torch.arange(changed, device=device) * world + rank
        state.times_seen[mine] += 1
        state.bucket[mine] = int(gk.Bucket.LIGHT if epoch % 2 else gk.Bucket.HARD)
        state.changed[mine] = True
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        sampler.probed(sampler.due_probes(epoch), epoch)
        sampler.set_epoch(epoch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        next(iter(sampler))
        time.sleep(0 if cpu else 1)  # the epoch's training, while which the next order is made
    assert sampler.plan is not None
    parts = (sampler.plan.ids, state.bucket.cpu())
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    digests: list[Any] = [digest]
    if dist.is_initialized():
        digests = [None] * world
        dist.all_gather_object(digests, digest)
    return {
        "table": table,
        "changed_rows": changed * world,
        "sync_and_plan_seconds": median(seconds[1:]),
        "plans_equal": len(set(digests)) == 1,
    }


def launches(given: argparse.Namespace) -> Iterator[tuple[str, int, str, str]]:
    """(model, GPUs, kind, arm) of each run; one GPU has nothing to shard."""
    for model in given.models:
        for count in given.gpus:
            for kind in given.kinds if count > 1 else ("ddp",):
                for arm in given.arms:
                    yield model, count, kind, arm


def efficiencies(rows: list[Row]) -> list[Row]:
    """The rows with `efficiency`: tokens a second and GPU, over the same arm's on one GPU."""
    single = {(row["model"], row["arm"]): row["tokens_per_second"] for row in rows if row["gpus"] == 1}
    for row in rows:
        base = single.get((row["model"], row["arm"]))
        row["efficiency"] = row["tokens_per_second"] / row["gpus"] / base if base else None
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """One panel a model: tokens a second over GPUs, a line for each arm and kind."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.2 * len(models), 3.8), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for kind, style in (("ddp", "o-"), ("fsdp2", "s--")):
            for arm, color in (("standard", "#9aa5b1"), ("geko", "#0b7a75")):
                line = [
                    r for r in rows if (r["model"], r["arm"]) == (model, arm) and (r["kind"] == kind or r["gpus"] == 1)
                ]
                line.sort(key=lambda row: row["gpus"])
                values = [row["tokens_per_second"] / 1e3 for row in line]
                axes.plot([row["gpus"] for row in line], values, style, color=color, label=f"{arm}, {kind}")
        axes.set(title=model, xlabel="GPUs", ylabel="thousand tokens a second", xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, help="default: 1, 2, 4, ... as many as there are")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what the rows name as the commit, where there is no git")
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU, tiny sizes; nothing is written")
    parser.add_argument("--worker", nargs=4, metavar=("ARM", "KIND", "MODEL", "DIR"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        arm, kind, model, folder = given.worker
        train(arm, kind, model, Path(folder), given.cpu)
        return
    there = 2 if given.cpu else torch.cuda.device_count()
    given.gpus = given.gpus or [count for count in (1, 2, 4, 8) if count <= there]
    given.models = given.models or (["tiny"] if given.cpu else ["135M", "1B"])
    device = torch.device("cpu" if given.cpu else "cuda")
    packages = {name: version(name) for name in ("transformers", "accelerate")}
    shared = {**environment(device, given.commit), **packages, "length": LENGTH, "command": " ".join(sys.argv)}
    rows: list[Row] = []
    for model, count, kind, arm in launches(given):
        if kind == "fsdp2" and given.cpu:
            continue  # accelerate takes CPUs for DDP only
        with tempfile.TemporaryDirectory() as folder:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            extra = ["--cpu"] if given.cpu else []
            command = [sys.executable, *torchrun, __file__, "--worker", arm, kind, model, folder, *extra]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            values = json.loads((Path(folder) / "run.json").read_text())
        rows.append({"model": model, "gpus": count, "kind": kind, "arm": arm, **values})
        efficiencies(rows)
        print(rows[-1], flush=True)
        if not given.cpu:
            append(given.results / "scaling.jsonl", {**rows[-1], **shared})
    if not given.cpu:
        draw(runs(given.results / "scaling.jsonl")[-1], given.results / "scaling.png")


if __name__ == "__main__":
    main()
