"""Checks a run's output directory, and finds the checkpoint to resume from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.options import LAST_CHECKPOINT, TrainOptions
from geko_kernels.config import GEKOConfig
from geko_kernels.state import SampleState
from geko_kernels.training.checkpoint import STATE_NAME, last_complete
from geko_kernels.training.report.efficiency import REPORT_NAME


def check_output(options: TrainOptions) -> None:
    """Refuse an output directory that cannot be written, or that is the model's own."""
    folder = Path(options.output_dir).absolute()
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        raise UsageError(f"--output-dir {options.output_dir}: {error}; give another one") from error
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"--output-dir {options.output_dir}: {there} is not a directory; give another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output-dir {options.output_dir}: no permission to write in {there}; give another one")
    if os.path.isdir(options.model) and folder.resolve() == Path(options.model).resolve():
        raise UsageError(
            f"--output-dir {options.output_dir} is the directory of --model, which the run would overwrite; give "
            "another --output-dir"
        )


def newest_checkpoint(options: TrainOptions) -> str | None:
    """The newest whole checkpoint in the output directory."""
    return last_complete(options.output_dir, TRAINER_STATE_NAME) if os.path.isdir(options.output_dir) else None


def find_checkpoint(options: TrainOptions) -> str | None:
    """The checkpoint to resume from; refuses to overwrite an existing run."""
    folder, last = Path(options.output_dir), newest_checkpoint(options)
    if not options.resume:
        if last or (folder / REPORT_NAME).exists():
            raise UsageError(f"{folder} already holds a run: continue it with --resume, or give another --output-dir")
        return None
    if options.resume == LAST_CHECKPOINT:
        if last is None:
            raise UsageError(f"--resume: {folder} holds no checkpoint; leave --resume out to start the run")
        return last
    if not os.path.isdir(options.resume):
        raise UsageError(f"--resume: there is no directory {options.resume}; give a checkpoint-N directory")
    if not (Path(options.resume) / TRAINER_STATE_NAME).is_file():
        inside = last_complete(options.resume, TRAINER_STATE_NAME)
        raise UsageError(
            f"--resume: {options.resume} is not a whole checkpoint: it has no {TRAINER_STATE_NAME}; "
            + (f"give {inside}" if inside else "give a checkpoint-N directory")
        )
    return options.resume


def check_loss(checkpoint: str, loss: str) -> None:
    """Refuse to finish a run with another loss than it was started with."""
    state = Path(checkpoint) / STATE_NAME
    if not state.is_file():
        return  # the trainer says what is missing
    try:
        config = SampleState.load(state).config
    except ValueError as error:
        raise UsageError(f"--resume: {error}") from error
    before = "standard" if config == GEKOConfig.uniform() else "geko"
    if before != loss:
        raise UsageError(
            f"--resume: {checkpoint} was written with --loss {before}, but this run has --loss {loss}. Give --loss "
            f"{before}, or start a new run with another --output-dir (with --model {checkpoint}, from the weights "
            "trained so far)"
        )


def check_checkpoint(checkpoint: str, model: Any) -> None:
    """Refuse a checkpoint of another task or model, from which Transformers would load the parts that fit.

    The trainer checks GEKO's own files.
    """
    folder = Path(checkpoint)
    try:
        saved = _config(folder / CONFIG_NAME)
        shapes = _shapes(folder / SAFE_WEIGHTS_NAME)
    except (OSError, ValueError, SafetensorError) as error:
        named = str(error) if checkpoint in str(error) else f"{checkpoint}: {error}"
        raise UsageError(f"--resume: {named}") from error
    kinds = (saved.get("architectures") or [type(model).__name__])[0], type(model).__name__
    if kinds[0] != kinds[1]:
        raise UsageError(f"--resume: {checkpoint} is of a {kinds[0]}, but this run trains a {kinds[1]}")
    saved_classes = saved.get("id2label") or {}
    classes = {str(number): name for number, name in model.config.id2label.items()}
    if saved_classes and saved_classes != classes:
        there, here = (", ".join(map(str, names.values())) for names in (saved_classes, classes))
        raise UsageError(
            f"--resume: {checkpoint} has the classes {there}, but --data has {here}; give the data with which the run "
            "was started"
        )
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        if name in own and own[name] != shape:
            raise UsageError(
                f"--resume: {checkpoint} is of another model than --model: {name} is {shape} there and {own[name]} here"
            )


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():  # adapters alone
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("id2label") or {}, dict):
        raise ValueError(f"{path} is damaged")
    return config


def _shapes(weights: Path) -> dict[str, list[int]]:
    if not weights.exists():  # in shards, or adapters alone
        return {}
    with safe_open(weights, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
