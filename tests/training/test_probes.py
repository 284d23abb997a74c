"""When GEKOSampler has left-out samples looked at again."""

from __future__ import annotations

import pytest
import torch
from sampling import FOCUS, FREEZE, PLAIN, plan_of, state_of, visit

import geko_kernels as gk


def test_probes_double_their_interval_and_a_forgotten_sample_thaws():
    """In gekolib FREEZE is absorbing: a sample that is not drawn is never looked at again."""
    state = gk.SampleState(8, gk.GEKOConfig(**PLAIN))
    sampler, probed = gk.GEKOSampler(state, num_epochs=40), {}
    visit(state, torch.arange(8), margin=9.0)
    assert (state.bucket == FREEZE).all()
    for epoch in range(26):
        ids = sampler.due_probes(epoch)
        visit(state, ids, margin=9.0)
        sampler.probed(ids, epoch)
        probed[epoch] = ids.tolist()
        assert plan_of(sampler, epoch) == []
    assert [epoch for epoch, ids in probed.items() if 0 in ids] == [1, 9, 25]
    assert [epoch for epoch, ids in probed.items() if 1 in ids] == [2, 10]
    forgotten = torch.tensor([1])
    due = next(epoch for epoch in range(26, 40) if 1 in sampler.due_probes(epoch).tolist() or plan_of(sampler, epoch))
    assert due == 26
    visit(state, forgotten, margin=-5.0)
    sampler.probed(forgotten, due)
    assert plan_of(sampler, due) == [1]
    assert sampler.forgotten.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert int(sampler.lost) == 1


@pytest.mark.parametrize(("lost", "rest"), [(1, 0), (2, 70)])
def test_where_probes_find_many_forgotten_all_are_probed(lost, rest):
    """More than a tenth of the 10 that are due: the other 70 are looked at before the epoch is drawn, and once only."""
    state = state_of([FREEZE] * 80)
    sampler = gk.GEKOSampler(state, num_epochs=40)
    sampler.set_epoch(0)
    due = sampler.due_probes(1)
    assert due.tolist() == list(range(0, 80, 8))
    visit(state, due, margin=9.0)
    visit(state, due[:lost], margin=-5.0)
    sampler.probed(due, 1)
    others = sampler.due_probes(1)
    assert len(others) == rest and not set(others.tolist()) & set(due.tolist())
    visit(state, others, margin=-5.0)
    sampler.probed(others, 1)
    assert len(sampler.due_probes(1)) == 0
    assert len(plan_of(sampler, 1)) == rest + lost


def test_probes_can_be_switched_off():
    sampler = gk.GEKOSampler(state_of([FREEZE] * 8, probes=False), num_epochs=20)
    for epoch in range(10):
        assert len(sampler.due_probes(epoch)) == 0
        sampler.set_epoch(epoch)


def test_probes_of_a_budget_of_samples_count_passes_not_epochs():
    """Epochs of a tenth of the samples are ten times as many: probing each time would eat up what they save."""
    state = state_of([FREEZE] * 90 + [FOCUS] * 10)
    sampler, probed = gk.GEKOSampler(state, num_epochs=10), 0
    for epoch in range(100):
        due = sampler.due_probes(epoch, start=epoch / 100)
        probed += len(due)
        visit(state, due, margin=9.0)
        sampler.probed(due, epoch, start=epoch / 100)
        sampler.set_epoch(epoch, start=epoch / 100)
        assert len(list(sampler)) == 10
    assert probed == 90 + 12  # due after 1 to 8 passes, and again 8 later


def test_a_resumed_run_does_not_probe_all_once_more_in_the_same_pass():
    state = state_of([FREEZE] * 80 + [FOCUS] * 20)
    sampler = gk.GEKOSampler(state, num_epochs=10)
    sampler.set_epoch(0, start=0.0)
    due = sampler.due_probes(1, start=0.1)
    visit(state, due, margin=-5.0)
    sampler.probed(due, 1, start=0.1)
    resumed = gk.GEKOSampler(state, num_epochs=10)
    resumed.load_state_dict(sampler.state_dict(consumed=20))
    for each in (sampler, resumed):  # alike: the pass has had its alarm
        others = each.due_probes(2, start=0.12)
        assert len(others) == 70
        state.times_seen[others] += 1
        each.probed(others, 2, start=0.12)
        assert len(each.due_probes(2, start=0.12)) == 0
        assert each.hurried == 1
