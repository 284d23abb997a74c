"""Every test of the benchmarks runs on one thread, and the random stand-in for SmolLM2 has two layers of its eight."""

import pytest
from one_thread import one_thread  # noqa: F401  a fixture


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    try:
        from transformers import LlamaConfig

        import benchmarks.end_to_end.engine  # noqa: F401  puts smollm2 on the path
    except ModuleNotFoundError:
        return
    monkeypatch.setattr("smollm2.LlamaConfig", lambda **sizes: LlamaConfig(**sizes | {"num_hidden_layers": 2}))
