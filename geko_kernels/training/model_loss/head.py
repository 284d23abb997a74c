"""The head of a causal language model, fused with the loss, so that training never holds the logits.

The loss replaces the head's forward, so it runs inside the model's forward: under its autocast, with its sharded
parameters gathered, and where DDP sees which parameters are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geko_kernels.losses.linear import weighted_linear_loss
from geko_kernels.state import SampleState
from geko_kernels.training.model_loss.loss_form import LossForm, Question
from geko_kernels.training.model_loss.own_loss import Route, find_logits, find_loss, fit_labels, without_cross_entropy
from geko_kernels.training.processes import in_step


def find_head(question: Question, form: LossForm) -> LossHead:
    """The output embeddings of a language model, if the loss fused with them equals the model's own on test labels.

    Raises:
        ValueError: they are missing or cannot be fused; says why.
    """
    base = question.base
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if head is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings")
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"its output embeddings are a {type(head).__name__}, not a plain nn.Linear")
    if "forward" in vars(head):
        raise ValueError("the forward of its output embeddings is patched")
    for mode in (nullcontext, question.in_training):  # probes run in eval mode
        with mode():
            _check_head(question, head, form)
    return LossHead(head)


def _check_head(question: Question, head: nn.Linear, form: LossForm) -> None:
    labels = question.counted(next(question.made_up()), form)
    expected = in_step(lambda: _observe(question, head, form, labels))
    if expected is None:
        raise ValueError("its logits are not what its output embeddings return")
    try:
        loss, terms = in_step(lambda: _fused(question, head, form, labels))
    except Exception as error:  # any error of a head or a model without logits
        raise ValueError(f"it does not run without logits ({type(error).__name__}: {error})") from error
    others = question.other_terms(labels, form.route)
    if not (_close(loss, expected, 1e-2) and _close(terms, others, 1e-4)):
        raise ValueError(
            f"without logits its loss is {loss:.4f} + {terms:.4f}, with them {expected:.4f} + {others:.4f}"
        )


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


def _observe(question: Question, head: nn.Linear, form: LossForm, labels: Tensor) -> float | None:
    """The loss from the model's logits; None if they are not what its head returns."""
    returned: list[Tensor] = []

    def observe(hidden: Tensor) -> Tensor:
        returned.append(nn.Linear.forward(head, hidden))
        return returned[-1]

    with _forward_of(head, observe):
        logits = find_logits(question.outputs(labels), labels)
    if len(returned) != 1 or logits.dim() != 3 or not logits.float().equal(returned[0].float()):
        return None
    return _plain(form, labels, logits)


def _plain(form: LossForm, labels: Tensor, logits: Tensor) -> float:
    """The loss of test labels from all logits."""
    labels = fit_labels(labels, logits, form.prompt)
    some, targets = (logits[:, :-1], labels[:, 1:]) if form.shift else (logits, labels)
    return float(nn.functional.cross_entropy(some.flatten(0, -2).float(), targets.flatten()))


def _fused(question: Question, head: nn.Linear, form: LossForm, labels: Tensor) -> tuple[float, float]:
    """The same with the fused head, gradients included, and the model's other terms.

    A large number is added to the head's result, so that any other use of the logits shows.
    """

    def forward(hidden: Tensor) -> Tensor:
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            targets = fit_labels(labels, hidden, form.prompt)
            loss = weighted_linear_loss(
                hidden, head.weight, targets, bias=head.bias, reduction="token_mean", shift=form.shift
            )
            torch.autograd.grad(loss, hidden)
        return loss.detach() + _MARK

    with _forward_of(head, forward), without_cross_entropy(question.base, form.route):
        outputs = question.model(**question.few) if form.route is Route.APART else question.outputs(labels)
    loss = find_logits(outputs, labels)
    if loss.dim():
        raise ValueError(f"its logits should be the loss, but have shape {tuple(loss.shape)}")
    terms = find_loss(outputs) if form.route.has_terms else None
    return float(loss) - _MARK, 0.0 if terms is None else float(terms)


_MARK = 1024.0
STEP_MIB = 512  # of logits that a step of training holds at a time, see `step_budget`


@contextmanager
def _forward_of(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


class LossHead:
    """A head whose forward can return the loss of its logits instead.

    One object serves the whole run: a compiled model is recompiled for each new function that replaces a forward.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.layer = head
        reason = "GEKO's fused head needs the numbers of rows on the host: compile the model without fullgraph=True"
        self._forward = torch.compiler.disable(self._loss_of, reason=reason)
        self._call: tuple[Any, ...] = ()

    @contextmanager
    def returns_loss(
        self,
        labels: Tensor,
        sample_ids: Tensor | None,
        state: SampleState | None,
        prompt: bool,
        options: dict[str, Any],
    ) -> Iterator[list[Any]]:
        """Inside the context the head returns `weighted_linear_loss`'s loss; yields a list for its other results."""
        found: list[Any] = []
        self._call = labels, sample_ids, state, prompt, options, found
        with _forward_of(self.layer, self._forward):
            yield found
        self._call = ()

    def _loss_of(self, hidden: Tensor) -> Tensor:
        labels, sample_ids, state, prompt, options, found = self._call
        arguments = (hidden, self.layer.weight, fit_labels(labels, hidden, prompt), sample_ids, state)
        options = {"bias": self.layer.bias, "chunk_mib": step_budget(self.layer.weight, hidden.device), **options}
        loss, *others = weighted_linear_loss(*arguments, reduction="token_mean", **options)
        found += others
        return loss


def step_budget(weight: Tensor, device: torch.device) -> int | None:
    """`chunk_mib` for a step of training, whose memory is highest at the loss, and of which the loss is a small part.

    A fill more costs the traffic of dW's float32 sum, 8 bytes an element. If dW has 2 bytes an element, that sum also
    takes memory of its own, often more than the smaller buffer saves: None, the default of `weighted_linear_loss`.
    """
    narrow = weight.requires_grad and weight.element_size() == 2
    return None if narrow or device.type == "cpu" else STEP_MIB
