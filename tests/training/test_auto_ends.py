"""Runs with `auto_stop` that nothing sensible can be said of: what they end with, and what is told of them."""

from __future__ import annotations

import json

import pytest
import torch
from auto_run import RawWeights, auto_trainer, few_samples, noisy, report_of
from training import weights
from transformers import TrainerCallback

from geko_kernels._files import load_tensors, save_tensors
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
    assert "ends with the averaged weights. An eval_dataset needs at least 10 samples." in caplog.text


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
        "At no look was the mean loss of the samples of eval_dataset a number: none of them has a label, or one had a "
        "loss that was NaN or infinite. The run went to its end. The weights are its average there."
    )


def test_a_run_that_a_callback_ends_is_not_said_to_have_gone_to_its_end(tmp_path):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 20

    trainer = auto_trainer(tmp_path, noisy(90), eval_dataset=noisy(50, seed=1), callbacks=[Ends()])
    trainer.train()
    told = "Something else than auto_stop (a callback, too few samples) ended the run"
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
        "the checkpoint was written by another version of geko_kernels, the rule's epochs, losses, accuracies, "
        "mislabelled, kept are missing: resume it with that version, or load the model from the checkpoint and start a"
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
