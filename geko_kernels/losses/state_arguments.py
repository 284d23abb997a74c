"""The learning state as the ops take it; calls without a state share default tensors on each device."""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels import torch_private
from geko_kernels.config import GEKOConfig
from geko_kernels.losses.arguments import debugging
from geko_kernels.state import NO_ERROR, SampleState, rules_tensor
from geko_kernels.zero_share import ZeroShare


def state_arguments(
    state: SampleState | None, device: torch.device, eager: bool
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """Rules, weights, columns and error flag of `state` as `sample_update_` takes them."""
    if state is None:
        error = torch.full((), NO_ERROR, device=device) if eager and debugging() else None
        return *_plain_rules(device, eager), [], error
    return state.rules, state.weights, state.columns, state.error


def prediction_of(state: SampleState | None, device: torch.device) -> tuple[Tensor, ZeroShare | None, Tensor]:
    """(upstream, zero_share, predictions) of `state`.

    Calls without a state share those of their device, without a zero_share: no weight is 0.
    """
    if state is not None:
        return state.upstream, state.zero_share, state.predictions
    plain = _plain_prediction.get(device)
    if plain is None:
        upstream = torch.ones((), dtype=torch.float32, device=device)
        plain = upstream, None, torch.zeros(2, dtype=torch.int64, device=device)
        if not torch_private.transformed():  # it wraps tensors that are made under it
            _plain_prediction[device] = plain
    return plain


_plain_prediction: dict[torch.device, tuple[Tensor, None, Tensor]] = {}
_plain: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _plain_rules(device: torch.device, eager: bool) -> tuple[Tensor, Tensor]:
    """The default rules and weights 1, made once a device: copying them from the host would wait for the GPU."""
    if eager and device in _plain:
        return _plain[device]
    pair = rules_tensor(GEKOConfig(), device), torch.ones(4, dtype=torch.float32, device=device)
    if eager and not torch_private.transformed():
        _plain[device] = pair
    return pair
