"""Settings of every test: Triton's interpreter where there is no GPU, poisoned memory, the backends, hypothesis."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads of several workers take no core

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from geko_kernels import ops  # noqa: E402

# backend is set anew for each test, not for each example: nothing in it changes between examples
_common = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=20, derandomize=True, **_common)
settings.register_profile("deep", max_examples=1000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
FROZEN = pytest.StashKey[int]()  # how many modules the garbage collector leaves out


def keep_masks_bool():
    """Triton's interpreter spreads a scalar of int1 as int32, which its own loads refuse since Triton 3.9."""
    try:
        from triton.runtime.interpreter import InterpreterBuilder
    except ImportError:
        return
    spread = InterpreterBuilder.create_splat

    def create_splat(self, block_type, scalar):
        block = spread(self, block_type, scalar)
        if block_type.scalar.is_int1():
            block.data = block.data.astype(bool)
        return block

    InterpreterBuilder.create_splat = create_splat


def quicken():
    """Triton's interpreter patches `triton.language` anew at each call of each function: half of its time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, patched = interpreter._patch_lang, {}

    def patch_lang(function):
        if function not in patched:
            patched[function] = type(patch(function))
        return patched[function]()  # a scope that has nothing to restore

    interpreter._patch_lang = patch_lang

    find = interpreter._get_np_dtype
    found = functools.cache(find)  # it builds a table of all dtypes at each call

    def np_dtype(of):
        scalar = of.element_ty if isinstance(of, interpreter.tl.block_type) else of
        return find(of) if isinstance(scalar, interpreter.tl.pointer_type) else found(scalar)

    interpreter._get_np_dtype = np_dtype

    # sums of integers are computed twice to find an overflow, which nothing reports without `debug`
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    share_attributes(interpreter.tl.block_type, lambda element, shape: (str(element), *map(int, shape)), "element_ty")
    share_attributes(interpreter.tl.tensor, lambda handle, type: type.name, "handle", "type")


def share_attributes(of, key, *own):
    """Instances of `of` whose arguments have the same key share all attributes but `own`, the arguments themselves."""
    init, made = of.__init__, {}

    def quick_init(self, first, second):
        attributes = made.get(name := key(first, second))
        if attributes is None:
            init(self, first, second)
            made[name] = {attribute: value for attribute, value in vars(self).items() if attribute not in own}
        else:
            vars(self).update(attributes)
            vars(self).update(zip(own, (first, second), strict=False))  # a block's shape is shared

    of.__init__ = quick_init


def pytest_configure(config):
    if not HAS_GPU:
        keep_masks_bool()
        quicken()
    # the interpreter computes with numpy, which warns of the NaN and inf that some tests are about
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script_method:DeprecationWarning")


def pytest_runtest_setup(item):
    """Accelerate's `gc.collect` at the begin of each run, 0.3 s, need not look at all that has been imported."""
    if len(sys.modules) > item.session.stash.get(FROZEN, 0):
        gc.collect()
        gc.freeze()
        item.session.stash[FROZEN] = len(sys.modules)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN (or the largest integer), also where C++ asks for it: an unwritten output is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(
    params=["reference", "cpp", pytest.param("triton", marks=[pytest.mark.gpu if HAS_GPU else pytest.mark.no_cover])],
)
def backend(request, monkeypatch):
    """The name of the backend that every op runs on."""
    try:
        importlib.import_module(ops._MODULES[request.param])
    except ImportError as error:
        pytest.skip(f"the {request.param} backend cannot be loaded: {error}")
    monkeypatch.setattr(ops, "_override", request.param)
    return request.param


@pytest.fixture
def device(backend) -> str:
    """Where the tensors of a test of `backend` live."""
    return "cuda" if backend == "triton" and HAS_GPU else "cpu"


@pytest.fixture
def reference(monkeypatch):
    """Every op runs in plain PyTorch."""
    monkeypatch.setattr(ops, "_override", "reference")
