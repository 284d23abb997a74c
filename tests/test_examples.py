"""The plain loop and the demo run as a user runs them; a demo arm that has frozen everything only re-checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import geko_kernels as gk

ROOT = Path(__file__).parent.parent


def run_example(*arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_loop_learns_and_skips():
    output = run_example("examples/plain_loop.py")
    trained = [int(n) for n in re.findall(r"trained on (\d+) samples", output)]
    assert trained[0] == 2000
    assert trained[-3] < 1000
    assert float(output.split()[-1]) > 0.95


def test_demo_prints_both_arms_and_draws(tmp_path):
    pytest.importorskip("transformers")
    output = run_example("examples/demo.py", "--smoke", "--plot", str(tmp_path / "demo.png"))
    for row in ("held-out accuracy", "held-out loss", "seconds of training"):
        assert row in output
    assert re.search(r"samples backpropagated\W+384\W+384\W", output)  # 6 epochs of 64; a random model freezes nothing
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_a_frozen_demo_arm_is_only_rechecked(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo_training import EPOCHS, Arm, Data
    from glosses import frozen_states, load_glosses
    from rich.progress import Progress
    from smollm2 import Prefix, Tail, tiny_llama

    model, encode = tiny_llama()
    glosses = load_glosses("train", encode, torch.device("cpu"), 8)
    data = Data(glosses, frozen_states(Prefix(model, 7), glosses))
    at_once = gk.GEKOConfig(freeze_confidence=1e-5, focus_confidence=1e-6, correct_loss=100)
    arm = Arm("GEKO", Tail(model, 7), gk.SampleState(8, at_once))
    progress = Progress(disable=True)
    for _ in range(EPOCHS):
        arm.train_epoch(data, data, progress, progress.add_task("GEKO", buckets=""))
    assert arm.backpropagated == 8  # the first epoch, in which no sample has been seen
    assert arm.forwarded == 8 + (EPOCHS - 1) // 2 * 8
    assert arm.epochs[-1].buckets == [8, 0, 0, 0]
