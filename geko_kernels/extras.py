"""How to get what an install left out, and the warning about it, which names the user's own line."""

import sys
import warnings

TRAINING = 'pip install "transformers>=5.17" accelerate tqdm rich matplotlib jinja2 pyyaml'
REBUILD = (
    'in a checkout or an unpacked sdist, `pip install "setuptools>=77" wheel ninja pybind11 && '
    "pip install --no-build-isolation --no-deps --force-reinstall .`"
)
_LIBRARIES = {"geko_kernels", "torch", "transformers", "accelerate", "trl", "peft", "lightning", "pytorch_lightning"}


def warn_user(message: str) -> None:
    """A RuntimeWarning at the innermost line outside of the libraries; at the outermost line if all are inside."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _in_library(frame.f_globals.get("__name__")):
        frame = frame.f_back
    names, code = frame.f_globals, frame.f_code
    registry = names.setdefault("__warningregistry__", {})
    module = names.get("__name__") or "<unknown>"
    warnings.warn_explicit(message, RuntimeWarning, code.co_filename, frame.f_lineno, module, registry)


def _in_library(module: str | None) -> bool:
    """Also of code that torch.compile made, which is in no module."""
    return module is None or module.partition(".")[0] in _LIBRARIES
