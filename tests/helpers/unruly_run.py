"""Processes that do not behave, for test_unruly_processes.py: `torchrun unruly_run.py OUT killed|broken|rest`.

`killed` ends with a SIGKILL of one process, `broken` with an item that one cannot read; `rest` resumes both runs and
has all other scenarios. Writes OUT/<name>-<rank>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from auto_run import few_samples, noisy
from resume_run import learnable, summary
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import MapDataset, arguments, sentences, tiny_llama
from transformers import TrainerCallback

import geko_kernels as gk
from geko_kernels import ops

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SAVED, TROUBLE = 5, 12  # steps: of a checkpoint, and of what goes wrong


class Then(TrainerCallback):
    """Calls `then` at the begin of a step, on the last process."""

    def __init__(self, then: Any, step: int = TROUBLE) -> None:
        self.then, self.step = then, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and RANK == WORLD - 1:
            self.then()


class Breaking(MapDataset):
    """No item can be read once `broken` is set."""

    broken = False

    def __getitem__(self, index: int) -> Any:
        if self.broken:
            raise OSError(f"item {index} cannot be read")
        return super().__getitem__(index)


def settings(out: Path, **fields: Any) -> gk.GEKOTrainingArguments:
    several = {"ddp_backend": "gloo"} if WORLD > 1 else {}
    common = {"per_device_train_batch_size": 4 // WORLD, "optim": "sgd", "learning_rate": 1.0, "num_train_epochs": 3}
    return arguments(out, **{**common, **several, "save_strategy": "steps", "save_steps": SAVED, **fields})


def easy(**fields: Any) -> gk.GEKOConfig:
    """The third epoch leaves out more than half of the samples."""
    return learnable(**{"correct_loss": 3.3, "freeze_confidence": 0.05, "focus_confidence": 0.02, **fields})


def selecting(out: Path, data: Any = None, config: Any = None, **fields: Any) -> gk.GEKOTrainer:
    """29 ragged samples, of which some freeze."""
    data = sentences(29, ragged=True) if data is None else data
    return gk.GEKOTrainer(tiny_llama(), settings(out, **fields), train_dataset=data, config=config or easy())


def automatic(out: Path, data: Any = None) -> gk.GEKOTrainer:
    """130 samples, 20 of them held back."""
    args = settings(out, per_device_train_batch_size=20 // WORLD)
    data = noisy(150) if data is None else data
    return gk.GEKOTrainer(tiny_llama(), args, train_dataset=data, config=gk.GEKOConfig.auto())


def tell(out: Path, name: str, values: Any) -> None:
    (out / f"{name}-{RANK}.json").write_text(json.dumps(values))


def killed(out: Path, resume: bool) -> None:
    trainer = selecting(out / "killed")
    if not resume:
        trainer.add_callback(Then(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    trainer.train(resume_from_checkpoint=resume)
    tell(out, "killed", summary(trainer))


def broken(out: Path, resume: bool) -> None:
    data = Breaking(noisy(150))
    trainer = automatic(out / "broken", data)
    if not resume:
        trainer.add_callback(Then(lambda: setattr(data, "broken", True)))
    trainer.train(resume_from_checkpoint=resume)
    tell(out, "broken", summary(trainer))


def stop_for(seconds: float) -> None:
    """SIGSTOP, and SIGCONT by a child."""
    parent = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(parent, signal.SIGCONT)
        os._exit(0)
    os.kill(parent, signal.SIGSTOP)


def stopped(out: Path) -> None:
    trainer = selecting(out / "stopped")
    trainer.add_callback(Then(lambda: stop_for(float(os.environ.get("STOP_FOR", 2)))))
    trainer.train()
    tell(out, "stopped", summary(trainer))


def small(out: Path, left: int, **fields: Any) -> dict[str, Any]:
    """Two epochs of which the first has `left` samples, all others being frozen."""
    config = gk.GEKOConfig.recommended(probes=False, noise_guard=False, light_interval=1)
    trainer = selecting(out / "small", config=config, save_strategy="no", **{"num_train_epochs": 2, **fields})
    state = trainer.sample_state
    state.times_seen[left:], state.bucket[left:] = 1, gk.Bucket.FREEZE
    trainer.train()
    return {**summary(trainer), "steps": trainer.state.global_step}


REFUSED: dict[str, dict[str, Any]] = {
    "shorter": {"data": sentences(27, ragged=True)},
    "reversed": {"data": sentences(29, ragged=True)[::-1]},
    "config": {"config": easy(correct_loss=2.0)},
    "epochs": {"num_train_epochs": 2},
    "batch": {"per_device_train_batch_size": 4},
    "seed": {"seed": 7},
    "steps between checkpoints": {"save_steps": 6},
}


def refused(out: Path) -> None:
    messages = {}
    for name, given in REFUSED.items():
        trainer = selecting(out / "refused", **(given if RANK == 1 else {}))
        try:
            trainer.train()
        except ValueError as error:
            messages[name] = str(error)
    trainer = selecting(out / "refused")
    try:
        trainer.train(resume_from_checkpoint=str(out / "killed" / f"checkpoint-{SAVED * (RANK + 1)}"))
    except ValueError as error:
        messages["checkpoint"] = str(error)
    model, halves = tiny_llama(), {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(model.model.layers[0].mlp, mesh, {**halves, "down_proj": RowwiseParallel()})
    try:
        gk.GEKOTrainer(model, settings(out / "refused"), train_dataset=sentences(4))
    except ValueError as error:
        messages["tensor parallel"] = str(error)
    tell(out, "refused", messages)


def whole(out: Path, name: str = "whole", resume: Any = None, **fields: Any) -> dict[str, Any]:
    trainer = selecting(out / name, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return summary(trainer)


def by(accelerator: dict[str, Any], batch: int) -> dict[str, Any]:
    return {"accelerator_config": accelerator, "per_device_train_batch_size": batch, "save_strategy": "no"}


def rest(out: Path) -> None:
    tell(out, "whole", whole(out))
    trainer = automatic(out / "automatic")
    trainer.train()
    tell(out, "automatic", summary(trainer))
    stopped(out)
    tell(out, "split_batches", whole(out, "split", **by({"split_batches": True}, 4)))
    even = sentences(29)  # batches of one width, which accelerate needs to dispatch them
    for name, value in (("even_batches", False), ("dispatch_batches", True)):
        tell(out, name, whole(out, name, data=even, **by({name: value}, 4 // WORLD)))
    for left in (0, 1, 3):
        tell(out, f"small {left}", small(out, left))
    tell(out, "small steps", small(out, 0, max_steps=3))
    refused(out)
    tell(out, "from one", whole(out, "one", str(out / "one" / f"checkpoint-{2 * SAVED}")))


def main() -> None:
    torch.set_num_threads(1)
    ops._override = "reference"
    out, what = Path(sys.argv[1]), sys.argv[2]
    gk.GEKOTrainer._write_report = lambda self: None  # takes longer than such a run
    with few_samples(20):
        if what in ("killed", "rest"):
            killed(out, resume=what == "rest")
        if what in ("broken", "rest"):
            broken(out, resume=what == "rest")
        rest(out)
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
