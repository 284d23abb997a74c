"""Training runs for test_resume.py and kill_runs.py."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from training import arguments, sentences, tiny_llama, weights
from transformers import TrainerCallback

import geko_kernels as gk
from geko_kernels import ops


class KillAt(TrainerCallback):
    """`kill -9` in the middle of a step: after its backward, before its optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Doing(TrainerCallback):
    """Says in a file what the run is at, for who kills it."""

    def __init__(self, trainer: gk.GEKOTrainer, path: Path) -> None:
        self.path = path
        for name in ("_probe", "_save_checkpoint"):
            setattr(trainer, name, self.told(name, getattr(trainer, name)))

    def told(self, name: str, call: Any) -> Any:
        def calling(*args: Any, **named: Any) -> None:
            self.path.write_text(name)
            call(*args, **named)
            self.path.write_text("training")

        return calling

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path.write_text("training")


# name -> (training arguments, fields of the config): what the position of a checkpoint may depend on
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"gradient_accumulation_steps": 1}, {}),
    "accumulate 2": ({"gradient_accumulation_steps": 2}, {}),
    "accumulate 3, max_steps": ({"gradient_accumulation_steps": 3, "max_steps": 16}, {}),
    "drop_last": ({"gradient_accumulation_steps": 1, "dataloader_drop_last": True}, {"light_interval": 2}),
    "drop_last, accumulate 2": ({"gradient_accumulation_steps": 2, "dataloader_drop_last": True}, {}),
    "workers": ({"gradient_accumulation_steps": 1, "dataloader_num_workers": 2}, {}),
    "workers, accumulate 3": ({"gradient_accumulation_steps": 3, "dataloader_num_workers": 2}, {"noise_guard": False}),
    "persistent workers": (
        {
            "gradient_accumulation_steps": 2,
            "dataloader_num_workers": 2,
            "dataloader_persistent_workers": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        {},
    ),
    "group_by_length": ({"gradient_accumulation_steps": 1, "train_sampling_strategy": "group_by_length"}, {}),
    "batch_tokens": ({"gradient_accumulation_steps": 2}, {"batch_tokens": 16, "uniform_finish": 0.3}),
    "batch_tokens, drop_last": (
        {"gradient_accumulation_steps": 1, "dataloader_drop_last": True, "dataloader_num_workers": 2},
        {"batch_tokens": 20, "light_interval": 2},
    ),
    "uniform_finish": ({"gradient_accumulation_steps": 2, "num_train_epochs": 3.5}, {"uniform_finish": 0.4}),
    "uniform_finish, max_steps": ({"gradient_accumulation_steps": 1, "max_steps": 31}, {"uniform_finish": 0.3}),
    "no curriculum, turns": (
        {"gradient_accumulation_steps": 2},
        {"use_curriculum": False, "bucket_weights": (3, 2, 1), "light_interval": 3, "uniform_finish": 0.0},
    ),
    "quarantine": (
        {"gradient_accumulation_steps": 1, "learning_rate": 2e-2},
        {
            "noise_guard_margin": 0.3,
            "noise_guard_min_share": 0.0,
            "noise_guard_share": 0.3,
            "correct_loss": 3.2,
            "focus_confidence": 0.8,
            "freeze_confidence": 0.85,
        },
    ),
    "spend_saved": ({"gradient_accumulation_steps": 2}, {"spend_saved": True}),
    "rare logs": ({"gradient_accumulation_steps": 1, "logging_steps": 3, "save_steps": 3}, {"quality": "std"}),
}


def learnable(**fields: Any) -> gk.GEKOConfig:
    """Everything on, thresholds so low that samples freeze, thaw and are quarantined within a few epochs."""
    low = {"correct_loss": 2.6, "freeze_confidence": 0.14, "focus_confidence": 0.1, "freeze_quality": 0.1}
    return gk.GEKOConfig(**{**low, "noise_guard_share": 0.1, **fields})


def trainer_of(folder: str, samples: int = 30, config: dict[str, Any] | None = None, **fields: Any) -> gk.GEKOTrainer:
    options = {
        "num_train_epochs": 8,
        "learning_rate": 2e-2,
        "save_strategy": "steps",
        "save_steps": 5,
        "warmup_steps": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    model = tiny_llama(attention_dropout=0.2)
    args = arguments(folder, **{**options, **fields})
    data = sentences(samples, ragged=True)
    return gk.GEKOTrainer(model, args, train_dataset=data, eval_dataset=data[:4], config=learnable(**(config or {})))


def trainer_in(setting: str, folder: str) -> gk.GEKOTrainer:
    """A short run that saves at every step."""
    fields, config = SETTINGS[setting]
    quick = {"per_device_train_batch_size": 3, "learning_rate": 4e-2, "save_steps": 1, **fields}
    trainer = trainer_of(folder, 14, config, **quick)
    if setting == "quarantine":  # one token is the answer to all, but for two samples
        for number, item in enumerate(trainer.train_dataset):
            item["labels"] = [9 if number in (3, 8) else 5] * len(item["labels"])
    return trainer


def summary(trainer: gk.GEKOTrainer) -> dict[str, Any]:
    """All that has to be equal, to the bit."""
    keys = ("loss", "learning_rate", "grad_norm", "geko/loss", "geko/freeze", "geko/progress", "step")
    report = trainer.get_efficiency_report()
    epochs = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in report["epochs"]]
    return {
        "curve": [{k: e[k] for k in keys if k in e} for e in trainer.state.log_history if "loss" in e],
        "epochs": epochs,
        "counts": {name: report[name] for name in report if name not in ("seconds", "epochs")},
        "plan": trainer.sampler.plan.ids.tolist(),
        "weights": weights(trainer.model).double().tolist(),
        "state": {name: column.double().tolist() for name, column in trainer.sample_state.state_dict().items()},
    }


def after(result: dict[str, Any], step: int) -> dict[str, Any]:
    """The summary with only the curve's part behind `step`, as JSON has it."""
    result = json.loads(json.dumps(result))
    return {**result, "curve": [entry for entry in result["curve"] if entry["step"] > step]}


def run(folder: str, setting: str | None = None, resume: bool | str = False, kill_at: int | None = None) -> None:
    """Train, and write the summary into `folder`."""
    torch.set_num_threads(1)
    ops._override = "reference"
    trainer = trainer_in(setting, folder) if setting else trainer_of(folder)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    trainer.add_callback(Doing(trainer, Path(folder, "doing")))
    trainer.train(resume_from_checkpoint=resume)
    Path(folder, "summary.json").write_text(json.dumps(summary(trainer)))
