"""The plain loop and the demo run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("options", "told"), [((), "none of the 77 wrong labels"), (("--clean",), "suspects 0 of 256")]
)
def test_demo_prints_both_arms_and_draws(tmp_path, options, told):
    pytest.importorskip("transformers")
    output = run_example("examples/demo.py", "--smoke", *options, "--out", str(tmp_path))
    for row in ("held-out accuracy", "seconds of training", told):
        assert row in output
    assert re.search(r"samples backpropagated\W+2560\W+25\d\d\W", output)  # 10 epochs of 256 each
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert "</html>" in (tmp_path / "report.html").read_text()
