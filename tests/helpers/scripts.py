"""Scripts that run one after another in one process, as most of the time of each is that of its imports."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABORTED = "terminate called without an active exception"  # gloo's threads, now and then, as an interpreter shuts down


def run_scripts(folder: Path, commands: Sequence[Sequence[object]], launcher: Sequence[str] = ()) -> list[str]:
    """What each of `commands`, a script of this repository with its arguments, prints in all processes.

    They must end well. `launcher` is what stands between the interpreter and the script, as `-m torch.distributed.run`.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    told = folder / "told"
    wanted = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, *launcher, __file__, str(told), wanted]
    for _ in range(2):
        told.mkdir()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        printed = ["".join(path.read_text() for path in sorted(told.glob(f"{i}_*"))) for i in range(len(commands))]
        if ABORTED not in done.stderr:
            break
        told.rename(folder / "aborted")
    assert done.returncode == 0, done.stderr
    return printed


def main() -> None:
    told, commands = sys.argv[1:]
    for i, (script, *arguments) in enumerate(json.loads(commands)):
        path = ROOT / script
        sys.argv, sys.path[0] = [str(path), *arguments], str(path.parent)
        output = Path(told) / f"{i}_{os.environ.get('RANK', 0)}"
        with output.open("w") as file, contextlib.redirect_stdout(file):
            runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
