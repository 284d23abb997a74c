"""Finds out how the model's loss is computed, with the same result on all processes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import logging

from geko_kernels.training.model_loss.few_rows import few_rows
from geko_kernels.training.model_loss.head import LossHead, find_head
from geko_kernels.training.model_loss.loss_form import WAY_OUT, LossForm, Question, find_loss_form
from geko_kernels.training.model_loss.own_loss import Route
from geko_kernels.training.model_loss.untouched import untouched

logger = logging.get_logger(__name__)
_ROWS, _TOKENS = 4, 64  # of the first batch, for the test


class FoundLoss(NamedTuple):
    """How the model's loss is computed; constant during a run."""

    form: LossForm
    own: bool  # the model computes a loss if it gets labels
    head: LossHead | None  # fused with the loss; None: the loss is computed from the model's logits


def find_loss_of(
    model: nn.Module,
    base: nn.Module,
    inputs: Mapping[str, Any],
    label_name: str,
    *,
    shift: bool | None,
    takes_num_items: bool,
    routes: Sequence[Route],
    fuse: bool,
    processes: int,
) -> FoundLoss:
    """Determine the loss of `model` from a few rows of `inputs`, and whether its head can be fused with the loss.

    Args:
        model: as `module_to_call` gives it; `base` is without PEFT and torch.compile too.
        inputs: the first training batch, with labels and sample_ids.
        shift: set by the user: the cross-entropy of the logits is trained, and the model's own loss is not tested.
        takes_num_items: Trainer passes `num_items_in_batch` to the model.
        routes: the ways in which the model can be called in training, the best first.
        fuse: look for a head.
        processes: all of them call this and reach the same decision.

    Raises:
        ValueError: GEKO cannot train the model's own loss; gives the figures that show it.
    """
    rest = {name: value for name, value in inputs.items() if name not in (label_name, "sample_ids", "shift_labels")}
    labels, sample_ids = inputs[label_name], inputs.get("sample_ids")
    if labels.is_floating_point():
        raise ValueError(
            f"GEKO's loss is a cross-entropy over classes: labels must be integers, got {labels.dtype}; train a "
            "regression, or several labels at once, with transformers.Trainer"
        )
    found, error = None, None
    if processes > 1:
        rest, labels, sample_ids = _of_the_first(rest, labels, sample_ids)
    with untouched(model, labels.device):
        try:
            question = _question(model, base, rest, labels, sample_ids, label_name)
            found = _ask(question, labels, shift, takes_num_items, routes, fuse)
        except Exception as reason:
            error = reason
    if processes > 1:
        found = _agreed(found, error, processes)
    if error is not None:
        raise error
    assert found is not None
    return found


def _of_the_first(
    inputs: dict[str, Any], labels: Tensor, sample_ids: Tensor | None
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """The batch of process 0, in all processes: what is not a tensor stays each one's own.

    How often the model is asked depends on its answers, and under FSDP all processes take part in each forward.
    """
    mine = {"inputs": {k: v for k, v in inputs.items() if isinstance(v, Tensor)}, "labels": labels, "ids": sample_ids}
    shared: list[Any] = [send_to_device(mine, "cpu")]
    dist.broadcast_object_list(shared, src=0)
    first = send_to_device(shared[0], labels.device)
    return {**inputs, **first["inputs"]}, first["labels"], first["ids"]


def _question(
    model: nn.Module,
    base: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    sample_ids: Tensor | None,
    label_name: str,
) -> Question:
    """A test on a few rows, cut to a few tokens; on the whole batch if the model fails on those."""
    few = few_rows(inputs, labels, sample_ids, _ROWS, _TOKENS)
    if few is not None and computes_loss(base, label_name):
        question = Question(model, base, *few, name=label_name)
        try:
            if question.is_finite():
                return question
            reason: object = "its loss is not finite"
        except Exception as error:
            reason = error
        logger.info(f"GEKOTrainer tests the model's loss on the whole first batch, as a part of it fails: {reason}")
    question = Question(model, base, inputs, labels, label_name)
    if computes_loss(base, label_name):
        _check_it_runs(question)
    return question


def _check_it_runs(question: Question) -> None:
    """Raise for labels that the model rejects; any other error of the model is raised as it is."""
    try:
        question.is_finite()
    except ValueError:
        raise
    except Exception as error:
        question.outputs(question.labels)  # raises the model's own error, as in training
        raise ValueError(
            f"the model accepts the labels of the first batch, but not test labels, which are its classes and -100 for "
            f"ignored labels ({type(error).__name__}: {error}). The model and the data have to mark ignored labels by "
            f"-100, torch's default `ignore_index`; or {WAY_OUT}"
        ) from error


def _ask(
    question: Question, labels: Tensor, shift: bool | None, takes_num_items: bool, routes: Sequence[Route], fuse: bool
) -> FoundLoss:
    form, own = None, computes_loss(question.base, question.name)
    if shift is None and own:
        form = find_loss_form(question, takes_num_items, routes)
        own = form is not None
    if form is None:
        form = LossForm(labels.dim() > 1 if shift is None else shift, Route.APART, prompt=question.prompt)
    try:
        if not fuse:
            raise ValueError("it is compiled or run by DeepSpeed")
        return FoundLoss(form, own, find_head(question, form))
    except ValueError as reason:
        logger.info(f"GEKOTrainer computes the loss from all logits of the model: {reason}")
        return FoundLoss(form, own, None)


def _agreed(found: FoundLoss | None, error: Exception | None, processes: int) -> FoundLoss | None:
    """`found`, with a head only if all processes have one; raises on all processes if one has failed."""
    mine = (None if error is None else str(error), None if found is None else (found.form, found.head is not None))
    all_of: list[Any] = [None] * processes
    dist.all_gather_object(all_of, mine)
    if error is not None or found is None:
        return None
    other = next((text for text, _ in all_of if text is not None), None)
    if other is not None:
        raise ValueError(f"on another process: {other}")
    if len({form for _, (form, _) in all_of}) > 1:
        raise ValueError(f"the processes find different losses in their first batches: {[form for _, form in all_of]}")
    return found if all(head for _, (_, head) in all_of) else found._replace(head=None)


def computes_loss(base: nn.Module, label_name: str) -> bool:
    """Whether the unwrapped model may compute a loss from labels, as those of Transformers do."""
    parameters = inspect.signature(base.forward).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return isinstance(base, PreTrainedModel) or label_name in parameters or takes_all


def trainer_counts(base: nn.Module) -> tuple[bool, bool]:
    """(the model gets `num_items_in_batch`, its count leaves out each row's first label), both as Trainer decides."""
    parameters = inspect.signature(base.forward).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    shifts = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return bool(getattr(base, "accepts_loss_kwargs", takes_all)), shifts and not encodes
