"""Weak scaling: `GEKOTrainer` beside `transformers.Trainer` under torchrun, DDP and FSDP2, constant batch per GPU.

`python -m benchmarks.training.scaling` on a host with one or more GPUs (about 8 minutes for one, two and four): random
Llamas of SmolLM2-135M's size (compiled by regions) and of about 1B parameters in bf16, fixed-length samples.
GEKOTrainer runs with all weights 1, so every run is the same work; both arms take turns in the same processes
(`scaling_run.py`). What it takes to synchronise the learning state of 10 million samples, to draw their plans and to
probe is measured apart. Launches that fit run at the same time, each on GPUs of its own. Rows go to
results/scaling.jsonl; exits with 1 if a launch failed. `--cpu` tries it out with gloo and tiny sizes, and writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.results import RESULTS, ROOT, Row, append, environment
from benchmarks.training.scaling_rows import targets, with_ratios

KINDS = ("ddp", "fsdp2")
LIMIT_S = 180  # of a launch: a hang must not cost the rest


class Launch(NamedTuple):
    model: str
    gpus: int
    kind: str

    def __str__(self) -> str:
        return f"{self.model}, {self.gpus} GPU{'s' if self.gpus > 1 else ''}, {self.kind}"


def stages(models: list[str], gpus: list[int], kinds: list[str], there: int) -> Iterator[list[Launch]]:
    """Launches that run at the same time, on `there` GPUs; one GPU has nothing to shard or to reduce."""
    for count in gpus:
        launches = [Launch(model, count, kind) for model in models for kind in (kinds if count > 1 else ("single",))]
        at_once = max(there // count, 1)
        for first in range(0, len(launches), at_once):
            yield launches[first : first + at_once]


def start(launch: Launch, gpus: str, out: Path, cpu: bool) -> subprocess.Popen:
    """`gpus` are those that the launch sees, as CUDA_VISIBLE_DEVICES has them."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launch.gpus)]
    script = str(Path(__file__).with_name("scaling_run.py"))
    command = [sys.executable, *(torchrun if launch.gpus > 1 else []), script, launch.model, launch.kind, str(out)]
    environ = {**os.environ, "NCCL_NVLS_ENABLE": "0", "PYTHONPATH": str(ROOT)}  # without NVLink multicast
    environ["CUDA_VISIBLE_DEVICES"] = gpus
    with (out / "log.txt").open("w") as log:
        return subprocess.Popen(
            [*command, *(["--cpu"] if cpu else [])], stdout=subprocess.DEVNULL, stderr=log, env=environ
        )


def finish(process: subprocess.Popen, out: Path, deadline: float) -> tuple[dict[str, Row], str]:
    """The arms' rows, as far as the launch came, and why it failed, or ""."""
    try:
        code = process.wait(max(deadline - time.monotonic(), 0))
        reason = f"exit status {code}\n{(out / 'log.txt').read_text()[-4000:]}" if code else ""
    except subprocess.TimeoutExpired:
        reason = f"longer than {LIMIT_S} s\n{(out / 'log.txt').read_text()[-4000:]}"
        process.terminate()  # torchrun ends its processes, which are in sessions of their own
        process.wait()
    rows = out / "rows.json"
    return json.loads(rows.read_text()) if rows.exists() else {}, reason


def run(stage: list[Launch], gpus: list[str], cpu: bool) -> Iterator[tuple[Launch, dict[str, Row], str]]:
    """The launches of a stage at the same time, each with its arms' rows and why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(place) for place in range(len(stage))]
        for out in outs:
            out.mkdir()
        first, processes = 0, []
        for launch, out in zip(stage, outs, strict=True):
            processes.append(start(launch, ",".join(gpus[first : first + launch.gpus]), out, cpu))
            first += launch.gpus
        deadline = time.monotonic() + LIMIT_S
        for launch, process, out in zip(stage, processes, outs, strict=True):
            yield launch, *finish(process, out, deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, help="default: 1, 2, 4, ... as many as there are")
    parser.add_argument("--models", nargs="+", choices=("135M", "1B", "tiny"))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what the rows name as the commit, where there is no git")
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU, tiny sizes; nothing is written")
    given = parser.parse_args()
    there = 2 if given.cpu else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))
    counts = given.gpus or [count for count in (1, 2, 4, 8) if count <= there]
    models = given.models or (["tiny"] if given.cpu else ["135M", "1B"])
    packages = {name: version(name) for name in ("transformers", "accelerate")}
    device = torch.device("cpu" if given.cpu else "cuda")
    shared = {**environment(device, given.commit), **packages, "command": " ".join(sys.argv)}
    rows: list[Row] = []
    failed = False
    for stage in stages(models, counts, given.kinds, there):
        begin = time.monotonic()
        for launch, arms, reason in run(stage, [] if given.cpu else visible.split(","), given.cpu):
            print(f"{launch}: {time.monotonic() - begin:.0f} s", flush=True)
            if reason:
                failed = True
                print(f"FAILED  {launch}: {reason}", flush=True)
            rows += [{**launch._asdict(), "arm": arm, **row} for arm, row in arms.items()]
            rows = with_ratios(rows)
            for row in rows[len(rows) - len(arms) :]:
                figures = ("step_ms", "tokens_per_second", "efficiency", "of_standard", "probe_share")
                print(row["arm"], {key: float(f"{row[key]:.5g}") for key in figures if row.get(key)}, flush=True)
                if not given.cpu:
                    append(given.results / "scaling.jsonl", {**row, **shared})
    print(*targets(rows), sep="\n")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
