"""The same run on one and on several GPUs: one global batch, SmolLM2-135M, the rows of D1 or D2, GEKOTrainer with DDP.

    RUN="benchmarks.training.same_run d2.npz --arm recommended --out rows.jsonl"
    python -m $RUN --folder one
    torchrun --nproc-per-node 4 -m $RUN --folder four --save-at 60
    torchrun --nproc-per-node 4 -m $RUN --folder again --resume four/checkpoint-60

A row has the losses as they were logged, the test loss, digests (SHA-256) of the weights, of the last plan and of the
learning state, and whether these are the same on every rank. Rank 0 writes it, and the learning state to
FOLDER/state.pt. PyTorch's deterministic algorithms are on where there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainingArguments

import geko_kernels as gk
from benchmarks.end_to_end.engine import load_smollm2, tiny_llama
from benchmarks.end_to_end.product import Rows, collate
from benchmarks.end_to_end.texts import load
from benchmarks.results import append, environment

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def digest(values: list[Tensor]) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def same(text: str) -> bool:
    """Is it equal on every rank?"""
    texts: list[Any] = [text] * WORLD
    if dist.is_initialized():
        dist.all_gather_object(texts, text)
    return len(set(texts)) == 1


def trainer_of(given: argparse.Namespace) -> tuple[gk.GEKOTrainer, Rows]:
    cuda, texts = torch.cuda.is_available(), load(given.texts)
    config = gk.GEKOConfig.auto() if given.arm == "auto" else gk.GEKOConfig.recommended()
    ids = torch.cat([ids for name, ids in texts.parts.items() if name not in ("test", "choose")]).sort().values
    args = TrainingArguments(
        str(given.folder),
        num_train_epochs=given.epochs,
        per_device_train_batch_size=given.batch // WORLD,
        per_device_eval_batch_size=given.batch // WORLD,
        learning_rate=given.rate,
        lr_scheduler_type="constant_with_warmup" if given.arm == "auto" else "cosine",
        warmup_steps=0.1 if given.arm == "auto" else 0.03,
        bf16=cuda,
        use_cpu=not cuda,
        ddp_backend=None if cuda or WORLD == 1 else "gloo",
        seed=given.seed,
        save_strategy="steps" if given.save_at else "no",
        save_steps=given.save_at or 500,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    model = (tiny_llama if given.tiny else load_smollm2)()[0]
    trainer = gk.GEKOTrainer(model, args, collate, Rows(texts, ids[: given.rows]), config=config)
    return trainer, Rows(texts, texts.parts["test"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--arm", choices=("recommended", "auto"), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and the learning state")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128, help="of all GPUs together")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-at", type=int, metavar="STEP", help="a checkpoint at each multiple of it")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, for tests")
    given = parser.parse_args()
    if given.batch % WORLD:
        parser.error(f"--batch {given.batch} is not divisible by {WORLD} processes: they would train other batches")
    torch.use_deterministic_algorithms(True, warn_only=True)
    trainer, test = trainer_of(given)
    device = trainer.args.device
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(given.resume) if given.resume else None)
    seconds = time.perf_counter() - begin
    state = trainer.sample_state
    assert state is not None and trainer.sampler is not None and trainer.sampler.plan is not None
    columns = {name: value for name, value in state.state_dict().items() if isinstance(value, Tensor)}
    digests = {
        "weights": digest(list(trainer.model.state_dict().values())),
        "plan": digest([trainer.sampler.plan.ids]),
        "state": digest(list(columns.values())),
    }
    equal = {name: same(text) for name, text in digests.items()}
    loss = trainer.evaluate(test)["eval_loss"]
    report = trainer.get_efficiency_report()
    if RANK == 0:
        torch.save(columns, given.folder / "state.pt")
        row = {
            "arm": given.arm,
            "texts": given.texts.name,
            "gpus": WORLD,
            "batch": given.batch,
            "rows": given.rows,
            "epochs": given.epochs,
            "seed": given.seed,
            "rate": given.rate,
            "resumed": str(given.resume) if given.resume else None,
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "test_loss": loss,
            "losses": [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e],
            "samples_backward": report["samples_backward"],
            "saved_compute": report["saved_compute"],
            "buckets": state.bucket_counts().tolist(),
            "digests": digests,
            "same_on_every_rank": equal,
        }
        append(given.out, {**row, **environment(device), "command": " ".join(sys.argv)})
        print(json.dumps(row), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
