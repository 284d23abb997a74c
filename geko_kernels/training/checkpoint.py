"""GEKO's files in a checkpoint folder: the learning state, the sampler, and the counts of the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geko_kernels.state import SampleState
from geko_kernels.training.efficiency import write_json

STATE_NAME = "geko_state.safetensors"
SAMPLER_NAME = "geko_sampler.safetensors"
EFFICIENCY_NAME = "geko_efficiency.json"
_FORMAT = "geko_kernels.GEKOSampler"


def save_files(
    folder: str | os.PathLike[str], state: SampleState, sampler: dict[str, Any], efficiency: dict[str, Any]
) -> None:
    """Write the three files, each of them whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state.save(folder / STATE_NAME)
    write_json(folder / EFFICIENCY_NAME, efficiency)
    columns = {name: value.cpu().contiguous() for name, value in sampler.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in sampler.items() if not isinstance(value, Tensor)}
    temporary = folder / f".{SAMPLER_NAME}.{uuid.uuid4().hex}.tmp"
    try:
        save_file(columns, temporary, {"format": _FORMAT, "rest": json.dumps(rest, allow_nan=False)})
        os.replace(temporary, folder / SAMPLER_NAME)
    finally:
        temporary.unlink(missing_ok=True)


def load_files(
    folder: str | os.PathLike[str], num_samples: int, device: torch.device
) -> tuple[SampleState, dict[str, Any], dict[str, Any]]:
    """(state, sampler's values, efficiency's values) of a checkpoint.

    Raises:
        ValueError: not a checkpoint of GEKOTrainer, a damaged file, or the state of another dataset.
    """
    folder = Path(folder)
    missing = [name for name in (STATE_NAME, SAMPLER_NAME, EFFICIENCY_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} cannot be resumed by GEKOTrainer: it has no {', '.join(missing)}")
    state = SampleState.load(folder / STATE_NAME, device)
    if len(state) != num_samples:
        raise ValueError(
            f"{folder} holds the learning state of {len(state)} samples, but train_dataset has {num_samples}: resume "
            "with the dataset that the run was started with"
        )
    try:
        with safe_open(folder / SAMPLER_NAME, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            sampler: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{folder / SAMPLER_NAME} is truncated or not a safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{folder / SAMPLER_NAME} is a safetensors file, but not one that GEKOTrainer wrote")
    return state, {**sampler, **json.loads(metadata["rest"])}, json.loads((folder / EFFICIENCY_NAME).read_text())


def set_aside(folder: Path, final_name: str) -> None:
    """Rename a checkpoint that is about to be written again: it lasts until the new one is whole."""
    kept = folder.with_name(f".{folder.name}.old")
    if _is_whole(folder, final_name):
        shutil.rmtree(kept, ignore_errors=True)
        folder.rename(kept)
    else:
        (folder / final_name).unlink(missing_ok=True)


def drop_set_aside(output_dir: Path) -> None:
    """A new checkpoint is whole: what `set_aside` has kept is no longer needed."""
    for kept in output_dir.glob(".checkpoint-*.old"):
        shutil.rmtree(kept, ignore_errors=True)


def last_complete(output_dir: str | os.PathLike[str], final_name: str) -> str | None:
    """The newest `checkpoint-N` whose last-written file `final_name` (JSON) is whole; None if there is none.

    A process killed while it saves leaves a folder without that file, or with half of it; if that was a step that had
    been saved before, what `set_aside` kept of it is taken.
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
