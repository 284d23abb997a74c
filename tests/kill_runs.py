"""Runs that are killed at a random moment and resumed, until they end: each has to equal the run that never stopped.

    python tests/kill_runs.py [--kills 100] [--seed N] [--every]    # not part of the test suite: some minutes

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
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from resume_run import SETTINGS, after

SCRIPT = Path(__file__).with_name("resume_run.py")
KILLED = ("plain", "accumulate 3, max_steps", "drop_last", "workers", "persistent workers", "uniform_finish")
KILLED += ("quarantine", "spend_saved")


def start(folder: Path, setting: str, *extra: str) -> subprocess.Popen:
    paths = [str(SCRIPT.parent), str(SCRIPT.parents[1]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(SCRIPT), str(folder), "--setting", setting, *extra]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> int:
    _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(errors.decode()[-2000:])
    return process.returncode


def result_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def has_checkpoint(folder: Path) -> bool:
    return any(path.is_file() for path in folder.glob("checkpoint-*/trainer_state.json"))


def kill_once(folder: Path, setting: str, seconds: float) -> str | None:
    """Start or resume the run, kill it `seconds` after it began to train; what it was at, None if it ended before."""
    doing = folder / "doing"
    doing.unlink(missing_ok=True)
    process = start(folder, setting, *(["--resume"] if has_checkpoint(folder) else []))
    while process.poll() is None and not doing.exists():
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    return doing.read_text() if finish(process) == -signal.SIGKILL else None


def kills_of(setting: str, kills: int, draw: random.Random) -> Counter[str]:
    """Kill runs of `setting` so many times; each has to end as a whole one. Counts what the kills fell into."""
    tally = Counter[str]()
    with TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        begin = time.perf_counter()
        finish(start(whole, setting))
        expected, most = result_of(whole), (time.perf_counter() - begin) / 4
        while tally.total() < kills:
            folder = Path(name, str(tally.total()))
            folder.mkdir()
            for _ in range(min(kills - tally.total(), draw.randint(1, 5))):
                phase = kill_once(folder, setting, draw.uniform(0, most))
                if phase is None:
                    break
                tally[phase] += 1
            if not (folder / "summary.json").exists():
                finish(start(folder, setting, *(["--resume"] if has_checkpoint(folder) else [])))
            assert result_of(folder) == expected, f"{setting} differs after {dict(tally)}"
    return tally


def resume_everywhere(setting: str) -> int:
    """Resume from every checkpoint of a whole run; how many there were."""
    with TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        finish(start(whole, setting))
        expected, checkpoints = result_of(whole), sorted(whole.glob("checkpoint-*"))
        for checkpoint in checkpoints:
            step = int(checkpoint.name.split("-")[1])
            finish(start(Path(name), setting, "--from", str(checkpoint)))
            assert after(result_of(Path(name)), step) == after(expected, step), f"{setting}: from step {step}"
        return len(checkpoints)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--every", action="store_true")
    given = parser.parse_args()
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
