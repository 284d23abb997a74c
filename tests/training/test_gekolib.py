"""Parity with the reference package gekolib 0.3.1 under `GEKOConfig.gekolib()`, and what it gets wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels import ops

core = pytest.importorskip("geko.core")
partitioner = pytest.importorskip("geko.partitioner")


def visit_op(state, loss, confidence, ids):
    """The sample update alone, on one token a visit with the given loss and confidence."""
    zero = torch.zeros_like(loss)
    tokens = torch.stack([loss, zero, zero, confidence, zero])
    labels = torch.zeros(len(ids), 1, dtype=torch.long, device=loss.device)
    table = (state.rules, state.weights, None, state.columns, state.error)
    ops.sample_update_(tokens, labels, ids, *table, 2, 1, -100, False, True)


@given(
    seed=st.integers(0, 2**20),
    steps=st.integers(1, 40),
    level=st.sampled_from([0.02, 0.3, 1.0, 6.0, 14.0]),
    options=st.sampled_from(
        [{}, {"q_value_lr": 0.5}, {"q_value_loss_scale": 2.0}, {"freeze_quality": 0.95, "min_q_for_freeze": 0.6}]
    ),
)
def test_buckets_q_values_and_qualities_agree_on_random_visits(backend, device, seed, steps, level, options):
    if backend == "triton" and device == "cpu":
        pytest.skip("too slow in Triton's interpreter; the next test has it")
    random = torch.Generator().manual_seed(seed)
    config = core.GEKOConfig(**options)
    ours = gk.SampleState(8, gk.GEKOConfig(**{**gk.GEKOConfig.gekolib().to_dict(), **options}), device=device)
    theirs = [core.SampleState(sample_id=str(i)) for i in range(8)]
    classify = partitioner.SamplePartitioner(config).classify
    for _ in range(steps):
        ids = torch.randperm(8, generator=random)[:5]
        loss = torch.rand(5, generator=random) * level * torch.rand(1, generator=random)
        confidence = 1 - torch.rand(5, generator=random) ** 2 * 0.6
        visit_op(ours, loss.to(device), confidence.to(device), ids.to(device))
        for i, a_loss, a_confidence in zip(ids.tolist(), loss.tolist(), confidence.tolist(), strict=True):
            theirs[i].update(
                a_loss, a_confidence, a_loss < 0.5, lr=config.q_value_lr, loss_scale=config.q_value_loss_scale
            )
            theirs[i].bucket = classify(theirs[i])
    assert [gk.Bucket(b).name for b in ours.bucket.tolist()] == [s.bucket.name for s in theirs]
    assert ours.q_value.tolist() == pytest.approx([s.q_value for s in theirs], abs=1e-5)
    assert ours.quality.tolist() == pytest.approx([s.quality for s in theirs], abs=2e-5)
    assert ours.times_seen.tolist() == [s.times_seen for s in theirs]
    assert ours.last_loss.tolist() == pytest.approx([s.last_loss for s in theirs])


def test_through_weighted_loss_they_agree_too(backend, device):
    ours = gk.SampleState(6, gk.GEKOConfig.gekolib(), device=device)
    theirs = [core.SampleState(sample_id=str(i)) for i in range(6)]
    classify = partitioner.SamplePartitioner(core.GEKOConfig()).classify
    labels, ids = torch.randint(9, (6, 4), device=device), torch.arange(6, device=device)
    skill = torch.tensor([9.0, 6, 4, 2, 0, 9], device=device)[:, None, None]
    learnt = torch.cat([labels[:5], (labels[5:] + 1) % 9])  # the last sample is sure of something else
    for _ in range(14):
        logits = torch.randn(6, 4, 9, device=device)
        logits += skill * F.one_hot(learnt, 9)
        _, stats = gk.weighted_loss(logits, labels, ids, ours, return_stats=True)
        for i, state in enumerate(theirs):
            state.update(float(stats.loss[i]), float(stats.confidence[i]), float(stats.loss[i]) < 0.5)
            assert classify(state).name == gk.Bucket(int(stats.bucket[i])).name
    assert len(set(ours.bucket.tolist())) == 4, "all buckets are reached"


def test_the_q_gate_keeps_learnt_samples_out_of_freeze_and_ours_does_not(reference):
    gated, ours = gk.SampleState(1, gk.GEKOConfig.gekolib()), gk.SampleState(1)
    sure, steps = torch.tensor([[12.0, 0, 0]]), {"gated": None, "ours": None}
    for visit in range(1, 40):
        for name, state in (("gated", gated), ("ours", ours)):
            gk.weighted_loss(sure, torch.tensor([0]), torch.tensor([0]), state)
            if state.bucket[0] == gk.Bucket.FREEZE and steps[name] is None:
                steps[name] = visit
    assert steps == {"gated": 9, "ours": 1}


def test_a_falling_loss_is_steady_by_our_rule_only(reference):
    rise, std = gk.SampleState(1), gk.SampleState(1, gk.GEKOConfig(quality="std"))
    for margin in (-1.0, 3.0, 9.0):  # wrong, then right, then sure
        for state in (rise, std):
            gk.weighted_loss(torch.tensor([[margin, 0.0]]), torch.tensor([0]), torch.tensor([0]), state)
    assert rise.bucket[0] == gk.Bucket.FREEZE and std.bucket[0] == gk.Bucket.LIGHT


def test_the_loss_is_weighted_and_correctness_is_a_sample_s_own(backend, device):
    logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0]], device=device)
    labels = torch.tensor([0, 1], device=device)
    state = gk.SampleState(2, gk.GEKOConfig.original(), device)
    loss, stats = gk.weighted_loss(logits, labels, torch.arange(2, device=device), state, return_stats=True)
    assert stats.correct.tolist() == [True, False] and stats.weight.tolist() == [0, 3]
    assert loss.item() == pytest.approx(3 * stats.loss[1].item() / 2)


def test_confidence_leaves_the_prompt_and_the_padding_out(backend, device):
    logits = torch.zeros(1, 6, 16, device=device)
    logits[0, :4, 3] = 30.0  # sure of prompt and padding, without a clue on the answer
    labels = torch.tensor([[-100, -100, -100, -100, 5, 6]], device=device)
    _, stats = gk.weighted_loss(logits, labels, return_stats=True)
    assert stats.confidence.tolist() == pytest.approx([1 / 16])


def test_no_bucket_is_absorbing(backend, device):
    state, ids = gk.SampleState(1, device=device), torch.tensor([0], device=device)
    label = torch.tensor([0], device=device)
    buckets = []
    for margin in (9.0, -9.0, 9.0, 9.0, 9.0, 9.0, 9.0):
        gk.weighted_loss(torch.tensor([[margin, 0.0]], device=device), label, ids, state)
        buckets.append(int(state.bucket[0]))
    assert buckets[0] == gk.Bucket.FREEZE and buckets[1] == gk.Bucket.HARD and buckets[-1] == gk.Bucket.FREEZE
