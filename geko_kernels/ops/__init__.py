"""The op set `torch.ops.geko`: schemas, shapes for tracing, choice of backend. See `reference` for the maths."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from geko_kernels import torch_private
from geko_kernels.extras import warn_user
from geko_kernels.ops import checks as op_checks
from geko_kernels.ops.fakes import FAKES
from geko_kernels.reference import rows as reference_rows

# rules and state; the columns in the order of `geko_kernels.columns`, or none without a state
_TABLE = "Tensor rules, Tensor weights, Tensor? num_items, Tensor(a!)[] columns, Tensor(b!)? error"
_WEIGHTS = "Tensor? token_weights=None, Tensor? sample_weights=None"
_GRAD = "Tensor labels, Tensor tokens, Tensor coeff, Tensor scale, Tensor token_visit, bool shift, float softcap"
_SCHEMAS = {
    "token_stats": "(Tensor logits, Tensor labels, Tensor? sample_ids, int ignore_index, bool shift, float softcap) "
    "-> Tensor",
    "sample_update_": f"(Tensor tokens, Tensor labels, Tensor? sample_ids, {_TABLE}, "
    f"int vocab, int reduction, int ignore_index, bool shift, bool update, {_WEIGHTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "loss_forward_": f"(Tensor logits, Tensor labels, Tensor? sample_ids, {_TABLE}, "
    f"int reduction, int ignore_index, bool shift, float softcap, bool update, {_WEIGHTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "logits_grad": f"(Tensor grad_output, Tensor logits, {_GRAD}) -> Tensor",
    "logits_grad_": f"(Tensor grad_output, Tensor(a!) logits, {_GRAD}) -> ()",
    "scored_rows": "(Tensor labels, Tensor? sample_ids, int vocab, int ignore_index, bool shift) "
    "-> (Tensor, Tensor, Tensor)",
    "score_rows_": "(Tensor(a!) logits, Tensor rows, Tensor targets, Tensor(b!) tokens, bool fused, int slot, "
    "int start, int count, int vocab, float softcap, Tensor(c!)? entropy=None) -> ()",
    "kept_rows_": "(Tensor coeff, Tensor rows, Tensor(a!) positions, Tensor(b!) sources, int held, int start, "
    "int count) -> Tensor",
    "gradient_rows_": "(Tensor(a!) logits, Tensor positions, Tensor? sources, Tensor? end, "
    "Tensor labels, Tensor tokens, int first, int last, int ready_from, int vocab, bool shift, float softcap) -> ()",
    "gather_rows": "(Tensor hidden, Tensor positions, Tensor coeff, int count) -> Tensor",
    "scatter_rows_": "(Tensor(a!) out, Tensor product, Tensor positions, Tensor coeff, int first) -> ()",
    "clear_rows_": "(Tensor(a!) tile, Tensor positions, Tensor coeff) -> ()",
    "column_sums": "(Tensor tile, Tensor by_row) -> Tensor",
    "rescale_": "(Tensor(a!) values, Tensor factor) -> ()",
    "weight_product_": "(Tensor(a!) out, Tensor tile, Tensor hidden, Tensor positions, Tensor coeff, Tensor end) -> ()",
    "hidden_product_": "(Tensor(a!) out, Tensor(b!) tile, Tensor weight, Tensor positions, Tensor coeff, Tensor end) "
    "-> ()",
}
# the argument that says which backend runs
_PROBES = ("logits", "hidden", "out", "tokens", "coeff", "labels", "tile", "values")
_MODULES = {"reference": "geko_kernels.reference.ops", "triton": "geko_kernels.kernels", "cpp": "geko_kernels.cpu"}
_override = os.environ.get("GEKO_BACKEND", "")  # tests replace it
_loaded: dict[str, ModuleType] = {}


def _load(name: str) -> ModuleType:
    """The backend module `name`, or the reference with one warning where it can't be imported."""
    if name not in _MODULES:
        raise ValueError(f"GEKO_BACKEND must be one of {sorted(_MODULES)}, got {name!r}")
    try:
        _loaded[name] = importlib.import_module(_MODULES[name])
    except ImportError as error:
        if _override:
            raise
        warn_user(
            f"geko_kernels: the {name!r} backend is not available ({error}); using the plain PyTorch reference, "
            "which is right but slow. `python -m geko_kernels env` says how to get it."
        )
        _loaded[name] = importlib.import_module(_MODULES["reference"])
    return _loaded[name]


def backend_name(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Which backend runs on `device`: "triton", "cpp" or "reference" (always for float64)."""
    if dtype == torch.float64:
        return "reference"
    return _override or ("cpp" if device.type == "cpu" else "triton")


def _backend_of(tensor: Tensor) -> ModuleType:
    name = backend_name(tensor.device, tensor.dtype)
    return _loaded.get(name) or _load(name)


def recomputing() -> bool:
    """Whether activation checkpointing repeats a forward that has been counted.

    Non-reentrant: the repeat runs inside the backward, under saved-tensor hooks. Reentrant: there are no hooks, and
    the first forward ran under no_grad, uncounted.
    """
    return torch_private.graph_task_id() != -1 and torch_private.saves_by_hooks()


def counts(update: bool | None) -> bool:
    """Whether a call with this `update` counts its visits, unless it turns out to be `recomputing` without hooks.

    None: where gradients are enabled. True: always, but once: when a reentrant checkpoint repeats its forward in the
    backward, the first forward, under no_grad, has already counted.
    """
    if update is None:
        return torch.is_grad_enabled()
    return update and (torch.compiler.is_compiling() or torch_private.graph_task_id() == -1)


def _implement(op: str) -> Callable[..., Any]:
    """What the dispatcher runs: the backend's `op`. No visit counts twice; versions of written tensors are bumped."""
    arguments = torch_private.arguments_of(getattr(torch.ops.geko, op).default)
    written = [place for place, argument in enumerate(arguments) if argument.is_write]
    names = [argument.name for argument in arguments]
    update = names.index("update") if "update" in names else None
    check = op_checks.CHECKS[op]
    needed = [place for place, argument in enumerate(arguments) if str(argument.type) == "Tensor"]
    probe = names.index(next(name for name in _PROBES if name in names))

    def run(*args: Any) -> Any:
        if update is not None and args[update] and recomputing():
            args = (*args[:update], False, *args[update + 1 :])
        if args[probe] is None:  # the dispatcher accepts None for any tensor
            raise ValueError(f"{names[probe]} must be a tensor, got None")
        backend = _backend_of(args[probe])
        if op not in getattr(backend, "CHECKED", ()):
            for place in needed:
                if args[place] is None:
                    raise ValueError(f"{names[place]} must be a tensor, got None")
            check(*args)
        result = getattr(backend if hasattr(backend, op) else reference_rows, op)(*args)
        if written and (update is None or args[update]):
            torch.autograd.graph.increment_version(_tensors_at(written, args))
        return result

    return run


def _tensors_at(places: list[int], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among `arguments` at `places`, lists flattened."""
    tensors: list[Tensor] = []
    for place in places:
        given = arguments[place] if place < len(arguments) else None  # the dispatcher leaves defaults out
        if type(given) is list:
            tensors += given
        elif given is not None:
            tensors.append(given)
    return tensors


_library = torch.library.Library("geko", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implement(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"geko::{_name}", FAKES[_name], lib=_library)

token_stats = torch.ops.geko.token_stats.default
sample_update_ = torch.ops.geko.sample_update_.default
loss_forward_ = torch.ops.geko.loss_forward_.default
logits_grad = torch.ops.geko.logits_grad.default
logits_grad_ = torch.ops.geko.logits_grad_.default
scored_rows = torch.ops.geko.scored_rows.default
kept_rows_ = torch.ops.geko.kept_rows_.default
gradient_rows_ = torch.ops.geko.gradient_rows_.default
score_rows_ = torch.ops.geko.score_rows_.default
gather_rows = torch.ops.geko.gather_rows.default
scatter_rows_ = torch.ops.geko.scatter_rows_.default
clear_rows_ = torch.ops.geko.clear_rows_.default
column_sums = torch.ops.geko.column_sums.default
rescale_ = torch.ops.geko.rescale_.default
weight_product_ = torch.ops.geko.weight_product_.default
hidden_product_ = torch.ops.geko.hidden_product_.default


def _direct(op: str) -> Callable[..., Any]:
    """`op` of the backend without dispatcher and checks, which took a tenth of a small head's CPU time.

    For the linear loss: it is never traced, and the package itself makes its arguments.
    """
    names = [argument.name for argument in torch_private.arguments_of(getattr(torch.ops.geko, op).default)]
    probe = names.index(next(name for name in _PROBES if name in names))

    found: dict[tuple[str, str], Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        name = backend_name(args[probe].device, args[probe].dtype)
        if (name, _override) not in found:
            backend = _loaded.get(name) or _load(name)
            own = getattr(backend if hasattr(backend, op) else reference_rows, op)
            own = getattr(backend, "DIRECT", {}).get(op, own)
            found[name, _override] = own if _override else getattr(backend, "UNASKED", {}).get(op, own)
        return found[name, _override](*args)

    return run


_ROW_OPS = ("scored_rows", "kept_rows_", "gradient_rows_", "score_rows_", "gather_rows", "scatter_rows_")
_OWN_OPS = (*_ROW_OPS, "clear_rows_", "column_sums", "rescale_", "weight_product_", "hidden_product_", "sample_update_")
direct = SimpleNamespace(**{op: _direct(op) for op in _OWN_OPS})


def _bump_versions(columns: Sequence[Tensor], error: Tensor | None) -> None:
    """What the dispatcher does after an update: an autograd graph that has saved a column raises in its backward."""
    torch.autograd.graph.increment_version(columns if error is None else (*columns, error))


def direct_update_(columns: Sequence[Tensor], error: Tensor | None, update: bool, *call: Any) -> tuple[Tensor, ...]:
    """`direct.sample_update_`, which counts no visit twice.

    Args: call: the op's other arguments: those before `columns` as one tuple, those between `error` and `update` as
        another, and the weights.
    """
    batch, options, *weights = call
    update = update and not recomputing()
    outcome = direct.sample_update_(*batch, columns, error, *options, update, *weights)
    if update:
        _bump_versions(columns, error)
    return outcome


def _planning(logits: Tensor, labels: Tensor, other: Tensor | None) -> ModuleType | None:
    """The backend, if it has plans and bypassing the dispatcher (14 us in Python) would go unnoticed; else None.

    It would be noticed if the call is traced, transformed or recorded, or if a tensor is a subclass or a lazy view.
    """
    if (
        torch.compiler.is_compiling()
        or type(logits) is not Tensor
        or type(labels) is not Tensor
        or (other is not None and type(other) is not Tensor)
        or logits.is_neg()
        or logits.is_meta
        or torch_private.watched()
    ):
        return None
    backend = _backend_of(logits)
    return backend if hasattr(backend, "planned_loss_forward") else None


def planned_loss_forward(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    rules: Tensor,
    weights: Tensor,
    num_items: Tensor | None,
    columns: Sequence[Tensor],
    error: Tensor | None,
    stats: bool,
    foresight: tuple[Tensor, Any] | None,
    inplace: bool,
    *options: Any,
) -> tuple[Tensor, Any, Tensor, Tensor | None, Tensor | None] | None:
    """`kernels.forward.planned_loss_forward` where it can stand in for `loss_forward_`, else None."""
    backend = _planning(logits, labels, sample_ids)
    if backend is None or not labels.numel():
        return None
    update = options[-1]
    if update and recomputing():
        update, options = False, (*options[:-1], False)
    if _override or torch_private.saves_by_hooks():
        foresight = None  # a backend was asked for by name, or hooks may give the backward other logits
    args = (logits, labels, sample_ids, rules, weights, num_items, columns, error, stats)
    outcome = backend.planned_loss_forward(*args, foresight, inplace, *options)
    if inplace and outcome[-1] is not None:
        torch.autograd.graph.increment_version(logits)
    if update:
        _bump_versions(columns, error)
    return outcome


def native(values: Tensor) -> ModuleType | None:
    """The C++ backend if it is what runs on `values`, else None: its ops need no Python between them and the caller."""
    if values.device.type != "cpu":
        return None
    backend = _backend_of(values)
    return backend if hasattr(backend, "CHECKED") else None


def native_update_(
    backend: ModuleType, op: str, columns: Sequence[Tensor], error: Tensor | None, stats: bool, update: bool, *call: Any
) -> tuple[Tensor, ...]:
    """`op`, "loss_forward_" or "sample_update_", of `backend` as one call; statistics are empty without `stats`.

    Args: call: its other arguments: those before `columns` as one tuple, those between `error` and `update` as
        another, and the weights.
    Raises: RuntimeError where a label or an id is out of range, before anything is counted.
    """
    batch, options, *weights = call
    update = update and not recomputing()
    outcome = getattr(backend, op)(*batch, columns, error, *options, update, *weights, True, stats)
    if update:
        _bump_versions(columns, error)
    return outcome


def planned_logits_grad(
    logits: Tensor,
    labels: Tensor,
    plan: Any,
    kept: Tensor,
    grad_output: Tensor,
    inplace: bool,
    predicted: Tensor | None,
    prediction: tuple[Tensor, Tensor],
) -> Tensor | None:
    """`kernels.forward.planned_logits_grad` where it can stand in for `logits_grad` or `logits_grad_`, else None.

    With `predicted`, `kernels.forward.predicted_logits_grad`: in place always, as the logits are gone.
    """
    backend = _planning(logits, labels, grad_output)
    if inplace and predicted is not None:
        backend = _load("triton")
    elif backend is None or torch_private.batched(grad_output) or not plan.fits(logits, labels):
        return None
    if predicted is None:
        grad = backend.planned_logits_grad(logits, labels, plan, kept, grad_output, inplace)
    else:
        grad = backend.predicted_logits_grad(logits, labels, plan, kept, grad_output, predicted, *prediction)
    if inplace:
        torch.autograd.graph.increment_version(logits)
    return grad
