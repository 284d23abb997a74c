"""Runs that are killed at a random moment and resumed, until they end: each has to equal the run that never stopped.

    python tests/helpers/kill_runs.py [--kills 100] [--seed N] [--every]    # not part of the test suite: some minutes

A kill is a SIGKILL after a random time, so it falls into steps, into saving and into probing. A run is killed up to
five times, resumed after each, and then left to end.
`--every` resumes from every checkpoint of a whole run of each setting as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from resume_run import SETTINGS, after, run

import geko_kernels as gk

KILLED = ("plain", "accumulate 3, max_steps", "drop_last", "workers", "persistent workers", "uniform_finish")
KILLED += ("quarantine", "spend_saved")


class Run:
    """A process that trains in `folder`, from its newest checkpoint if it has one; it shares our imports."""

    def __init__(self, folder: Path, setting: str, checkpoint: Path | None = None) -> None:
        whole = any(path.is_file() for path in folder.glob("checkpoint-*/trainer_state.json"))
        self.log = folder / "log"
        arguments = (folder, setting, str(checkpoint) if checkpoint else whole)
        self.process = get_context("fork").Process(target=self.work, args=arguments)
        self.process.start()

    def work(self, folder: Path, setting: str, resume: bool | str) -> None:
        with self.log.open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            run(str(folder), setting, resume)

    def end(self) -> int:
        """Its exit code: 0, or -9 if it was killed."""
        self.process.join()
        code = self.process.exitcode
        assert code in (0, -signal.SIGKILL), f"exit code {code}:\n{self.log.read_text()[-3000:]}"
        return code


def result_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def kill_once(folder: Path, setting: str, seconds: float) -> str | None:
    """Start or resume the run, kill it `seconds` after it began to train; what it was at, None if it ended before."""
    doing = folder / "doing"
    doing.unlink(missing_ok=True)
    started = Run(folder, setting)
    while started.process.is_alive() and not doing.exists():
        time.sleep(0.01)
    time.sleep(seconds)
    started.process.kill()
    return (doing.read_text() or "training") if started.end() == -signal.SIGKILL else None


def kills_of(setting: str, kills: int, draw: random.Random) -> Counter[str]:
    """Kill runs of `setting` so many times; each has to end as a whole one. Counts what the kills fell into."""
    tally = Counter[str]()
    with TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        begin = time.perf_counter()
        Run(whole, setting).end()
        expected, most = result_of(whole), (time.perf_counter() - begin) / 2
        while tally.total() < kills:
            folder = Path(mkdtemp(dir=name))
            for _ in range(min(kills - tally.total(), draw.randint(1, 5))):
                phase = kill_once(folder, setting, draw.uniform(0, most))
                if phase is None:
                    break
                tally[phase] += 1
            if not (folder / "summary.json").exists():
                Run(folder, setting).end()
            assert result_of(folder) == expected, f"{setting} differs after {dict(tally)}"
    return tally


def resume_everywhere(setting: str) -> int:
    """Resume from every checkpoint of a whole run; how many there were."""
    with TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        Run(whole, setting).end()
        expected, checkpoints = result_of(whole), sorted(whole.glob("checkpoint-*"))
        for checkpoint in checkpoints:
            step = int(checkpoint.name.split("-")[1])
            Run(Path(name), setting, checkpoint).end()
            assert after(result_of(Path(name)), step) == after(expected, step), f"{setting}: from step {step}"
        return len(checkpoints)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--every", action="store_true")
    given = parser.parse_args()
    _ = gk.GEKOTrainer  # imported here, and not by each run
    draw, total = random.Random(given.seed), Counter[str]()
    print("seed", given.seed, flush=True)
    for number, setting in enumerate(KILLED):
        share = given.kills // len(KILLED) + (number < given.kills % len(KILLED))
        tally = kills_of(setting, share, draw)
        total += tally
        print(f"{setting}: killed {dict(tally)}, each run ended as the whole one", flush=True)
    print(f"{total.total()} kills: {dict(total)}")
    for setting in SETTINGS if given.every else ():
        print(setting, resume_everywhere(setting), "checkpoints resumed", flush=True)


if __name__ == "__main__":
    main()
