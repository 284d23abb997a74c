"""What TensorBoard, W&B and other tools that `report_to` names get to see of a run, and under which names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from auto_run import auto_trainer, few_samples, report_of
from training import sentences, trainer_of
from transformers import TrainerCallback
from transformers.integrations import rewrite_logs

import geko_kernels as gk

SHARES = ("freeze", "light", "focus", "hard")


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


class Recorder(TrainerCallback):
    """Scalars by name, as Transformers' own callbacks of such tools send them: {name: [(step, value)]}."""

    def __init__(self):
        self.scalars = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in rewrite_logs(logs).items():
            assert isinstance(value, (int, float)), name
            self.scalars.setdefault(name, []).append((state.global_step, value))

    def values(self, name):
        return [value for _, value in self.scalars[name]]


def test_gekos_figures_are_one_group_beside_the_loss(tmp_path):
    recorder = Recorder()
    config = gk.GEKOConfig(use_curriculum=False, noise_guard=False)
    trainer = trainer_of(tmp_path, sentences(24), config, num_train_epochs=20, callbacks=[recorder])
    trainer.train()
    names = {name for name in recorder.scalars if "geko" in name}
    phases = {f"train/geko/phase_{name}" for name in SHARES[1:]}
    figures = {f"train/geko/{name}" for name in ("loss", "accuracy", "progress", "left_out", "quarantined", *SHARES)}
    assert names == figures | phases
    steps = [step for step, _ in recorder.scalars["train/loss"]]
    assert all([step for step, _ in recorder.scalars[name]] == steps for name in names)
    for shares in zip(*(recorder.values(f"train/geko/{name}") for name in SHARES), strict=True):
        assert sum(shares) == pytest.approx(1)
    planned = [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]]
    assert planned[0] == 24 and planned[-1] < 24
    left_out = recorder.values("train/geko/left_out")
    assert left_out[0] == 0
    assert list(dict.fromkeys(left_out)) == pytest.approx(list(dict.fromkeys(1 - count / 24 for count in planned)))


def test_auto_stop_shows_the_curve_of_the_held_out_samples_as_it_grows(tmp_path):
    recorder = Recorder()
    with few_samples():
        trainer = auto_trainer(tmp_path, config=gk.GEKOConfig.uniform(auto_stop=True), callbacks=[recorder])
        trainer.train()
    curve = report_of(trainer)["stopping"]["curve"]
    for quantity in ("loss", "accuracy"):
        shown = recorder.scalars[f"train/geko/held_out_{quantity}"]
        assert [value for _, value in shown] == pytest.approx([look[quantity] for look in curve], abs=1e-6)
        assert [step for step, _ in shown] == sorted({step for step, _ in shown})
    steps = [step for step, _ in recorder.scalars["train/loss"]]
    assert steps == list(range(1, trainer.state.global_step + 1))  # a look takes no log step's place
    # 40 of 400 samples are held back, so no epoch trains them
    assert recorder.values("train/geko/left_out") == pytest.approx([0.1] * len(recorder.scalars["train/loss"]))


def test_the_bar_of_a_notebook_ends_where_the_run_does(tmp_path):
    class Bar(TrainerCallback):  # as transformers.utils.notebook.NotebookProgressCallback, which needs IPython
        training_tracker = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.training_tracker = SimpleNamespace(total=state.max_steps)

    bar, config = Bar(), gk.GEKOConfig(use_curriculum=False, noise_guard=False)
    trainer = trainer_of(tmp_path, sentences(24), config, num_train_epochs=20, callbacks=[bar])
    trainer.train()
    assert bar.training_tracker.total == trainer.state.global_step < 20 * 6


def test_tensorboard_gets_them(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(tmp_path / "run", report_to=["tensorboard"])
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {f"train/geko/{name}" for name in (*SHARES, "left_out", "quarantined")} <= set(board.Tags()["scalars"])
    logged = [entry["geko/hard"] for entry in trainer.state.log_history if "geko/hard" in entry]
    assert [event.value for event in board.Scalars("train/geko/hard")] == pytest.approx(logged)
