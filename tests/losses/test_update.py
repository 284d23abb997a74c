"""`update`: which calls count a visit in the state, and what the sampler hears of probes that count none."""

from __future__ import annotations

import contextlib
import inspect
import textwrap

import pytest
import torch
from sampling import FREEZE, state_of, visit
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import geko_kernels as gk

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def losses(device, linear):
    """A call of either loss with a state of three samples: (function of `update` and more, state)."""
    logits, state = torch.randn(3, 4, 7, device=device), gk.SampleState(3, device=device)
    labels, ids = torch.randint(7, (3, 4), device=device), torch.arange(3, device=device)
    weight = torch.randn(7, 7, device=device)
    if linear:
        return lambda **options: gk.weighted_linear_loss(logits, weight, labels, ids, state, **options), state
    return lambda **options: gk.weighted_loss(logits, labels, ids, state, **options), state


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("update", [None, True, False, "left out"])
def test_when_a_visit_counts(backend, device, linear, mode, update):
    call, state = losses(device, linear)
    version = state.times_seen._version
    with MODES[mode]():
        call(**({} if update == "left out" else {"update": update}))
    counted = update is True or (update is not False and mode == "grad")
    assert state.times_seen.tolist() == [int(counted)] * 3
    assert (state.times_seen._version > version) == counted
    assert state.changed.all() == counted


def test_a_probe_learns_what_training_would(backend, device):
    states = [gk.SampleState(3, device=device) for _ in range(2)]
    logits, ids = torch.randn(3, 7, device=device), torch.arange(3, device=device)
    labels = torch.tensor([0, 3, 6], device=device)
    gk.weighted_loss(logits, labels, ids, states[0])
    with torch.no_grad():
        gk.weighted_loss(logits, labels, ids, states[1], update=True)
    for name, column in states[0].state_dict().items():
        assert column.equal(states[1].state_dict()[name]), name


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("update", [None, True])
def test_a_recomputation_never_counts_again(backend, device, update, reentrant, linear):
    state = gk.SampleState(3, device=device)
    labels, ids = torch.randint(7, (3,), device=device), torch.arange(3, device=device)
    leaf, weight = torch.randn(3, 7, device=device, requires_grad=True), torch.eye(7, device=device)

    def step(x):
        if linear:
            return gk.weighted_linear_loss(x * 2, weight, labels, ids, state, update=update)
        return gk.weighted_loss(x * 2, labels, ids, state, update=update)

    checkpoint(step, leaf, use_reentrant=reentrant).backward()
    assert state.times_seen.tolist() == [1, 1, 1] and leaf.grad.any()


@pytest.mark.parametrize("update", [None, True, False])
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_calls_count_alike(reference, update, grad):
    torch._dynamo.reset()
    state, labels, ids = gk.SampleState(3), torch.tensor([0, 3, 6]), torch.arange(3)
    compiled = torch.compile(
        lambda z: gk.weighted_loss(z, labels, ids, state, update=update), fullgraph=True, backend="aot_eager"
    )
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            compiled(torch.randn(3, 7))
    assert state.times_seen.tolist() == [2 * int(grad if update is None else update)] * 3


def due_of(state, epoch=1):
    sampler = gk.GEKOSampler(state, num_epochs=40)
    sampler.set_epoch(0)
    due = sampler.due_probes(epoch)
    assert due.dtype == torch.int64 and len(due) == 10
    return sampler, due


@pytest.mark.parametrize("update", [None, True])
def test_probes_that_counted_nothing_are_heard_of(backend, device, update):
    state = state_of([FREEZE] * 80, device)
    sampler, due = due_of(state)
    logits, labels = torch.zeros(10, 4, device=device), torch.zeros(10, dtype=torch.long, device=device)
    with torch.no_grad():
        gk.weighted_loss(logits, labels, due.to(device), state, update=update)
    message = "none of the 10 samples that due_probes returned has been visited: run them through weighted_loss"
    with contextlib.nullcontext() if update else pytest.raises(ValueError, match=message):
        sampler.probed(due, 1)
    assert (sampler.probes.next_probe[due] == 9).all() == bool(update)  # a refused call changed nothing


def test_a_call_that_could_not_count_is_a_look_all_the_same(reference):
    """Samples without a valid label, or with a NaN loss, must not make a run fail."""
    for logits, label in ((torch.zeros(10, 4), -100), (torch.full((10, 4), torch.nan), 0)):
        state = state_of([FREEZE] * 80)
        sampler, due = due_of(state)
        with torch.no_grad():
            gk.weighted_loss(logits, torch.full((10,), label), due, state, update=True)
        sampler.probed(due, 1)
        assert (state.times_seen == 1).all()


def test_one_visited_sample_is_enough_and_nothing_due_needs_none():
    state = state_of([FREEZE] * 80)
    sampler, due = due_of(state)
    visit(state, due[:1], margin=9.0)
    sampler.probed(due, 1)
    fresh = gk.GEKOSampler(state, num_epochs=40)
    fresh.probed(due, 1)  # nothing was handed out: a resumed run
    assert len(fresh.due_probes(1)) == 0
    fresh.probed(torch.empty(0, dtype=torch.int64), 1)


def test_a_state_made_in_inference_mode():
    with torch.inference_mode():
        state = state_of([FREEZE] * 80)
        sampler, due = due_of(state)
        with pytest.raises(ValueError, match="none of the 10 samples"):
            sampler.probed(due, 1)
        gk.weighted_loss(torch.zeros(10, 4), torch.zeros(10, dtype=torch.long), due, state, update=True)
        sampler.probed(due, 1)
    assert state.times_seen.sum() == 90


def test_the_loop_in_the_samplers_help_runs_as_written(reference):
    """Sixty four samples that are learnt at once: those left out are looked at again, forward only."""
    loop = inspect.getdoc(gk.GEKOSampler).split("of the state:\n", 1)[1].split("\nSeveral processes", 1)[0]
    inputs, labels = torch.eye(64), torch.arange(64) % 4
    model = nn.Linear(64, 4)
    with torch.no_grad():
        model.weight.copy_(12.0 * nn.functional.one_hot(labels, 4).T)
    state = gk.SampleState(64, gk.GEKOConfig(use_curriculum=False, uniform_finish=0.0))
    looked, forward = [], model.forward

    def watch(batch):
        looked.append((model.training, torch.is_grad_enabled(), len(batch)))
        return forward(batch)

    model.forward = watch
    names = {"model": model, "inputs": inputs, "labels": labels, "state": state, "torch": torch}
    names |= {"GEKOSampler": gk.GEKOSampler, "weighted_loss": gk.weighted_loss, "DataLoader": DataLoader}
    exec(textwrap.dedent(loop), names | {"optimizer": torch.optim.SGD(model.parameters(), 0.1)})
    assert looked[:2] == [(True, True, 32)] * 2  # epoch 0: all are trained
    assert looked[2:] == [(False, False, 8)]  # all froze, so epoch 1 is empty; before epoch 2 an eighth is due
    assert state.times_seen.tolist() == [2, 1, 1, 1, 1, 1, 1, 1] * 8
