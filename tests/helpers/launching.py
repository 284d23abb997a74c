"""Scripts of these tests as processes, alone or under torchrun's launcher: forked from one that imported everything.

`python launching.py FOLDER MODULE LAUNCHES`, LAUNCHES being JSON: [[processes, script, argument, ...], ...].
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parent


def launch(folder: Path, *launches: tuple[Any, ...], shared: str = "training") -> list[tuple[int, str]]:
    """Start each (processes, script, *arguments) when the one before has ended; its exit code and what it wrote.

    One process is started as `python script` would, several as `torchrun --standalone` would. All share the import
    of the module `shared`.
    """
    environment = {"PYTHONPATH": ":".join([str(HELPERS), *sys.path]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HELPERS / "launching.py"), str(folder), shared, json.dumps(launches)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    codes = json.loads((folder / "codes.json").read_text())
    return [(code, (folder / f"launch-{number}").read_text()) for number, code in enumerate(codes)]


def run(script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(str(HELPERS / script), run_name="__main__")


def start(said: Path, processes: int, *call: str) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if processes == 1:
        run(*call)
        return
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        *(1, 1, processes),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=said.name,
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run)(*call)


def main() -> None:
    importlib.import_module(sys.argv[2])
    gc.freeze()  # Accelerate calls gc.collect when a run begins
    folder, codes = Path(sys.argv[1]), []
    for number, (processes, *call) in enumerate(json.loads(sys.argv[3])):
        process = get_context("fork").Process(target=start, args=(folder / f"launch-{number}", processes, *call))
        process.start()
        process.join()
        codes.append(process.exitcode)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
