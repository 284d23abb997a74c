"""The table of what is replaced, called and read of Trainer: as the installed releases have it, and complete."""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import pytest
import torch
from auto_run import auto_trainer
from training import arguments, sentences, tiny_llama, trainer_of, weights
from transformers import Trainer
from transformers.trainer_utils import RemoveColumnsCollator

import geko_kernels as gk
from geko_kernels.training import overrides
from geko_kernels.training.overrides import CALLED, MORE, READ, REPLACED, SFT_READ, SFT_REPLACED, Method

FOLDER = Path(overrides.__file__).parent


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def ours(cls):
    return [base for base in cls.__mro__ if base.__module__.startswith("geko_kernels.")]


def replaced(classes, below):
    """The methods of `below` that one of `classes` has too."""
    names = {name for cls in classes for name, value in vars(cls).items() if isinstance(value, types.FunctionType)}
    return {name for name in names if hasattr(below, name) and (name == "__init__" or not name.startswith("__"))}


def test_this_trainer_is_the_one_of_the_table():
    told = overrides.changes(Trainer, {**REPLACED, **CALLED}, READ)
    assert not told, "\n".join(told)


def test_this_sft_trainer_is_the_one_of_the_table():
    sft = pytest.importorskip("trl").SFTTrainer
    told = overrides.changes(sft, SFT_REPLACED, SFT_READ)
    assert not told, "\n".join(told)


def test_every_replaced_method_is_in_the_table_and_no_other():
    assert replaced(ours(gk.GEKOTrainer), Trainer) == set(REPLACED)


def test_every_replaced_method_of_sft_is_in_the_table_and_no_other():
    sft = pytest.importorskip("trl").SFTTrainer
    own = [cls for cls in ours(gk.GEKOSFTTrainer) if cls not in ours(gk.GEKOTrainer)]
    assert replaced(own, sft) - {"__init__"} == set(SFT_REPLACED)


def attributes():
    for path in sorted(FOLDER.rglob("*.py")):
        if path.name != "overrides.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    yield f"{path.relative_to(FOLDER)}:{node.lineno}", node.attr


def test_every_private_name_of_trainer_is_in_the_table_and_is_used():
    trl = pytest.importorskip("trl")
    table = {*REPLACED, *CALLED, *READ, *SFT_REPLACED, *SFT_READ}
    theirs = {name for cls in (Trainer, trl.SFTTrainer) for name in {*vars(cls), *overrides.names_in(cls)}}
    mine = {name for cls in ours(gk.GEKOSFTTrainer) for name in vars(cls)} - {*dir(Trainer), *dir(trl.SFTTrainer)}
    private = [(at, name) for at, name in attributes() if name.startswith("_") and not name.startswith("__")]
    unlisted = [f"{at}: {name}" for at, name in private if name in theirs - mine - table]
    assert not unlisted, "belong into overrides.py: " + "; ".join(unlisted)
    used = {name for _, name in attributes()} | {"_remove_columns"}  # by getattr
    assert {*CALLED, *READ, *SFT_READ, *overrides.ELSEWHERE} <= used


def test_what_is_read_elsewhere_is_there(tmp_path):
    trainer = trainer_of(tmp_path)
    assert isinstance(trainer.accelerator._dataloaders, list), overrides.ELSEWHERE["_dataloaders"]
    assert callable(RemoveColumnsCollator._remove_columns), overrides.ELSEWHERE["_remove_columns"]


class Other:
    """A trainer of another release."""

    def kept(self, model):
        self._attribute = self.called()

    def called(self, model, more):
        self.kept()

    def left(self):
        pass


def test_each_difference_is_one_sentence():
    methods = {
        "kept": Method(("model",), "keeps"),
        "called": Method(("model",), "calls"),
        "left": Method((), "leaves"),
        "gone": Method((), "goes"),
    }
    assert overrides.changes(Other, methods, {"_attribute": "one", "_other": "another"}) == [
        "Other.called takes (model, more) now, and GEKO, which calls, expects (model)",
        "no method of Other calls left any longer, with which GEKO leaves",
        "Other no longer has a method gone, with which GEKO goes",
        "Other no longer has an attribute _other, from which GEKO reads another",
    ]
    assert overrides.changes(Other, {"called": Method(("model", MORE), "calls")}, {}) == []


@pytest.mark.parametrize("name", sorted({*REPLACED, *CALLED} - {"__init__"}))
def test_a_method_that_transformers_dropped_is_told_before_training(tmp_path, monkeypatch, name):
    trainer = trainer_of(tmp_path)
    before = weights(trainer.model)
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(
        RuntimeError, match=rf"the Trainer of Transformers \d\S* has no {name}, with which GEKO .*\. Install"
    ):
        trainer.train()
    assert torch.equal(before, weights(trainer.model))


# Of these a release that calls another name changes nothing that is trained.
OF_AUTO_STOP = ("_prepare_for_training", "_maybe_log_save_evaluate", "_finalize_training")
HARMLESS = {
    *("__init__", "_get_train_sampler", "training_step", "prediction_step", "_evaluate", "_save_rng_state"),
    *OF_AUTO_STOP,  # without it
    *("evaluate", "predict", "save_model", "_save_optimizer_and_scheduler"),
    *("_load_from_checkpoint", "_issue_warnings_after_load"),  # of a resumed run, which Trainer warns of
}


def call_by_another_name(monkeypatch, hook):
    """Trainer, as it would be if its methods called `hook` by another name; the old one stays, and is not called."""
    other = f"renamed{hook}"

    def renamed(code):
        inner = tuple(renamed(each) if isinstance(each, types.CodeType) else each for each in code.co_consts)
        names = tuple(other if name == hook else name for name in code.co_names)
        return code.replace(co_names=names, co_consts=inner)

    for value in vars(Trainer).copy().values():
        function = inspect.unwrap(value) if callable(value) else None
        if isinstance(function, types.FunctionType) and function.__code__ != renamed(function.__code__):
            monkeypatch.setattr(function, "__code__", renamed(function.__code__))
    monkeypatch.setattr(Trainer, other, vars(Trainer)[hook], raising=False)


def two_epochs(folder):
    fields = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    args = arguments(folder, **fields)
    config = gk.GEKOConfig.uniform()
    return gk.GEKOTrainer(tiny_llama(), args, train_dataset=sentences(24), eval_dataset=sentences(4), config=config)


@pytest.mark.parametrize("hook", sorted(set(REPLACED) - {"__init__", "train"}))
def test_a_hook_that_transformers_calls_by_another_name(tmp_path, monkeypatch, hook):
    plain, trainer = two_epochs(tmp_path / "plain"), two_epochs(tmp_path / "other")
    plain.train()
    call_by_another_name(monkeypatch, hook)
    if hook in HARMLESS:
        trainer.train()
        assert torch.equal(weights(trainer.model), weights(plain.model))
        assert torch.equal(trainer.sample_state.times_seen, plain.sample_state.times_seen)
        return
    with pytest.raises(RuntimeError, match=rf"{hook}.* replaced by a subclass, so this Trainer \(Transformers \d"):
        trainer.train()
    assert trainer.state.global_step <= 6, "an epoch has 6 steps"


@pytest.mark.parametrize("hook", OF_AUTO_STOP)
def test_a_run_that_should_find_its_length_is_not_trained_without_a_hook(tmp_path, monkeypatch, hook):
    call_by_another_name(monkeypatch, hook)
    trainer = auto_trainer(tmp_path, num_train_epochs=2)
    with pytest.raises(RuntimeError, match=rf"{hook}.* replaced by a subclass, so this Trainer \(Transformers \d"):
        trainer.train()


def test_a_run_that_transformers_begins_by_another_name_than_train(tmp_path):
    trainer = two_epochs(tmp_path)
    with pytest.raises(
        RuntimeError, match="the run did not begin with it. train is not replaced by a subclass, so this"
    ):
        Trainer.train(trainer)


def test_observe_sees_that_no_loss_is_asked_for(tmp_path, monkeypatch):
    trainer = Trainer(tiny_llama(), arguments(tmp_path, num_train_epochs=2), train_dataset=sentences(24))
    call_by_another_name(monkeypatch, "compute_loss")
    monkeypatch.setattr(
        Trainer, "_prepare_inputs", lambda self, inputs: {k: v for k, v in inputs.items() if k != "sample_ids"}
    )
    gk.observe(trainer)
    with pytest.raises(
        RuntimeError, match="a step was trained without compute_loss, through which observe sees the samples"
    ):
        trainer.train()
    assert trainer.state.global_step == 1
