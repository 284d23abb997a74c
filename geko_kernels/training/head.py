"""The head of a causal language model, computed together with the loss: no logits are held in training.

The loss takes the place of the head's forward, so that it runs inside the model's: in its autocast, with its sharded
parameters gathered, and where DDP sees which parameters took part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"its output embeddings are a {type(head).__name__}, not a plain nn.Linear")
    if "forward" in vars(head):
        raise ValueError("the forward of its output embeddings is patched")
    return head


@contextmanager
def _forward_of(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def check_head(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> None:
    """Try on the first tokens of `inputs` that the model returns what its head does, neither scaled nor capped.

    Raises:
        ValueError: it does not, or nobody can say.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("its inputs hold no input_ids of shape (B, S)")
    few = {
        name: value[:1, :_CHECKED] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    returned: list[Tensor] = []

    def observe(hidden: Tensor) -> Tensor:
        returned.append(nn.Linear.forward(head, hidden))
        return returned[-1]

    trains = model.training
    model.eval()
    try:
        with _forward_of(head, observe):
            logits = getattr(model(**few), "logits", None)
        same = isinstance(logits, Tensor) and len(returned) == 1 and logits.float().equal(returned[0].float())
        if same:
            with _forward_of(head, lambda hidden: hidden.sum()):
                model(**few)  # what looks at the logits' shape fails here and not in training
    except Exception as error:
        raise ValueError(f"it does not run without logits ({type(error).__name__}: {error})") from error
    finally:
        model.train(trains)
    if not same:
        raise ValueError("its logits are not what its output embeddings return")


def head_loss(
    model: nn.Module,
    head: nn.Linear,
    inputs: Mapping[str, Any],
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    options: dict[str, Any],
) -> tuple[Tensor, Any, SampleStats]:
    """`forward_loss` with `head` computed by `weighted_linear_loss`; the outputs' logits are None."""
    found: list[SampleStats] = []

    def forward(hidden: Tensor) -> Tensor:
        arguments = (hidden, head.weight, labels.long(), sample_ids, state)
        loss, stats = weighted_linear_loss(*arguments, bias=head.bias, reduction="token_mean", **options)
        found.append(stats)
        return loss

    with _forward_of(head, forward):
        outputs = model(**inputs)
    loss, outputs.logits = outputs.logits, None
    return loss, outputs, found[0]
