"""Every run ends, its rate falls to the end, and a checkpoint is never lost to the next one."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import curve, sentences, trainer_of, weights
from transformers import TrainerCallback

import geko_kernels as gk
from geko_kernels.training import planned
from geko_kernels.training.checkpoint import last_complete

FREEZE, LIGHT, FOCUS, HARD = range(4)
PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


class Bow(torch.nn.Module):
    """A model quick enough for many runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


def rows(count: int) -> list[dict]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": x[i], "labels": i % 3} for i in range(count)]


def collate(items):
    return {"x": torch.stack([item["x"] for item in items]), "labels": torch.tensor([i["labels"] for i in items])}


class Holds(TrainerCallback):
    """Puts the samples into these buckets before every epoch, whatever they have learnt."""

    def __init__(self, buckets, quarantined=(), from_epoch=0, trainer=None) -> None:
        self.buckets, self.quarantined, self.trainer, self.from_epoch = buckets, quarantined, trainer, from_epoch
        self.epochs = 0

    def on_epoch_begin(self, args, state, control, **_):
        if self.epochs >= self.from_epoch:
            samples = self.trainer.sample_state
            samples.times_seen.clamp_(min=1)
            samples.bucket.copy_(torch.as_tensor(self.buckets).expand(len(samples)))
            samples.quarantined[list(self.quarantined)] = True
        self.epochs += 1


def held(folder, buckets, quarantined=(), from_epoch=0, data=None, config=None, **fields):
    hold = Holds(buckets, quarantined, from_epoch)
    trainer = trainer_of(folder, data, config or gk.GEKOConfig(**PLAIN, probes=False), callbacks=[hold], **fields)
    hold.trainer = trainer
    return trainer


# Runs that end


CONFIGS = st.builds(
    gk.GEKOConfig,
    light_interval=st.sampled_from([1, 2, 64]),
    use_curriculum=st.booleans(),
    uniform_finish=st.sampled_from([0.0, 0.3]),
    noise_guard=st.booleans(),
    probes=st.booleans(),
    selection=st.booleans(),
    spend_saved=st.booleans(),
    bucket_weights=st.sampled_from([(3, 1, 0), (1, 1, 1), (0, 0, 1), (0, 0, 0)]),
)


@settings(max_examples=30)
@given(st.data())
def test_every_run_ends(tmp_path_factory, data):
    size, batch = data.draw(st.integers(1, 12), "size"), data.draw(st.integers(1, 5), "batch")
    config, drop_last = data.draw(CONFIGS, "config"), data.draw(st.booleans(), "drop_last")
    length = data.draw(
        st.sampled_from([{"num_train_epochs": e} for e in (0.4, 1, 3.3)] + [{"max_steps": s} for s in (1, 7)]), "length"
    )
    buckets = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size), "buckets")
    quarantined = data.draw(st.sets(st.integers(0, size - 1)), "quarantined")
    trainer = held(
        tmp_path_factory.mktemp("run"),
        buckets,
        quarantined if data.draw(st.booleans(), "quarantine") else range(size),
        data.draw(st.integers(0, 2), "from_epoch"),
        rows(size),
        config,
        model=Bow(),
        data_collator=collate,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=data.draw(st.sampled_from([1, 3]), "accumulation"),
        dataloader_drop_last=drop_last,
        learning_rate=0.0,
        **length,
    )
    if drop_last and size < batch and "num_train_epochs" in length:
        with pytest.raises(ValueError, match=f"{size} items, fewer than the {batch} of one batch"):
            trainer.train()
        return
    trainer.train()
    epochs = trainer.get_efficiency_report()["epochs"]
    bound = trainer._run_steps + 1 if trainer.counts_steps else 4
    assert len(epochs) <= bound and trainer.state.global_step <= trainer._run_steps
    stopped = trainer.state.global_step < trainer._run_steps
    if trainer.counts_steps and stopped:  # then there was nothing
        free = size - int(trainer.sample_state.quarantined.sum())
        assert free < (batch if drop_last else 1)


@pytest.mark.parametrize("spend_saved", [False, True])
def test_a_plan_smaller_than_a_batch_is_filled_up_under_drop_last(tmp_path, spend_saved):
    """Of three FOCUS samples no batch of four can be made: the next in order comes along, with no weight."""
    config = gk.GEKOConfig(**PLAIN, probes=False, spend_saved=spend_saved)
    length = {"num_train_epochs": 2} if spend_saved else {"max_steps": 12}
    buckets = [FOCUS] * 3 + [FREEZE] * 21
    trainer = held(tmp_path, buckets, (23,), config=config, dataloader_drop_last=True, learning_rate=0.0, **length)
    trainer.train()
    assert trainer.state.global_step == 12
    assert [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]] == [4] * 12
    seen = trainer.sample_state.times_seen.tolist()
    assert seen[:3] == [13] * 3 and seen[23] == 1 and sum(seen[3:23]) == 20 + 12


def test_a_small_plan_is_filled_up_in_a_run_of_epochs_too(tmp_path):
    trainer = held(tmp_path, [FOCUS] * 3 + [FREEZE] * 21, dataloader_drop_last=True, num_train_epochs=3)
    trainer.train()
    assert [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]] == [4, 4, 4]


@pytest.mark.parametrize(
    ("options", "quarantined", "message"),
    [
        (
            {"max_steps": 9},
            range(24),
            r"stops at step 0 of 9: no batch can be trained. 24 of 24 samples are quarantined\.",
        ),
        (
            {"max_steps": 9, "dataloader_drop_last": True},
            range(3, 24),
            r"21 of 24 samples are quarantined, and dataloader_drop_last=True drops batches of fewer than 4\.",
        ),
    ],
)
def test_a_run_that_can_train_nothing_stops_and_says_why(tmp_path, caplog, options, quarantined, message):
    saved = {"save_strategy": "steps", "save_steps": 100}
    trainer = held(tmp_path, HARD, quarantined, config=gk.GEKOConfig(**PLAIN), **options, **saved)
    trainer.train()
    assert trainer.state.global_step == 0
    assert re.search(message, caplog.text)
    assert (tmp_path / "checkpoint-0" / "trainer_state.json").exists()


def test_out_of_turn_samples_do_not_hold_a_run_up(tmp_path):
    config = gk.GEKOConfig(**PLAIN, probes=False, light_interval=64, bucket_weights=(1, 1, 1))
    trainer = held(tmp_path, LIGHT, config=config, max_steps=12, dataloader_drop_last=True, learning_rate=0.0)
    trainer.train()
    assert trainer.state.global_step == 12


# The rate


def last_rate_in_steps(trainer) -> float:
    """The last step's learning rate, as a multiple of what one step of its epoch takes off it."""
    rates = curve(trainer, "learning_rate")
    steps = [epoch["steps"] for epoch in trainer.get_efficiency_report()["epochs"] if epoch["steps"]]
    one = (rates[-steps[-1]] - rates[-1]) / (steps[-1] - 1) if steps[-1] > 1 else rates[-1]
    return rates[-1] / one


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("config", "from_epoch"),
    [
        (gk.GEKOConfig(**PLAIN, probes=False), 1),
        (gk.GEKOConfig(**PLAIN, probes=False), 3),
        (gk.GEKOConfig(**{**PLAIN, "uniform_finish": 0.1}, probes=False), 2),
        (gk.GEKOConfig.recommended(), 9),
    ],
    ids=["frozen-early", "frozen-late", "finish", "never-frozen"],
)
def test_the_rate_falls_to_the_end_where_the_last_plans_are_empty(tmp_path, config, from_epoch, scheduler):
    trainer = held(
        tmp_path, FREEZE, from_epoch=from_epoch, config=config, num_train_epochs=5, lr_scheduler_type=scheduler
    )
    trainer.train()
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([0.0, 0.0], abs=1e-12)
    if scheduler == "linear":
        assert last_rate_in_steps(trainer) == pytest.approx(1)
    else:
        assert last_rate_in_steps(trainer) <= 1
    rates = curve(trainer, "learning_rate")
    assert all(later <= sooner for sooner, later in zip(rates, rates[1:], strict=False))
    samples = [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]]
    if config.uniform_finish == 0 and from_epoch < 5:
        trained = sum(samples[:-1])
        assert samples == [24] * from_epoch + [0] * (4 - from_epoch) + [-(-trained // 5)]


def test_a_rate_that_does_not_fall_needs_no_closing_epoch(tmp_path):
    trainer = held(tmp_path, FREEZE, from_epoch=1, num_train_epochs=4, lr_scheduler_type="constant")
    trainer.train()
    assert [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]] == [24, 0, 0, 0]


def test_the_closing_epoch_trains_what_is_frozen_with_weight_one(tmp_path):
    trainer = held(tmp_path, FREEZE, (0, 1), from_epoch=1, num_train_epochs=2)
    trainer.train()
    assert [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]] == [24, 12]
    assert trainer.get_efficiency_report()["samples_idle"] == 0
    assert trainer.sample_state.times_seen[:2].tolist() == [1, 1]


# Checkpoints


EVERY_EPOCH = {"save_strategy": "epoch", "save_total_limit": 1, "num_train_epochs": 5, "lr_scheduler_type": "constant"}


def test_empty_epochs_leave_the_checkpoint_of_their_step_alone(tmp_path, monkeypatch):
    trainer = held(tmp_path, FREEZE, from_epoch=2, **EVERY_EPOCH)
    written = []
    save = planned.save_files
    monkeypatch.setattr(planned, "save_files", lambda folder, *a: (written.append(folder.name), save(folder, *a)))
    trainer.train()
    assert written == ["checkpoint-6", "checkpoint-12"]
    assert last_complete(tmp_path, "trainer_state.json") == str(tmp_path / "checkpoint-12")
    resumed = held(tmp_path, FREEZE, **EVERY_EPOCH)
    resumed.train(resume_from_checkpoint=True)
    assert written == ["checkpoint-6", "checkpoint-12"]
    assert resumed.state.global_step == 12 and weights(resumed.model).equal(weights(trainer.model))
    ours, theirs = resumed.get_efficiency_report(), trainer.get_efficiency_report()
    for report in (ours, theirs):
        report.pop("seconds")
        for epoch in report["epochs"]:
            epoch.pop("seconds")
    assert ours == theirs


def test_a_step_saved_again_keeps_the_old_checkpoint_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """Another run has left a checkpoint of this step, or a callback asks for a second save: then the process dies."""

    class Twice(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save = state.global_step == 6

    options = {"save_strategy": "epoch", "save_total_limit": 1, "num_train_epochs": 1}
    trainer = trainer_of(tmp_path, callbacks=[Twice()], **options)
    calls = []

    def dies(self, output_dir):
        calls.append(output_dir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rng(self, output_dir)

    rng = gk.GEKOTrainer._save_rng_state
    monkeypatch.setattr(gk.GEKOTrainer, "_save_rng_state", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.setattr(gk.GEKOTrainer, "_save_rng_state", rng)
    kept = last_complete(tmp_path, "trainer_state.json")
    assert kept == str(tmp_path / ".checkpoint-6.old")
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer_of(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and weights(resumed.model).equal(weights(whole.model))
    again = trainer_of(tmp_path, callbacks=[Twice()], **options)
    again.train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-6"]


def test_a_half_written_checkpoint_is_written_over(tmp_path):
    options = {"save_strategy": "epoch", "num_train_epochs": 1}
    trainer_of(tmp_path, **options).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")
    trainer_of(tmp_path, **options).train()
    assert last_complete(tmp_path, "trainer_state.json") == str(tmp_path / "checkpoint-6")
    assert not list(tmp_path.glob(".checkpoint*"))


def test_the_last_empty_epoch_evaluates_where_trainer_would_at_its_last_step(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "eval_dataset": sentences(4), "num_train_epochs": 3}
    trainer = held(tmp_path, FREEZE, from_epoch=1, lr_scheduler_type="constant", **options)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [4, 6]
