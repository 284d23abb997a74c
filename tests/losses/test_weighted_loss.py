"""`weighted_loss` as a part of autograd: graphs, autocast, no_grad, accumulation, functional transforms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import geko_kernels as gk


def batch(device, rows=3, length=4, vocab=11, dtype=torch.float32):
    logits = torch.randn(rows, length, vocab, device=device).to(dtype)
    return logits, torch.randint(vocab, (rows, length), device=device), torch.arange(rows, device=device)


def columns(state):
    return {name: column.clone() for name, column in state.state_dict().items()}


def test_the_weight_is_that_of_the_state_after_this_visit(backend, device):
    state = gk.SampleState(1, gk.GEKOConfig(bucket_weights=(3, 2, 1)), device=device)
    sure = torch.tensor([[20.0, 0, 0]], device=device)
    zero, one = torch.tensor([0], device=device), torch.tensor([1], device=device)
    loss, stats = gk.weighted_loss(sure, one, zero, state, return_stats=True)
    assert stats.bucket.tolist() == [gk.Bucket.HARD] and loss.item() == pytest.approx(60)
    state = gk.SampleState(1, device=device)
    _, stats = gk.weighted_loss(sure, zero, zero, state, return_stats=True)
    assert stats.bucket.tolist() == [gk.Bucket.FREEZE] and stats.weight.tolist() == [0]


def test_quarantine_weighs_zero_and_still_counts(backend, device):
    logits, labels, ids = batch(device)
    state = gk.SampleState(3, device=device)
    state.quarantined[1] = True
    logits.requires_grad_()
    _, stats = gk.weighted_loss(logits, labels, ids, state, return_stats=True)
    assert stats.weight[1] == 0 and stats.weight[0] > 0
    assert state.times_seen.tolist() == [1, 1, 1] and state.wrong_streak[1] == 1


def test_uniform_config_is_the_standard_loss(backend, device):
    logits, labels, ids = batch(device)
    logits[0].scatter_add_(1, labels[0][:, None], torch.full((4, 1), 30.0, device=device))  # would be FREEZE
    state = gk.SampleState(3, gk.GEKOConfig.uniform(), device=device)
    loss = gk.weighted_loss(logits, labels, ids, state, reduction="token_mean")
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), labels))


def test_bucket_weights_take_effect_at_once(backend, device):
    logits, labels, ids = batch(device)
    state = gk.SampleState(3, gk.GEKOConfig(bucket_weights=(1, 1, 1)), device=device)
    one = gk.weighted_loss(logits, labels, ids, state, update=False)
    state.bucket_weights = (4, 4, 4)
    four = gk.weighted_loss(logits, labels, ids, state, update=False)
    state.bucket_weights[:] = 8
    eight = gk.weighted_loss(logits, labels, ids, state, update=False)
    torch.testing.assert_close(torch.stack([four, eight]), torch.stack([4 * one, 8 * one]))


def test_retain_graph_and_accumulation(backend, device):
    logits, labels, ids = batch(device)
    logits.requires_grad_()
    loss = gk.weighted_loss(logits, labels, ids, gk.SampleState(3, device=device))
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    assert logits.grad.equal(2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inplace_backward_cannot_run_twice(backend, device):
    logits, labels, _ = batch(device)
    loss = gk.weighted_loss(logits.requires_grad_() * 1, labels, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_loss_may_be_scaled_in_place(backend, device):
    logits, labels, _ = batch(device)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = gk.weighted_loss(a, labels)
    loss /= 4
    loss.backward()
    (gk.weighted_loss(b, labels) / 4).backward()
    assert a.grad.equal(b.grad)


def test_a_second_derivative_is_refused(backend, device):
    logits, labels, _ = batch(device)
    loss = gk.weighted_loss(logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (grad.square().sum() + logits.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_logits_dtype_and_the_loss_is_fp32(backend, device, dtype):
    logits, labels, ids = batch(device, dtype=dtype)
    logits.requires_grad_()
    loss = gk.weighted_loss(logits, labels, ids, gk.SampleState(3, device=device))
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype


def test_autocast(backend, device):
    head = torch.nn.Linear(6, 11).to(device)
    hidden, labels = torch.randn(3, 4, 6, device=device), torch.randint(11, (3, 4), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = head(hidden)
        loss = gk.weighted_loss(logits, labels)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    outside = gk.weighted_loss(logits.detach(), labels)
    assert loss == outside and head.weight.grad.dtype == torch.float32


def test_no_gradient_no_graph(backend, device):
    logits, labels, _ = batch(device)
    assert gk.weighted_loss(logits, labels).grad_fn is None
    with torch.no_grad():
        assert gk.weighted_loss(logits.requires_grad_(), labels).grad_fn is None


def test_statistics_carry_no_graph(backend, device):
    logits, labels, ids = batch(device)
    loss, stats = gk.weighted_loss(
        logits.requires_grad_(), labels, ids, gk.SampleState(3, device=device), return_stats=True
    )
    assert loss.requires_grad and not any(values.requires_grad for values in stats)


def test_func_grad(backend, device):
    logits, labels, ids = batch(device)
    state = gk.SampleState(3, device=device)
    grad = torch.func.grad(lambda z: gk.weighted_loss(z, labels, ids, state))(logits)
    leaf = logits.clone().requires_grad_()
    gk.weighted_loss(leaf, labels, ids, gk.SampleState(3, device=device)).backward()
    torch.testing.assert_close(grad, leaf.grad)
    assert state.times_seen.tolist() == [1, 1, 1]


def test_strided_labels_and_ids(backend, device):
    logits, labels, _ = batch(device, rows=4, length=3)
    ids = torch.tensor([[0, 0, 1], [2, 2, 2], [-1, 3, 3], [1, 1, 1]], device=device)
    wide = torch.stack([labels, labels * 0 - 7], 2)[..., 0]
    states = [gk.SampleState(4, device=device) for _ in range(3)]
    losses = [
        gk.weighted_loss(logits, labels, ids, states[0], shift=True),
        gk.weighted_loss(logits, wide, ids.T.contiguous().T, states[1], shift=True),
        gk.weighted_loss(logits, labels, ids.flip(0).flip(0), states[2], shift=True),
    ]
    assert losses[0] == losses[1] == losses[2]
    assert all(x.equal(states[1].state_dict()[name]) for name, x in states[0].state_dict().items())
    rows = torch.arange(8, device=device)[::2]
    a, b = gk.SampleState(8, device=device), gk.SampleState(8, device=device)
    assert gk.weighted_loss(logits, labels, rows, a) == gk.weighted_loss(logits, wide, rows.clone(), b)
    assert a.times_seen.tolist() == b.times_seen.tolist() == [1, 0] * 4


def test_an_expanded_batch(backend, device):
    logits, labels, ids = batch(device, rows=1)
    wide = logits.expand(3, 4, 11).requires_grad_()
    loss = gk.weighted_loss(wide, labels.expand(3, 4), torch.arange(3, device=device), gk.SampleState(3, device=device))
    loss.backward()
    assert loss.item() == pytest.approx(gk.weighted_loss(logits, labels, ids, gk.SampleState(1, device=device)).item())


def test_a_step_bumps_the_versions_of_what_it_wrote(backend, device):
    logits, labels, ids = batch(device)
    state = gk.SampleState(3, device=device)
    scale = torch.ones(3, device=device, requires_grad=True)
    kept = (scale * state.confidence).sum()
    gk.weighted_loss(logits, labels, ids, state, update=False)
    kept.backward(retain_graph=True)
    gk.weighted_loss(logits, labels, ids, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("items", [7, 3.5, torch.tensor(7), torch.tensor([3.5])])
def test_num_items_divides(backend, device, items):
    logits, labels, _ = batch(device)
    total = gk.weighted_loss(logits, labels, reduction="sum")
    mean = gk.weighted_loss(logits, labels, num_items=items)
    torch.testing.assert_close(mean, total / float(items))


def test_losses_go_down_and_samples_freeze(backend, device):
    head = torch.nn.Linear(8, 5, device=device)
    inputs, labels, ids = torch.randn(6, 8, device=device), torch.arange(6, device=device) % 5, torch.arange(6)
    state, optimizer = gk.SampleState(6, device=device), torch.optim.SGD(head.parameters(), 2.0)
    for _ in range(40):
        optimizer.zero_grad()
        gk.weighted_loss(head(inputs), labels, ids.to(device), state).backward()
        optimizer.step()
    assert state.bucket_counts().sum() == 6 and state.last_loss.max() < 0.7
    assert state.bucket_counts()[gk.Bucket.FOCUS] == state.bucket_counts()[gk.Bucket.HARD] == 0
