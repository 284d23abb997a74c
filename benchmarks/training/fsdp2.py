"""Two GPUs under NCCL, DDP and FSDP2 (through accelerate): do plans, buckets and losses agree with one process?

`python -m benchmarks.training.fsdp2` on a host with two GPUs (about 3 minutes): trains the same small Llama on the
same global batches with one process, with DDP and with FSDP2, fp32, selection, probes, curriculum and noise guard on, a
dataset that does not divide by the batch, and for FSDP2 a resume from its own checkpoint. Prints one row per arm and
adds it to results/fsdp2.jsonl; exits with 1 if something disagrees. `--cpu` tries it out with gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import geko_kernels as gk
from benchmarks.results import RESULTS, ROOT, append, environment

ARMS = ("one", "ddp", "fsdp2", "fsdp2_resumed")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIG = gk.GEKOConfig(
    correct_loss=3.2, freeze_confidence=0.10, focus_confidence=0.05, freeze_quality=0.1, noise_guard_share=0.1
)
SAMPLES, EPOCHS, BATCH, SAVE_AT = 203, 8, 8, 60


def sentences() -> list[dict[str, list[int]]]:
    """Each sample repeats one token 3 to 14 times."""
    items = []
    for i in range(SAMPLES):
        tokens = [1 + i % 63] * (3 + i % 12)
        items.append({"input_ids": tokens, "labels": list(tokens)})
    return items


def trainer_of(arm: str, folder: str, cpu: bool) -> gk.GEKOTrainer:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fields: dict[str, Any] = {
        "per_device_train_batch_size": BATCH // world,
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.03,
        "adam_epsilon": 1e-3,  # the usual 1e-8 turns the rounding of a gradient near 0 into a full step
        "logging_steps": 1,
        "save_strategy": "steps" if arm.startswith("fsdp2") else "no",
        "save_steps": SAVE_AT,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": cpu,
    }
    if world > 1 and cpu:
        fields["ddp_backend"] = "gloo"
    if arm.startswith("fsdp2"):
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        fields.update(fsdp=True, fsdp_config={**wrap, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64))
    args = gk.GEKOTrainingArguments(folder, **fields)
    if cpu and arm.startswith("fsdp2"):
        _ = args.device  # sets the process up
        PartialState().distributed_type = DistributedType.MULTI_GPU  # accelerate takes CPUs for DDP only
    return gk.GEKOTrainer(model, args, train_dataset=sentences(), config=CONFIG)


def train(arm: str, out: Path, cpu: bool) -> None:
    """One process of an arm; writes out/<arm>-<rank>.json."""
    torch.backends.cuda.matmul.allow_tf32 = False
    trainer = trainer_of(arm, str(out / arm.removesuffix("_resumed")), cpu)
    trainer.train(resume_from_checkpoint=str(out / "fsdp2" / f"checkpoint-{SAVE_AT}") if "resumed" in arm else None)
    assert trainer.sample_state is not None and trainer.sampler is not None and trainer.sampler.plan is not None
    state, report = trainer.sample_state, trainer.get_efficiency_report()
    values = {
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "sharded": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "plan": trainer.sampler.plan.ids.tolist(),
        "bucket": state.bucket.tolist(),
        "times_seen": state.times_seen.tolist(),
        "last_loss": state.last_loss.tolist(),
        "epochs": [{k: v for k, v in epoch.items() if k not in ("seconds",)} for epoch in report["epochs"]],
        "saved_compute": report["saved_compute"],
        "seconds": report["seconds"]["total"],
    }
    rank = dist.get_rank() if dist.is_initialized() else 0
    (out / f"{arm}-{rank}.json").write_text(json.dumps(values))
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down: 2 of 8 runs, after all was done


def share_equal(ours: list[Any], theirs: list[Any]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def compare(ranks: list[dict[str, Any]], one: dict[str, Any]) -> dict[str, Any]:
    """Ranks among each other (exact but for time), and rank 0 with the one process (to rounding)."""
    exact = ("plan", "bucket", "times_seen", "last_loss", "epochs", "steps", "loss")
    first = ranks[0]
    together = min(len(first["loss"]), len(one["loss"]))
    losses = [abs(a - b) for a, b in zip(first["loss"][:together], one["loss"][:together], strict=True)]
    visited = [abs(a - b) for a, b in zip(first["last_loss"], one["last_loss"], strict=True)]
    row = {
        "sharded": first["sharded"],
        "ranks_agree": all(rank[key] == first[key] for rank in ranks for key in exact),
        "steps": first["steps"],
        "steps_one": one["steps"],
        "plan_equal": sorted(first["plan"]) == sorted(one["plan"]),
        "bucket_equal": share_equal(first["bucket"], one["bucket"]),
        "times_seen_equal": share_equal(first["times_seen"], one["times_seen"]),
        "max_loss_difference": max(losses),
        "max_sample_loss_difference": max(visited),
        "saved_compute": first["saved_compute"],
        "probes": sum(epoch["probes"] for epoch in first["epochs"]),
        "seconds": first["seconds"],
    }
    row["ok"] = bool(
        row["ranks_agree"]
        and row["steps"] == row["steps_one"]
        and row["bucket_equal"] == row["times_seen_equal"] == 1.0
        and row["plan_equal"]
        and row["max_loss_difference"] < 1e-3
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU; nothing is written")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--worker", nargs=2, metavar=("ARM", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        train(given.worker[0], Path(given.worker[1]), given.cpu)
        return
    device = torch.device("cpu" if given.cpu else "cuda")
    packages = {name: version(name) for name in ("transformers", "accelerate")}
    shared = {**environment(device), **packages, "processes": 2, "command": " ".join(sys.argv)}
    torchrun, failed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], False
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for arm in given.arms:
            launch = [] if arm == "one" else torchrun
            visible = {"CUDA_VISIBLE_DEVICES": "0"} if arm == "one" and not given.cpu else {}
            extra = ["--cpu"] if given.cpu else []
            command = [sys.executable, *launch, __file__, "--worker", arm, folder, *extra]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), **visible})
            ranks = [json.loads(path.read_text()) for path in sorted(out.glob(f"{arm}-[0-9].json"))]
            if arm == "one":
                one = ranks[0]
                continue
            row = {"arm": arm, **compare(ranks, one)}
            row["ok"] = row["ok"] and row["sharded"] == arm.startswith("fsdp2")
            failed |= not row["ok"]
            print(row, flush=True)
            if not given.cpu:
                append(RESULTS / "fsdp2.jsonl", {**row, **shared})
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
