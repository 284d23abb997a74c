"""Processes that do not behave, for test_unruly_processes.py: `torchrun unruly_run.py OUT killed|broken|rest`.

`killed` ends with a SIGKILL of one process, `broken` with an item that one cannot read; `rest` resumes both runs and
has all other scenarios. Writes OUT/<name>-<rank>.json.
"""

from __future__ import annotations

import json
import os
import shutil
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
from geko_kernels.training.checkpoint import STATE_NAME
from geko_kernels.training.data import CausalCollator
from geko_kernels.training.model_loss import head, loss_form
from geko_kernels.training.report.visits import VISITS_NAME

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


def automatic(out: Path, data: Any = None, collator: Any = None) -> gk.GEKOTrainer:
    """130 samples, 20 of them held back."""
    args = settings(out, per_device_train_batch_size=20 // WORLD)
    data = noisy(150) if data is None else data
    return gk.GEKOTrainer(tiny_llama(), args, collator, data, config=gk.GEKOConfig.auto())


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
    apart(out, messages)
    tell(out, "refused", messages)


def apart(out: Path, messages: dict[str, str]) -> None:
    """Runs that begin alike, and in which one process then has something else."""
    weighed = [{**item, "sample_weights": 0.5} if i % 4 > 1 else item for i, item in enumerate(sentences(29))]
    unlike = out / f"unlike-{RANK}"
    for name in ("visits", "state"):
        shutil.copytree(out / "killed" / f"checkpoint-{SAVED}", unlike / name / f"checkpoint-{SAVED}")
    if RANK:
        (unlike / "visits" / f"checkpoint-{SAVED}" / VISITS_NAME).unlink()
        file = unlike / "state" / f"checkpoint-{SAVED}" / STATE_NAME
        state = gk.SampleState.load(file)
        state.loss_history[0, -1] += 1
        state.save(file)
    runs = {
        "weights of some": (selecting(out / "apart", weighed, train_sampling_strategy="sequential"), None),
        "visits": (selecting(out / "apart"), str(unlike / "visits" / f"checkpoint-{SAVED}")),
        "state": (selecting(out / "apart"), str(unlike / "state" / f"checkpoint-{SAVED}")),
        "made-up items": (
            automatic(out / "apart", collator=CausalCollator(0) if RANK == 0 else fails_at_first()),
            None,
        ),
    }
    for name, (trainer, checkpoint) in runs.items():
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except ValueError as error:
            messages[name] = str(error)


def fails_at_first() -> Any:
    calls: list[Any] = []

    def collate(items: Any) -> Any:
        calls.append(items)
        if len(calls) == 1:
            raise KeyError("a word that only this process does not know")
        return CausalCollator(0)(items)

    return collate


class Drawn(MapDataset):
    """An item is drawn when it is read: its first token, or its length."""

    def __init__(self, items: Any, lengths: bool = False) -> None:
        super().__init__(items)
        self.lengths = lengths

    def __getitem__(self, index: int) -> Any:
        item, drawn = super().__getitem__(index), int(torch.randint(2, 8, ()))
        if self.lengths:
            return {name: tokens[:1] * drawn for name, tokens in item.items()}
        return {**item, "input_ids": [drawn, *item["input_ids"][1:]]}


def drawn(out: Path) -> None:
    """Each process draws from numbers of its own."""
    torch.manual_seed(RANK)
    trainer = automatic(out / "drawn", Drawn(noisy(150)))
    trainer.train()
    at = trainer._stopping.at
    made = [part.places.tolist() for part in at.swapped]
    torch.manual_seed(RANK)
    data, by_length = Drawn(sentences(29), lengths=True), {"train_sampling_strategy": "group_by_length"}
    trainer = selecting(out / "drawn", data, gk.GEKOConfig.uniform(), save_strategy="no", **by_length)
    trainer.train()
    tell(out, "drawn", {"held": at.held.tolist(), "made": made, **summary(trainer)})


class Tells(TrainerCallback):
    """The first process logs a loss of its own at odd steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if RANK == 0 and state.global_step % 2:
            self.trainer.log({"loss": 0.0})


def alone(out: Path) -> None:
    """In one process the fused head fails, and every figure seems to fit; it logs alone, too."""
    fused, error, forwards = head._fused, loss_form._relative_error, []
    if RANK:
        head._fused, loss_form._relative_error = fails_afterwards(fused), lambda *_: 10.0
    trainer = selecting(out / "alone", save_strategy="no", max_steps=5, logging_steps=2)
    trainer.model.register_forward_hook(lambda *_: forwards.append(0))
    callback = Tells()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    head._fused, loss_form._relative_error = fused, error
    values = {"forwards": len(forwards), "form": trainer._found.form.shift, "head": trainer._found.head is not None}
    logged = [entry for entry in trainer.state.log_history if "geko/loss" in entry]
    tell(out, "alone", {**values, "logged": [entry["geko/loss"] for entry in logged]})


def fails_afterwards(ask: Any) -> Any:
    def fails(*given: Any) -> Any:
        ask(*given)
        raise torch.OutOfMemoryError("only here")

    return fails


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
    drawn(out)
    alone(out)
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
