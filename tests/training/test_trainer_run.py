"""GEKOTrainer in one process: how a run goes, what it reports, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from training import MapDataset, arguments, curve, sentences, standard, tiny_classifier, tiny_llama, trainer_of, weights
from transformers import EarlyStoppingCallback, default_data_collator

import geko_kernels as gk

FREEZE, LIGHT, FOCUS, HARD = range(4)
ADAM = 5e-5  # at a learning rate of 1e-2 Adam turns the rounding of a gradient near 0 into this much of a weight
PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def frozen(trainer, ids) -> None:
    """Set the state as if `ids` had been mastered."""
    state = trainer.sample_state
    state.times_seen[ids], state.bucket[ids], state.confidence[ids] = 1, FREEZE, 0.99


def test_frozen_samples_are_not_loaded(tmp_path):
    loaded = []

    class Watched(MapDataset):
        def __getitem__(self, index):
            loaded.append(index)
            return self.items[index]

    trainer = trainer_of(tmp_path, Watched(sentences(24)), gk.GEKOConfig(**PLAIN, probes=False), num_train_epochs=2)
    frozen(trainer, slice(0, 12))
    trainer.train()
    assert sorted(loaded) == sorted(list(range(12, 24)) * 2)
    report = trainer.get_efficiency_report()
    assert report["samples_standard"] == 48 and report["samples_forward"] == report["samples_backward"] == 24
    assert report["saved_compute"] == pytest.approx(0.5)
    assert trainer.state.global_step == 6


def test_a_forgotten_sample_thaws_at_its_next_probe(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN), num_train_epochs=3, learning_rate=0.0)
    frozen(trainer, slice(0, 12))  # an untrained model: every probe finds them wrong
    trainer.train()
    report = trainer.get_efficiency_report()
    assert [epoch["probes"] for epoch in report["epochs"]] == [0, 12, 0]  # a quarter, found forgotten; so all
    assert [epoch["samples"] for epoch in report["epochs"]] == [12, 24, 24]
    assert [epoch["forgotten"] for epoch in report["epochs"]] == [0, 12, 0]
    assert trainer.sampler.forgotten.tolist() == [1] * 12 + [0] * 12
    assert report["samples_forward"] - report["samples_backward"] == 12


def test_probes_leave_the_model_alone(tmp_path):
    model = tiny_llama()
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN), model=model, num_train_epochs=3)
    frozen(trainer, slice(0, 24))
    before, seen = weights(model).clone(), []
    probe = trainer._probe
    trainer._probe = lambda *args: (probe(*args), seen.append(torch.equal(weights(model), before)))
    trainer.train()
    assert seen[0]
    assert trainer.state.global_step > 0  # and what they found was trained


def test_learning_rate_decays_fully_however_short_the_epochs(tmp_path):
    for options in ({"num_train_epochs": 4}, {"max_steps": 20}):
        trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN, probes=False), warmup_steps=1, **options)
        frozen(trainer, slice(0, 16))
        trainer.train()
        steps = {"num_train_epochs": 8, "max_steps": 20}[next(iter(options))]
        assert trainer.state.global_step == steps
        rates = curve(trainer, "learning_rate")
        assert rates[-1] < rates[1] / 6
        assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_the_first_step_has_a_rate(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.train()
    assert curve(trainer, "learning_rate")[0] == 1e-2


def test_weights_move_along_the_curriculum_within_an_epoch(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig.original(), num_train_epochs=1)
    trainer.args.per_device_train_batch_size = 1
    trainer._train_batch_size = 1
    trainer.train()
    phases = list(zip(*(curve(trainer, f"geko/phase_{name}") for name in ("hard", "focus", "light")), strict=True))
    assert set(phases) == {(1, 2, 3), (2, 3, 1), (5, 2, 0)}


def test_nothing_left_to_teach_ends_the_run_in_order(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN, probes=False), save_strategy="steps", save_steps=100)
    frozen(trainer, slice(0, 24))
    trainer.train()
    assert trainer.state.global_step == 0
    assert [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]] == [0, 0, 0]
    assert trainer.get_efficiency_report()["saved_compute"] == 1.0
    assert (tmp_path / "checkpoint-0" / "geko_state.safetensors").exists()


def test_max_steps_with_nothing_left_goes_on_uniformly(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN, probes=False), max_steps=9, learning_rate=0.0)
    frozen(trainer, slice(0, 24))
    trainer.train()
    assert trainer.state.global_step == 9
    assert trainer.get_efficiency_report()["samples_standard"] == 36


def test_save_steps_counts_optimizer_steps(tmp_path):
    """gekolib counts micro-batches."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    trainer_of(tmp_path, **options).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_evaluation_leaves_the_state_alone(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=sentences(8), num_train_epochs=1)
    trainer.train()
    before = {name: column.clone() for name, column in trainer.sample_state.state_dict().items()}
    loss = trainer.evaluate()["eval_loss"]
    reference = standard(trainer.model, trainer.args, None, eval_dataset=sentences(8))
    assert loss == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-5)
    for name, column in trainer.sample_state.state_dict().items():
        assert torch.equal(column, before[name])


@pytest.mark.parametrize("spend_saved", [False, True])
def test_the_best_model_is_loaded_at_the_end_and_a_run_can_stop_early(tmp_path, spend_saved):
    shifted = [{**item, "labels": [item["labels"][0] % 31 + 1] * 8} for item in sentences(8)]  # get worse when learnt
    saved = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}
    stop = EarlyStoppingCallback(2)
    config = gk.GEKOConfig(spend_saved=spend_saved)
    trainer = trainer_of(
        tmp_path, config=config, num_train_epochs=30, eval_dataset=shifted, callbacks=[stop], logging_steps=100, **saved
    )
    trainer.train()
    losses = curve(trainer, "eval_loss")
    best = losses.index(min(losses))
    assert best < len(losses) - 1 < 29 and trainer.state.best_global_step == 6 * (best + 1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert trainer.get_efficiency_report()["samples_standard"] == 24 * len(losses)


# Figures


def test_report_and_logs(tmp_path):
    config = gk.GEKOConfig()  # freezes early
    trainer = trainer_of(tmp_path, sentences(24, ragged=True), config, num_train_epochs=30, logging_steps=5)
    trainer.train()
    written = json.loads((tmp_path / "geko_report.json").read_text())
    report = trainer.get_efficiency_report()
    assert written["efficiency"] == json.loads(json.dumps(report)) | {"seconds": written["efficiency"]["seconds"]}
    assert {"version", "num_samples", "config", "efficiency", "log_history", "most_forgotten"} <= written.keys()
    assert {"num_quarantined", "quarantined", "num_doubtful"} <= written.keys()
    assert report["samples_standard"] == 24 * 30
    assert 0 < report["samples_backward"] <= report["samples_forward"] < 24 * 30
    assert report["samples_backward"] == sum(epoch["samples"] for epoch in report["epochs"])
    work = report["samples_forward"] + 2 * report["samples_backward"]
    assert report["saved_compute"] == pytest.approx(1 - work / (3 * 24 * 30))
    assert (
        report["tokens_backward"] < report["tokens_forward"] or report["samples_forward"] == report["samples_backward"]
    )
    parts = ("steps", "probes", "selection", "evaluation", "checkpoints")
    assert report["seconds"]["total"] >= sum(report["seconds"][part] for part in parts) > 0
    assert all(sum(epoch["buckets"].values()) == 24 for epoch in report["epochs"])
    assert report["epochs"][-1]["accuracy"] > report["epochs"][0]["accuracy"]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    shares = [entry[f"geko/{name}"] for name in ("freeze", "light", "focus", "hard")]
    assert sum(shares) == pytest.approx(1) and all(isinstance(share, float) for share in shares)
    assert [item["id"] for item in written["most_forgotten"]] == list(
        dict.fromkeys(item["id"] for item in written["most_forgotten"])
    )


def test_the_bar_shows_the_buckets(tmp_path, capsys):
    trainer_of(tmp_path, disable_tqdm=False, num_train_epochs=1).train()
    assert "focus 100%" in capsys.readouterr().err


# Errors


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from sentences(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"data": Stream(), "max_steps": 3}, "with a length"),
        ({"data": []}, "train_dataset has no items"),
        (
            {"data": {"train": sentences(4), "test": sentences(4)}},
            r"by index, got a dict with the keys \['test', 'train'\]",
        ),
        ({"shift_labels": "no"}, "shift_labels must be True, False or None, got 'no'"),
        ({"probe_batch_size": 0}, "probe_batch_size must be an integer of at least 1, or None, got 0"),
    ],
)
def test_what_does_not_combine_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(ValueError, match="num_train_epochs must be above 0, got 0"):
        trainer_of(tmp_path, num_train_epochs=0).train()
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at least 1, got 0"):
        trainer_of(tmp_path, per_device_train_batch_size=0).train()
    with pytest.raises(ValueError, match="max_steps must be at least 1, or -1 for num_train_epochs to count, got 0"):
        trainer_of(tmp_path, max_steps=0).train()
    with pytest.raises(ValueError, match="compute_loss_func"):
        gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), train_dataset=[], compute_loss_func=lambda *_: 0)
    with pytest.raises(TypeError, match="config must be a GEKOConfig, got dict"):
        trainer_of(tmp_path, config={"selection": True})
    regression = [{"input_ids": [1, 2, 3], "labels": 0.5}] * 4
    with pytest.raises(ValueError, match="labels must be integers, got torch.float32; train a regression"):
        trainer_of(tmp_path, regression, model=tiny_classifier(1), data_collator=default_data_collator).train()
    trainer = trainer_of(tmp_path)
    trainer.train_dataset = sentences(5)
    with pytest.raises(ValueError, match="make a new GEKOTrainer for another dataset"):
        trainer.train()
    with pytest.raises(IndexError, match="labels: 99"):
        trainer_of(tmp_path, [{"input_ids": [1, 2, 3], "labels": [1, 99, 3]}] * 4).train()


def test_the_samples_saved_can_be_spent(tmp_path):
    """As many samples as the standard run trains, in more and shorter epochs."""
    config = gk.GEKOConfig(**PLAIN, probes=False, spend_saved=True)
    trainer = trainer_of(tmp_path, config=config, num_train_epochs=2, learning_rate=0.0)
    frozen(trainer, slice(0, 12))
    trainer.train()
    assert trainer.state.global_step == 12
    samples = [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]]
    assert sum(samples) == 48 and samples[0] == 12
