"""What the tests of the command line share."""

import contextlib
import json

import torch

from geko_kernels.cli import main

WORDS = ("red", "green", "blue", "oak", "elm", "ash", "cat", "dog")


@contextlib.contextmanager
def one_cpu(monkeypatch):
    """No GPU, no network, one thread."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(model, data, output, *flags):
    small = ("--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3")
    return main(["train", "--model", str(model), "--data", str(data), "--output-dir", str(output), *small, *flags])


def refused(capsys, *arguments):
    """What the command says on stderr; it must fail without a traceback."""
    try:
        assert main(list(arguments)) == 2
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr().err


def refusal(capsys, tmp_path, *flags, model="no-model", data="no-data.jsonl", output=None):
    """The one line that `train` says, without its name."""
    capsys.readouterr()
    output = tmp_path / "run" if output is None else output
    status = main(["train", "--model", str(model), "--data", str(data), "--output-dir", str(output), *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("geko_kernels train: ")]
    assert status == 2 and len(lines) == 1
    return lines[0].removeprefix("geko_kernels train: ")
