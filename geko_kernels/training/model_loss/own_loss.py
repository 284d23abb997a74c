"""A model's forward without its own cross-entropy, so that only the other terms of its loss remain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from geko_kernels.torch_private import compiled_call, is_full_graph


class Route(Enum):
    """How the model is called, so that GEKO's loss replaces its cross-entropy and nothing else."""

    LOSS_FUNCTION = "with labels, its `loss_function` replaced"
    CROSS_ENTROPY = "with labels, F.cross_entropy and F.nll_loss replaced while it runs"
    UNUSED = "with labels, its loss left unused: it adds nothing to its cross-entropy, which cannot be replaced"
    APART = "without labels"

    @property
    def has_terms(self) -> bool:
        """Whether the model returns what it adds to its cross-entropy."""
        return self in (Route.LOSS_FUNCTION, Route.CROSS_ENTROPY)


@contextmanager
def without_cross_entropy(base: nn.Module, route: Route) -> Iterator[None]:
    """Inside the context the cross-entropy of `base`, which runs unwrapped, is 0, so its loss has only other terms."""
    if route is not Route.LOSS_FUNCTION:
        with _NoCrossEntropy() if route is Route.CROSS_ENTROPY else nullcontext():
            yield
        return
    own = vars(base)  # found before any submodule of that name, and never in a state_dict
    given = own.get("_loss_function")
    own["_loss_function"] = _zero_loss
    try:
        yield
    finally:
        del own["_loss_function"]
        if given is not None:
            own["_loss_function"] = given


def _zero_loss(*args: Any, **kwargs: Any) -> Tensor:
    """() float32; replaces a model's `loss_function`."""
    device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return torch.zeros((), dtype=torch.float32, device=device)


class _NoCrossEntropy(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is not F.cross_entropy and func is not F.nll_loss:
            return func(*args, **named)
        logits = args[0] if args else named["input"]
        target = args[1] if len(args) > 1 else named["target"]
        by_item = named.get("reduction") == "none"
        return torch.zeros(target.shape if by_item else (), device=logits.device)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and DistributedDataParallel."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def module_to_call(model: nn.Module) -> nn.Module:
    """`model` without DDP and torch.compile, but with a compiled wrapper that FSDP2 has sharded.

    accelerate compiles the model first, so the hooks that gather the weights are on that wrapper.
    """
    while (inner := _inside(model)) is not None and not isinstance(model, FSDPModule):
        model = inner
    return model


def is_ddp(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is among the wrappers of `model`."""
    inner = _inside(model)
    return isinstance(model, nn.parallel.DistributedDataParallel) or (inner is not None and is_ddp(inner))


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` is among the wrappers of `model`."""
    inner = _inside(model)
    return inner is not None and (hasattr(model, "_orig_mod") or is_compiled(inner))


def in_one_graph(model: nn.Module, base: nn.Module) -> bool:
    """Whether a part of `model` with the head of `base` was compiled with fullgraph=True: the head may not break it."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if head is None:
        return False
    return any(_is_one_graph(part) and any(head is inner for inner in part.modules()) for part in model.modules())


def _is_one_graph(part: nn.Module) -> bool:
    """By torch.compile(part), torch.compile(part.forward), part.compile(), or a decorator of its class's forward."""
    return any(map(is_full_graph, (vars(part).get("forward"), compiled_call(part), type(part).forward)))


def running(model: nn.Module, base: nn.Module) -> nn.Module:
    """What `model` runs as `base`: in accelerate's regional compilation a copy of it, whose blocks are compiled."""
    copied = False
    while True:
        copied |= "_orig_mod" in vars(model)  # torch.compile's own wrapper has it among its submodules
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return unwrap_peft_model(model) if copied else base
        model = model.module


def _inside(model: nn.Module) -> nn.Module | None:
    inner = getattr(model, "_orig_mod", None)  # first: a regionally compiled copy of a DDP model has both
    if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
    return inner if isinstance(inner, nn.Module) else None


def find_logits(outputs: Any, labels: Tensor) -> Tensor:
    """The logits among a model's outputs: the tensor itself, key "logits", or the first that fits the labels.

    Raises:
        ValueError: there are none; names the outputs.
    """
    if isinstance(outputs, Tensor):
        if outputs.dim():
            return outputs
        found = {"output": "a number"}
    elif isinstance(outputs, Mapping):
        if isinstance(outputs.get("logits"), Tensor):
            return outputs["logits"]
        found = {name: type(value).__name__ for name, value in outputs.items()}
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() and _fits(value, labels):
                return value
        found = {str(index): type(value).__name__ for index, value in enumerate(outputs)}
    else:
        found = {"output": type(outputs).__name__}
    raise ValueError(
        f"the model returned no logits for labels of shape {tuple(labels.shape)}, only {found}. GEKO computes the loss "
        "from an output `logits`: train a model with several heads with transformers.Trainer, and switch off a fused "
        "loss inside the model that returns logits=None"
    )


def _fits(logits: Tensor, labels: Tensor) -> bool:
    return logits.shape[:-1] == labels.shape or (*logits.shape[:-1], 1) == labels.shape


def find_loss(outputs: Any) -> Tensor | None:
    """The loss that a model returned, taken from where `transformers.Trainer` takes it; None without one."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0:
        return outputs[0]
    return None


def fit_labels(labels: Tensor, logits: Tensor, prompt: bool) -> Tensor:
    """`labels` int64 in the shape that the loss takes: (B, 1) of classes as (B,), one for each position.

    prompt: the model adds tokens before the sample's (prompt tuning), which get no label.
    """
    labels = labels.to(logits.device, torch.int64)
    if labels.dim() >= logits.dim() > 1 and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if prompt and labels.dim() == 2 and logits.dim() == 3 and logits.shape[1] > labels.shape[1]:
        labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    return labels
