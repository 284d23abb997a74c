"""The examples on Transformers, TRL and Accelerate run as their docstrings say, on a tiny random model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = ("--samples", "32", "--epochs", "2")
ABORTED = "terminate called without an active exception"  # gloo's threads, now and then, as an interpreter shuts down
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(model, output, script, launcher=()):
    """Standard output of `script`, which must end well."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    command = [sys.executable, *launcher, str(EXAMPLES / script), "--model", str(model), "--output-dir", str(output)]
    for _ in range(2):
        done = subprocess.run([*command, *SETTINGS], env=environment, capture_output=True, text=True, timeout=300)
        if ABORTED not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors").exists()
    return done.stdout


def test_trainer_on_two_processes(model, tmp_path):
    pytest.importorskip("matplotlib")
    output = run(model, tmp_path / "run", "trainer.py", TWO_PROCESSES)
    assert output.count("a standard run 64") == 1 and (tmp_path / "run" / "report.html").exists()


def test_accelerate_loop(model, tmp_path):
    pytest.importorskip("accelerate")
    output = run(model, tmp_path / "run", "accelerate_loop.py")
    assert "epoch 2: plan of 32 rows" in output


def test_accelerate_loop_on_two_processes(model, tmp_path):
    pytest.importorskip("accelerate")
    output = run(model, tmp_path / "run", "accelerate_loop.py", TWO_PROCESSES)
    assert output.count("epoch 2: plan of 32 rows") == 1
    work = json.loads((tmp_path / "run" / "geko_report.json").read_text())["efficiency"]
    assert work["samples_backward"] == work["samples_standard"] == 64 and work["samples_uncounted"] == 0
    assert [epoch["steps"] for epoch in work["epochs"]] == [2, 2]  # 32 samples, 8 a process
    assert (tmp_path / "run" / "report.html").exists()


def test_trl_sft(model, tmp_path):
    pytest.importorskip("trl")
    output = run(model, tmp_path / "run", "trl_sft.py")
    assert "64 of 64 samples trained; buckets after the last epoch:" in output
    assert output.count("eval_loss") == 2


def test_lightning_loop_goes_on_exactly(tmp_path):
    """The plan and the weights of a run stopped after four epochs and resumed are those of the whole one."""
    pytest.importorskip("lightning", reason="pip install lightning")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = ":".join([str(EXAMPLES.parent), *sys.path])

    def run(folder, *arguments):
        command = [
            sys.executable,
            str(EXAMPLES / "lightning_loop.py"),
            "--output-dir",
            str(tmp_path / folder),
            *arguments,
        ]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / folder / "report.html").exists()
        return re.search(r"trained (\d+) samples of 16000, accuracy (0.9\d+)", done.stdout).groups()

    whole = run("whole")
    run("half", "--stop-after", "4")
    assert run("resumed", "--resume", str(tmp_path / "half" / "last.ckpt")) == whole
    assert int(whole[0]) < 12000
    run("two", "--processes", "2")
