"""The examples on Transformers, TRL and Accelerate run as their docstrings say, on a tiny random model."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from scripts import ROOT, run_scripts
from tiny_model import save_tiny_model

EXAMPLES = ROOT / "examples"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(folder, names, launcher=()):
    """By name, the output directory of each example and what it printed."""
    model = save_tiny_model(folder / "tiny")
    settings = ("--model", model, "--samples", "32", "--epochs", "2", "--output-dir")
    commands = [[f"examples/{name}.py", *settings, folder / name] for name in names]
    printed = run_scripts(folder, commands, launcher)
    assert all((folder / name / "model.safetensors").exists() for name in names)
    return {name: (folder / name, output) for name, output in zip(names, printed, strict=True)}


def test_accelerate_loop_and_trl_sft(tmp_path):
    pytest.importorskip("accelerate")
    with_trl = importlib.util.find_spec("trl") is not None
    done = run(tmp_path, ["accelerate_loop", "trl_sft"] if with_trl else ["accelerate_loop"])
    assert "epoch 2: plan of 32 rows" in done["accelerate_loop"][1]
    if not with_trl:
        pytest.skip("trl is missing")
    output = done["trl_sft"][1]
    assert "64 of 64 samples trained; buckets after the last epoch:" in output
    assert output.count("eval_loss") == 2


def test_accelerate_loop_and_trainer_on_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    done = run(tmp_path, ["accelerate_loop", "trainer"], TWO_PROCESSES)
    folder, output = done["accelerate_loop"]
    assert output.count("epoch 2: plan of 32 rows") == 1
    work = json.loads((folder / "geko_report.json").read_text())["efficiency"]
    assert work["samples_backward"] == work["samples_standard"] == 64 and work["samples_uncounted"] == 0
    assert [epoch["steps"] for epoch in work["epochs"]] == [2, 2]  # 32 samples, 8 a process
    assert (folder / "report.html").exists()
    folder, output = done["trainer"]
    assert output.count("a standard run 64") == 1 and (folder / "report.html").exists()


def test_lightning_loop_goes_on_exactly(tmp_path):
    """The plan and the weights of a run stopped after four epochs and resumed are those of the whole one."""
    pytest.importorskip("lightning", reason="pip install lightning")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = ":".join([str(ROOT), *sys.path])

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
