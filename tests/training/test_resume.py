"""A run that is killed and resumed ends as the one that never stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import kill_runs
import pytest
import resume_run
import torch
from resume_run import SETTINGS, after, summary, trainer_in, trainer_of
from training import sentences, tiny_llama
from transformers import TrainerCallback

import geko_kernels as gk
from geko_kernels.training.beginning import Snapshot
from geko_kernels.training.report.efficiency import Efficiency
from geko_kernels.zero_share import ZeroShare


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Summaries of uninterrupted runs, in epochs and in steps; each is trained once."""
    runs = {}

    def run_of(**options):
        key = json.dumps(options)
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            trainer = trainer_of(str(folder), **options)
            trainer.train()
            runs[key] = folder, json.loads(json.dumps(summary(trainer)))
        return runs[key]

    return run_of


def exit_code(folder: Path, resume: bool = False, kill_at: int | None = None) -> int | None:
    """Of a process that trains in `folder`; it shares our imports."""
    process = get_context("fork").Process(target=resume_run.run, args=(str(folder), None, resume, kill_at))
    process.start()
    process.join()
    return process.exitcode


def test_the_run_exercises_selection(whole):
    """Samples freeze, are probed, forgotten and quarantined: what resuming has to carry over is there."""
    _, result = whole()
    epochs = result["epochs"]
    assert min(epoch["samples"] for epoch in epochs[1:]) < 30
    assert sum(epoch["probes"] for epoch in epochs) > 0
    assert sum(epoch["buckets"]["FREEZE"] for epoch in epochs) > 0


def test_kill_9_at_a_random_step(whole, tmp_path):
    _, expected = whole()
    last = expected["curve"][-1]["step"]
    step = random.SystemRandom().randrange(6, last)
    print(f"killed in step {step} of {last}")
    assert exit_code(tmp_path, kill_at=step) == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    assert exit_code(tmp_path, resume=True) == 0
    resumed = json.loads((tmp_path / "summary.json").read_text())
    assert resumed == expected


def test_kills_at_random_moments():
    """`python tests/helpers/kill_runs.py` kills 100 runs in eight settings."""
    tally = kill_runs.kills_of("plain", 2, random.Random())
    assert tally.total() == 2


@pytest.mark.parametrize("options", [{}, {"max_steps": 37}], ids=["epochs", "steps"])
def test_every_checkpoint_resumes_exactly(whole, tmp_path, options):
    """Whether it lies in the middle of an epoch, at its end, or after accumulated micro-batches."""
    folder, expected = whole(**options)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) > 5
    for checkpoint in checkpoints:
        trainer = trainer_of(str(tmp_path), **options)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        step = int(checkpoint.name.split("-")[1])
        assert after(summary(trainer), step) == after(expected, step)


def steps_to_resume(epochs: list[dict], every: int) -> list[int]:
    """The last saved step before the end of the longest epoch, which the loader has read to its end by then, and
    that of a later epoch's end.
    """
    ends = [sum(epoch["steps"] for epoch in epochs[: number + 1]) for number in range(len(epochs))]
    longest = max(range(len(epochs)), key=lambda number: (epochs[number]["steps"], number))
    steps = (ends[longest] - 1, ends[min(longest + 1, len(ends) - 2)])
    return [step - step % every for step in steps]


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_resumes_exactly(setting, tmp_path):
    """Where the loader has fetched ahead, by one batch or with workers by a whole epoch, too."""
    trainer = trainer_in(setting, str(tmp_path / "whole"))
    trainer.train()
    expected = summary(trainer)
    if setting == "quarantine":
        assert max(epoch["quarantined"] for epoch in expected["epochs"]) > 0
    steps = steps_to_resume(expected["epochs"], trainer.args.save_steps)
    for step in steps[:1] if "workers" in setting or "length" in setting else steps:
        resumed = trainer_in(setting, str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert after(summary(resumed), step) == after(expected, step), f"from step {step}"


def test_a_finished_run_does_not_train_again(whole, tmp_path):
    """gekolib forgets the epoch, and so trains a finished run again."""
    for options in ({}, {"max_steps": 37}):
        folder, expected = whole(**options)
        copy = tmp_path / str(len(options))
        shutil.copytree(folder, copy)
        trainer = trainer_of(str(copy), **options)
        trainer.train(resume_from_checkpoint=True)
        assert summary(trainer)["weights"] == expected["weights"]
        assert trainer.state.global_step == expected["curve"][-1]["step"]


def test_half_a_checkpoint_is_passed_over(whole, tmp_path):
    folder, expected = whole()
    for name in ("checkpoint-10", "checkpoint-15"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text('{"epoch": 2.')
    trainer = trainer_of(str(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert after(summary(trainer), 10) == after(expected, 10)
    with pytest.raises(ValueError, match="no whole checkpoint in output_dir .*/empty: give the output_dir of"):
        trainer_of(str(tmp_path / "empty")).train(resume_from_checkpoint=True)


def test_foreign_checkpoints_are_refused(whole, tmp_path):
    folder, _ = whole()
    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(folder / "checkpoint-10", checkpoint)
    args = trainer_of(str(tmp_path)).args
    with pytest.raises(ValueError, match=r"folder of checkpoints: give one of them, the newest is .*/checkpoint-10"):
        trainer_of(str(tmp_path)).train(resume_from_checkpoint=str(tmp_path))
    other = gk.GEKOTrainer(tiny_llama(), args, train_dataset=sentences(31))
    with pytest.raises(ValueError, match="state of 30 samples, but train_dataset has 31"):
        other.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="the checkpoint's run was counted in epochs, this one is in steps"):
        trainer_of(str(tmp_path), max_steps=50).train(resume_from_checkpoint=str(checkpoint))
    state = checkpoint / "geko_state.safetensors"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        trainer_of(str(tmp_path)).train(resume_from_checkpoint=str(checkpoint))
    shutil.copy(checkpoint / "model.safetensors", state)
    with pytest.raises(ValueError, match="not one that SampleState.save wrote"):
        trainer_of(str(tmp_path)).train(resume_from_checkpoint=str(checkpoint))
    state.unlink()
    with pytest.raises(ValueError, match=r"it has no geko_state.safetensors"):
        trainer_of(str(tmp_path)).train(resume_from_checkpoint=str(checkpoint))


def test_the_path_of_the_loss_is_chosen_on_as_before(tmp_path):
    chosen = [3, 1, 7.5, 9, 0, 2]

    class Choose(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            first.sample_state.zero_share = ZeroShare(chosen)

    first = trainer_of(str(tmp_path))
    first.add_callback(Choose())
    first.train()
    resumed = trainer_of(str(tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.sample_state.zero_share.values() == chosen


def test_an_attempt_that_is_undone_leaves_no_choice_behind():
    state, counts = gk.SampleState(2), Efficiency(torch.device("cpu"))
    state.zero_share = ZeroShare([3, 1, 7.5, 9, 0, 2])
    before = Snapshot(state, counts)
    for _ in range(5):
        state.zero_share.due(torch.device("cpu"))
    for _ in range(2):
        before.restore_(state, counts)
        assert state.zero_share.values() == [3, 1, 7.5, 9, 0, 2]
        state.zero_share.due(torch.device("cpu"))
