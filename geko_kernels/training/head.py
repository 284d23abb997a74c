"""The head of a causal language model, computed together with the loss: no logits are held in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model

from geko_kernels.linear_loss import weighted_linear_loss
from geko_kernels.loss import SampleStats
from geko_kernels.state import SampleState

_CHECKED = 8  # tokens of one sample on which the head is tried


def find_head(model: nn.Module) -> nn.Linear:
    """The output embeddings of a causal language model of Transformers, adapted by PEFT or not.

    Raises:
        ValueError: the model has none that the loss could take over; says why.
    """
    base = unwrap_peft_model(model)
    causal = isinstance(base, PreTrainedModel) and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if not causal:
        raise ValueError(f"{type(base).__name__} is not a causal language model of Transformers")
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"its output embeddings are a {type(head).__name__}, not a plain nn.Linear")
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks or hasattr(head.weight, "full_tensor"):
        raise ValueError("its output embeddings are hooked or sharded")
    return head


@contextmanager
def hidden_states_only(head: nn.Linear) -> Iterator[list[torch.dtype | None]]:
    """Inside, `head` returns its input. Yields a list to which each call adds its autocast dtype, None without."""
    calls: list[torch.dtype | None] = []

    def forward(hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        calls.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        return hidden

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield calls
    finally:
        del head.forward


@torch.no_grad()
def check_head(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> None:
    """Try on the first tokens of `inputs` that the model's logits are those of its head, neither scaled nor capped.

    Raises:
        ValueError: they are not, or nobody can say.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("its inputs hold no input_ids of shape (B, S)")
    few = {
        name: value[:1, :_CHECKED] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    trains = model.training
    model.eval()
    try:
        logits = getattr(model(**few), "logits", None)
        with hidden_states_only(head):
            hidden = getattr(model(**few), "logits", None)
    finally:
        model.train(trains)
    if logits is None or hidden is None:
        raise ValueError("its outputs have no attribute logits")
    if hidden.shape[-1] != head.in_features:
        raise ValueError("it changes what its output embeddings return")
    bias = None if head.bias is None else head.bias.float()
    again = F.linear(hidden.float(), head.weight.float(), bias)
    if again.shape != logits.shape or (again - logits.float()).norm() > 0.02 * again.norm():
        raise ValueError("its logits are not those of its output embeddings alone")


def head_loss(
    model: nn.Module,
    head: nn.Linear,
    inputs: Mapping[str, Any],
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    forward_only: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Any, SampleStats]:
    """`forward_loss` with `head` computed by `weighted_linear_loss`, in the precision that the model gives it."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only), hidden_states_only(head) as calls:
        outputs = model(**inputs)
    hidden, outputs.logits = outputs.logits, None
    weight, bias = (p.detach() if forward_only and p is not None else p for p in (head.weight, head.bias))
    with torch.autocast(hidden.device.type, calls[0], enabled=calls[0] is not None):
        hidden = hidden if calls[0] is not None else hidden.to(weight.dtype)
        arguments = (hidden, weight, labels.long(), sample_ids, state)
        loss, stats = weighted_linear_loss(*arguments, bias=bias, reduction="token_mean", **options)
    return loss, outputs, stats
