"""The one place where the trainer calls the model and the weighted loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geko_kernels.loss import SampleStats, weighted_loss
from geko_kernels.state import SampleState
from geko_kernels.training.head import head_loss


def forward_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    *,
    shift: bool,
    num_items: Tensor | int | None = None,
    forward_only: bool = False,
    head: nn.Linear | None = None,
) -> tuple[Tensor, Any, SampleStats]:
    """`weighted_loss(model(**inputs).logits, labels, sample_ids, state, reduction="token_mean")`.

    `inputs` hold neither labels nor sample_ids. With every weight 1 the loss is that of Transformers' models.

    forward_only: a probe: no graph, and the state counts the visits all the same.
    head: the model's output embeddings, to compute them with the loss; the outputs then hold no logits.

    Returns: loss (), the model's outputs, and the statistics of the visits.
    """
    if num_items is not None:  # 0 where a step has no label at all
        num_items = num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)
    options: dict[str, Any] = {"shift": shift, "num_items": num_items, "return_stats": True}
    if forward_only:
        options["update"] = True
    with torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only):
        if head is not None:
            return head_loss(model, head, inputs, labels, sample_ids, state, options)
        outputs = model(**inputs)
    if labels.is_floating_point():
        raise ValueError(f"GEKO's loss is a cross-entropy over classes: labels must be integers, got {labels.dtype}")
    logits = find_logits(outputs, labels)
    labels = labels.long() if labels.dim() < logits.dim() else labels.long().squeeze(-1)
    loss, stats = weighted_loss(logits, labels, sample_ids, state, reduction="token_mean", **options)
    return loss, outputs, stats


def find_logits(outputs: Any, labels: Tensor) -> Tensor:
    """The logits among a model's outputs: the tensor itself, key "logits", or the first that fits the labels.

    Raises:
        ValueError: there are none, by name of what there is instead.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("logits"), Tensor):
            return outputs["logits"]
        found = {name: type(value).__name__ for name, value in outputs.items()}
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] == labels.shape:
                return value
        found = {index: type(value).__name__ for index, value in enumerate(outputs)}
    else:
        found = {"output": type(outputs).__name__}
    raise ValueError(
        f"the model returned no logits for labels of shape {tuple(labels.shape)}, only {found}. GEKO computes the loss "
        "from the logits; a fused loss inside the model that returns logits=None has to be switched off"
    )


def auxiliary_loss(outputs: Any, model: nn.Module) -> Tensor | None:
    """The router's balancing loss of a mixture of experts, as the model itself would add it; None without one."""
    balance = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    factor = getattr(getattr(model, "config", None), "router_aux_loss_coef", None)
    return None if not isinstance(balance, Tensor) or not factor else factor * balance
