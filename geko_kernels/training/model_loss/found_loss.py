"""Finds out how the model's loss is computed, with the same result on all processes."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import logging

from geko_kernels.training.model_loss.few_rows import few_rows
from geko_kernels.training.model_loss.head import LossHead, find_head
from geko_kernels.training.model_loss.loss_form import WAY_OUT, LossForm, Question, find_loss_form
from geko_kernels.training.model_loss.own_loss import Route
from geko_kernels.training.model_loss.untouched import untouched
from geko_kernels.training.processes import in_step, rank_and_world

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
) -> FoundLoss:
    """Determine the loss of `model` from a few rows of `inputs`, and whether its head can be fused with the loss.

    All processes call it. How often the model is asked depends on its answers, and under FSDP all processes take part
    in each forward. So all ask about the batch of the first process, and go by the answers that it gets.

    Args:
        model: as `module_to_call` gives it; `base` is without PEFT and torch.compile too.
        inputs: the first training batch, with labels and sample_ids.
        shift: set by the user: the cross-entropy of the logits is trained, and the model's own loss is not tested.
        takes_num_items: Trainer passes `num_items_in_batch` to the model.
        routes: the ways in which the model can be called in training, the best first.
        fuse: look for a head.

    Raises:
        ValueError: GEKO cannot train the model's own loss; gives the figures that show it.
    """
    in_step(lambda: check_labels(inputs[label_name]))
    inputs, label_name = _of_the_first(inputs, label_name)
    labels, sample_ids = inputs[label_name], inputs.get("sample_ids")
    rest = {name: value for name, value in inputs.items() if name not in (label_name, "sample_ids", "shift_labels")}
    with untouched(model, labels.device):
        question = _question(model, base, rest, labels, sample_ids, label_name)
        return _ask(question, labels, shift, takes_num_items, routes, fuse)


def check_labels(labels: Tensor) -> None:
    """Raise `ValueError` for labels that are not the numbers of classes."""
    if labels.is_floating_point():
        raise ValueError(
            f"GEKO's loss is a cross-entropy over classes: labels must be integers, got {labels.dtype}; train a "
            "regression, or several labels at once, with transformers.Trainer"
        )


def _of_the_first(inputs: Mapping[str, Any], label_name: str) -> tuple[dict[str, Any], str]:
    """The batch of the first process and the name of its labels; a value that cannot be pickled is each one's own."""
    rank, world = rank_and_world()
    if world == 1:
        return dict(inputs), label_name
    device = str(inputs[label_name].device)
    shared: list[Any] = [None]
    if rank == 0:
        shared = [(label_name, device, {name: _pickled(value) for name, value in inputs.items()})]
    dist.broadcast_object_list(shared, src=0)
    if rank == 0:
        return dict(inputs), label_name
    label_name, theirs, values = shared[0]
    first = {}
    for name, data in values.items():
        if data is not None:
            first[name] = torch.load(io.BytesIO(data), map_location={theirs: device}, weights_only=False)
        elif name in inputs:
            first[name] = inputs[name]
    return first, label_name


def _pickled(value: Any) -> bytes | None:
    data = io.BytesIO()
    try:
        torch.save(value, data)  # unlike pickle it can be loaded to another device, however deep a tensor lies
    except Exception:  # any error of the value's class
        return None
    return data.getvalue()


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
