"""Runs that stop early: Ctrl-C, a full disk, a wrong checkpoint to go on from, the report of what there is."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from command import WORDS, one_cpu, refusal, refused, train, write_jsonl
from transformers import AutoModelForCausalLM, Trainer

from geko_kernels.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", [{"text": word} for word in WORDS * 2])


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """Two epochs of two steps."""
    output = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, one_cpu(patch):
        assert train(model, data, output) == 0
    return output


@pytest.fixture
def unfinished(finished, tmp_path):
    """Killed after the checkpoint of the first epoch."""
    folder = tmp_path / "unfinished"
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    (folder / "checkpoint-4").mkdir()
    return folder


class TestInterrupt:
    def interrupted_at(self, monkeypatch, capsys, step, *arguments):
        """Ctrl-C in that call of `training_step`; the last line told."""
        before, calls = Trainer.training_step, []

        def training_step(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == step:
                raise KeyboardInterrupt
            return before(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)
        assert train(*arguments) == 130
        monkeypatch.setattr(Trainer, "training_step", before)
        return capsys.readouterr().err.splitlines()[-1]

    def test_before_a_checkpoint(self, model, data, tmp_path, monkeypatch, capsys):
        told = self.interrupted_at(monkeypatch, capsys, 1, model, data, tmp_path / "run")
        no_checkpoint = "no checkpoint has been written, so the same command starts from the beginning"
        assert told == f"geko_kernels train: interrupted; {no_checkpoint}"
        assert train(model, data, tmp_path / "run") == 0

    def test_after_a_checkpoint(self, model, data, finished, tmp_path, monkeypatch, capsys):
        output = tmp_path / "run"
        told = self.interrupted_at(monkeypatch, capsys, 4, model, data, output)
        go_on = f"the same command with --resume continues from {output}/checkpoint-2"
        assert told == f"geko_kernels train: interrupted; {go_on}"
        assert train(model, data, output, "--resume") == 0
        assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()

    def test_signal(self, model, data, tmp_path):
        """As the terminal sends it, to the command itself."""
        output = tmp_path / "run"
        options = {"--model": model, "--data": data, "--output-dir": output, "--batch-size": 8, "--epochs": 1000}
        command = ["train", *(str(part) for option in options.items() for part in option)]
        with open(tmp_path / "told", "wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "geko_kernels", *command],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                cwd=Path(__file__).parents[2],
                stdout=subprocess.DEVNULL,
                stderr=told,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `nohup pytest &` ignores it
            )
            try:
                until = time.monotonic() + 120
                while not (output / "checkpoint-2" / "trainer_state.json").exists() and time.monotonic() < until:
                    time.sleep(0.2)
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
            finally:
                process.kill()
        lines = (tmp_path / "told").read_text().splitlines()
        assert "interrupted; the same command with --resume continues from" in lines[-1]
        assert "Traceback" not in "\n".join(lines)


class TestDisk:
    @pytest.mark.parametrize("room", [5_000, 100_000, 200_000])
    def test_no_room(self, model, data, tmp_path, capsys, room):
        """Files of at most `room` bytes: GEKO's own, the model's or the optimizer's do not fit."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            told = refusal(capsys, tmp_path, "--epochs", "1", model=model, data=data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"cannot write to {tmp_path}/run (" in told and ("File too large" in told or room == 200_000)
        assert told.endswith(
            "free some space; no checkpoint has been written, so the same command starts from the beginning"
        )

    def test_no_permission(self, model, data, tmp_path, monkeypatch, capsys):
        def denied(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied", "run/checkpoint-1")

        monkeypatch.setattr(Trainer, "training_step", denied)
        told = refusal(capsys, tmp_path, model=model, data=data)
        assert told.startswith(f"cannot write to {tmp_path}/run ([Errno 13] Permission denied: 'run/checkpoint-1')")
        assert "): give another --output-dir, or allow writing there; no checkpoint has been written" in told

    def test_no_memory(self, model, data, tmp_path, monkeypatch, capsys):
        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(Trainer, "training_step", full)
        told = refusal(capsys, tmp_path, model=model, data=data)
        assert told.startswith("the GPU's memory is full (CUDA out of memory.): lower --batch-size")

    def test_our_own_errors_keep_their_traceback(self, model, data, tmp_path, monkeypatch):
        def wrong(*args, **kwargs):
            raise ValueError("a fault of ours")

        monkeypatch.setattr(Trainer, "training_step", wrong)
        with pytest.raises(ValueError, match="a fault of ours"):
            train(model, data, tmp_path / "run")


class TestResume:
    def test_not_a_checkpoint(self, model, data, finished, tmp_path, capsys):
        told = refusal(capsys, tmp_path, "--resume", str(tmp_path), model=model, data=data)
        assert told.endswith("is not a whole checkpoint: it has no trainer_state.json; give a checkpoint-N directory")
        told = refusal(capsys, tmp_path, "--resume", str(finished), model=model, data=data)
        assert told.endswith(f"it has no trainer_state.json; give {finished}/checkpoint-4")
        plain = tmp_path / "checkpoint-1"
        plain.mkdir()
        (plain / "trainer_state.json").write_text("{}")
        told = refusal(capsys, tmp_path, "--resume", str(plain), model=model, data=data)
        assert f"{plain} cannot be resumed by GEKOTrainer: it has no geko_state.safetensors" in told

    def test_of_another_dataset_size(self, model, unfinished, tmp_path, capsys):
        data = write_jsonl(tmp_path / "data.jsonl", [{"text": word} for word in WORDS])
        told = refusal(capsys, tmp_path, "--resume", model=model, data=data, output=unfinished)
        assert "checkpoint-2 holds the learning state of 16 samples, but train_dataset has 8" in told

    def test_of_another_task(self, model, unfinished, tmp_path, capsys):
        data = write_jsonl(tmp_path / "data.jsonl", [{"text": word, "label": word} for word in WORDS * 2])
        told = refusal(capsys, tmp_path, "--resume", model=model, data=data, output=unfinished)
        assert told == (
            f"--resume: {unfinished}/checkpoint-2 is of a LlamaForCausalLM, but this run trains a "
            "LlamaForSequenceClassification"
        )

    def test_of_other_classes(self, model, tmp_path, capsys):
        for names in (("a", "b"), ("a", "c")):
            write_jsonl(
                tmp_path / f"{names[1]}.jsonl", [{"text": w, "label": names[i % 2]} for i, w in enumerate(WORDS)]
            )
        assert train(model, tmp_path / "b.jsonl", tmp_path / "run", "--epochs", "1") == 0
        told = refusal(capsys, tmp_path, "--resume", model=model, data=tmp_path / "c.jsonl")
        assert "checkpoint-1 has the classes a, b, but --data has a, c" in told

    def test_of_another_model(self, model, data, unfinished, tmp_path, capsys):
        other = tmp_path / "model"
        shutil.copytree(model, other)
        config = AutoModelForCausalLM.from_pretrained(model).config
        config.hidden_size = 16
        AutoModelForCausalLM.from_config(config).save_pretrained(other)
        told = refusal(capsys, tmp_path, "--resume", model=other, data=data, output=unfinished)
        assert (
            "checkpoint-2 is of another model than --model: lm_head.weight is [258, 32] there and [258, 16] here"
            in told
        )

    def test_damaged_weights(self, model, data, unfinished, tmp_path, capsys):
        (unfinished / "checkpoint-2" / "model.safetensors").write_bytes(b"\x7f" * 100)
        told = refusal(capsys, tmp_path, "--resume", model=model, data=data, output=unfinished)
        assert told.startswith(f"--resume: {unfinished}/checkpoint-2") and "header too large" in told


class TestReport:
    def test_of_the_newest_checkpoint(self, finished, unfinished, capsys):
        assert main(["report", str(unfinished)]) == 0
        assert "the run has not ended; the figures are those of checkpoint-2\n" in capsys.readouterr().out
        page = (unfinished / "report.html").read_text()
        assert "these are the figures of its newest checkpoint, checkpoint-2" in page and "16 training samples" in page
        assert "16</b><span>samples trained, of 16 in the standard run" in page

    def test_of_a_run_that_went_on_after_its_end(self, finished, unfinished, capsys):
        shutil.copy(finished / "geko_report.json", unfinished)
        assert main(["report", str(unfinished)]) == 0
        assert "has not ended" not in capsys.readouterr().out
        (unfinished / "checkpoint-2").rename(unfinished / "checkpoint-6")
        assert main(["report", str(unfinished)]) == 0
        assert "the figures are those of checkpoint-6" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "path, value, message",
        [
            (("efficiency", "seconds"), 3, "efficiency.seconds is int"),
            (("efficiency", "epochs", 0, "buckets"), {}, "efficiency.epochs[0].buckets lacks FREEZE"),
            (("most_forgotten",), [1], "most_forgotten[0] is int"),
            (("num_samples",), "many", "num_samples is str"),
            (("log_history",), [{"geko/loss": 1}], "log_history[0] lacks epoch"),
        ],
    )
    def test_damaged_figures(self, finished, tmp_path, capsys, path, value, message):
        run = json.loads((finished / "geko_report.json").read_text())
        inner = run
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (tmp_path / "geko_report.json").write_text(json.dumps(run))
        told = refused(capsys, "report", str(tmp_path))
        assert told == f"geko_kernels report: {tmp_path}/geko_report.json is damaged: {message}\n"

    def test_a_page_that_cannot_be_written(self, finished, tmp_path, capsys):
        shutil.copy(finished / "geko_report.json", tmp_path)
        (tmp_path / "report.html").mkdir()
        told = refused(capsys, "report", str(tmp_path))
        assert told.startswith(f"geko_kernels report: cannot make the report of {tmp_path} ([Errno 21] Is a directory")
        assert told.endswith("reads and writes files there; allow that, or give a copy of the folder\n")

    def test_nothing_to_report(self, tmp_path, capsys):
        for text, message in (
            ("[" * 100_000, "not JSON"),
            ("[1]", "must hold an object, got list"),
            ("\0", "not JSON"),
        ):
            (tmp_path / "geko_report.json").write_text(text)
            assert message in refused(capsys, "report", str(tmp_path))
        told = refused(capsys, "report", str(tmp_path / "geko_report.json"))
        assert "no geko_report.json and no whole checkpoint in" in told
        assert "no geko_report.json" in refused(capsys, "report", "a\0")
