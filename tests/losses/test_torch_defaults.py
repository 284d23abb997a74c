"""torch.set_default_dtype and torch.set_default_device change no result."""

from __future__ import annotations

import pytest
import torch

import geko_kernels as gk
from geko_kernels.losses import state_arguments

VISITS, LENGTH, VOCAB = 4, 5, 70
OTHER = "cuda" if torch.cuda.is_available() else "meta"  # a device that values on the host are not on
CALLS = {
    "state": {},
    "no state": {"state": None, "sample_ids": None},
    "num_items": {"num_items": 257.3},
    "weights": {"token_weights": torch.rand(VISITS, LENGTH), "sample_weights": torch.rand(VISITS)},
}


def usual():
    """torch's own defaults, and nothing kept from calls under others."""
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for kept in (state_arguments._plain, state_arguments._plain_prediction):
        kept.clear()


@pytest.fixture(autouse=True)
def usual_again():
    usual()
    yield
    usual()


def outcome(inputs, linear, options):
    hidden, weight, labels, ids = (tensor.clone() for tensor in inputs)
    state = gk.SampleState(VISITS, device=ids.device)
    call = {"sample_ids": ids, "state": state, "return_stats": True, **options}
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for _ in range(2):
        if linear:
            loss, stats = gk.weighted_linear_loss(*leaves, labels, **call)
        else:
            loss, stats = gk.weighted_loss(hidden @ weight.T, labels, **call)
        results += [loss, *stats, *torch.autograd.grad(loss, leaves)]
    return [*results, state.upstream, *state.state_dict().values(), state.quality]


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("change", [torch.float64, torch.bfloat16, OTHER])
def test_the_defaults_of_torch_change_no_result(backend, device, change, linear, options):
    inputs = torch.randn(VISITS, LENGTH, 16), torch.randn(VOCAB, 16)
    inputs = *inputs, torch.randint(VOCAB, (VISITS, LENGTH)), torch.arange(VISITS)
    inputs = [tensor.to(device) for tensor in inputs]
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    (torch.set_default_device if change == OTHER else torch.set_default_dtype)(change)
    ours = outcome(inputs, linear, options)
    usual()
    for mine, want in zip(ours, outcome(inputs, linear, options), strict=True):
        assert mine.device == want.device
        torch.testing.assert_close(mine, want, rtol=0, atol=0, equal_nan=True)
