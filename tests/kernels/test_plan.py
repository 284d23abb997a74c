"""Eager calls of the Triton backend: past the dispatcher, and by addresses, which the interpreter does not take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import random_state
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.columns import NAMES

pytest.importorskip("geko_kernels.kernels", exc_type=ImportError)
from geko_kernels.kernels import launch as launching
from geko_kernels.kernels import plan as planning
from geko_kernels.kernels import triton_private
from geko_kernels.kernels.table import prepared_of

pytestmark = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setattr(ops, "_override", "triton")


class Recorder:
    """In place of a `Launch`: keeps the pointers it is called with, launches nothing."""

    def __init__(self, ready: bool) -> None:
        self.ready, self.pointers = ready, ()

    def __call__(self, *pointers) -> None:
        self.pointers = pointers


def address(pointer):
    """Addresses of empty tensors are nobody's."""
    if isinstance(pointer, torch.Tensor):
        return pointer.data_ptr() if pointer.numel() else "empty"
    return pointer


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("num_items", [None, 2.0])
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("form", ["none", "row", "packed", "rows of one"])
def test_a_launch_gets_the_same_memory_by_tensors_and_by_addresses(
    monkeypatch, form, table, reduction, num_items, apart
):
    shape = (7,) if form == "rows of one" else (7, 3)
    logits, labels = torch.randn(*shape, 5), torch.zeros(shape, dtype=torch.long)
    ids = {"none": None, "packed": torch.zeros(shape, dtype=torch.long)}.get(form, torch.zeros(7, dtype=torch.long))
    state = random_state(1, 9, gk.GEKOConfig(), (3, 1, 0))
    columns = (state.columns, state.error) if table else ([], None)
    items = None if num_items is None else torch.tensor(num_items)
    options = (reduction, -100, False, 0.0, table)
    plan = planning.plan_of(logits, labels, ids, items, *columns, *options)
    seen = []
    loss, visits = torch.empty(plan.loss_shape), torch.empty(plan.visit_words)
    kept = torch.empty(plan.kept_words + (0 if apart else plan.visit_words))
    weights = SimpleNamespace(data_ptr=state.weights.data_ptr)
    for ready in (False, True):
        memory = iter((loss, kept, visits))
        weights.new_empty = lambda _size, memory=memory: next(memory)
        plan.statistics_launch, plan.update_launch, gradient = Recorder(ready), Recorder(ready), Recorder(ready)
        plan.forward(logits, labels, ids, state.rules, weights, items, *columns, apart)
        monkeypatch.setattr(planning, "gradient_launch", lambda *_, gradient=gradient: gradient)
        plan.gradients.clear()
        plan.gradient(logits, kept, loss, logits, labels, inplace=True)
        seen.append([*plan.statistics_launch.pointers, *plan.update_launch.pointers, *gradient.pointers])
    planning._plans.clear()
    tensors, addresses = seen
    assert len(tensors) == 4 + len(prepared_of(NAMES)) + 2 + 6 + len(NAMES) + 2 + 8 + 8
    for tensor, pointer in zip(tensors, addresses, strict=True):
        assert pointer is None or isinstance(pointer, int)
        assert address(tensor) in (pointer, "empty") or tensor is weights
        assert isinstance(pointer, int) is (tensor is not None)
    parts = [part for part in tensors if isinstance(part, torch.Tensor) and part.numel()]
    memory = [tensor.untyped_storage().data_ptr() for tensor in (kept, visits)]
    inside = {(part.data_ptr(), part.nbytes) for part in parts if part.untyped_storage().data_ptr() in memory}
    ends = sorted(inside)
    assert all(start % 16 == 0 for start, _ in ends)
    assert all(start + size <= after for (start, size), (after, _) in zip(ends, ends[1:], strict=False))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def call(state=None, **options):
    """(loss, leaf) of one call."""
    leaf = torch.randn(3, 2, 5, device=DEVICE, requires_grad=True)
    labels, ids = torch.ones(3, 2, dtype=torch.long, device=DEVICE), torch.arange(3, device=DEVICE)
    return gk.weighted_loss(leaf * 1, labels, ids, state or gk.SampleState(3, device=DEVICE), **options), leaf


@pytest.fixture
def planned(monkeypatch):
    """Forwards and backwards that went past the dispatcher."""
    seen = []
    kernels = ops._load("triton")

    def listen(name):
        op = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args: (seen.append(name), op(*args))[1])

    listen("planned_loss_forward")
    listen("planned_logits_grad")
    return seen


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_eager_step_goes_past_the_dispatcher(planned):
    call()[0].backward()
    assert planned == ["planned_loss_forward", "planned_logits_grad"]


@pytest.mark.parametrize("mode", [Functions, Dispatches, torch.profiler.profile])
def test_who_looks_on_sees_the_ops(planned, mode):
    with mode() as onlooker:
        call()[0].backward()
    assert planned == []
    if mode is Dispatches:
        assert {"geko.loss_forward_.default", "geko.logits_grad.default"} <= set(onlooker.ops)
    if mode is torch.profiler.profile:
        assert {"geko::loss_forward_", "geko::logits_grad"} <= {event.name for event in onlooker.events()}


def test_a_backward_alone_under_a_mode_takes_over(planned):
    torch.manual_seed(1)
    loss, logits = call()
    loss.backward()
    torch.manual_seed(1)
    loss, same = call()
    with Dispatches() as onlooker:
        loss.backward()
    assert planned == ["planned_loss_forward", "planned_logits_grad", "planned_loss_forward"]
    assert "geko.logits_grad.default" in onlooker.ops and same.grad.equal(logits.grad)


def test_saved_tensors_laid_out_anew_by_a_hook(planned):
    torch.manual_seed(1)
    loss, leaf = call()
    loss.backward()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.mT.contiguous().mT if x.dim() == 3 else x):
        loss, other = call()
    loss.backward()
    assert planned == ["planned_loss_forward", "planned_logits_grad", "planned_loss_forward"]
    assert other.grad.equal(leaf.grad)


def test_columns_and_overwritten_logits_hear_of_it():
    state = gk.SampleState(3, device=DEVICE)
    columns = (state.q_value, state.times_seen, state.claim, state.error)
    before = [column._version for column in columns]
    loss, _ = call(state, inplace=True)
    assert [column._version for column in columns] == [version + 1 for version in before]
    (logits, _) = loss.grad_fn.saved_tensors
    version = logits._version
    loss.backward()
    assert logits._version == version + 1


class Binary:
    """What Triton's `kernel[grid](...)` returns: starts itself with `run`, or as `binary[grid]` for profilers."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.calls = []

    def run(self, *arguments):
        self.calls.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, *arguments))


def test_a_launch_finds_its_binary_once_and_lets_profilers_hear(monkeypatch):
    binary, compiled = Binary(), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: (compiled.append((grid, arguments, constants)), binary)[1]

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _device: 77)
    monkeypatch.setattr(triton_private, "driver", SimpleNamespace(active=active))
    launch = launching.Launch(Kernel(), 6, (5, 8), {"BLOCK": 16, "UNIT": True}, 4)
    assert not launch.ready
    launch("x", "y")
    assert launch.ready and compiled == [((6, 1, 1), ("x", "y", 5, 8), {"BLOCK": 16, "UNIT": True, "num_warps": 4})]
    launch(1, 2)
    assert binary.calls == [(6, 1, 1, 77, "function", "metadata", None, None, None, 1, 2, 5, 8, 16, True)]
    runtime = triton_private.knobs.runtime
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(
        triton_private, "knobs", SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=hook, launch_exit_hook=None))
    )
    launch(3, 4)
    assert binary.calls[1:] == [((6, 1, 1), 3, 4, 5, 8, 16, True)] and len(compiled) == 1
    assert not bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook))
