"""Runs a list of benchmark commands, one at a time on each GPU, and goes on where it was broken off.

    python -m benchmarks.run_jobs benchmarks/jobs.txt --out runs --seconds 1500

A line of the list is `name: command`, for a shell in the repository's root; its `python -m` runs this Python. Commands
find the folder `--out` as $OUT. There NAME.log has what a job printed. NAME.done says that it ended well, and that it
is not run again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import torch

from benchmarks.results import ROOT

Jobs = SimpleQueue[tuple[str, str]]


def read_jobs(path: Path) -> dict[str, str]:
    """{name: command}, in the order of the list; blank lines and lines that begin with # say nothing."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, command = line.partition(": ")
        if not colon or not name.isidentifier() or name in found:
            raise ValueError(f"{path}: a line is `name: command`, with a name of its own, got {line!r}")
        found[name] = command
    return found


def work(gpu: int | None, jobs: Jobs, out: Path, deadline: float) -> None:
    """Run jobs until there are none, or until the deadline, which ends the one that runs."""
    environ = {**os.environ, "OUT": str(out.resolve()), "PYTHONPATH": str(ROOT)}
    if gpu is not None:
        environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    while (left := deadline - time.monotonic()) > 0:
        try:
            name, command = jobs.get_nowait()
            command = command.replace(
                "python -m", f"{shlex.quote(sys.executable)} -m"
            )  # not every machine has `python`
        except Empty:
            return
        start = time.monotonic()
        with (out / f"{name}.log").open("w") as log:
            job = subprocess.Popen(
                command, shell=True, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = f"exit status {job.wait(left)}"
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                status = f"ended at the deadline {job.wait()}"
        if job.returncode == 0:
            (out / f"{name}.done").touch()
        print(f"{name}: {status} after {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then jobs that still run are ended")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    jobs: Jobs = SimpleQueue()
    for job in read_jobs(given.list).items():
        if not (given.out / f"{job[0]}.done").exists():
            jobs.put(job)
    deadline = time.monotonic() + min(given.seconds, 1e9)
    gpus = list(range(torch.cuda.device_count())) or [None]
    workers = [Thread(target=work, args=(gpu, jobs, given.out, deadline)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
