"""Files written whole or not at all, and tensor files with a checksum."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "2"  # of a checkpoint's files except the state's; files of the first layout have none
_UNREADABLE = (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError, KeyError)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` write a file beside `path`, then move it there, with the mode that the umask gives.

    If it fails, or the process is killed meanwhile, the old file is still whole. An error leaves no temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # save_file lets only the owner read its file
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `ValueError` names a file that is truncated or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it must hold an object, got {type(values).__name__}")
    return values


def save_tensors(
    path: str | os.PathLike[str],
    layout: str,
    columns: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    version: str = VERSION,
) -> None:
    """Write `columns` to a safetensors file with a version and a checksum of its contents."""
    held = {name: column.detach().cpu().contiguous() for name, column in columns.items()}
    described = {**metadata, "format": layout, "version": version}
    described["crc32"] = _checksum(held, described)
    write_whole(path, lambda temporary: save_file(held, temporary, described))


def load_tensors(
    path: str | os.PathLike[str], layout: str, writer: str, version: str = VERSION, earlier: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(columns, metadata) that `save_tensors` wrote; metadata has no "version" in files of the first layout.

    Args: writer: named in errors; version, earlier: the versions that the caller can read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of a newer version, or not a file that `writer` wrote; names the file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except _UNREADABLE as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if metadata.get("format") != layout:
        raise ValueError(f"{path} is a safetensors file, but not one that {writer} wrote")
    if "version" not in metadata:
        if "crc32" in metadata:  # the first layout had neither
            raise ValueError(f"{path} is damaged: it has a checksum but no version; take another copy of it")
        return columns, metadata
    if metadata["version"] not in (version, *earlier):
        known = " and ".join((*earlier, version))
        raise ValueError(
            f"{path} has version {metadata['version']}, this geko_kernels reads {known}; update geko_kernels"
        )
    if metadata.pop("crc32", None) != _checksum(columns, metadata):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum; take another copy of it")
    return columns, metadata


def _checksum(columns: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of the metadata and of the columns' names, dtypes, shapes and bytes, in order of name."""
    names = sorted(columns)
    described = [(name, str(columns[name].dtype), list(columns[name].shape)) for name in names]
    crc = zlib.crc32(json.dumps([sorted(metadata.items()), described]).encode())
    for name in names:
        if columns[name].numel():
            crc = zlib.crc32(columns[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
