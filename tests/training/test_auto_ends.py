"""Runs with `auto_stop` that nothing sensible can be said of: what they end with, and what is told of them."""

from __future__ import annotations

import json

import pytest
import torch
from auto_run import RawWeights, auto_trainer, few_samples, noisy, report_of
from training import weights
from transformers import TrainerCallback

import geko_kernels as gk
from geko_kernels._files import load_tensors, save_tensors
from geko_kernels.training.planning import sampler as sampler_module
from geko_kernels.training.resumed import ResumeError
from geko_kernels.training.stopping import files


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)
    with few_samples():
        yield


def test_a_handful_of_evaluation_samples_decides_nothing(tmp_path, caplog):
    trainer = auto_trainer(
        tmp_path, noisy(90), eval_dataset={"a": noisy(5, seed=1), "b": noisy(4, seed=2)}, max_steps=2
    )
    trainer.train()
    assert report_of(trainer)["stopping"]["looked_at"] is None
    assert (
        "ends with the averaged weights. An eval_dataset needs a length, at least 10 samples, and labels" in caplog.text
    )


def test_evaluation_data_without_labels_are_not_looked_at(tmp_path, caplog):
    """A language model would be judged by its prompts, a classifier failed at the first look."""
    prompts = [{"input_ids": item["input_ids"]} for item in noisy(30, seed=1)]
    for eval_dataset in (prompts, {"own": noisy(30, seed=1), "plain": prompts}):
        trainer = auto_trainer(tmp_path, noisy(90), eval_dataset=eval_dataset, num_train_epochs=2)
        trainer.train()
        assert report_of(trainer)["stopping"]["looked_at"] is None and trainer.state.global_step == 18
    assert caplog.text.count("and labels if those of train_dataset have them.") == 2


def test_samples_without_labels_do_not_end_the_run(tmp_path):
    """Not by what is no number at all: it ended after 1.25 epochs with the weights of the first quarter."""
    unlabelled = [{**item, "labels": [-100] * 5} for item in noisy(30, seed=1)]
    trainer = auto_trainer(tmp_path, noisy(90), eval_dataset=unlabelled, num_train_epochs=3)
    raw = RawWeights(trainer)
    trainer.train()
    report = report_of(trainer)["stopping"]
    assert trainer.state.global_step == 27 and not report["ended"] and report["kept"] is None
    torch.testing.assert_close(weights(trainer.model).double(), raw.averaged(27), rtol=1e-4, atol=1e-5)
    assert [point["loss"] for point in report["curve"]] == [None] * 12
    assert report["why"] == (
        "The mean loss of the samples of eval_dataset was never a number: none of them has a label, or one had a loss "
        "that was NaN or infinite. The run went to its end. The weights are the final average."
    )


def test_a_run_that_a_callback_ends_is_not_said_to_have_gone_to_its_end(tmp_path):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 20

    trainer = auto_trainer(tmp_path, noisy(90), eval_dataset=noisy(50, seed=1), callbacks=[Ends()])
    trainer.train()
    told = "Something other than auto_stop (a callback, too few samples) ended the run"
    assert trainer.state.global_step == 20 and told in report_of(trainer)["stopping"]["why"]


def test_a_checkpoint_of_another_version_is_refused_with_a_sentence(tmp_path):
    auto_trainer(tmp_path, num_train_epochs=1, save_strategy="steps", save_steps=20).train()
    folder = tmp_path / "checkpoint-20"
    path = files.path_of(folder, files.AVERAGE, None)
    columns, about = load_tensors(path, files._FORMAT, "GEKOTrainer")
    values = json.loads(about["rest"])
    values["rule"] = {name: values["rule"][name] for name in ("measure", "armed", "by_heart")}
    save_tensors(path, files._FORMAT, columns, {"rest": json.dumps(values)})
    told = (
        "the checkpoint was written by another version of geko_kernels \\(the rule's epochs, losses, accuracies, "
        "mislabelled, kept are missing\\): resume with that version, or load the model from the checkpoint and start a"
    )
    with pytest.raises(ResumeError, match=told):
        auto_trainer(tmp_path).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("name", [files.RAW, files.AVERAGE, files.KEPT])
def test_a_file_that_a_checkpoint_lacks_is_missed_before_the_run_and_not_at_its_end(tmp_path, name):
    fields = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 20}
    auto_trainer(tmp_path / "first", **fields).train()
    folder = tmp_path / "first" / "checkpoint-20"
    files.path_of(folder, name, None).unlink()
    again = auto_trainer(tmp_path / "again", **fields)
    raw = RawWeights(again)
    with pytest.raises(
        ValueError, match=f"checkpoint-20 has no {name}.safetensors: with auto_stop take another, whole c"
    ):
        again.train(resume_from_checkpoint=str(folder))
    assert len(raw.steps) == 1  # no step was trained


def test_a_run_resumed_before_or_after_the_guard_quarantines_is_the_one_that_never_stopped(tmp_path, monkeypatch):
    """A third of the labels is wrong, and quarantined from the second epoch on; so many held-back ones do not count."""
    right, data = noisy(400, 0.0), noisy(400, 0.0)
    for item in data[::3]:
        item["labels"] = [-100] * 4 + [24 + (item["labels"][-1] - 23) % 4]
        item["input_ids"] = [*item["input_ids"][:4], item["labels"][-1]]
    wrong = torch.tensor([mine != its for mine, its in zip(data, right, strict=True)])
    monkeypatch.setattr(sampler_module.GEKOSampler, "_guards", lambda _: True)
    quarantine = lambda state: int(state.quarantined.copy_(wrong & (state.times_seen > 0)).sum())  # noqa: E731
    monkeypatch.setattr(sampler_module, "update_quarantine_", quarantine)
    fields = {"config": gk.GEKOConfig.auto(), "save_strategy": "steps", "save_steps": 18}
    whole = auto_trainer(tmp_path / "whole", data, **fields)
    whole.train()
    expected = report_of(whole)["stopping"]
    held, share = expected["held_back"], int(whole.sample_state.quarantined.sum()) / 360
    assert share == (134 - int(wrong[held].sum())) / 360 and f"without the highest {share:.0%}" in expected["why"]
    for step in (18, 54):
        trainer = auto_trainer(tmp_path / str(step), data, **fields)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert report_of(trainer)["stopping"] == expected and weights(trainer.model).equal(weights(whole.model))
