"""One training run for test_resume.py: `python resume_run.py OUTPUT_DIR [--resume] [--kill-at STEP]`."""

from __future__ import annotations

import argparse
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


def learnable() -> gk.GEKOConfig:
    """Everything on, thresholds so low that samples freeze, thaw and are quarantined within a few epochs."""
    return gk.GEKOConfig(
        correct_loss=2.6, freeze_confidence=0.14, focus_confidence=0.1, freeze_quality=0.1, noise_guard_share=0.1
    )


def trainer_of(folder: str, **fields: Any) -> gk.GEKOTrainer:
    options = {
        "num_train_epochs": 8,
        "learning_rate": 2e-2,
        "save_strategy": "steps",
        "save_steps": 5,
        "warmup_steps": 3,
    }
    args = arguments(
        folder, **{**options, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **fields}
    )
    model = tiny_llama(attention_dropout=0.2)
    return gk.GEKOTrainer(model, args, train_dataset=sentences(30, ragged=True), config=learnable())


def summary(trainer: gk.GEKOTrainer) -> dict[str, Any]:
    """All that has to be equal, to the bit."""
    keys = ("loss", "learning_rate", "grad_norm", "geko_loss", "geko_freeze", "geko_progress", "step")
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    torch.set_num_threads(1)
    ops._override = "reference"
    trainer = trainer_of(given.folder, **given.options)
    if given.kill_at is not None:
        trainer.add_callback(KillAt(given.kill_at))
    trainer.train(resume_from_checkpoint=given.resume)
    Path(given.folder, "summary.json").write_text(json.dumps(summary(trainer)))


if __name__ == "__main__":
    main()
