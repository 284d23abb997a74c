"""The files of a run that finds its own length: the kept weights in its folder, the exact run in a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from geko_kernels._files import load_tensors, save_tensors, write_whole
from geko_kernels.training.stopping.average import WeightAverage

_FORMAT = "geko_kernels.WeightAverage"
RAW, AVERAGE, KEPT = "geko_raw", "geko_average", "geko_kept"


def path_of(folder: str | os.PathLike[str], name: str, shard: int | None) -> Path:
    """The path of a file; with a sharded model every process has its own."""
    return Path(folder) / f"{name}{'' if shard is None else f'-{shard}'}.safetensors"


def is_of_auto_stop(checkpoint: str | os.PathLike[str]) -> bool:
    return any(file for name in (AVERAGE, RAW) for file in Path(checkpoint).glob(f"{name}*.safetensors"))


def save_values(path: Path, average: WeightAverage) -> None:
    """Write only the averaged weights: the point that is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, _FORMAT, dict(zip(average.names, average.values, strict=True)), {})


def load_values(path: Path, average: WeightAverage) -> list[Tensor]:
    columns, _ = load_tensors(path, _FORMAT, "GEKOTrainer")
    return [columns[name] for name in average.names]


def save_run(folder: Path, shard: int | None, average: WeightAverage | None, rest: dict[str, Any], kept: Path) -> None:
    """Write into a checkpoint: the raw weights, the average, the rule's state, and the kept weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if average is not None:
        save_tensors(path_of(folder, RAW, shard), _FORMAT, average.own(), {})
        if kept.is_file():
            copy(kept, path_of(folder, KEPT, shard))
    columns = {} if average is None else average.state_dict()
    save_tensors(path_of(folder, AVERAGE, shard), _FORMAT, columns, {"rest": json.dumps(rest)})


def load_run(folder: Path, shard: int | None, average: WeightAverage, kept: Path | None) -> dict[str, Any]:
    """Load what `save_run` wrote into the model, `average`, and the file `kept`, if any; returns `rest`.

    Raises:
        ValueError: a file is missing, damaged, or of other parameters; names it.
    """
    path = _present(folder, AVERAGE, shard)
    columns, about = load_tensors(path, _FORMAT, "GEKOTrainer")
    rest = json.loads(about["rest"])
    if rest["by_heart"]:
        return rest
    average.load_state_dict(columns)
    average.copy_to_model(load_values(_present(folder, RAW, shard), average))
    if rest["rule"].get("kept") is not None:
        source = _present(folder, KEPT, shard)
        if kept is not None:
            copy(source, kept)
    return rest


def _present(folder: Path, name: str, shard: int | None) -> Path:
    path = path_of(folder, name, shard)
    if not path.is_file():
        then = "take another, whole copy of the checkpoint"
        if shard is not None:
            then = f"resume a sharded run with the same number of processes and the same sharding; else {then}"
        raise ValueError(f"{folder} has no {path.name}: with auto_stop {then}")
    return path


def copy(source: Path, target: Path) -> None:
    """A hard link if the disk supports it, else a copy; these files are replaced, never written into."""

    def link(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, link)
