"""What a run logs and reports is what it did: speeds, epochs, diverged models, samples without labels."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from training import arguments, curve, sentences, standard, tiny_llama, trainer_of, weights
from transformers import EarlyStoppingCallback, TrainerCallback

import geko_kernels as gk
from geko_kernels.training.report.efficiency import Efficiency, write_json
from geko_kernels.training.report.report import write_report

FREEZE, LIGHT, FOCUS, HARD = range(4)
PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


# As Trainer's where nothing is left out


LENGTHS = [
    {"num_train_epochs": 0.5},
    {"num_train_epochs": 1.3},
    {"num_train_epochs": 2},
    {"max_steps": 3},
    {"max_steps": 9},
    {"max_steps": 8, "gradient_accumulation_steps": 3},
    {"num_train_epochs": 1.5, "gradient_accumulation_steps": 3},
    {"num_train_epochs": 1.5, "dataloader_drop_last": True},
    {"max_steps": 8, "dataloader_drop_last": True},
]


@pytest.mark.parametrize("size", [24, 25])
@pytest.mark.parametrize("length", LENGTHS, ids=str)
def test_uniform_weights_give_trainers_epochs_and_figures(tmp_path, length, size):
    data, args = sentences(size), arguments(tmp_path, **length)
    ours = gk.GEKOTrainer(tiny_llama(), args, train_dataset=data, config=gk.GEKOConfig.uniform())
    theirs = standard(tiny_llama(), args, data)
    outputs = ours.train(), theirs.train()
    assert curve(ours, "epoch") == pytest.approx(curve(theirs, "epoch"), rel=1e-12)
    assert curve(ours, "step") == curve(theirs, "step")
    assert curve(ours, "learning_rate") == pytest.approx(curve(theirs, "learning_rate"), rel=1e-9)
    for name in ("global_step", "epoch", "total_flos", "max_steps", "num_train_epochs"):
        assert getattr(ours.state, name) == pytest.approx(getattr(theirs.state, name)), name
    assert outputs[0].metrics.keys() == outputs[1].metrics.keys()
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=5e-4)
    report = ours.get_efficiency_report()
    assert report["samples_backward"] == report["samples_standard"] and report["saved_compute"] == 0
    assert report["epochs"][-1]["end"] == pytest.approx(theirs.state.epoch)


class Counts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rows = tiny_llama(), 0

    def forward(self, input_ids):
        self.rows += len(input_ids) * self.training
        return self.inner(input_ids=input_ids).logits


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == 5


@pytest.mark.parametrize("case", ["frozen", "partial", "stopped", "resumed", "again"])
def test_speeds_are_of_what_was_trained(tmp_path, case):
    model, options = Counts(), {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    if case == "partial":
        options["num_train_epochs"] = 1.2
    callbacks = [StopAt()] if case == "stopped" else []
    config = gk.GEKOConfig(**PLAIN, probes=False)
    trainer = trainer_of(tmp_path, sentences(25), config, model, callbacks=callbacks, learning_rate=0.0, **options)
    if case == "frozen":
        state = trainer.sample_state
        state.times_seen[:12], state.bucket[:12] = 1, FREEZE
    before = 0
    if case in ("resumed", "again"):
        trainer.train()
        model.rows, before = 0, 4 if case == "resumed" else 0
    output = trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if case == "resumed" else None)
    metrics, steps = output.metrics, trainer.state.global_step - before
    seconds = metrics["train_runtime"]
    expected = {"frozen": 26, "partial": 33, "stopped": 20, "resumed": 34, "again": 50}[case]
    assert model.rows == expected
    assert metrics["train_samples_per_second"] == pytest.approx(model.rows / seconds, rel=1e-3)
    assert metrics["train_steps_per_second"] == pytest.approx(steps / seconds, rel=1e-3)
    assert trainer.state.log_history[-1]["train_samples_per_second"] == metrics["train_samples_per_second"]


def test_epochs_of_a_run_counted_in_steps_are_passes_over_the_data(tmp_path):
    """However many plans they take: half of the samples are frozen, so twelve steps make four plans."""
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN, probes=False), max_steps=12, learning_rate=0.0)
    trainer.sample_state.times_seen[:12], trainer.sample_state.bucket[:12] = 1, FREEZE
    trainer.train()
    assert curve(trainer, "epoch")[:12] == pytest.approx([step / 6 for step in range(1, 13)])
    epochs = trainer.get_efficiency_report()["epochs"]
    assert [epoch["end"] for epoch in epochs] == [0.5, 1.0, 1.5, 2.0]
    assert trainer.state.num_train_epochs == 2


# Models that diverge


def diverging(tmp_path, at: int, **fields):
    class Diverges(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == at:
                torch.nn.init.constant_(model.model.norm.weight, math.nan)

    return trainer_of(tmp_path, config=gk.GEKOConfig.uniform(), callbacks=[Diverges()], num_train_epochs=2, **fields)


def strict(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_model_gone_nan_is_shown_as_nan(tmp_path, caplog):
    saved = {"save_strategy": "steps", "save_steps": 4}
    trainer = diverging(tmp_path, 8, **saved)
    trainer.train()
    losses = curve(trainer, "geko/loss")
    assert all(map(math.isfinite, losses[:8])) and all(map(math.isnan, losses[8:]))
    assert curve(trainer, "geko/nonfinite") == [4, 4, 4, 4]
    report = trainer.get_efficiency_report()
    assert report["samples_nonfinite"] == 16 and report["samples_backward"] == 48
    assert [epoch["nonfinite"] for epoch in report["epochs"]] == [0, 16]
    assert math.isfinite(report["epochs"][0]["loss"]) and math.isnan(report["epochs"][1]["loss"])
    assert caplog.text.count("The loss of 4 samples was NaN or infinite: geko/loss is NaN") == 1
    assert trainer.sample_state.last_loss.isfinite().all()
    written = strict(tmp_path / "geko_report.json")
    assert written["efficiency"]["epochs"][1]["loss"] is None
    assert [row["geko/loss"] for row in written["log_history"] if "geko/loss" in row][8:] == [None] * 4
    page = write_report(tmp_path).read_text()
    assert "<b>NaN</b>" in page and "<td>NaN</td>" in page and "0.000" not in page
    assert "The loss of 16 visits was NaN or infinite." in page
    resumed = diverging(tmp_path, -1, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert math.isnan(resumed.get_efficiency_report()["epochs"][1]["loss"])
    for name in ("geko_efficiency.json", "geko_report.json"):
        strict(next(tmp_path.glob(f"**/{name}")))


def test_a_probe_that_meets_nan_is_counted():
    counts, state = Efficiency(torch.device("cpu")), gk.SampleState(2)
    logits = torch.full((2, 3), math.inf)
    _, stats = gk.weighted_loss(logits, torch.tensor([0, 1]), torch.arange(2), state, update=True, return_stats=True)
    counts.count(stats, torch.tensor(2), probe=True)
    assert counts.collect()["nonfinite"] == 0
    assert counts.report()["samples_nonfinite"] == 2 and counts.batches == 0


def test_every_json_is_strict(tmp_path):
    values = {
        "a": math.nan,
        "b": [math.inf, (-math.inf, 1.5)],
        "c": {"d": np.float32("nan"), "e": np.int64(3), "f": torch.tensor(math.nan), "g": torch.tensor(2)},
        "h": "NaN",
        "i": True,
    }
    write_json(tmp_path / "x.json", values)
    assert strict(tmp_path / "x.json") == {
        "a": None,
        "b": [None, [None, 1.5]],
        "c": {"d": None, "e": 3, "f": None, "g": 2},
        "h": "NaN",
        "i": True,
    }


def test_what_callbacks_and_metrics_log_is_strict_in_the_report(tmp_path):
    class Logs(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            state.log_history.append({"epoch": state.epoch, "mine": np.float32("inf"), "eval_loss": math.nan})

    trainer_of(tmp_path, num_train_epochs=1, callbacks=[Logs()]).train()
    rows = strict(tmp_path / "geko_report.json")["log_history"]
    assert {"epoch": 1.0, "mine": None, "eval_loss": None} in rows
    write_report(tmp_path)


# Samples without labels


@pytest.mark.parametrize("ragged", [False, True])
def test_samples_without_a_label_are_work_done(tmp_path, ragged):
    data = sentences(24, ragged=ragged)
    for item in data[::2]:
        item["labels"] = [-100] * len(item["labels"])
    trainer = trainer_of(tmp_path, data, gk.GEKOConfig.uniform(), num_train_epochs=2)
    trainer.train()
    report, tokens = trainer.get_efficiency_report(), sum(len(item["input_ids"]) for item in data)
    assert report["samples_forward"] == report["samples_backward"] == report["samples_standard"] == 48
    assert report["tokens_forward"] == report["tokens_backward"] == 2 * tokens
    assert report["samples_idle"] == 24 and report["saved_compute"] == 0
    assert [epoch["samples"] for epoch in report["epochs"]] == [24, 24]
    assert trainer.sample_state.times_seen.tolist() == [0, 2] * 12


def test_no_label_at_all_is_work_done_too(tmp_path):
    data = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 8
    trainer = trainer_of(tmp_path, data, num_train_epochs=2)
    trainer.train()
    report = trainer.get_efficiency_report()
    assert report["samples_backward"] == report["samples_idle"] == 16 and report["saved_compute"] == 0
    assert report["epochs"][0]["loss"] is None and "geko/loss" not in trainer.state.log_history[0]


def test_a_run_whose_visits_were_not_counted_reports_no_saving():
    counts = Efficiency(torch.device("cpu"))
    counts.begin_epoch(0, 0)
    counts.samples_standard = 24
    marks = {"end": 1.0, "buckets": {}, "quarantined": 0, "forgotten": 0}
    counts.end_epoch(6, marks)
    assert counts.report()["saved_compute"] == 0
    idle = Efficiency(torch.device("cpu"))
    idle.begin_epoch(0, 0)
    idle.samples_standard = 24
    idle.end_epoch(0, marks)
    assert idle.report()["saved_compute"] == 1  # an empty plan


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_early_stop_counts_the_epochs_that_trainer_would_have_made(tmp_path, drop_last):
    shifted = [{**item, "labels": [item["labels"][0] % 31 + 1] * 8} for item in sentences(8)]
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "logging_steps": 100}
    trainer = trainer_of(
        tmp_path,
        sentences(26),
        gk.GEKOConfig(),
        callbacks=[EarlyStoppingCallback(2)],
        eval_dataset=shifted,
        num_train_epochs=30,
        dataloader_drop_last=drop_last,
        **best,
    )
    trainer.train()
    epochs = len(curve(trainer, "eval_loss"))
    assert epochs < 30
    assert trainer.get_efficiency_report()["samples_standard"] == epochs * (24 if drop_last else 26)


def test_the_time_of_an_attempt_that_ran_out_of_memory_is_in_the_total_alone(tmp_path):
    class Slow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()

        def forward(self, input_ids):
            if len(input_ids) > 3:
                time.sleep(0.5)
                raise RuntimeError("CUDA out of memory.")
            return self.inner(input_ids=input_ids).logits

    trainer = trainer_of(tmp_path, model=Slow(), auto_find_batch_size=True, num_train_epochs=1)
    trainer.train()
    seconds = trainer.get_efficiency_report()["seconds"]
    assert seconds["total"] - sum(v for k, v in seconds.items() if k != "total") > 0.5
