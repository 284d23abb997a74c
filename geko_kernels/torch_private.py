"""Every private name of torch that geko_kernels uses, each with a fallback for releases that lack it.

No other file of the package uses one. A fallback is correct but slower. If a guess could count a visit twice or give a
wrong gradient, the call is refused instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

NAMES = {  # name: what the package learns from it
    "torch._C._current_graph_task_id": "whether a call runs inside a backward",
    "torch._C._autograd._top_saved_tensors_default_hooks": "whether activation checkpointing wraps a call",
    "torch._C._autograd._get_current_graph_task_keep_graph": "whether a backward may overwrite its gradients",
    "torch._C._are_functorch_transforms_active": "whether torch.func transforms a call",
    "torch._C._len_torch_dispatch_stack": "whether a dispatch mode watches a call",
    "torch._C._len_torch_function_stack": "whether a function mode watches a call",
    "torch._C._get_tracing_state": "whether torch.jit.trace records a call",
    "torch._C._FunctionBase.apply": "how a custom function runs without inspecting torch.func",
    "torch.autograd._profiler_enabled": "whether a profiler records a call",
    "torch.autograd.forward_ad._current_level": "whether forward-mode derivatives are under way",
    "torch._subclasses.fake_tensor.FakeTensor": "whether a tensor has values",
    "torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters": "which transforms of torch.func are active",
    "torch._C._functorch.TransformType.Vmap": "whether vmap is among the transforms",
    "torch._C._functorch.TransformType.Jvp": "whether jvp is among the transforms",
    "torch._C._functorch.TransformType.Functionalize": "whether functionalize is among the transforms",
    "torch._C._functorch.get_unwrapped": "which tensor a transform has wrapped",
    "torch._C._functorch.is_functorch_wrapped_tensor": "whether a transform has wrapped a tensor",
    "torch._C._functorch.maybe_get_level": "which transform has wrapped a tensor",
    "torch._disable_dynamo": "how torch.compile leaves a function out, loaded only when that is first called",
    "torch._foreach_lerp_": "how tensors move towards others in a few launches",
    "torch.nn.Module._compiled_call_impl": "what Module.compile has made of a module",
    "torch.Tensor._base": "which tensor a view is of",
    "torch.Tensor._is_view": "whether a tensor is a view",
    "torch.Tensor._version": "whether a tensor was written to",
    "torch.ops.aten.add.Tensor._schema": "the arguments of an op",
}
ON_CUDA = {"torch._C._cuda_getCurrentRawStream": "the address of the current stream"}  # in builds for CUDA only


def find(path: str, otherwise: Any = None) -> Any:
    """The object at `path` ("torch.a.b"), or `otherwise` if this torch has none."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):  # the longest prefix that is a module
        try:
            return reduce(getattr, parts[length:], importlib.import_module(".".join(parts[:length])))
        except (ImportError, AttributeError):
            continue
    return otherwise


def missing(names: dict[str, str] = NAMES) -> list[str]:
    """One sentence for each of `names` that the installed torch lacks."""
    absent = object()
    return [_sentence(path, why) for path, why in names.items() if find(path, absent) is absent]


def _sentence(path: str, why: str) -> str:
    return f"torch {torch.__version__} has no {path}, by which geko_kernels learns {why}"


def _required(path: str) -> Any:
    """The object at `path`; if it is missing, a function that raises."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"{_sentence(path, NAMES[path])}: install a release of torch that geko_kernels was tested with"
        )

    return find(path, refuse)


graph_task_id: Callable[[], int] = _required("torch._C._current_graph_task_id")  # -1 outside a backward
_saved_tensors_hooks: Callable[[bool], Any] = _required("torch._C._autograd._top_saved_tensors_default_hooks")
# without it torch._dynamo is imported with the package, half of the time that takes
leave_out_of_compile: Callable[[Any], Any] = find("torch._disable_dynamo", torch.compiler.disable)
# without it one launch for each tensor
foreach_lerp_: Callable[[list[Tensor], list[Tensor], float], None] = find(
    "torch._foreach_lerp_",
    lambda values, towards, share: [value.lerp_(other, share) for value, other in zip(values, towards, strict=True)],
)
# without it gradients are always copied, as a second backward may follow
keeps_graph: Callable[[], bool] = find("torch._C._autograd._get_current_graph_task_keep_graph", lambda: True)
interpreters: Callable[[], list[Any]] = _required("torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters")
transformed: Callable[[], bool] = find("torch._C._are_functorch_transforms_active", lambda: bool(interpreters()))
# if one is missing, every call goes through the dispatcher, where all watchers see it
_WATCHERS: tuple[Callable[[], Any], ...] = (
    find("torch._C._len_torch_dispatch_stack", lambda: True),
    find("torch._C._len_torch_function_stack", lambda: True),
    transformed,
    find("torch._C._get_tracing_state", lambda: True),
    find("torch.autograd._profiler_enabled", lambda: True),
)
get_unwrapped: Callable[[Tensor], Tensor] = _required("torch._C._functorch.get_unwrapped")
is_wrapped: Callable[[Tensor], bool] = _required("torch._C._functorch.is_functorch_wrapped_tensor")
level_of: Callable[[Tensor], int] = _required("torch._C._functorch.maybe_get_level")
stream_address: Callable[[int], int] = find(
    "torch._C._cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
_FakeTensor = find("torch._subclasses.fake_tensor.FakeTensor")


def compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` has made of its call; None if it was not called."""
    return getattr(module, "_compiled_call_impl", None)


def is_full_graph(call: Any) -> bool:
    """Whether torch.compile has made `call` with fullgraph=True, or made it in a way that does not show."""
    while call is not None:
        compiled = hasattr(call, "_torchdynamo_orig_callable") and not getattr(call, "_torchdynamo_disable", False)
        if compiled:
            code = getattr(call, "__code__", None)
            cells = dict(zip(code.co_freevars, call.__closure__ or (), strict=True)) if code else {}
            settings = cells["self"].cell_contents if "self" in cells else None
            if getattr(settings, "fullgraph", True):
                return True
        call = getattr(call, "__wrapped__", None)
    return False


def saves_by_hooks() -> bool:
    """Whether hooks handle the tensors that autograd saves, as in activation checkpointing."""
    return _saved_tensors_hooks(False) is not None


def watched() -> bool:
    """Whether a mode, a transform, a trace or a profiler would miss a call that bypasses the dispatcher."""
    dispatch, function, transforms, tracing, profiler = _WATCHERS
    return bool(dispatch() or function() or transforms() or tracing() is not None or profiler())


def levels(kind: str) -> list[int]:
    """The levels of the active transforms of torch.func of this kind: "Vmap", "Jvp", "Functionalize"."""
    return [each.level() for each in interpreters() if each.key().name == kind]


def forward_mode() -> bool:
    """Whether forward-mode derivatives may be in use; always True without the private name."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def batched(grad_output: Tensor) -> bool:
    """Whether several gradients are computed at once (is_grads_batched, jacrev): such a tensor has no memory."""
    try:
        grad_output.data_ptr()
    except RuntimeError:
        return True
    return False


def is_fake(tensor: Any) -> bool:
    """Whether a tensor is a `FakeTensor`, without values."""
    if _FakeTensor is None:
        return any(base.__name__ == "FakeTensor" for base in type(tensor).__mro__)
    return isinstance(tensor, _FakeTensor)


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that `tensor` is a view of, or `tensor` itself."""
    if not hasattr(Tensor, "_base"):
        return _required("torch.Tensor._base")(tensor)
    return tensor._base if tensor._is_view() else tensor


def version_of(tensor: Tensor) -> int:
    """How often `tensor` has been written to."""
    if not hasattr(Tensor, "_version"):
        return _required("torch.Tensor._version")(tensor)
    return tensor._version


def arguments_of(op: Any) -> list[Any]:
    """The arguments of an op overload: each with `name`, `type` and `is_write`."""
    if not hasattr(op, "_schema"):
        return _required("torch.ops.aten.add.Tensor._schema")(op)
    return op._schema.arguments


def set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Restore `value` as the buffer `name`, even if the forward has replaced it by something else."""
    if hasattr(module, "_buffers"):
        module._buffers[name] = value
    else:
        module.register_buffer(name, value)


def set_last_rates(scheduler: Any, rates: list[Any]) -> None:
    """Set the result of `scheduler.get_last_lr()`; no effect if a release of torch keeps it elsewhere."""
    scheduler._last_lr = rates
