"""LIGHT samples that rest are answered for by those that are drawn in their turn."""

from __future__ import annotations

import pytest
import torch
from auto_run import noisy
from sampling import FOCUS, FREEZE, HARD, LIGHT, plan_of, state_of
from training import MapDataset, sentences, tiny_llama, trainer_of

import geko_kernels as gk
from geko_kernels.training import training_loss

ONES = {"bucket_weights": (1, 1, 1)}


@pytest.mark.parametrize("interval", [2, 3])
def test_over_all_turns_every_sample_weighs_the_same(interval):
    """30 % of the labels are wrong, and stay so: so they are 30 % of the weight of every epoch, and not more."""
    state = state_of([LIGHT] * 7000 + [HARD] * 3000, light_interval=interval, **ONES)
    sampler = gk.GEKOSampler(state, num_epochs=9)
    total = torch.zeros(10_000)
    for epoch in range(interval):
        ids = torch.tensor(plan_of(sampler, epoch))
        weights = sampler.sample_weights(ids)
        assert weights.dtype == torch.float32 and set(weights[ids < 7000].tolist()) == {float(interval)}
        assert weights[ids >= 7000].eq(1).all()
        assert weights[ids >= 7000].sum() / weights.sum() == pytest.approx(0.3, abs=0.01)
        total[ids] += weights
    assert total.eq(interval).all()


def test_who_does_not_rest_weighs_one():
    buckets = [FREEZE] * 5 + [LIGHT] * 20 + [FOCUS] * 5
    every = torch.arange(30)
    for config in ({"light_interval": 1}, {"light_interval": 2, "selection": False}):
        sampler = gk.GEKOSampler(state_of(buckets, **config, **ONES), num_epochs=2)
        sampler.set_epoch(0)
        assert sampler.sample_weights(every) is None
    fresh = gk.GEKOSampler(gk.SampleState(30, gk.GEKOConfig.recommended()), num_epochs=2)
    fresh.set_epoch(0)
    assert fresh.sample_weights(every) is None


def test_in_the_uniform_finish_nobody_rests():
    state = state_of([LIGHT] * 100, light_interval=2, uniform_finish=0.5, **ONES)
    sampler = gk.GEKOSampler(state, num_epochs=1)
    sampler.set_epoch(0)
    ids, head = sampler.plan.ids, sampler.plan.selected
    assert sampler.sample_weights(ids[:head]).eq(2).all() and sampler.sample_weights(ids[head:]).eq(1).all()
    assert 0 < head < 50 and len(ids) - head == 50


def test_it_is_the_bucket_of_the_plan_that_counts_also_after_a_resume():
    state = state_of([LIGHT] * 40 + [HARD] * 10, light_interval=2, **ONES)
    sampler = gk.GEKOSampler(state, num_epochs=4)
    ids = torch.tensor(plan_of(sampler, 1))
    before = sampler.sample_weights(ids)
    state.bucket.fill_(FOCUS)
    assert sampler.sample_weights(ids).equal(before) and before.max() == 2
    other = gk.GEKOSampler(state_of([HARD] * 50, light_interval=2, **ONES), num_epochs=4)
    other.load_state_dict(sampler.state_dict(consumed=10))
    assert other.sample_weights(ids).equal(before)
    packed = torch.tensor([[0, 0, 1, -1], [45, 45, -1, -1]])  # one id a token, -1 for padding
    assert other.sample_weights(packed).shape == packed.shape
    values = sampler.state_dict(consumed=10)
    with pytest.raises(ValueError, match=r"state_dict\['answering'\] must be \(50,\) torch.bool"):
        other.load_state_dict({**values, "answering": torch.zeros(50)})


def test_the_trainer_sends_the_weights_with_those_of_the_data(tmp_path, monkeypatch, reference):
    seen = []

    def watched(*args, **named):
        if not named.get("forward_only"):
            seen.append((args[6].tolist(), named["weights"]["sample_weights"].tolist()))
        return forward_loss(*args, **named)

    forward_loss = training_loss.forward_loss
    monkeypatch.setattr(training_loss, "forward_loss", watched)
    items = [{**item, "sample_weights": 1.0 + i % 2} for i, item in enumerate(sentences(24))]
    config = gk.GEKOConfig.recommended(probes=False, noise_guard=False)
    trainer = trainer_of(tmp_path, MapDataset(items), config, num_train_epochs=1, learning_rate=0.0)
    state = trainer.sample_state
    state.times_seen[:12], state.bucket[:12], state.confidence[:12] = 1, LIGHT, 0.9
    trainer.train()
    weights = {i: weight for ids, given in seen for i, weight in zip(ids, given, strict=True) if i >= 0}
    assert 12 < len(weights) < 24
    assert weights == {i: (2.0 if i < 12 else 1.0) * (1 + i % 2) for i in weights}


def test_a_step_follows_the_gradient_of_the_weighted_losses_over_the_number_of_samples(tmp_path, reference):
    data, model, before = noisy(8), tiny_llama(), tiny_llama()
    config, plain = (
        gk.GEKOConfig.recommended(probes=False),
        {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0},
    )
    trainer = trainer_of(tmp_path, data, config, model, max_steps=1, per_device_train_batch_size=8, **plain)
    trainer.sample_state.times_seen[:4], trainer.sample_state.bucket[:4] = 1, LIGHT
    trainer.train()
    loss, drawn = torch.zeros(()), trainer.sampler.plan.ids.tolist()
    assert 4 < len(drawn) < 8 and not set(range(4, 8)) - set(drawn)
    for i in drawn:
        logits = before(torch.tensor([data[i]["input_ids"]])).logits[0, 3]
        loss = loss - logits.log_softmax(-1)[data[i]["labels"][4]] * (2 if i < 4 else 1) / len(drawn)
    loss.backward()
    for own, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(own.detach(), old.detach() - old.grad, rtol=1e-5, atol=1e-6)


def test_the_loader_hands_the_weights_out_with_the_batch():
    loader = gk.GEKOLoader(MapDataset([torch.tensor([float(i)]) for i in range(40)]), 8, 1, device="cpu")
    loader.state.times_seen[:20], loader.state.bucket[:20] = 1, LIGHT
    weights = {}
    for batch in loader:
        assert batch.trains
        weights |= dict(zip(batch.ids.tolist(), batch.weights.tolist(), strict=True))
        logits = torch.zeros(len(batch.ids), 3, requires_grad=True)
        loss = gk.weighted_loss(
            logits, batch.ids % 3, batch.ids, loader.state, sample_weights=batch.weights, update=True
        )
        loss.backward()
    assert 20 < len(weights) < 40 and weights == {i: 2.0 if i < 20 else 1.0 for i in weights}
