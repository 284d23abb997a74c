"""The one place where the trainer calls the model and the weighted loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geko_kernels import ops
from geko_kernels.losses.logits import weighted_loss
from geko_kernels.losses.results import SampleStats
from geko_kernels.state import SampleState
from geko_kernels.training.model_loss.head import LossHead
from geko_kernels.training.model_loss.loss_form import LossForm
from geko_kernels.training.model_loss.own_loss import Route, find_logits, find_loss, fit_labels, without_cross_entropy

_ENTROPY_ROWS = 256  # of logits in float32 at a time


class ModelLoss(NamedTuple):
    """The result of one forward."""

    loss: Tensor  # (): the weighted cross-entropy
    terms: Tensor | None  # (): what the model adds to its cross-entropy
    outputs: Any  # of the model; without logits if the head is fused
    stats: SampleStats
    entropy: Tensor | None = None  # if asked for: of each token, in the shape of the labels, 0 where none counts


def forward_loss(
    model: nn.Module,
    base: nn.Module,
    form: LossForm,
    head: LossHead | None,
    inputs: Mapping[str, Any],
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    *,
    label_name: str = "labels",
    shifted: Tensor | None = None,
    num_items: Tensor | int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    forward_only: bool = False,
    entropy: bool = False,
) -> ModelLoss:
    """`weighted_loss(model(**inputs).logits, labels, sample_ids, state, reduction="token_mean")`.

    With every weight 1, `loss + terms` is the model's own loss.

    Args:
        base: `model` without any wrapper; `form` and `head`: what was found for it.
        inputs: without labels and sample_ids.
        shifted: labels that a collator has already shifted, instead of `labels`.
        weights: `token_weights` beside the labels, `sample_weights`, or both.
        forward_only: a probe: no graph, but `state`, if given, counts the visits.
        entropy: of labels (B, S) return each token's.
    """
    shift = form.shift and shifted is None
    if num_items is not None:  # 0 if a step has no label at all
        num_items = torch.where(num_items > 0, num_items, 1) if isinstance(num_items, Tensor) else num_items or 1
    options: dict[str, Any] = {"shift": shift, "num_items": num_items, "return_stats": True, **(weights or {})}
    if weights and "token_weights" in weights and (form.prompt or shifted is not None):
        what = "prompt tuning, whose logits have more positions" if form.prompt else "a collator's shift_labels"
        raise ValueError(f"token_weights must match the labels and do not combine with {what}: leave out one of them")
    if form.prompt and sample_ids is not None and sample_ids.dim() == 2:
        raise ValueError(
            "prompt tuning does not work with packed samples, as PEFT lets the samples of a row attend to each other: "
            "pad the samples, each in its own row (packing=False, padding_free=False), or train LoRA"
        )
    if forward_only:
        options["update"] = state is not None
    targets = labels if shifted is None else shifted
    given = inputs if form.route is Route.APART else {**inputs, label_name: labels}
    with ExitStack() as stack:
        if head is not None:
            asked = {**options, "return_entropy": entropy}
            in_head = head.returns_loss(targets, sample_ids, state, form.prompt, asked)
            found = stack.enter_context(in_head)
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only))
        stack.enter_context(without_cross_entropy(base, form.route))
        outputs = model(**given)
    terms = find_loss(outputs) if form.route.has_terms else None
    if head is not None:
        loss, outputs.logits = outputs.logits, None
        return ModelLoss(loss, terms, outputs, *found)
    logits = find_logits(outputs, labels)
    targets = fit_labels(targets, logits, form.prompt)
    loss, stats = weighted_loss(logits, targets, sample_ids, state, reduction="token_mean", **options)
    found_entropy = _entropy(logits.detach(), targets, sample_ids, shift, weights or {}) if entropy else None
    return ModelLoss(loss, terms, outputs, stats, found_entropy)


def _entropy(
    logits: Tensor, labels: Tensor, sample_ids: Tensor | None, shift: bool, weights: Mapping[str, Tensor]
) -> Tensor:
    """The entropy that `weighted_linear_loss` returns: (B, S), from logits (B, S, V)."""
    if "token_weights" in weights:
        labels = labels.masked_fill(weights["token_weights"].to(labels.device) == 0, -100)
    rows, _, visits = ops.scored_rows(labels, sample_ids, logits.shape[-1], -100, shift)
    entropy, by_token = logits.new_zeros(labels.numel(), dtype=torch.float32), logits.flatten(0, 1)
    for some in rows[: int(visits[0])].split(_ENTROPY_ROWS):
        entropy[some] = torch.special.entr(by_token[some].float().softmax(-1)).sum(-1)
    return entropy.view(labels.shape)
