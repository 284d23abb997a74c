"""`weighted_loss`: cross-entropy weighted by what each sample still has to teach."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from geko_kernels import ops
from geko_kernels.config import GEKOConfig
from geko_kernels.reference import Reduction, layout
from geko_kernels.state import NO_ERROR, SampleState, raise_flagged, rules_tensor

REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "token_mean": Reduction.TOKEN_MEAN, "sum": Reduction.SUM}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SampleStats(NamedTuple):
    """What one call saw, one entry a visit in order of position; unused entries have sample_ids -1, 0 tokens, loss 0.

    M = B with one id a row; with one id a token M = B * S, used entries first.
    """

    sample_ids: Tensor  # (M,) int64
    num_tokens: Tensor  # (M,) int64: valid tokens
    loss: Tensor  # (M,) float32: mean over valid tokens, nats, before weighting
    confidence: Tensor  # (M,) float32: mean of max(softmax)
    accuracy: Tensor  # (M,) float32: share of tokens whose label has the largest logit
    correct: Tensor  # (M,) bool
    quality: Tensor  # (M,) float32
    q_value: Tensor  # (M,) float32
    bucket: Tensor  # (M,) uint8, a Bucket
    weight: Tensor  # (M,) float32: 0 where the visit has no valid token


class Visits(NamedTuple):
    """What the forward op returned: what the backward and `SampleStats` are made of. See `reference.sample_update_`."""

    loss: Tensor
    scale: Tensor
    coeff: Tensor
    token_visit: Tensor
    floats: Tensor
    ints: Tensor
    flags: Tensor
    tokens: Tensor

    def stats(self) -> SampleStats:
        loss, confidence, accuracy, quality, q_value, weight = self.floats.unbind()
        sample_ids, num_tokens = self.ints.unbind()
        bucket, correct = self.flags.unbind()
        return SampleStats(
            sample_ids, num_tokens, loss, confidence, accuracy, correct.bool(), quality, q_value, bucket, weight
        )


class _LogitsLoss(torch.autograd.Function):
    """Ties a loss that is already computed to the logits it came from."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, visits: Visits, shift: bool, softcap: float, inplace: bool) -> Tensor:
        return visits.loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, labels, visits, ctx.shift, ctx.softcap, ctx.inplace = inputs
        ctx.save_for_backward(logits, labels)
        # not saved but kept: under activation checkpointing these stay those of the forward that was counted
        ctx.visits = visits.tokens, visits.coeff, visits.scale, visits.token_visit

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        args = (grad_output, logits, labels, *ctx.visits, ctx.shift, ctx.softcap)
        with torch.no_grad():
            if ctx.inplace:
                ops.logits_grad_(*args)
                grad = logits
            else:
                grad = ops.logits_grad(*args)
        if torch.is_grad_enabled():
            grad = _NoSecondDerivative.apply(grad, logits)
        return grad, None, None, None, None, None


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient under create_graph: usable as a value, an error in the backward, never silently a constant."""

    @staticmethod
    def forward(grad: Tensor, logits: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None]:
        raise NotImplementedError("weighted_loss has no second derivative; use F.cross_entropy for one")


def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None = None,
    state: SampleState | None = None,
    *,
    reduction: str = "mean",
    shift: bool = False,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    softcap: float | None = None,
    update: bool = True,
    return_stats: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, SampleStats]:
    """Cross-entropy of each sample times the weight of its bucket; updates `state` by the way.

    With `l = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(B, S)`, `l_i` the
    mean of `l` over the valid tokens of visit i and `w_i` the weight of its bucket after this visit:

    - "mean": `sum(w_i * l_i) / N`, N the visits with a valid token;
    - "token_mean": `sum(w_i * l[t]) / num_items` over tokens; with all weights 1 this is `F.cross_entropy`;
    - "sum": `sum(w_i * l_i)`;  "none": `w_i * l_i`, one entry a visit.

    Args:
        logits: (B, S, V), or (B, V) where each row is one visit; float32, bfloat16, float16 or float64, any strides.
        labels: (B, S) or (B,) int64.
        sample_ids: int64, (B,): one sample a row; or (B, S): one id a token, each run of one id in a row is a visit,
            -1 is padding. None (without a state): every row is a visit.
        state: the learning state to read and update; None gives the plain loss, weight 1 for all.
        reduction: "mean", "token_mean", "sum" or "none".
        shift: causal-LM labels: position t predicts `labels[:, t + 1]`; the last position of a visit predicts nothing.
        ignore_index: label of tokens that do not count.
        num_items: the divisor of "mean" (visits) or "token_mean" (tokens) where the batch at hand is only a part:
            gradient accumulation, several processes.
        softcap: c means `logits = c * tanh(logits / c)` first.
        update: False reads the state and leaves it as it is; so does a call under `torch.no_grad`.
        return_stats: also return `SampleStats`.
        inplace: let the backward write the gradient over the logits, which nothing else may need then.

    Returns:
        The loss, float32: () or, for "none", one entry a visit; with `return_stats` a pair (loss, stats).
        A batch without valid token or weight gives 0 with zero gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
        IndexError: on the CPU, a label outside [0, V) or an id outside the table. On a GPU such a visit is left out
            and `state.check()` raises (at once with GEKO_DEBUG=1).

    Source: the GEKO document's weighted loss; see `reference.py` for every op in plain PyTorch.
    """
    check_batch("logits", logits, labels, sample_ids, state, reduction, shift, ignore_index, softcap)
    if inplace:
        _check_inplace(logits)
    code = REDUCTIONS[reduction]
    cap = float(softcap or 0.0)
    items = num_items_tensor(num_items, reduction, logits.device)
    logits_3d = logits if logits.dim() == 3 else logits.unsqueeze(1)  # (B, S, V)
    labels_2d = labels if labels.dim() == 2 else labels.unsqueeze(1)
    visits = _visit(logits_3d.detach(), labels_2d, sample_ids, state, items, code, ignore_index, shift, cap, update)
    loss = visits.loss
    if logits.requires_grad and torch.is_grad_enabled():
        overwrite = inplace and not torch.compiler.is_compiling()
        loss = _LogitsLoss.apply(logits_3d, labels_2d, visits, shift, cap, overwrite)
    return (loss, visits.stats()) if return_stats else loss


def _visit(
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    num_items: Tensor | None,
    reduction: int,
    ignore_index: int,
    shift: bool,
    softcap: float,
    update: bool,
) -> Visits:
    """Run the forward op with the state's columns; on the CPU look at the values of labels and ids first."""
    eager = not torch.compiler.is_compiling() and not isinstance(labels, FakeTensor)
    if eager and logits.device.type == "cpu":
        check_values(labels, sample_ids, state, logits.shape[-1], ignore_index, shift)
    rules, weights, columns = table_of(state, logits.device, eager)
    writes = state is not None and update and torch.is_grad_enabled()
    visits = Visits(
        *ops.loss_forward_(
            *(logits, labels, sample_ids, rules, weights, num_items, *columns),
            *(reduction, ignore_index, shift, softcap, writes),
        )
    )
    if eager:
        check_flag(columns[-1], state, logits.shape[-1])
    return visits


def table_of(
    state: SampleState | None, device: torch.device, eager: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Rules, weights and columns of `state` as `sample_update_` takes them; the columns end with the error flag."""
    if state is None:
        error = torch.full((), NO_ERROR, device=device) if eager and _debug() else None
        return *_plain_rules(device, eager), (*[None] * 9, error)
    columns = (
        *(state.q_value, state.confidence, state.loss_history, state.times_seen, state.bucket, state.wrong_streak),
        *(state.changed, state.claim, state.quarantined, state.error),
    )
    return state.rules, state.weights, columns


def _debug() -> bool:
    return os.environ.get("GEKO_DEBUG", "0") not in ("", "0")


def check_flag(error: Tensor | None, state: SampleState | None, vocab: int) -> None:
    """With GEKO_DEBUG=1: raise what the ops flagged, at once."""
    if error is not None and _debug():
        raise_flagged(error, len(state) if state is not None else -1, vocab)


_plain: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _plain_rules(device: torch.device, eager: bool) -> tuple[Tensor, Tensor]:
    """The default rules and weights 1, made once a device: a copy from the host would wait for it."""
    if eager and device in _plain:
        return _plain[device]
    pair = rules_tensor(GEKOConfig(), device), torch.ones(4, device=device)
    if eager:
        _plain[device] = pair
    return pair


def num_items_tensor(num_items: int | float | Tensor | None, reduction: str, device: torch.device) -> Tensor | None:
    if num_items is None:
        return None
    if reduction not in ("mean", "token_mean"):
        raise ValueError(f"num_items divides only reduction='mean' or 'token_mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            shape = tuple(num_items.shape)
            raise ValueError(f"num_items must be a number or a tensor of one element, got shape {shape}")
        return num_items.detach().reshape(()).to(device, torch.float32, non_blocking=True)
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"num_items must be a number or a tensor of one element, got {type(num_items).__name__}")
    if not 0 < num_items < math.inf:
        raise ValueError(f"num_items must be a finite number above 0, got {num_items}")
    return torch.ones((), device=device) * num_items  # torch.full would compile anew for every number


def check_batch(
    name: str,
    tokens: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    reduction: str,
    shift: bool,
    ignore_index: int,
    softcap: float | None,
) -> None:
    """What Python can see of a batch without its values; `tokens` is the argument `name`, one vector a token."""
    for key, tensor in ((name, tokens), ("labels", labels), ("sample_ids", sample_ids)):
        if not isinstance(tensor, Tensor) and not (key == "sample_ids" and tensor is None):
            hint = "; this model returned no logits" if key == "logits" and tensor is None else ""
            raise TypeError(f"{key} must be a torch.Tensor, got {type(tensor).__name__}{hint}")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{key} must be a plain tensor, got a {type(tensor).__name__}; use {key}.full_tensor()")
    if state is not None and not isinstance(state, SampleState):
        raise TypeError(f"state must be a SampleState or None, got {type(state).__name__}")
    if tokens.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tokens.dtype}")
    if tokens.dim() not in (2, 3) or tokens.shape[-1] < 1:
        size = "V" if name == "logits" else "H"
        raise ValueError(f"{name} must be (B, S, {size}) or (B, {size}) with {size} >= 1, got {tuple(tokens.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}; use labels.long()")
    if labels.shape != tokens.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(tokens.shape[:-1])} for {name} of {tuple(tokens.shape)}, got {tuple(labels.shape)}"
        )
    for key, where in (("labels", labels), ("sample_ids", sample_ids)):
        if where is not None and where.device != tokens.device:
            raise ValueError(f"{key} must be on the device of {name}, {tokens.device}, got {where.device}")
    _check_ids(labels, sample_ids, state)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {tuple(REDUCTIONS)}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if shift and tokens.dim() == 2:
        raise ValueError(f"shift=True needs {name} of 3 dimensions: in 2 there is no next position to predict")
    _check_softcap(softcap)


def _check_inplace(logits: Tensor) -> None:
    if logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace=True would write the gradient over a leaf tensor; pass the output of a model")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError("inplace=True cannot write over expanded logits (stride 0)")


def _check_softcap(softcap: float | None) -> None:
    if softcap is None:
        return
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a number above 0 or None, got {softcap!r}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number above 0 or None, got {softcap}")


def _check_ids(labels: Tensor, sample_ids: Tensor | None, state: SampleState | None) -> None:
    if sample_ids is None:
        if state is not None:
            raise ValueError("sample_ids must be given with a state: it says whose row each visit updates")
        return
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids must be int64, got {sample_ids.dtype}; use sample_ids.long()")
    allowed = (labels.shape[:1], labels.shape)[: labels.dim()]
    if sample_ids.shape not in allowed:
        shapes = " or ".join(str(tuple(shape)) for shape in allowed)
        raise ValueError(f"sample_ids must be {shapes}, got {tuple(sample_ids.shape)}")
    if state is not None and state.device != labels.device:
        raise ValueError(
            f"state must be on the device of the labels, {labels.device}, got {state.device}; make it with device=..."
        )


def check_values(
    labels: Tensor,
    sample_ids: Tensor | None,
    state: SampleState | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
) -> None:
    """On the CPU, where looking is cheap: raise before anything is counted."""
    suspect = bool(((labels < 0) & (labels != ignore_index)).any() or (labels >= vocab).any())
    if sample_ids is not None and sample_ids.numel() and state is not None and not suspect:
        suspect = bool(sample_ids.min() < -1 or sample_ids.max() >= state.num_samples)
    if suspect:
        rows = -1 if state is None else state.num_samples
        raise_flagged(layout(labels, sample_ids, rows, vocab, ignore_index, shift).error.clone(), rows, vocab)
