"""Random batches and states for the tests that compare two implementations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import geko_kernels as gk


@dataclass
class Case:
    """Everything one call of `weighted_loss` depends on; `options` are its keyword arguments."""

    logits: Tensor  # (B, S, V) in its dtype and strides
    labels: Tensor  # (B, S)
    sample_ids: Tensor | None
    state: gk.SampleState | None
    options: dict[str, Any] = field(default_factory=dict)
    upstream: float = 1.0  # scale of the incoming gradient

    def new_state(self, device: str = "cpu") -> gk.SampleState | None:
        """A copy of the state, so that several implementations start from the same rows."""
        if self.state is None:
            return None
        copy = gk.SampleState(len(self.state), self.state.config, device=device)
        copy.load_state_dict(self.state.state_dict())
        return copy


def random_state(
    draw_seed: int, num_samples: int, config: gk.GEKOConfig, weights: tuple[float, float, float]
) -> gk.SampleState:
    """A state whose samples have been visited between 0 and 8 times, some of them quarantined."""
    random = torch.Generator().manual_seed(draw_seed)
    state = gk.SampleState(num_samples, config)
    seen = torch.randint(0, 9, (num_samples,), generator=random)
    state.times_seen.copy_(seen)
    history = torch.rand(num_samples, 5, generator=random) * 1.5
    live = torch.arange(5) >= 5 - seen[:, None].clamp(max=5)
    state.loss_history.copy_(history * live)
    state.q_value.copy_(torch.where(seen > 0, torch.rand(num_samples, generator=random), 0.5))
    state.confidence.copy_(torch.rand(num_samples, generator=random) * (seen > 0))
    state.bucket.copy_(torch.where(seen > 0, torch.randint(0, 4, (num_samples,), generator=random), 2))
    state.wrong_streak.copy_(torch.where(seen > 0, torch.randint(0, 256, (num_samples,), generator=random), 0))
    state.quarantined.copy_(torch.rand(num_samples, generator=random) < 0.15)
    state.bucket_weights = weights
    return state


def _strided(values: Tensor, how: str) -> Tensor:
    """`values` (B, S, V) again, with other strides."""
    batch, length, vocab = values.shape
    if how == "padded":
        return torch.cat([values, values.new_full((batch, length, 3), 7)], 2)[..., :vocab]
    if how == "sliced":
        return torch.cat([values.new_full((batch, 1, vocab), 7), values], 1)[:, 1:]
    if how == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "vocab_first":
        return values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return values


def _ids(draw: Any, kind: str, batch: int, length: int, num_samples: int, random: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "row":
        return torch.randint(-1 if draw(st.booleans()) else 0, num_samples, (batch,), generator=random)
    runs = torch.randint(-1, num_samples, (batch, length), generator=random)
    starts = torch.rand(batch, length, generator=random) < 0.4
    starts[:, :1] = True
    last = torch.where(starts, torch.arange(length), 0).cummax(1).values
    return runs.gather(1, last)


@st.composite
def cases(draw: Any, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> Case:
    """Shapes, ids, dtypes, strides, weights, rules, reductions and options, all small."""
    seed = draw(st.integers(0, 2**20))
    random = torch.Generator().manual_seed(seed)
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    vocab = draw(st.sampled_from([1, 2, 3, 8, 17, 33, 130]))
    scale, offset = draw(st.sampled_from([(0.1, 0), (1, 0), (6, 0), (6, 100)]))
    values = torch.randn(batch, length, vocab, generator=random) * scale + offset
    labels = torch.randint(0, vocab, (batch, length), generator=random)
    if draw(st.booleans()):  # mostly right, so that samples are LIGHT or FREEZE
        values.scatter_add_(2, labels[..., None], torch.full((batch, length, 1), 2.0 + 4 * scale))
    if vocab > 4 and draw(st.booleans()):  # padded vocabulary
        labels = labels % (vocab - 3)
        values[..., -3:] = -torch.inf
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    drop = draw(st.sampled_from([0.0, 0.3, 1.0]))
    labels = torch.where(torch.rand(batch, length, generator=random) < drop, ignore_index, labels)
    kind = draw(st.sampled_from(["none", "row", "token"]))
    num_samples = draw(st.integers(1, 5))
    sample_ids = _ids(draw, kind, batch, length, num_samples, random)
    state = None
    if kind != "none" and draw(st.booleans() | st.just(True)):
        config = gk.GEKOConfig(
            correctness=draw(st.sampled_from(["loss", "accuracy"])),
            quality=draw(st.sampled_from(["rise", "std"])),
            min_q_for_freeze=draw(st.sampled_from([0.0, 0.7])),
            freeze_weight=draw(st.sampled_from([0.0, 0.25])),
        )
        weights = draw(st.sampled_from([(3, 1, 0), (5.0, 2.0, 0.5), (0, 0, 0)]))
        state = random_state(seed, num_samples, config, weights)
    reduction = draw(st.sampled_from(["mean", "token_mean", "sum", "none"]))
    options = {
        "reduction": reduction,
        "shift": draw(st.booleans()),
        "ignore_index": ignore_index,
        "softcap": draw(st.sampled_from([None, 5.0])) if offset == 0 else None,
        "num_items": draw(st.sampled_from([None, 2.5])) if reduction in ("mean", "token_mean") else None,
        "update": draw(st.booleans() | st.just(True)),
    }
    strides = draw(st.sampled_from(["contiguous", "padded", "sliced", "transposed", "vocab_first"]))
    logits = _strided(values.to(draw(st.sampled_from(dtypes))), strides)
    return Case(logits, labels, sample_ids, state, options, draw(st.sampled_from([1.0, -0.7, 1024.0])))


def _some_weights(draw: Any, shape: torch.Size, random: torch.Generator) -> Tensor:
    """Between 0 and 2 or 0.001, some of them 0."""
    values = torch.rand(shape, generator=random) * draw(st.sampled_from([2.0, 2.0, 1e-3]))
    values[torch.rand(shape, generator=random) < draw(st.sampled_from([0.0, 0.3]))] = 0
    return values.to(draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])))


@st.composite
def weighted_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> Case:
    """`cases` with token weights, sample weights or both among the options."""
    case = draw(cases(dtypes))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    given = draw(st.sampled_from(["token", "sample", "both"]))
    packed = case.sample_ids is not None and case.sample_ids.dim() == 2
    if given != "sample":
        case.options["token_weights"] = _some_weights(draw, case.labels.shape, random)
    if given != "token":
        shape = case.labels.shape if packed else case.labels.shape[:1]
        case.options["sample_weights"] = _some_weights(draw, shape, random)
    return case
