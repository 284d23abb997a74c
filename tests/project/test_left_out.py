"""What a build left out is said once, at the user's own line, and `geko env` says how to get it."""

import ctypes
import inspect
import subprocess
import sys
import warnings

import pytest
import torch

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.cli import environment, main
from geko_kernels.extras import REBUILD
from geko_kernels.kernels.one_pass import hopper

LOGITS, LABELS = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])


@pytest.fixture
def without_cpp(monkeypatch):
    monkeypatch.setattr(ops, "_override", "")
    monkeypatch.setattr(ops, "_loaded", {})
    monkeypatch.setitem(ops._MODULES, "cpp", "geko_kernels.not_built")


class Loss(torch.nn.Module):
    def forward(self, logits):
        return gk.weighted_loss(logits, LABELS)


def by_loss():
    gk.weighted_loss(LOGITS, LABELS)


def by_linear_loss():
    gk.weighted_linear_loss(LOGITS, torch.ones(4, 3), LABELS)


def by_op():
    torch.ops.geko.rescale_(torch.ones(2), torch.ones(()))


def by_compiled_loss():
    torch.compile(Loss(), backend="eager", fullgraph=True)(LOGITS)


def by_trainer(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    arguments = gk.GEKOTrainingArguments(str(folder), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 2
    trainer = gk.GEKOTrainer(transformers.GPT2LMHeadModel(config), arguments, train_dataset=rows)
    trainer.train()


def last_line(function):
    lines, first = inspect.getsourcelines(function)
    return first + len(lines) - 1


@pytest.mark.parametrize("call", [by_loss, by_linear_loss, by_op, by_compiled_loss, by_trainer])
def test_a_missing_backend_is_said_at_the_users_line(without_cpp, tmp_path, call):
    arguments = (tmp_path,) if call is by_trainer else ()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(*arguments)
        call(*arguments)
    (told,) = [warning for warning in told if "backend is not available" in str(warning.message)]
    line = Loss.forward.__code__.co_firstlineno if call is by_compiled_loss else last_line(call)  # its lines are gone
    assert (told.category, told.filename, told.lineno) == (RuntimeWarning, __file__, line)
    assert str(told.message) == (
        "geko_kernels: the 'cpp' backend is not available (No module named 'geko_kernels.not_built'); using the plain "
        "PyTorch reference, which is right but slow. `python -m geko_kernels env` says how to get it."
    )


def test_without_a_line_of_the_users_the_outermost_is_named():
    script = (
        "import warnings\nfrom geko_kernels.extras import warn_user\n__name__ = 'torch.file'\n"
        "def inner(): warn_user('told')\ndef outer(): inner()\nouter()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.startswith("<string>:6: RuntimeWarning: told")


@pytest.fixture
def on_hopper(monkeypatch, tmp_path):
    """A GPU of capability 9.0 to look at, and an install without `_hopper`."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(hopper, "__file__", str(tmp_path / "geko_kernels" / "kernels" / "one_pass" / "hopper.py"))
    for function in (hopper.library, hopper.missing):
        function.cache_clear()
    yield
    for function in (hopper.library, hopper.missing):
        function.cache_clear()


NO_HOPPER = (
    "geko_kernels._hopper was not built at install, as nvcc was missing or failed. With nvcc on the path: " + REBUILD
)


def test_a_missing_cuda_kernel_is_said_once_where_it_would_run(on_hopper):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert hopper.missing(torch.device("cuda", 0)) == hopper.missing(torch.device("cuda", 0)) == NO_HOPPER
    (told,) = told
    assert str(told.message) == (
        "geko_kernels: large losses take one pass more over the logits, in Triton: " + NO_HOPPER
    )
    assert (told.category, told.filename) == (RuntimeWarning, __file__)


def test_a_cuda_library_of_other_sources_is_left_out(on_hopper, monkeypatch, tmp_path):
    (tmp_path / "geko_kernels").mkdir()
    (tmp_path / "geko_kernels" / "_hopper.so").touch()
    load = ctypes.PyDLL
    monkeypatch.setattr(ctypes, "PyDLL", lambda _path: load(None))  # Python itself has none of its functions
    with pytest.warns(RuntimeWarning, match="take one pass more over the logits"):
        reason = hopper.missing(torch.device("cuda", 0))
    assert reason.startswith("geko_kernels._hopper was built from other sources: ") and reason.endswith(REBUILD)


def test_env_says_how_to_get_the_cuda_kernel(on_hopper, monkeypatch):
    monkeypatch.delenv("GEKO_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert environment._one_pass() == f"off: {NO_HOPPER}"


@pytest.mark.parametrize(
    ("compiler", "advice"),
    [
        ("", f"No C++ compiler found: install one (Debian: `apt-get install g++`), then, {REBUILD}."),
        (sys.executable, f"A C++ compiler is there ({sys.executable}): {REBUILD}."),
        ("/no/g++", f"There is no CXX=/no/g++: unset it or name a C++ compiler, then, {REBUILD}."),
    ],
)
def test_env_says_how_to_get_the_cpu_kernels(without_cpp, monkeypatch, capsys, compiler, advice):
    monkeypatch.delenv("GEKO_BACKEND", raising=False)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "")
    assert main(["env"]) == 0
    row = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  cpu    ") and "core" not in line
    )
    assert "reference (plain PyTorch: correct but slow), without cpp: No module named 'geko_kernels.not_built'" in row
    assert row.endswith(advice)
