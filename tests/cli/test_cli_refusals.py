"""Settings, folders and models that `train` refuses in one line, before anything is trained."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from command import WORDS, refusal, refused, train, write_jsonl
from tiny_model import save_tiny_model

import geko_kernels
from geko_kernels import ops
from geko_kernels.cli import main

ELSE = "unset it, or set it to one of"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", [{"text": word} for word in WORDS])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"geko_kernels {geko_kernels.__version__}\n"


@pytest.mark.parametrize(
    "command, told",
    [
        (["env"], "geko_kernels env: interrupted\n"),
        (["train"], "geko_kernels train: interrupted; nothing had begun, so give the same command again\n"),
    ],
)
def test_interrupted_while_it_is_still_loading(monkeypatch, capsys, command, told):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("geko_kernels.cli._run", interrupted)
    assert main(command) == 130 and capsys.readouterr().err == told


@pytest.mark.parametrize(
    "output, status, told", [("pipe", 141, ""), ("/dev/full", 2, "cannot write the output (No space left on device)")]
)
def test_output_that_nobody_takes(output, status, told):
    """`geko env | true`, and a full disk: no traceback, also not from the flush at exit."""
    if output == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    elif os.path.exists(output):
        writer = os.open(output, os.O_WRONLY)
    else:
        pytest.skip(f"there is no {output}")
    command = [sys.executable, "-m", "geko_kernels", "env"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    lines = [line for line in done.stderr.splitlines() if "geko_kernels env" in line or "Error" in line]
    assert done.returncode == status and lines == ([f"geko_kernels env: {told}"] if told else [])


class TestYaml:
    @pytest.mark.parametrize(
        "content, message",
        [
            (b"epochs: \xff", "is not UTF-8 text (byte 8); convert it first"),
            (b"epochs: 1\nseed: 2\nepochs: 3", "the key 'epochs' is there twice (line 3, column 1)"),
            (b"geko: {probes: true, probes: false}", "the key 'probes' is there twice"),
            (
                b"a: &a [x, x]\nb: &b [*a, *a]",
                "the reference *a is not allowed: write the value out (line 2, column 8)",
            ),
            (b"a: " + b"[" * 50_000, "nests too deeply"),
            (b"seed: " + b"9" * 5000, "is not valid YAML: Exceeds the limit"),
            (b"data: 2020-99-99", "is not valid YAML: month must be in 1..12"),
            (b"a: !!python/object:os.system x", "could not determine a constructor for the tag"),
            (b"a: b: c", "mapping values are not allowed here (line 1, column 5)"),
            (b"1: 2", "unknown option 1"),
            (b"geko: {1: 2, a: 3}", "unknown 1, a; GEKOConfig has"),
            (b"epochs: .inf", "epochs must be above 0 and at most 1,000,000, got inf"),
            (b"trust_remote_code: 1", "trust_remote_code must be true or false, got 1"),
            (b"training_arguments: {label_names: [y]}", "label_names cannot be set here; `train` makes the labels"),
            (b"training_arguments: {resume_from_checkpoint: x}", "resume_from_checkpoint cannot be set here; use --re"),
            (b"training_arguments: {weight_decay: abc}", "weight_decay must be a number, got 'abc'"),
            (b"training_arguments: {max_steps: 1.5}", "max_steps must be a whole number, got 1.5"),
            (b"training_arguments: {lr_scheduler_kwargs: 3}", "must be a mapping or text or null, got 3"),
            (b"training_arguments: {parallelism_config: 3}", "parallelism_config must be null, got 3"),
            (b"training_arguments: {optim: 3}", "optim must be text, got 3"),
            (b"training_arguments: {log_level: foo}", "Transformers refuses these settings: KeyError: 'foo'"),
            (b"training_arguments: {optim: foo}", "Transformers refuses these settings: foo is not a valid"),
            (b"training_arguments: {report_to: wandb}", "report_to names wandb, whose package is not installed"),
            (b"training_arguments: {report_to: [wandb, foo]}", "report_to names foo, wandb, whose package"),
        ],
    )
    def test_wrong_file(self, tmp_path, capsys, content, message):
        path = tmp_path / "run.yaml"
        path.write_bytes(content)
        told = refusal(capsys, tmp_path, "--config", str(path))
        assert message in told and len(told) < 1000

    def test_byte_order_mark_is_no_part_of_the_first_key(self, tmp_path, capsys):
        (tmp_path / "run.yaml").write_bytes("\ufeffepochs: 0".encode())
        assert "epochs must be above 0" in refused(
            capsys, "train", "--config", str(tmp_path / "run.yaml"), "--model", "a", "--data", "b", "--output-dir", "c"
        )
        assert "(it is a directory); give the path of a YAML file" in refusal(
            capsys, tmp_path, "--config", str(tmp_path)
        )

    @pytest.mark.parametrize(
        "settings, message",
        [
            ("eval_strategy: epoch", "didn't pass an `eval_dataset`"),
            ("label_smoothing_factor: 0.1", "GEKOTrainer does not work with label_smoothing_factor: set it to 0"),
            ("optim: adamw_bnb_8bit", "You need to install `bitsandbytes`"),
            ("dataloader_num_workers: -1", "num_workers option should be non-negative"),
            ("adam_beta1: 2", "Invalid beta parameter at index 0: 2"),
        ],
    )
    def test_what_the_trainer_refuses(self, model, data, tmp_path, capsys, settings, message):
        (tmp_path / "run.yaml").write_text(f"training_arguments:\n  {settings}\n")
        assert message in refusal(capsys, tmp_path, "--config", str(tmp_path / "run.yaml"), model=model, data=data)

    def test_metric_that_nothing_measures(self, model, data, tmp_path, capsys):
        (tmp_path / "run.yaml").write_text(
            "training_arguments: {load_best_model_at_end: true, metric_for_best_model: accuracy}"
        )
        told = refusal(
            capsys, tmp_path, "--config", str(tmp_path / "run.yaml"), "--eval-data", data, model=model, data=data
        )
        assert "metric_for_best_model must be one of loss, runtime" in told and "got 'accuracy'" in told


def test_missing_package_is_named_with_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "geko_kernels.cli.yaml_file", raising=False)
    told = refusal(capsys, tmp_path, "--config", "run.yaml")
    assert told == ('needs yaml: pip install "transformers>=5.17" accelerate tqdm rich matplotlib jinja2 pyyaml')


@pytest.mark.parametrize(
    "flag, value, message",
    [
        *(
            ("--epochs", value, f"epochs must be above 0 and at most 1,000,000, got {value}")
            for value in ("inf", "nan")
        ),
        *(("--epochs", value, "epochs must be above 0 and at most 1,000,000") for value in ("-1", "0", "1e300")),
        ("--learning-rate", "inf", "learning_rate must be above 0 and at most 1,000,000, got inf"),
        ("--batch-size", "0", "batch_size must be at least 1 and at most 2,147,483,647, got 0"),
        ("--batch-size", str(10**30), "batch_size must be at least 1 and at most 2,147,483,647"),
        ("--max-length", "1", "max_length must be at least 2"),
        ("--seed", str(2**32), "seed must be at least 0 and at most 4,294,967,295"),
    ],
)
def test_numbers_out_of_range(tmp_path, capsys, flag, value, message):
    assert message in refusal(capsys, tmp_path, flag, value)


class TestOutput:
    def test_not_a_directory(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        told = refusal(capsys, tmp_path, output=tmp_path / "file")
        assert told == f"--output-dir {tmp_path}/file: {tmp_path}/file is not a directory; give another one"
        told = refusal(capsys, tmp_path, output=tmp_path / "file" / "run")
        assert f"{tmp_path}/file is not a directory" in told
        (tmp_path / "dangling").symlink_to(tmp_path / "none")
        assert "dangling is not a directory" in refusal(capsys, tmp_path, output=tmp_path / "dangling")

    @pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
    def test_names_that_no_file_can_have(self, model, data, tmp_path, capsys, name):
        assert refusal(capsys, tmp_path, output=name).startswith("--output-dir ")
        assert "cannot load --model" in refusal(capsys, tmp_path, data=data, model=name)
        assert "there is no directory" in refusal(capsys, tmp_path, "--resume", name)
        assert "cannot load" in refusal(capsys, tmp_path, data=name)

    def test_no_permission(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("os.access", lambda path, mode: False)
        assert f"no permission to write in {tmp_path}; give another one" in refusal(capsys, tmp_path)

    def test_of_the_model(self, model, data, tmp_path, capsys):
        (tmp_path / "link").symlink_to(model)
        for output in (model, f"{model}/../{model.name}", tmp_path / "link"):
            told = refusal(capsys, tmp_path, model=model, data=data, output=output)
            assert "is the directory of --model, which the run would overwrite; give another --output-dir" in told

    def test_inside_the_model_is_its_own(self, tmp_path):
        folder = save_tiny_model(tmp_path / "tiny")
        before = (folder / "model.safetensors").read_bytes()
        data = write_jsonl(tmp_path / "data.jsonl", [{"text": word} for word in WORDS])
        assert train(folder, data, folder / "run", "--epochs", "1") == 0
        assert (folder / "model.safetensors").read_bytes() == before


class TestModel:
    """Damaged in many ways; each is one line that names the folder."""

    @pytest.mark.parametrize(
        "name, content",
        [
            ("config.json", "{"),
            ("config.json", "[1]"),
            ("config.json", "null"),
            ("config.json", "{}"),
            ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
            ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
            ("config.json", '{"model_type": "t5"}'),
            ("model.safetensors", ""),
            ("model.safetensors", "\x7f" * 500),
            ("model.safetensors", None),
            ("tokenizer.json", "{}"),
            ("tokenizer.json", None),
            ("tokenizer_config.json", "["),
        ],
    )
    def test_damaged_folder(self, model, data, tmp_path, capsys, name, content):
        folder = tmp_path / "model"
        shutil.copytree(model, folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
        told = refusal(capsys, tmp_path, model=folder, data=data)
        assert told.startswith(f"cannot load --model {folder} (") and "`save_pretrained` wrote" in told

    @pytest.mark.parametrize("flags", [(), ("--trust-remote-code",)])
    def test_custom_code_runs_only_when_trusted(self, model, data, tmp_path, capsys, monkeypatch, flags):
        """Not even where Transformers asks on the terminal and the answer is yes."""
        monkeypatch.setattr("builtins.input", lambda _: "y")
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "model"
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
            "from transformers import PretrainedConfig\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
        )
        told = refusal(capsys, tmp_path, *flags, model=folder, data=data)
        assert (tmp_path / "ran").exists() == bool(flags)
        assert ("give --trust-remote-code if you trust it" in told) != bool(flags)
        assert f"--model {folder}" in told


class TestEnvironmentVariables:
    """They are read once a process, so what was read is replaced."""

    @pytest.mark.parametrize(
        "value, message",
        [
            ("fpga", f"GEKO_BACKEND=fpga is unknown; {ELSE} cpp, reference, triton"),
            (
                "triton",
                "GEKO_BACKEND=triton needs a GPU, and there is none; unset it, or set it to one of cpp, reference",
            ),
        ],
    )
    def test_backend(self, tmp_path, capsys, monkeypatch, value, message):
        monkeypatch.setattr(ops, "_override", value)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: None)
        assert refusal(capsys, tmp_path) == message

    def test_cpu_capability(self, tmp_path, capsys, monkeypatch):
        cpp = pytest.importorskip("geko_kernels.cpu")

        def capability():
            raise RuntimeError("GEKO_CPU_CAPABILITY must be avx512, avx2 or portable, got 'foo'")

        monkeypatch.setattr(cpp, "cpu_capability", capability)
        monkeypatch.setattr(ops, "_override", "cpp")
        assert refusal(capsys, tmp_path).startswith("GEKO_CPU_CAPABILITY must be avx512")
        assert main(["env"]) == 0
        assert "none: GEKO_CPU_CAPABILITY must be avx512" in capsys.readouterr().out


def test_env_without_triton_says_so():
    """As torch's builds for the CPU come: the C++ and the plain backend run without it."""
    code = "import sys; sys.modules['triton'] = None; from geko_kernels.cli import main; sys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "triton" in done.stdout
