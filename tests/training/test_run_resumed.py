"""Resuming under other settings, on other data, or from less than a checkpoint: right, refused, or told."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset
from training import MapDataset, curve, sentences, trainer_of

import geko_kernels as gk
from geko_kernels.training.fingerprint import changed_items, fingerprint

PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}
SAVED = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
OTHER = "continues with other settings than its checkpoint has"


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three epochs of six steps; a checkpoint every four steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("saved")
    trainer = trainer_of(folder, config=gk.GEKOConfig(**PLAIN), **SAVED)
    trainer.train()
    return folder


def resume(saved, step, folder, config=None, data=None, **options):
    config = config or gk.GEKOConfig(**PLAIN)
    trainer = trainer_of(folder, data, config, **{**SAVED, "save_strategy": "no", **options})
    trainer.train(resume_from_checkpoint=str(saved / f"checkpoint-{step}"))
    return trainer


# Length


def test_the_same_settings_are_not_remarked_on(saved, tmp_path, caplog):
    trainer = resume(saved, 8, tmp_path)
    assert OTHER not in caplog.text and "nothing is trained" not in caplog.text
    assert trainer.state.global_step == 18


@pytest.mark.parametrize("epochs", [2, 5])
def test_another_number_of_epochs(saved, tmp_path, caplog, epochs):
    """At step 8 of 18: the rate goes on as that of a run of the new length."""
    trainer = resume(saved, 8, tmp_path, num_train_epochs=epochs)
    assert trainer.state.global_step == 6 * epochs and trainer.state.epoch == epochs
    rates = dict(zip(curve(trainer, "step"), curve(trainer, "learning_rate"), strict=False))
    assert rates[10] == pytest.approx(1e-2 * (1 - 9 / (6 * epochs)))
    assert rates[6 * epochs] == pytest.approx(1e-2 / (6 * epochs))
    report = trainer.get_efficiency_report()
    assert report["samples_standard"] == report["samples_backward"] == 24 * epochs
    assert f"num_train_epochs was 3, is {epochs}: the learning rate continues from the run's position" in caplog.text


@pytest.mark.parametrize(("step", "done"), [(12, 2), (16, 2)])
def test_fewer_epochs_than_are_done_train_nothing_and_say_so(saved, tmp_path, caplog, step, done):
    trainer = resume(saved, step, tmp_path, num_train_epochs=1)
    assert trainer.state.global_step == step and max(curve(trainer, "step")) == step
    assert f"past the end of this one (epoch {done}): nothing is trained" in caplog.text
    report = trainer.get_efficiency_report()
    assert report["samples_standard"] == report["samples_backward"] == 4 * step
    assert report["saved_compute"] == 0


def test_another_number_of_steps(tmp_path, caplog):
    folder = tmp_path / "steps"
    options = {"max_steps": 16, "save_strategy": "steps", "save_steps": 8}
    trainer_of(folder, config=gk.GEKOConfig(**PLAIN), **options).train()
    for steps in (20, 10, 4):
        trainer = resume(folder, 8, tmp_path, max_steps=steps)
        assert trainer.state.global_step == max(steps, 8)
        assert f"max_steps was 16, is {steps}" in caplog.text
        assert trainer.get_efficiency_report()["samples_standard"] == 4 * max(steps, 8)
    assert "nothing is trained" in caplog.text
    with pytest.raises(
        ValueError, match="run was counted in steps, this one is in epochs: resume with the same max_steps"
    ):
        resume(folder, 8, tmp_path)


def test_spend_saved_counts_in_steps(saved, tmp_path):
    with pytest.raises(ValueError, match="counted in epochs, this one is in steps"):
        resume(saved, 8, tmp_path, gk.GEKOConfig(**PLAIN, spend_saved=True))


# Batches, seed, config


@pytest.mark.parametrize(
    ("options", "message", "steps"),
    [
        ({"per_device_train_batch_size": 3}, "samples in a batch of all processes was 4, is 3", 8 + 6 + 8),
        ({"per_device_train_batch_size": 8}, "samples in a batch of all processes was 4, is 8", 8 + 2 + 3),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps was 1, is 3", 8 + 2 + 2),
    ],
)
def test_another_batch_skips_no_sample(saved, tmp_path, caplog, options, message, steps):
    """Step 8 is two batches into epoch 1. What a new step would cut in two is trained again: nothing is left out."""
    trainer = resume(saved, 8, tmp_path, learning_rate=0.0, **options)
    assert trainer.state.global_step == steps
    assert trainer.sample_state.times_seen.min() == 3
    assert message in caplog.text and "are trained again" in caplog.text


def test_another_seed(saved, tmp_path, caplog):
    trainer = resume(saved, 8, tmp_path, seed=7)
    assert "seed of the order was 42, is 7: later epochs are drawn in another order" in caplog.text
    assert (trainer.sample_state.times_seen == 3).all()


def test_another_config_is_named_by_field(saved, tmp_path, caplog):
    trainer = resume(saved, 8, tmp_path, gk.GEKOConfig.uniform())
    assert "GEKOConfig bucket_weights was [3, 1, 0], is [1, 1, 1], freeze_weight was 0.0, is 1.0" in caplog.text
    assert trainer.sample_state.config == gk.GEKOConfig.uniform() and trainer.state.global_step == 18


def test_only_the_model_was_saved(tmp_path, caplog):
    options = {**SAVED, "save_only_model": True}
    trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN), **options).train()
    trainer = resume(tmp_path, 8, tmp_path)
    assert "checkpoint-8 has no optimizer and no random numbers (save_only_model=True)" in caplog.text
    assert trainer.state.global_step == 18 and (trainer.sample_state.times_seen == 3).all()
    assert curve(trainer, "learning_rate")[-1] == pytest.approx(1e-2 / 18)


# Data


def test_another_dataset_of_the_same_size_is_refused(saved, tmp_path):
    shifted = [{**item, "input_ids": item["input_ids"][::-1][:-1] + [5]} for item in sentences(24)]
    with pytest.raises(ValueError, match=r"another train_dataset: of 24 items compared, 23 .* start a new run"):
        resume(saved, 8, tmp_path, data=shifted)
    with pytest.raises(ValueError, match="another train_dataset: of 24 items compared, 2 have changed"):
        items = sentences(24)
        items[3], items[4] = items[4], items[3]
        resume(saved, 8, tmp_path, data=items)
    assert resume(saved, 8, tmp_path, data=MapDataset(sentences(24))).state.global_step == 18


class Image:
    def __init__(self, data):
        self.data = data

    def tobytes(self):
        return self.data


class Lazy(Dataset):
    """Items of many kinds, some of which tell nothing."""

    def __init__(self, size=40, noise=None):
        self.size, self.noise = size, noise

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        item = {
            "numbers": [i, 2 * i],
            "array": np.arange(i, i + 3, dtype=np.float32),
            "tensor": torch.full((2, 2), i, dtype=torch.bfloat16),
            "text": f"sample {i}",
            "names": np.array([f"name {i}", "x"]),
            "image": Image(bytes([i, 0])),
            "nested": [{"a": (1.5, None, True)}, [[1], [2, 3]], b"x"],
            "unknown": object(),
        }
        if self.noise is not None:
            item["noise"] = self.noise()
        return item


def test_a_fingerprint_is_the_same_in_every_process_and_container():
    plain = fingerprint(Lazy())
    assert plain["length"] == 40 and len(plain["items"]) == 40 and None not in plain["items"]
    assert fingerprint(Lazy(), in_worker=True) == plain
    assert fingerprint([Lazy()[i] for i in range(40)]) == plain
    assert fingerprint(Subset(Lazy(80), range(40))) == plain
    ordered = fingerprint([OrderedDict(reversed(Lazy()[i].items())) for i in range(40)])
    assert ordered == plain
    assert plain["items"][3] == fingerprint(Lazy(4))["items"][3]
    listed = [{"x": [1, 2], "y": 1.5}]
    assert fingerprint(listed) == fingerprint([{"x": torch.tensor([1, 2]), "y": np.float64(1.5)}])
    assert len(fingerprint(Lazy(10**6))["items"]) == 64
    assert fingerprint([])["items"] == []


@pytest.mark.parametrize("field", ["numbers", "array", "tensor", "text", "names", "image", "nested"])
def test_a_change_in_any_field_is_seen(field):
    items = [Lazy()[i] for i in range(40)]
    items[7] = {**items[7], field: Lazy()[8][field] if field != "nested" else [{"a": (1.5, None, False)}]}
    assert changed_items(fingerprint(Lazy()), fingerprint(items)) == (1, 40)


def test_augmentation_is_no_change_and_random_numbers_are_left_as_they_were():
    for noise in (random.random, np.random.rand, lambda: torch.rand(3)):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        one = fingerprint(Lazy(noise=noise))
        after = torch.rand(2).tolist(), random.random(), np.random.rand()
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        assert after == (torch.rand(2).tolist(), random.random(), np.random.rand())
        assert fingerprint(Lazy(noise=noise)) == one and None not in one["items"]
    own = np.random.default_rng(0)
    assert fingerprint(Lazy(noise=own.random))["items"] == [None] * 40


def test_items_that_tell_nothing_are_skipped():
    class Broken(Lazy):
        def __getitem__(self, i):
            if i % 2:
                raise OSError("gone")
            return super().__getitem__(i)

    digests = fingerprint(Broken())["items"]
    assert digests[1::2] == [None] * 20 and None not in digests[::2]
    assert changed_items({"items": digests}, fingerprint(Lazy())) == (0, 20)
    assert fingerprint([object()] * 3)["items"] == [None] * 3


def test_datasets_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    columns = {"x": list(range(100)), "text": [f"a{i}" for i in range(100)]}
    one, two = datasets.Dataset.from_dict(columns), datasets.Dataset.from_dict(columns)
    assert fingerprint(one) == fingerprint(two) == fingerprint(one.with_format("torch"))
    assert changed_items(fingerprint(one), fingerprint(one.shuffle(seed=1)))[0] > 50


def test_the_data_is_read_for_it_only_where_a_checkpoint_is_written(tmp_path):
    """And then in a worker, where the loader has workers: the dataset opens its file there."""
    import os

    class Opens(MapDataset):
        opened = None

        def __getitem__(self, index):
            self.opened = os.getpid()
            return super().__getitem__(index)

    data = Opens(sentences(8))
    options = {"num_train_epochs": 1, "dataloader_num_workers": 1}
    trainer_of(tmp_path, data, **options).train()
    assert data.opened is None
    trainer_of(tmp_path, data, save_strategy="epoch", **options).train()
    assert data.opened is None and (tmp_path / "checkpoint-2").exists()
