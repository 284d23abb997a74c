"""Determines which loss a model trains, by running the model on a few rows before its first training step.

Transformers' models do not say whether they shift labels, add terms to their cross-entropy, or weight it. So the model
computes its own loss for test labels, and GEKO's plain loss of the same logits has to equal it. Test labels give a
clear answer, as they have many classes and some ignored positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geko_kernels.torch_private import version_of
from geko_kernels.training.model_loss.few_rows import HIDDEN
from geko_kernels.training.model_loss.own_loss import Route, find_logits, find_loss, fit_labels, without_cross_entropy
from geko_kernels.training.processes import in_step
from geko_kernels.training.random_numbers import RandomNumbers

_CLASSES = 64  # up to this many classes are all tested; of more, a random choice
_ROUNDS = 4  # rounds of test labels, if each row has one label
_IGNORED = -100


class LossForm(NamedTuple):
    """The settings with which GEKO's loss equals the model's own if every weight is 1."""

    shift: bool  # position t predicts label t + 1
    route: Route
    counts: bool = False  # the model divides by `num_items_in_batch`, as counted by Trainer
    prompt: bool = False  # its logits have more positions than its inputs: prompt tuning
    masks: bool = False  # labels with `attention_mask` 0 do not count

    def counted(self, labels: Tensor, attention_mask: Any) -> Tensor:
        """`labels`, with -100 for those that do not count."""
        hidden = hidden_labels(labels, attention_mask) if self.masks else None
        return labels if hidden is None else labels.masked_fill(hidden, _IGNORED)


class _Answer(NamedTuple):
    """One forward of the model with labels."""

    own: float  # the model's loss
    tolerance: float
    plain: dict[LossForm, float]  # the cross-entropy of its logits
    valid: dict[LossForm, int]  # how many labels count in it

    def equals(self, loss: float) -> bool:
        return abs(self.own - loss) <= self.tolerance

    def fits(self, form: LossForm, terms: float) -> bool:
        """Whether it is the cross-entropy in that form plus `terms`; a mean of no labels is NaN in both."""
        if not self.valid[form] and not math.isfinite(self.own):
            return True
        return self.equals(self.plain[form] + terms)


class Question:
    """A model, a `few` rows of its inputs (without labels), and ways to run them; all processes get the same answers.

    Args:
        model: as `module_to_call` gives it; `base` is without PEFT and torch.compile too.
        labels: of the few rows; the test labels have their shape and their name.
    """

    def __init__(self, model: nn.Module, base: nn.Module, few: Mapping[str, Any], labels: Tensor, name: str) -> None:
        self.model, self.base, self.few, self.labels, self.name = model, base, few, labels, name
        self.prompt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        self.forms = [
            LossForm(s, Route.APART, prompt=self.prompt)
            for s in ((True, False) if labels.dim() > 1 and labels.shape[-1] > 1 else (False,))
        ]
        if hidden_labels(labels, few.get("attention_mask")) is not None:
            self.forms += [form._replace(masks=True) for form in self.forms]
        self.random = RandomNumbers(labels.device, model)
        self._classes: int | None = None
        self._versions = {name: version_of(value) for name, value in model.named_parameters()}

    def outputs(self, labels: Tensor, **more: Any) -> Any:
        """The model's outputs, with the same random numbers at each call."""
        self.random.restore()
        return self.model(**self.few, **{self.name: labels}, **more)

    def answer(self, labels: Tensor, **more: Any) -> _Answer | None:
        """One forward with `labels`; None if the model returns no loss."""
        return in_step(lambda: self._answer(labels, **more))

    def _answer(self, labels: Tensor, **more: Any) -> _Answer | None:
        outputs = self.outputs(labels, **more)
        own = find_loss(outputs)
        if own is None:
            return None
        if own.numel() != 1:
            raise ValueError(f"the model's loss must be a scalar, got shape {tuple(own.shape)}")
        logits = find_logits(outputs, labels)
        counted = {form: self.counted(labels, form) for form in self.forms}
        rows = {
            form: _rows(logits, fit_labels(some, logits, self.prompt), form.shift) for form, some in counted.items()
        }
        plain = {form: float(F.cross_entropy(*pair)) for form, pair in rows.items()}
        valid = {form: int(targets.ne(_IGNORED).sum()) for form, (_, targets) in rows.items()}
        tolerance = _relative_error(own, logits, max(valid.values())) * max(1.0, abs(float(own)))
        return _Answer(float(own), tolerance, plain, valid)

    def other_terms(self, labels: Tensor, route: Route) -> float:
        """The model's loss without its cross-entropy."""
        if not route.has_terms:
            return 0.0

        def term() -> float:
            with without_cross_entropy(self.base, route):
                loss = find_loss(self.outputs(labels))
            return float("nan") if loss is None else float(loss)

        return in_step(term)

    def counted(self, labels: Tensor, form: LossForm) -> Tensor:
        return form.counted(labels, self.few.get("attention_mask"))

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Inside the context the model is in training mode.

        Raises:
            ValueError: its forward writes to a parameter; restoring it would take a copy of all parameters.
        """
        before = [
            (name, value, version_of(value), self._checksum_of(name, value))
            for name, value in self.model.named_parameters()
        ]
        self.model.train()
        try:
            with warnings.catch_warnings():  # from activation checkpointing without gradients
                warnings.simplefilter("ignore")
                yield
        finally:
            self.model.eval()
        for name, value, version, checksum in before:
            if version_of(value) != version and (checksum is None or not checksum.equal(_checksum(value))):
                raise ValueError(
                    f"the model's forward writes to its parameter {name!r} in training mode, so testing the model's "
                    f"loss would change it: make it a buffer, or {WAY_OUT}"
                )

    def _checksum_of(self, name: str, value: Tensor) -> Tensor | None:
        """A checksum of a parameter; None for one that eval forwards write to, as PEFT's `target_parameters` does."""
        return None if self._versions.get(name) == version_of(value) else _checksum(value)

    def made_up(self) -> Iterator[Tensor]:
        """Test labels for the few rows, on their device; (B, S) labels end with the rows' own."""
        classes = self.num_classes()
        if classes < 2:
            raise ValueError(
                "the model has one output, which is regression: GEKO's loss needs at least two classes. Give the model "
                "num_labels=2 or more, or train a regression with transformers.Trainer"
            )
        generator = torch.Generator().manual_seed(0)
        if self.labels.dim() == 1 or self.labels.shape[-1] == 1:
            rows = self.labels.shape[0]
            rounds = -(-classes // rows) if classes <= _CLASSES else _ROUNDS
            order = torch.randperm(classes, generator=generator).repeat(-(-rounds * rows // classes))
            for part in order[: rounds * rows].split(rows):
                yield part.to(self.labels.device).view(self.labels.shape)
            return
        for _ in range(2):
            labels = torch.randint(classes, self.labels.shape, generator=generator)
            if classes <= self.labels.numel():
                labels.view(-1)[:classes] = torch.randperm(classes, generator=generator)
            ignored = torch.rand(labels.shape, generator=generator) < 0.25
            ignored[0, labels.shape[1] // 2 :] = labels.shape[1] > 3  # rows with unequal numbers of labels
            ignored[-1, :HIDDEN] = ignored[-1, -HIDDEN:] = False
            special = self.special_classes()[: labels.shape[1] - 1]
            labels[0, 1 : 1 + len(special)] = torch.tensor(special)
            ignored[0, 1 : 1 + len(special)] = False
            yield labels.masked_fill(ignored, _IGNORED).to(self.labels.device)
        valid = self.labels[self.labels != _IGNORED]
        if valid.numel() and 0 <= int(valid.min()) <= int(valid.max()) < classes:
            yield self.labels.contiguous()

    def special_classes(self) -> list[int]:
        """Token ids whose labels a loss may ignore, such as padding."""
        config = getattr(self.base, "config", None)
        named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos")]
        return sorted({0, *(k for k in named if isinstance(k, int) and 0 < k < self.num_classes())})

    def is_finite(self) -> bool:
        """Whether the model runs on the test with a finite loss, or with none."""
        answer = self.answer(next(self.made_up())) if self.num_classes() > 1 else None
        return answer is None or math.isfinite(answer.own)

    def num_classes(self) -> int:
        """The range of labels that the model accepts."""
        if self._classes is None:
            labels = torch.full_like(self.labels, self.plain_label())
            self._classes = in_step(lambda: find_logits(self.outputs(labels), labels).shape[-1])
            config = getattr(self.base, "config", None)
            if getattr(config, "is_encoder_decoder", False):  # labels are inputs of the decoder
                embeddings = self.base.get_input_embeddings()  # type: ignore[operator]
                self._classes = min(self._classes, getattr(embeddings, "num_embeddings", self._classes))
        return self._classes

    def first_position(self) -> Tensor:
        """Labels with only the first position set, so a loss that shifts has none left."""
        labels = torch.full_like(self.labels, _IGNORED)
        labels[:, 0] = self.plain_label()
        return labels

    def plain_label(self) -> int:
        """0, or 1 if 0 is padding: a decoder may look for the last label that is not padding."""
        return int(getattr(getattr(self.base, "config", None), "pad_token_id", None) == 0)


def _checksum(values: Tensor) -> Tensor:
    """(2,) int64: a checksum of the bytes of `values`, which takes no memory."""
    data = values.detach().contiguous().view(-1).view(torch.uint8)
    return torch.stack([data.sum(dtype=torch.int64), data[::2].sum(dtype=torch.int64)])


def find_loss_form(question: Question, takes_num_items: bool, routes: Sequence[Route]) -> LossForm | None:
    """The form in which GEKO's loss equals the model's own; None if the model returns no loss.

    Call it under `torch.no_grad` with the model in eval mode, since with dropout two forwards differ.

    takes_num_items: Trainer passes `num_items_in_batch` to the model.
    routes: the ways in which the model can be called in training, the best first.

    Raises:
        ValueError: there is none; gives both figures.
    """
    asked = list(question.made_up())
    answers = [question.answer(labels) for labels in asked]
    known = [answer for answer in answers if answer is not None]
    if len(known) < len(answers):
        return None
    for route in routes:
        terms = [question.other_terms(labels, route) for labels in asked]
        fits = [f for f in question.forms if all(a.fits(f, t) for a, t in zip(known, terms, strict=True))]
        fits = [form for form in fits if not form.masks] or fits
        if len(fits) > 1:
            fits = [form for form in fits if form.shift == _shifts_first(question, route)]
        if fits:
            _check_training(question, fits[0], route, asked[0])
            counts = takes_num_items and _counts(question, fits[0], known[0], terms[0], asked[0])
            return fits[0]._replace(route=route, counts=counts)
    if not math.isfinite(known[0].own):
        raise ValueError(
            f"the model's loss is {known[0].own} before its first step: its weights or the first batch hold NaN or "
            "infinity, or a row has no token to attend to"
        )
    raise ValueError(_refusal(known[0], ""))


def _relative_error(own: Tensor, logits: Tensor, valid: int) -> float:
    """The error allowed for a loss: more if the model computed it, or the loss of each label, in low precision.

    Autocast may return rounded values in float32; then the logits show their precision.
    """
    if own.dtype in (torch.float16, torch.bfloat16):
        return torch.finfo(own.dtype).eps
    for dtype in (torch.bfloat16, torch.float16):
        if logits.to(dtype).to(logits.dtype).equal(logits):
            return max(1e-4, torch.finfo(dtype).eps / max(valid, 1) ** 0.5)
    return 1e-4


def _check_training(question: Question, form: LossForm, route: Route, labels: Tensor) -> None:
    """Refuse a model that smooths its labels or has a second head in training mode only."""
    if route is Route.APART:  # it may then return no logits
        return
    with question.in_training():
        answer, term = question.answer(labels), question.other_terms(labels, route)
    if answer is not None and not answer.equals(answer.plain[form] + term):
        raise ValueError(_refusal(answer, ", in training mode,"))


def _shifts_first(question: Question, route: Route) -> bool:
    """Whether the model shifts, if the logits give every label the same loss."""
    labels = question.first_position()
    answer = question.answer(labels)
    assert answer is not None
    unshifted = next(form for form in question.forms if not form.shift)
    return not answer.equals(answer.plain[unshifted] + question.other_terms(labels, route))


def _counts(question: Question, form: LossForm, before: _Answer, term: float, labels: Tensor) -> bool:
    """Whether the model divides by `num_items_in_batch` if it gets one."""
    valid = before.valid[form]
    items = 3 * valid + 1
    answer = question.answer(labels, num_items_in_batch=torch.tensor(items, device=labels.device))
    assert answer is not None
    if answer.equals(answer.plain[form] * valid / items + term):
        return True
    if answer.equals(before.own):
        return False
    raise ValueError(
        f"the model's own loss of {valid} labels is {before.own:.4f}, and {answer.own:.4f} with num_items_in_batch="
        f"{items}: GEKO cannot tell what it divides by. Set `accepts_loss_kwargs = False` on the model, or {WAY_OUT}"
    )


def hidden_labels(labels: Tensor, attention_mask: Any) -> Tensor | None:
    """(B, S) bool: labels of tokens that are not attended to; None if there are none."""
    if not isinstance(attention_mask, Tensor) or labels.dim() != 2 or attention_mask.shape != labels.shape:
        return None
    hidden = attention_mask.to(labels.device) == 0
    return hidden if bool(hidden.any()) else None


def _rows(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """(logits (N, V) float32, labels (N,)) as F.cross_entropy takes them."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            "GEKO's loss takes logits (B, S, V) with labels (B, S), or (B, V) with (B,). The model's logits have shape "
            f"{tuple(logits.shape)}, its labels {tuple(labels.shape)}: train it with transformers.Trainer"
        )
    some, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    return some.flatten(0, -2).float(), targets.flatten()


WAY_OUT = (
    "GEKOTrainingArguments(shift_labels=True or False) trains the cross-entropy of the logits instead, with the "
    "labels shifted or not"
)


def _refusal(answer: _Answer, when: str) -> str:
    how = {True: "with labels shifted by one", False: "without a shift"}
    told = ", ".join(f"{loss:.4f} {how[form.shift]}" for form, loss in answer.plain.items() if not form.masks)
    return (
        f"the model's own loss{when} is not a plain cross-entropy of its logits: on test labels it is "
        f"{answer.own:.4f}, the cross-entropy {told}. The model may weight classes, smooth labels, or have a second "
        f"head or a custom loss function, which GEKO would drop. Train it with transformers.Trainer; or {WAY_OUT}"
    )
