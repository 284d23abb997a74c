"""`python -m geko_kernels env`: what is installed, and which backend runs where and why, for a bug report."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

import geko_kernels
from geko_kernels import ops
from geko_kernels.cli.errors import UsageError
from geko_kernels.extras import REBUILD

_PACKAGES = ("numpy", "safetensors", "triton", "transformers", "accelerate", "datasets", "trl", "peft", "gekolib")
_VARIABLES = (
    "GEKO_BACKEND",
    "GEKO_CPU_CAPABILITY",
    "GEKO_DEBUG",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "CXX",
)
_UNSET = "unset it, or set it to one of"


def describe() -> str:
    """The sections versions, devices, backends and environment variables, as plain text."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "environment": [(name, os.environ.get(name, "not set")) for name in _VARIABLES],
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<22}{value}" for name, value in rows)]) for title, rows in sections.items()
    )


def _versions() -> list[tuple[str, str]]:
    return [
        ("geko_kernels", f"{geko_kernels.__version__} ({Path(geko_kernels.__file__).parent})"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        (
            "torch",
            f"{torch.__version__} (built for CUDA: {torch.version.cuda or 'no'}, ROCm: {torch.version.hip or 'no'})",
        ),
        *((name, _version(name)) for name in _PACKAGES),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    rows = [
        (
            "cpu",
            f"{_cpu_name()}, {os.cpu_count()} cores, "
            f"torch: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        )
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {memory:.0f} GiB"))
    if len(rows) == 1:
        rows.append(("cuda", "none: " + ("torch sees no GPU" if torch.version.cuda else "this torch is a CPU build")))
    return rows


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _backends() -> list[tuple[str, str]]:
    cuda = _backend(torch.device("cuda")) if torch.cuda.is_available() else "none: no CUDA device to run on"
    return [("cpu", _backend(torch.device("cpu"))), ("cuda", cuda), ("cuda, one pass", _one_pass())]


def _one_pass() -> str:
    """Whether large losses run in one pass, with a predicted gradient, and if not, why."""
    if os.environ.get("GEKO_BACKEND"):
        return "off: GEKO_BACKEND is set"
    reason = _hopper_missing(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return f"off: {reason}" if reason else "on, for large batches"


def _backend(device: torch.device) -> str:
    """Which backend runs on `device`, why, and whether a small loss and gradient are right."""
    wanted = ops.backend_name(device)
    asked = bool(os.environ.get("GEKO_BACKEND"))
    if wanted not in ops._MODULES:
        return f"none: GEKO_BACKEND={wanted} is unknown; {_UNSET} {', '.join(sorted(ops._MODULES))}"
    try:
        module = importlib.import_module(ops._MODULES[wanted])
    except ImportError as error:
        instead = "none, as GEKO_BACKEND asks for" if asked else "reference (plain PyTorch: correct but slow), without"
        return f"{instead} {wanted}: {error}. {_remedy(wanted)}"
    why = "set by GEKO_BACKEND" if asked else "the default here"
    try:
        build = _build(module) if wanted == "cpp" else ""
    except RuntimeError as error:  # GEKO_CPU_CAPABILITY
        return f"none: {error}"
    return f"{wanted}, {why}; {build}{_check(device)}"


def check_variables() -> None:
    """Raise UsageError if an environment variable asks for something that `train` cannot use on this machine."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    wanted = ops.backend_name(device)
    if wanted not in ops._MODULES:
        raise UsageError(f"GEKO_BACKEND={wanted} is unknown; {_UNSET} {', '.join(sorted(ops._MODULES))}")
    if wanted == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f"GEKO_BACKEND=triton needs a GPU, and there is none; {_UNSET} cpp, reference")
    if wanted == "cpp":
        try:
            importlib.import_module(ops._MODULES[wanted]).cpu_capability()
        except ImportError:  # then another backend runs, with a warning
            return
        except RuntimeError as error:  # GEKO_CPU_CAPABILITY
            raise UsageError(str(error)) from error


def _build(cpp: ModuleType) -> str:
    return f"{cpp.cpu_capability()}, {cpp.num_threads()} threads, built with {cpp.build_info()}; "


def _remedy(backend: str) -> str:
    if backend == "triton":
        return "Install it with `pip install triton`."
    asked = os.environ.get("CXX", "").split()
    if asked and not shutil.which(asked[0]):
        return f"There is no CXX={asked[0]}: unset it or name a C++ compiler, then, {REBUILD}."
    compiler = asked[0] if asked else next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return f"No C++ compiler found: install one (Debian: `apt-get install g++`), then, {REBUILD}."
    return f"A C++ compiler is there ({compiler}): {REBUILD}."


def _check(device: torch.device) -> str:
    logits = torch.linspace(-3, 3, 77, device=device).reshape(11, 7).requires_grad_()
    labels = torch.arange(11, device=device) % 7
    expected = F.cross_entropy(logits, labels)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            loss = geko_kernels.weighted_loss(logits, labels)
        assert isinstance(loss, torch.Tensor)
        (grad,) = torch.autograd.grad(loss, logits)
        largest = max((loss - expected).abs().item(), (grad - expected_grad).abs().max().item())
    except Exception as error:  # any error of a compiler or driver belongs in the report
        return f"self-test FAILED: {type(error).__name__}: {error}"
    return f"self-test {'ok' if largest < 1e-5 else 'FAILED'} (largest error {largest:.1e})"


def _hopper_missing(device: torch.device) -> str | None:
    """Why the one-pass kernel cannot run on `device`; None if it can. Its folder imports Triton."""
    try:
        from geko_kernels.kernels.one_pass import hopper
    except ImportError as error:
        return str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what it says stands in this report
        return hopper.missing(device)
