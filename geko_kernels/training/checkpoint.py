"""GEKO's files in a checkpoint folder: the learning state, the sampler, and the counts of the report."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geko_kernels._files import VERSION, load_tensors, read_object, save_tensors
from geko_kernels.state import SampleState
from geko_kernels.training.report.efficiency import strict, write_json

STATE_NAME = "geko_state.safetensors"
SAMPLER_NAME = "geko_sampler.safetensors"
EFFICIENCY_NAME = "geko_efficiency.json"
_TRAINER_STATE = "trainer_state.json"  # Transformers' name; importing it would take seconds
_FORMAT = "geko_kernels.GEKOSampler"


def save_files(
    folder: str | os.PathLike[str], state: SampleState, sampler: dict[str, Any], efficiency: dict[str, Any]
) -> None:
    """Write the three files, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state.save(folder / STATE_NAME)
    counts = strict(efficiency)
    write_json(folder / EFFICIENCY_NAME, {"version": int(VERSION), "crc32": _checksum(counts), **counts})
    columns = {name: value for name, value in sampler.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in sampler.items() if not isinstance(value, Tensor)}
    save_tensors(folder / SAMPLER_NAME, _FORMAT, columns, {"rest": json.dumps(rest, allow_nan=False)})


def load_files(
    folder: str | os.PathLike[str], num_samples: int, device: torch.device, like: dict[str, Any]
) -> tuple[SampleState, dict[str, Any], dict[str, Any]]:
    """(state, sampler's values, efficiency's values) of a checkpoint; efficiency's have the same types as in `like`.

    `GEKOSampler.load_state_dict` checks the sampler's values.

    Raises:
        ValueError: not a whole checkpoint of GEKOTrainer, a damaged file, or the state of another dataset; names it.
    """
    folder = Path(folder)
    names = (STATE_NAME, SAMPLER_NAME, EFFICIENCY_NAME, _TRAINER_STATE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        told = f"it has no {', '.join(missing)}" if folder.is_dir() else "there is no such folder"
        inside = last_complete(folder, _TRAINER_STATE) if folder.is_dir() else None
        if inside is not None:
            told += f". It is a folder of checkpoints: give one of them, the newest is {inside}"
        elif folder.is_dir() and missing == list(names[:3]):
            told += ". Another trainer wrote it: load the model from it, and start a new run"
        raise ValueError(f"{folder} cannot be resumed by GEKOTrainer: {told}")
    _check_trainer_state(folder / _TRAINER_STATE)
    state = SampleState.load(folder / STATE_NAME, device)
    if len(state) != num_samples:
        raise ValueError(
            f"{folder} holds the learning state of {len(state)} samples, but train_dataset has {num_samples}: resume "
            "with the dataset that the run was started with"
        )
    return state, _load_sampler(folder / SAMPLER_NAME), _load_efficiency(folder / EFFICIENCY_NAME, like)


def _load_sampler(path: Path) -> dict[str, Any]:
    columns, metadata = load_tensors(path, _FORMAT, "GEKOTrainer")
    if "version" not in metadata:
        raise ValueError(
            f"{path} was written by an earlier geko_kernels, whose checkpoints have no version and do not record the "
            f"run's exact position: start a new run. SampleState.load still reads its {STATE_NAME}"
        )
    try:
        return {**json.loads(metadata["rest"]), **columns}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _load_efficiency(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    values = read_object(path)
    version, crc = values.pop("version", None), values.pop("crc32", None)
    if version != int(VERSION):
        raise ValueError(
            f"{path} has version {version}, this geko_kernels reads {VERSION}; resume with the geko_kernels that "
            "wrote it, or start a new run"
        )
    if crc != _checksum(values):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum; resume from another checkpoint")
    return _of_kind(values, like, str(path))


def _check_trainer_state(path: Path) -> None:
    from transformers.trainer_callback import TrainerState

    values = read_object(path)
    try:
        state = TrainerState(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or of another version of Transformers: {error}") from error
    for name in ("global_step", "epoch", "train_batch_size", "log_history"):
        if name not in values:
            raise ValueError(f"{path} is damaged: it has no {name}")
    step = state.global_step
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{path} is damaged: global_step must be an integer of at least 0, got {step!r}")
    if not isinstance(state.epoch, (int, float)) or not isinstance(state.train_batch_size, int):
        got = f"{state.epoch!r} and {state.train_batch_size!r}"
        raise ValueError(f"{path} is damaged: epoch and train_batch_size must be numbers, got {got}")
    if not isinstance(state.log_history, list) or not all(isinstance(entry, dict) for entry in state.log_history):
        raise ValueError(f"{path} is damaged: log_history must be a list of objects")


def _of_kind(value: Any, like: Any, name: str) -> Any:
    """`value` if it has the keys and types of `like`, with NaN for a number that is None; lists hold dicts."""
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{name} must hold {sorted(like)}, got {got}")
        return {key: _of_kind(value[key], like[key], f"{name}[{key!r}]") for key in like}
    if isinstance(like, list):
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ValueError(f"{name} must be a list of objects")
        return value
    if isinstance(like, float) and value is None:
        return math.nan
    kinds = (float, int) if isinstance(like, float) else (int, type(None)) if like is None else type(like)
    if isinstance(value, bool) != isinstance(like, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} must be a {type(like).__name__}, got {value!r}")
    return value


def _checksum(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def set_aside(folder: Path, final_name: str) -> None:
    """Rename a checkpoint that is about to be rewritten, and keep it until the new one is whole."""
    kept = folder.with_name(f".{folder.name}.old")
    if _is_whole(folder, final_name):
        shutil.rmtree(kept, ignore_errors=True)
        folder.rename(kept)
    else:
        (folder / final_name).unlink(missing_ok=True)


def drop_set_aside(output_dir: Path) -> None:
    """Delete the checkpoint that `set_aside` has kept, once the new one is whole."""
    for kept in output_dir.glob(".checkpoint-*.old"):
        shutil.rmtree(kept, ignore_errors=True)


def last_complete(output_dir: str | os.PathLike[str], final_name: str) -> str | None:
    """The newest `checkpoint-N` whose last-written file `final_name` (JSON) is whole; None if there is none.

    A process killed while saving leaves a folder without that file, or with half of it. If the same step had been saved
    before, the checkpoint kept by `set_aside` is used.
    """
    folder = Path(output_dir)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.old", path.name)
        if match:
            found.append((int(match[1] or match[2]), match[1] is not None, path))
    return next((str(path) for _, _, path in sorted(found, reverse=True) if _is_whole(path, final_name)), None)


def _is_whole(checkpoint: Path, final_name: str) -> bool:
    try:
        json.loads((checkpoint / final_name).read_text())
    except (OSError, ValueError):
        return False
    return True
