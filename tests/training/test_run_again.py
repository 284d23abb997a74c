"""A run leaves the caller's things as they were, a second one begins anew, a failed attempt leaves nothing behind."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from training import arguments, curve, sentences, tiny_llama, trainer_of, weights
from transformers import TrainerCallback
from transformers.trainer_utils import BestRun, HPSearchBackend

import geko_kernels as gk

PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}
LEARNABLE = {**PLAIN, "correct_loss": 2.6, "freeze_confidence": 0.14, "focus_confidence": 0.1, "freeze_quality": 0.1}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def figures(trainer) -> tuple:
    report = trainer.get_efficiency_report()
    epochs = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in report["epochs"]]
    counts = {k: v for k, v in report.items() if k not in ("seconds", "epochs")}
    state = {name: column.tolist() for name, column in trainer.sample_state.state_dict().items()}
    return curve(trainer), curve(trainer, "learning_rate"), curve(trainer, "epoch"), epochs, counts, state


# The caller's things


@pytest.mark.parametrize("options", [{"num_train_epochs": 2}, {"num_train_epochs": 1.5}, {"max_steps": 7}])
def test_nothing_of_the_callers_is_written_to(tmp_path, options):
    args, data, callbacks = arguments(tmp_path, **options), sentences(22, ragged=True), [TrainerCallback()]
    config = gk.GEKOConfig(**LEARNABLE, spend_saved=True)
    before, items, runs = copy.deepcopy(args.to_dict()), copy.deepcopy(data), []
    for _ in range(2):
        trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=data, config=config, callbacks=callbacks)
        trainer.train()
        runs.append(figures(trainer))
        assert args.to_dict() == before and trainer.args is args
        assert data == items and config == gk.GEKOConfig(**LEARNABLE, spend_saved=True) and len(callbacks) == 1
    assert runs[0] == runs[1]


def test_a_collator_may_hand_on_the_datasets_own_items(tmp_path):
    batches = [{"input_ids": torch.tensor([[1 + i, 2, 3]]), "labels": torch.tensor([[1 + i, 2, 3]])} for i in range(4)]
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 2}
    trainer = trainer_of(tmp_path, batches, data_collator=lambda items: items[0], **options)
    trainer.train()
    assert trainer.state.global_step == 8 and all(batch.keys() == {"input_ids", "labels"} for batch in batches)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("epochs", [2, 0.5])
def test_spend_saved_takes_as_many_steps_as_the_standard_run(tmp_path, epochs, drop_last):
    config = gk.GEKOConfig(**PLAIN, spend_saved=True)
    trainer = trainer_of(
        tmp_path, sentences(25), config, num_train_epochs=epochs, dataloader_drop_last=drop_last, learning_rate=0.0
    )
    trainer.train()
    assert (
        trainer.state.global_step == {(2, False): 14, (2, True): 12, (0.5, False): 4, (0.5, True): 3}[epochs, drop_last]
    )
    assert trainer.state.epoch == pytest.approx({False: {2: 2, 0.5: 4 / 7}, True: {2: 2, 0.5: 0.5}}[drop_last][epochs])


# A second train()


def test_a_second_train_goes_on_with_the_state_and_counts_anew(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN), max_steps=6)
    trainer.train()
    first, sampler = trainer.sample_state, trainer.sampler
    trainer.train()
    assert trainer.sample_state is first and (first.times_seen == 2).all()
    assert trainer.sampler is not sampler and trainer.sampler.epoch == 0
    report = trainer.get_efficiency_report()
    assert report["samples_backward"] == report["samples_standard"] == 24 and len(report["epochs"]) == 1
    assert curve(trainer, "learning_rate")[0] == 1e-2  # and not that of the first run's end
    assert trainer.state.global_step == 6


def test_a_resized_model_trains_again_as_a_new_trainer_would(tmp_path):
    trainer = trainer_of(tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.model.resize_token_embeddings(40)
    trainer.optimizer = None
    copied, args = copy.deepcopy(trainer.model), trainer.args
    trainer.train()
    fresh = gk.GEKOTrainer(copied, args, train_dataset=sentences(24))
    fresh.train()
    assert curve(trainer) == pytest.approx(curve(fresh), rel=1e-5)
    assert trainer._found.head.layer is trainer.model.lm_head and trainer.model.lm_head.out_features == 40


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_model_is_trained_from_its_beginning(tmp_path, wrapped, caplog):
    """Trainer goes on with the old one unless model_wrapped and optimizer are set as well."""
    trainer = trainer_of(tmp_path, num_train_epochs=1)
    trainer.train()
    old = trainer.sample_state
    after = weights(trainer.model).clone()
    first, trainer.model = trainer.model, tiny_llama(hidden_size=32, vocab_size=48)
    if wrapped:
        trainer.model_wrapped, trainer.optimizer = trainer.model, None
    trainer.train()
    fresh = gk.GEKOTrainer(tiny_llama(hidden_size=32, vocab_size=48), trainer.args, train_dataset=sentences(24))
    fresh.train()
    assert weights(first).equal(after) and weights(trainer.model).equal(weights(fresh.model))
    assert trainer.sample_state is not old and (trainer.sample_state.times_seen == 1).all()
    assert ("it starts with a new optimizer and a new learning state" in caplog.text) == (not wrapped)


def test_model_init_gives_the_same_run_each_time(tmp_path):
    sizes = iter((16, 16, 32, 16))  # the first is asked for when the trainer is made
    data = sentences(24)
    trainer = gk.GEKOTrainer(
        None, arguments(tmp_path), train_dataset=data, model_init=lambda: tiny_llama(hidden_size=next(sizes))
    )
    runs = []
    for _ in range(3):
        trainer.train()
        runs.append(figures(trainer))
    assert runs[0] == runs[2] != runs[1]
    assert trainer.sample_state.times_seen.max() <= 3


def test_hyperparameter_search_tries_each_from_the_beginning(tmp_path, monkeypatch):
    trials = [{"learning_rate": 1e-3, "num_train_epochs": 1}, {"learning_rate": 1e-2, "num_train_epochs": 2}] * 2
    found = []

    class Backend:
        def ensure_available(self):
            pass

        default_hp_space = staticmethod(lambda trial: trial.params)

        def run(self, trainer, n_trials, direction, **_):
            for number, params in enumerate(trials[:n_trials]):
                trainer.train(trial=SimpleNamespace(number=number, params=params))
                found.append((figures(trainer), (tmp_path / f"run-{number}" / "geko_report.json").exists()))
            return BestRun("0", 0.0, trials[0])

    monkeypatch.setitem(
        transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS,
        HPSearchBackend.OPTUNA,
        Backend,
    )
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = gk.GEKOTrainer(
        None,
        arguments(tmp_path),
        train_dataset=sentences(24),
        model_init=lambda: tiny_llama(),
        eval_dataset=sentences(4),
    )
    trainer.hyperparameter_search(n_trials=4, backend="optuna")
    assert found[0] == found[2] and found[1] == found[3] and all(written for _, written in found)
    counts = [run[4]["samples_standard"] for run, _ in found]
    assert counts == [24, 48, 24, 48]


def test_a_loader_asked_for_in_a_run_leaves_it_alone(tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                len(trainer.get_train_dataloader())

    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**LEARNABLE), num_train_epochs=3)
    trainer.train()
    expected = figures(trainer)
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**LEARNABLE), num_train_epochs=3, callbacks=[Asks()])
    trainer.train()
    assert figures(trainer) == expected


# auto_find_batch_size


class Narrow(torch.nn.Module):
    """Runs out of memory at more than `rows` rows, from the `late`-th such batch on."""

    def __init__(self, rows: int, late: int, error: type[RuntimeError]) -> None:
        super().__init__()
        self.inner, self.rows, self.left, self.error = tiny_llama(attention_dropout=0.2), rows, late, error

    def forward(self, input_ids, attention_mask=None):
        if len(input_ids) > self.rows and self.training:
            self.left -= 1
            if self.left < 0:
                raise self.error("CUDA out of memory.")
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize("late", [0, 4])
@pytest.mark.parametrize("error", [RuntimeError, torch.cuda.OutOfMemoryError])
def test_an_attempt_that_ran_out_of_memory_leaves_nothing_behind(tmp_path, late, error):
    """At a learning rate of 0, as the weights that it has trained are kept (Trainer's way)."""
    options = {"auto_find_batch_size": True, "learning_rate": 0.0, "num_train_epochs": 4}
    config, runs, drawn = gk.GEKOConfig(**LEARNABLE), [], []
    for start, rows in ((10, 6), (6, 6)):  # 10, 9, 8, 7, 6
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        trainer = trainer_of(
            tmp_path,
            sentences(30),
            config,
            Narrow(rows, late, error),
            per_device_train_batch_size=start,
            **options,
        )
        trainer.train()
        assert trainer._train_batch_size == 6
        runs.append((figures(trainer), trainer.sampler.plan.ids.tolist(), trainer.state.total_flos))
        drawn.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert runs[0] == runs[1] and drawn[0] == drawn[1]
    assert runs[0][0][4]["samples_backward"] == sum(epoch["samples"] for epoch in runs[0][0][3])
    seconds = trainer.get_efficiency_report()["seconds"]
    assert seconds["total"] > seconds["steps"] > 0


def test_a_resumed_run_that_runs_out_of_memory_begins_at_its_checkpoint(tmp_path):
    options = {"learning_rate": 0.0, "num_train_epochs": 3, "per_device_train_batch_size": 6}
    saved = {"save_strategy": "steps", "save_steps": 5}
    trainer = trainer_of(tmp_path, sentences(30), None, Narrow(6, 0, RuntimeError), **options, **saved)
    trainer.train()
    expected = figures(trainer)
    trainer = trainer_of(
        tmp_path, sentences(30), None, Narrow(3, 2, RuntimeError), auto_find_batch_size=True, **options
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer._train_batch_size == 3
    assert figures(trainer)[4] == expected[4] and figures(trainer)[5] == expected[5]
