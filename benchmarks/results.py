"""Rows of measurements as JSON lines, each with the machine and the commit it came from."""

from __future__ import annotations

import gzip
import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device, commit: str | None = None) -> Row:
    """The keys `gpu, torch, triton, commit, date` that all rows of a run share; `gpu` names the CPU on a CPU run."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu: {_cpu_model()}, {torch.get_num_threads()} threads"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"gpu": name, "torch": torch.__version__, "triton": triton, "commit": commit or _commit(), "date": date}


def append(path: Path, row: Row) -> None:
    """Add `row` as one line, at once: a run that is cut short leaves what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open(path, "at") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a file, oldest first."""
    with _open(path, "rt") as file:
        return [json.loads(line) for line in file]


def _open(path: Path, mode: str) -> IO[str]:
    """A file of rows, packed where its name ends in .gz."""
    return gzip.open(path, mode) if path.suffix == ".gz" else path.open(mode)


def runs(path: Path) -> list[list[Row]]:
    """The rows of each run (one date on one machine), oldest first."""
    by_run: dict[tuple[str, str], list[Row]] = {}
    for row in read(path):
        by_run.setdefault((row["date"], row["gpu"]), []).append(row)
    return [by_run[key] for key in sorted(by_run)]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
