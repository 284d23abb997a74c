"""Every test of the command line runs on the CPU, with one thread and without a network, and draws nothing itself."""

import gc

import pytest
from command import one_cpu

PIXEL = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny language model."""
    pytest.importorskip("transformers")
    from tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """A command that fails collects garbage: 0.3 s and more if that looks at all that the tests before have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    with one_cpu(monkeypatch):
        yield


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch):
    """The runs that a module shares draw their charts; those of a test leave out what takes a second each."""
    try:
        from geko_kernels.training.report import report
    except ModuleNotFoundError:
        return
    monkeypatch.setattr(report, "_png", lambda figure: PIXEL)
