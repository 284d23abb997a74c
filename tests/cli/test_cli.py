"""`python -m geko_kernels`: env, train and report, and what they say to wrong input."""

import json
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from command import WORDS, refused, train, write_jsonl
from transformers import AutoModelForSequenceClassification

from geko_kernels import ops
from geko_kernels.cli import main


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [
        {"prompt": f"{word} is a", "completion": " colour" if i % 8 < 3 else " thing"}
        for i, word in enumerate(WORDS * 3)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture
def classes(tmp_path):
    rows = [{"text": word, "label": "colour" if i % 8 < 3 else "thing"} for i, word in enumerate(WORDS * 3)]
    return write_jsonl(tmp_path / "classes.jsonl", rows)


@pytest.fixture(scope="module")
def finished_run(model, prompts, tmp_path_factory):
    """Two epochs of three steps, evaluated and saved after each."""
    output = tmp_path_factory.mktemp("run") / "run"
    assert train(model, prompts, output, "--eval-data", prompts) == 0
    return output


def figures(output):
    return json.loads((output / "geko_report.json").read_text())


class TestEnv:
    def test_names_versions_and_backend(self, capsys, monkeypatch):
        monkeypatch.delenv("GEKO_BACKEND", raising=False)
        assert main(["env"]) == 0
        text = capsys.readouterr().out
        assert f"torch                 {torch.__version__}" in text
        assert "self-test ok" in text or "reference" in text

    def test_missing_extension_says_what_to_install(self, capsys, monkeypatch):
        monkeypatch.setitem(ops._MODULES, "cpp", "geko_kernels.no_such_extension")
        monkeypatch.delenv("GEKO_BACKEND", raising=False)
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        main(["env"])
        text = capsys.readouterr().out
        assert "reference (plain PyTorch" in text and "No C++ compiler found: install one" in text

    def test_backend_asked_for(self, capsys, monkeypatch):
        monkeypatch.setenv("GEKO_BACKEND", "reference")
        monkeypatch.setattr(ops, "_override", "reference")
        main(["env"])
        assert "reference, set by GEKO_BACKEND; self-test ok" in capsys.readouterr().out

    def test_unknown_backend(self, capsys, monkeypatch):
        monkeypatch.setenv("GEKO_BACKEND", "fpga")
        monkeypatch.setattr(ops, "_override", "fpga")
        main(["env"])
        assert "GEKO_BACKEND=fpga is unknown; unset it, or set it to one of" in capsys.readouterr().out


class TestTrain:
    def test_prompts_leave_model_and_report(self, finished_run):
        assert {"report.html", "geko_report.json", "model.safetensors", "tokenizer.json", "report_loss.png"} <= {
            path.name for path in finished_run.iterdir()
        }
        assert figures(finished_run)["num_samples"] == 24
        assert any("eval_loss" in row for row in figures(finished_run)["log_history"])

    def test_classifier_learns_named_labels(self, model, classes, tmp_path):
        output = tmp_path / "run"
        assert train(model, classes, output, "--eval-data", classes) == 0
        config = AutoModelForSequenceClassification.from_pretrained(output).config
        assert config.id2label == {0: "colour", 1: "thing"}
        assert any("eval_accuracy" in row for row in figures(output)["log_history"])

    def test_standard_loss_trains_everything(self, model, prompts, tmp_path):
        output = tmp_path / "run"
        assert train(model, prompts, output, "--loss", "standard") == 0
        work = figures(output)["efficiency"]
        assert work["samples_backward"] == work["samples_standard"] == 48
        assert work["saved_compute"] == 0

    def test_text_from_a_saved_dataset(self, model, tmp_path):
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list([{"text": f"{word} grows"} for word in WORDS]).save_to_disk(tmp_path / "saved")
        assert train(model, str(tmp_path / "saved"), tmp_path / "run", "--epochs", "1") == 0
        assert figures(tmp_path / "run")["num_samples"] == 8

    def test_yaml_with_flags_on_top(self, model, prompts, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text(
            f"model: {model}\ndata: {prompts}\noutput_dir: {tmp_path / 'run'}\nepochs: 5\nlearning_rate: 1e-3\n"
            "preset: balanced\ngeko:\n  correct_loss: 0.25\ntraining_arguments:\n  logging_steps: 1\n"
        )
        assert main(["train", "--config", str(config), "--epochs", "1"]) == 0
        run = figures(tmp_path / "run")
        assert run["config"]["correct_loss"] == 0.25 and run["config"]["bucket_weights"] == [3, 2, 1]
        assert len(run["efficiency"]["epochs"]) == 1
        assert [row["step"] for row in run["log_history"] if "geko/loss" in row] == [1, 2, 3]

    def test_resume_goes_on_where_the_run_stopped(self, model, prompts, finished_run, tmp_path, capsys):
        killed = tmp_path / "killed"
        shutil.copytree(finished_run, killed)
        for name in ("geko_report.json", "model.safetensors"):
            (killed / name).unlink()
        shutil.rmtree(killed / "checkpoint-6")
        command = ("train", "--model", str(model), "--data", prompts, "--output-dir", str(killed))
        assert "already holds a run" in refused(capsys, *command)
        assert train(model, prompts, killed, "--eval-data", prompts, "--resume") == 0
        assert (killed / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()
        assert "trained 48 samples of the standard run's 48" in capsys.readouterr().out

    @pytest.mark.parametrize("first", ["geko", "standard"])
    def test_a_run_is_not_ended_with_the_other_loss(self, model, prompts, tmp_path, capsys, first):
        other = {"geko": "standard", "standard": "geko"}[first]
        output = tmp_path / "run"
        assert train(model, prompts, output, "--loss", first, "--epochs", "1") == 0
        command = ("train", "--model", str(model), "--data", prompts, "--output-dir", str(output), "--resume")
        text = refused(capsys, *command, "--loss", other)
        assert f"checkpoint-3 was written with --loss {first}, but this run has --loss {other}." in text
        assert f"Give --loss {first}, or start a new run with another --output-dir" in text
        capsys.readouterr()
        assert train(model, prompts, output, "--loss", first, "--epochs", "1", "--resume") == 0

    def test_a_run_is_not_ended_on_other_data(self, model, prompts, finished_run, tmp_path, capsys):
        killed = tmp_path / "killed"
        shutil.copytree(finished_run, killed)
        rows = [{"prompt": f"{word} is no", "completion": " thing"} for word in WORDS * 3]
        other = write_jsonl(tmp_path / "other.jsonl", rows)
        command = ("train", "--model", str(model), "--data", other, "--output-dir", str(killed), "--resume")
        text = refused(capsys, *command)
        assert "--resume: " in text and "written with another train_dataset: of 24 items compared, 24" in text


class TestReport:
    def test_report_of_a_run(self, finished_run, tmp_path, capsys):
        shutil.copy(finished_run / "geko_report.json", tmp_path)
        assert main(["report", str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert "report_buckets.png" in told and (tmp_path / "report.html").exists()
        forecast = json.loads((tmp_path / "geko_report.json").read_text())["forecast"]["text"]
        assert told.startswith(forecast + "\n") and "of the samples are right" in forecast

    def test_no_run_there(self, tmp_path, capsys):
        assert "no geko_report.json" in refused(capsys, "report", str(tmp_path))


class TestWrongInput:
    """Each message says what is wrong and what to do."""

    def refuse(self, capsys, tmp_path, *flags, model="no-model", data="no-data.jsonl"):
        return refused(
            capsys, "train", "--model", str(model), "--data", data, "--output-dir", str(tmp_path / "run"), *flags
        )

    def test_missing_file(self, tmp_path, capsys):
        assert "give the path of a .jsonl file" in self.refuse(capsys, tmp_path)

    @pytest.mark.parametrize(
        "content, message",
        [
            ("", "holds no records"),
            ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
            ("[1]\n", "line 1 is not a JSON object"),
            ('{"body": "a"}\n', "fields ['body']; `train` needs `text`"),
            ('{"text": "a"}\n{"body": "b"}\n', "line 2: the field `text` is missing"),
            ('{"text": 3}\n', "line 1: `text` must be text, got 3"),
            ('{"prompt": "a", "completion": ""}\n', "`completion` is empty"),
            ('{"text": "a", "label": 0.5}\n', "`label` must be a number or a name"),
        ],
    )
    def test_data(self, tmp_path, capsys, content, message):
        path = tmp_path / "data.jsonl"
        path.write_text(content)
        assert message in self.refuse(capsys, tmp_path, data=str(path))

    @pytest.mark.parametrize(
        "content, message",
        [
            ("epoch: 3", "unknown option 'epoch'; did you mean 'epochs'?"),
            ("epochs: many", "epochs must be a number, got 'many'"),
            ("loss: hard", "loss must be one of geko, standard"),
            ("- a", "must hold `option: value` lines"),
            ("a: [", "is not valid YAML"),
            ("geko:\n  freeze: 1", "unknown freeze; GEKOConfig has freeze_confidence"),
            ("geko:\n  freeze_confidence: 2", "freeze_confidence must be in (0, 1]"),
            ("training_arguments:\n  seed: 1", "seed has its own option"),
            ("training_arguments:\n  warm_up: 1", "has no 'warm_up'"),
            ("batch_size: 0", "batch_size must be at least 1"),
            ("loss: standard\npreset: balanced", "need --loss geko"),
        ],
    )
    def test_yaml(self, tmp_path, capsys, content, message):
        path = tmp_path / "run.yaml"
        path.write_text(content)
        assert message in self.refuse(capsys, tmp_path, "--config", str(path))

    def test_flags(self, tmp_path, capsys):
        assert "invalid choice: 'odd'" in self.refuse(capsys, tmp_path, "--loss", "odd")
        assert "--model is required" in refused(capsys, "train", "--data", "x", "--output-dir", "y")
        assert "cannot read the file" in self.refuse(capsys, tmp_path, "--config", str(tmp_path / "none.yaml"))
        assert "holds no checkpoint" in self.refuse(capsys, tmp_path, "--resume")
        assert "there is no directory" in self.refuse(capsys, tmp_path, "--resume", str(tmp_path / "none"))

    def test_model_and_held_out_data(self, tmp_path, capsys, model, prompts, classes):
        assert "cannot load --model" in self.refuse(capsys, tmp_path, model=tmp_path / "none", data=prompts)
        wrong = self.refuse(capsys, tmp_path, "--eval-data", classes, model=model, data=prompts)
        assert "--eval-data must have the same" in wrong
        new = write_jsonl(tmp_path / "new.jsonl", [{"text": "oak", "label": "tree"}])
        assert "'tree' is not in the training data" in self.refuse(
            capsys, tmp_path, "--eval-data", new, model=model, data=classes
        )


def test_auto_finds_the_run_s_length(model, prompts, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(model, prompts, output, "--auto", "--eval-data", prompts) == 0
    report = figures(output)
    assert report["config"]["auto_stop"] and report["stopping"]["looked_at"] == "eval_dataset"
    assert report["forecast"] is None  # of other lengths, which such a run does not have
    capsys.readouterr()
    assert main(["report", str(output)]) == 0
    assert capsys.readouterr().out.startswith(report["stopping"]["why"] + "\n")
    told = refused(
        capsys, "train", "--model", "m", "--data", "d", "--output-dir", "o", "--auto", "--preset", "original"
    )
    assert "geko: use_curriculum must be False with auto_stop=True, got True" in told
    assert "; --auto sets auto_stop, for which the default --preset recommended is made" in told
