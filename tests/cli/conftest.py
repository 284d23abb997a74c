"""Every test of the command line runs on the CPU, with one thread and without a network."""

import pytest
from command import one_cpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny language model."""
    pytest.importorskip("transformers")
    from tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    with one_cpu(monkeypatch):
        yield
