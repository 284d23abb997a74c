"""The noise guard: who is quarantined, who is spared, who comes out again."""

from __future__ import annotations

import pytest
import torch
from sampling import PLAIN, plan_of, visit

import geko_kernels as gk
from geko_kernels.training.planning.guard import update_quarantine_

GUARDED = {**PLAIN, "noise_guard": True, "noise_guard_min_share": 0.0083}  # of 100 samples it takes six times that


def noisy(num_wrong: int, total: int = 100, margins=(-3.0, -4.0, -5.0), **fields) -> gk.SampleState:
    """A state with `num_wrong` samples that were sure and wrong three times, at a loss that rises."""
    state = gk.SampleState(total, gk.GEKOConfig(**{**GUARDED, **fields}))
    for margin in margins:
        visit(state, torch.arange(num_wrong), margin)
        visit(state, torch.arange(num_wrong, total), 9.0)
    return state


def test_a_mislabelled_sample_is_quarantined_and_weighs_nothing():
    state = noisy(10)
    sampler = gk.GEKOSampler(state, num_epochs=20)
    assert plan_of(sampler, 3) == []
    assert state.quarantined.nonzero()[:, 0].tolist() == list(range(10))
    logits = torch.zeros(1, 10, requires_grad=True)
    _, stats = gk.weighted_loss(logits, torch.tensor([3]), torch.tensor([0]), state, return_stats=True)
    assert stats.weight.item() == 0
    assert 0 in sampler.due_probes(4).tolist()  # probed as a frozen sample is
    visit(state, torch.tensor([0]), 9.0)
    sampler.set_epoch(4)
    assert not state.quarantined[0] and state.quarantined[1:10].all()  # and released once it is right


def test_quarantine_lasts_through_the_uniform_finish():
    state = noisy(10, uniform_finish=0.5)
    plan = plan_of(gk.GEKOSampler(state, num_epochs=4), 3)
    assert sorted(plan) == list(range(10, 100))


def test_quarantine_waits_until_most_samples_are_right_and_opens_again():
    """Where nothing has been learnt every sample is wrong: quarantine would stop learning for good."""
    state = noisy(100)
    assert len(plan_of(gk.GEKOSampler(state, num_epochs=20), 3)) == 100
    state = noisy(10)
    update_quarantine_(state)
    assert state.quarantined.sum() == 10
    visit(state, torch.arange(10, 100), -5.0)
    update_quarantine_(state)
    assert not state.quarantined.any()


def test_samples_that_a_third_of_the_margin_would_hold_are_counted():
    """As labels are that are wrong in confusable ways: the model's answer is more likely, but not by far."""
    state = noisy(10, margins=(-1.2, -1.5, -2.0))
    sampler = gk.GEKOSampler(state, num_epochs=20)
    sampler.set_epoch(3)
    assert not state.quarantined.any() and sampler.doubtful == 10
    visit(state, torch.arange(10), 9.0)  # learnt by heart by now
    sampler.set_epoch(4)
    resumed = gk.GEKOSampler(state, num_epochs=20)
    resumed.load_state_dict(sampler.state_dict(consumed=0))
    assert resumed.doubtful == sampler.doubtful == 10
    sure = gk.GEKOSampler(noisy(10, noise_guard_share=0.05), num_epochs=20)  # no room for all of these
    sure.set_epoch(3)
    assert sure.state.quarantined.sum() == 5 and sure.doubtful == 0
    off = gk.GEKOSampler(noisy(10, margins=(-1.2, -1.5, -2.0), noise_guard=False), num_epochs=20)
    off.set_epoch(3)
    assert off.doubtful == 0
    told = gk.GEKOSampler(noisy(10, margins=(-1.2, -1.5, -2.0), noise_guard_margin=1.0), num_epochs=20)
    told.set_epoch(3)
    assert told.state.quarantined.sum() == 10 and told.doubtful == 0


def test_quarantine_is_for_tasks_that_generalise():
    """Facts, random labels, a task that takes many epochs: sure and wrong is what the model is of anything new."""
    state = gk.SampleState(100, gk.GEKOConfig(**GUARDED))
    sampler = gk.GEKOSampler(state, num_epochs=20)
    sampler.set_epoch(0)
    visit(state, torch.arange(55), -5.0)
    visit(state, torch.arange(55, 100), 9.0)
    for epoch in (1, 2, 3):
        assert all(sample >= 55 for sample in sampler.due_probes(epoch))
        assert set(range(55 if epoch < 3 else 20)) <= set(plan_of(sampler, epoch))
        visit(state, torch.arange(20, 55), 9.0 if epoch == 2 else -5.0)
        visit(state, torch.arange(20), -5.0)
    assert not state.quarantined.any()
    resumed = gk.GEKOSampler(state, num_epochs=20)  # the verdict stands, though most are right now
    resumed.load_state_dict(sampler.state_dict(consumed=100))
    resumed.set_epoch(4)
    assert not state.quarantined.any()
    plan_of(gk.GEKOSampler(state, num_epochs=20), 4)  # another run cannot tell any more
    assert state.quarantined.any()


def test_quarantine_is_bounded_and_can_be_switched_off():
    state = noisy(40, noise_guard_share=0.1)
    update_quarantine_(state)
    assert state.quarantined.sum() == 10
    off = noisy(10, noise_guard=False)
    update_quarantine_(off)
    assert not off.quarantined.any()


def test_who_may_be_mislabelled_is_looked_at_before_trained_again():
    state = gk.SampleState(100, gk.GEKOConfig(**GUARDED))
    visit(state, torch.arange(10), -5.0)
    visit(state, torch.arange(10, 100), 9.0)
    sampler = gk.GEKOSampler(state, num_epochs=20)
    due = sampler.due_probes(1)
    assert due.tolist() == list(range(10))
    visit(state, due, -5.0)
    visit(state, due[:2], 9.0)
    sampler.probed(due, 1)
    assert len(sampler.due_probes(1)) == 0
    plan_of(sampler, 1)
    assert state.quarantined.nonzero()[:, 0].tolist() == list(range(2, 10))


def test_a_suspect_that_cannot_be_looked_at_is_not_asked_for_again():
    """Where its loss is NaN the state keeps its old row."""
    state = gk.SampleState(10, gk.GEKOConfig(**GUARDED))
    visit(state, torch.arange(2), -5.0)
    visit(state, torch.arange(2, 10), 9.0)
    sampler = gk.GEKOSampler(state, num_epochs=20)
    due = sampler.due_probes(1)
    assert due.tolist() == [0, 1]
    gk.weighted_loss(torch.full((2, 10), torch.nan), torch.zeros(2, dtype=torch.long), due.long(), state)
    sampler.probed(due, 1)
    assert len(sampler.due_probes(1)) == 0


def test_quarantine_spares_what_is_not_learnt_yet():
    """Wrong and unsure is a sample whose time has not come, not one with a wrong label."""
    state = gk.SampleState(100, gk.GEKOConfig(**GUARDED))
    for _ in range(4):
        visit(state, torch.arange(30), -0.1)  # loss 2.3, confidence 0.1
        visit(state, torch.arange(30, 100), 9.0)
    update_quarantine_(state)
    assert not state.quarantined.any()


def test_where_wrong_labels_are_common_a_third_of_the_margin_is_enough():
    for num_wrong, held in ((14, 14), (16, 25)):
        state = gk.SampleState(100, gk.GEKOConfig(**GUARDED))
        for _ in range(2):
            visit(state, torch.arange(num_wrong), -5.0)
            visit(state, torch.arange(num_wrong, 25), -2.0)
            visit(state, torch.arange(25, 100), 9.0)
        update_quarantine_(state)
        assert state.quarantined.sum() == held


def test_quarantine_spares_a_few():
    """Where wrong labels are rare, what looks like one is as often a rare sample."""
    for num_wrong in (4, 5):
        state = noisy(num_wrong)
        update_quarantine_(state)
        assert state.quarantined.sum() == (0 if num_wrong == 4 else 5)
    visit(state, torch.arange(2), 9.0)
    update_quarantine_(state)
    assert state.quarantined.nonzero()[:, 0].tolist() == [2, 3, 4]  # those inside stay


@pytest.mark.parametrize(("total", "least"), [(400, 61), (3600, 180), (10_000, 500)])
def test_of_few_samples_a_larger_share_has_to_look_mislabelled(total, least):
    for num_wrong in (least - 1, least):
        state = noisy(num_wrong, total, noise_guard_min_share=0.05)
        update_quarantine_(state)
        assert state.quarantined.sum() == (0 if num_wrong < least else least)


def test_the_guard_is_settled_once_most_samples_have_been_seen():
    state = gk.SampleState(100, gk.GEKOConfig(**GUARDED))
    visit(state, torch.arange(30), 9.0)  # a part of the samples, in an earlier run
    sampler = gk.GEKOSampler(state, num_epochs=20)
    sampler.set_epoch(0)
    visit(state, torch.arange(30, 40), -5.0)
    visit(state, torch.arange(40, 100), 9.0)
    assert sampler.due_probes(1).tolist()[-10:] == list(range(30, 40))
