"""A run that finds its own length: where it stops, which weights it ends with, what it leaves alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from auto_run import RawWeights, auto_trainer, facts, few_samples, noisy, report_of
from safetensors.torch import load_file
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from training import curve, tiny_config, tiny_llama, trainer_of, weights
from transformers import LlamaForSequenceClassification

import geko_kernels as gk
from geko_kernels.training.resumed import ResumeError
from geko_kernels.training.stopping import mixin

AUTO = gk.GEKOConfig.uniform(auto_stop=True)


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)
    with few_samples():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(trainer, raw weights by step) of a run that was not interrupted; saves every 7 steps."""
    from geko_kernels import ops

    before, ops._override = ops._override, "reference"
    torch.set_num_threads(1)
    with few_samples():
        trainer = auto_trainer(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=7)
        raw = RawWeights(trainer)
        trainer.train()
    ops._override = before
    return trainer, raw


# The end


def test_it_stops_where_the_held_out_loss_rises_with_the_averaged_weights_of_the_best_look(whole):
    trainer, raw = whole
    report = report_of(trainer)["stopping"]
    losses = [point["loss"] for point in report["curve"]]
    kept = report["kept"]
    assert report["ended"] and losses[kept] == min(losses) and losses[-1] > losses[kept]
    assert report["curve"][-1]["epoch"] == report["curve"][kept]["epoch"] + 0.5 < 12
    assert trainer.state.global_step == math.ceil(report["curve"][-1]["epoch"] * 36)
    step = math.ceil(report["curve"][kept]["epoch"] * 36)  # 360 samples in batches of 10
    torch.testing.assert_close(weights(trainer.model).double(), raw.averaged(step), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights(trainer.model).double(), raw.averaged(trainer.state.global_step), atol=1e-4)
    assert report["why"] == (
        f"The run ended because the held-back samples were best after {report['curve'][kept]['epoch']:.2f} epochs "
        f"(loss {losses[kept]:.4f}), and did not improve for 0.5 epochs."
    )
    assert not list(Path(trainer.args.output_dir).glob("geko_kept*"))


def test_the_loss_of_a_look_is_that_of_the_held_back_samples(whole):
    trainer, _ = whole
    report = report_of(trainer)["stopping"]
    items = [noisy(400)[i] for i in report["held_back"]]
    model = trainer.model.eval()
    with torch.no_grad():
        losses = [float(model(torch.tensor([i["input_ids"]]), labels=torch.tensor([i["labels"]])).loss) for i in items]
    assert report["curve"][report["kept"]]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_samples_held_back_are_never_trained_nor_probed(whole):
    trainer, _ = whole
    held = report_of(trainer)["stopping"]["held_back"]
    seen = trainer.sample_state.times_seen
    assert len(held) == 40 and (seen[held] == 0).all() and int((seen == 0).sum()) == 40
    assert not set(held) & set(trainer.sampler.plan.ids.tolist())


def test_what_looks_cost_is_counted(whole):
    """40 samples a look; until the swap test has succeeded also 40 seen ones and the pairs of both."""
    trainer, _ = whole
    report, run = report_of(trainer), trainer._stopping
    looks, pairs = len(run.rule.curve), sum(len(each.items) for each in run.at.swapped)
    forwards = report["efficiency"]["samples_forward"] - report["efficiency"]["samples_backward"]
    unarmed, rest = divmod(forwards - 40 * looks, 40 + pairs)
    assert rest == 0 and 1 <= unarmed < looks
    assert report["efficiency"]["seconds"]["probes"] > 0
    assert report["efficiency"]["samples_standard"] == round(run.rule.curve[-1][0] * 400)


@pytest.mark.parametrize("judged_by", ["held_back", "eval_dataset"])
def test_of_what_looks_see_only_samples_held_back_are_recorded(whole, tmp_path, judged_by):
    """Made-up items and those of `eval_dataset` have ids that training samples have too."""
    trainer, _ = whole
    if judged_by == "eval_dataset":
        trainer = auto_trainer(tmp_path, noisy(90), eval_dataset=noisy(50, seed=1), num_train_epochs=2)
        trainer.train()
    stopping, lines = report_of(trainer)["stopping"], Path(trainer.args.output_dir, "samples.jsonl").read_text()
    assert stopping["looked_at"] == judged_by and stopping["swap_test"]
    last = trainer.sample_state.loss_history[:, -1].tolist()
    for row in map(json.loads, lines.splitlines()):
        if row["id"] in stopping["held_back"]:
            assert row["losses"] and not row["times_seen"]
        else:
            assert len(row["losses"]) == row["times_seen"]
            assert row["losses"][-1] == pytest.approx(last[row["id"]], abs=1e-5)


def test_looks_leave_the_run_alone(whole, tmp_path, monkeypatch):
    """Dropout and order included: the raw weights are those of a run that looks at nothing."""
    monkeypatch.setattr(mixin, "looked_at", lambda *_: None)
    trainer = auto_trainer(tmp_path, num_train_epochs=1)
    raw = RawWeights(trainer)
    trainer.train()
    assert len(raw.steps) == 37 and all(a.equal(b) for a, b in zip(raw.steps, whole[1].steps[:37], strict=True))
    torch.testing.assert_close(weights(trainer.model).double(), raw.averaged(36), rtol=1e-4, atol=1e-5)


def test_it_ends_with_the_kept_weights_where_it_goes_to_its_most(tmp_path):
    trainer = auto_trainer(tmp_path, max_steps=50, config=gk.GEKOConfig.auto())
    raw = RawWeights(trainer)
    trainer.train()
    report = report_of(trainer)["stopping"]
    assert trainer.state.global_step == 50 and not report["ended"] and report["kept"] == len(report["curve"]) - 1
    assert report["why"].startswith("The run went to its end; the held-back samples were best after 1.25 epochs")
    torch.testing.assert_close(weights(trainer.model).double(), raw.averaged(50), rtol=1e-4, atol=1e-5)


def test_accuracy_may_be_the_measure(tmp_path):
    trainer = auto_trainer(tmp_path, num_train_epochs=3, config=gk.GEKOConfig.auto(auto_measure="accuracy"))
    trainer.train()
    report = report_of(trainer)["stopping"]
    right = [point["accuracy"] for point in report["curve"]]
    assert report["kept"] == right.index(max(right)) and max(right) > 0.5 and "(accuracy " in report["why"]


# Resuming


@pytest.mark.parametrize("step", [7, 28, 49])
def test_a_resumed_run_is_the_one_that_never_stopped(whole, tmp_path, step):
    expected, raw = whole
    trainer = auto_trainer(tmp_path, save_strategy="steps", save_steps=7)
    weights_after = RawWeights(trainer)
    trainer.train(resume_from_checkpoint=f"{expected.args.output_dir}/checkpoint-{step}")
    assert trainer.state.global_step == expected.state.global_step
    assert all(a.equal(b) for a, b in zip(weights_after.steps[1:], raw.steps[step + 1 :], strict=True))
    assert weights(trainer.model).equal(weights(expected.model))
    assert trainer._stopping.rule.curve == expected._stopping.rule.curve
    mine, theirs = report_of(trainer), report_of(expected)
    assert mine["stopping"] == theirs["stopping"]
    for name in ("samples_forward", "samples_backward", "samples_standard"):
        assert mine["efficiency"][name] == theirs["efficiency"][name]
    assert curve(trainer) == curve(expected)


def test_a_run_resumed_after_its_end_trains_nothing(tmp_path):
    first = auto_trainer(tmp_path, save_strategy="epoch")
    first.train()
    last = first.state.global_step
    again = auto_trainer(tmp_path, save_strategy="epoch")
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{last}")
    assert again.state.global_step == last and weights(again.model).equal(weights(first.model))


def test_only_with_the_setting_that_it_was_started_with(whole, tmp_path):
    checkpoint = f"{whole[0].args.output_dir}/checkpoint-7"
    with pytest.raises(ResumeError, match="written with auto_stop=True, but this run has auto_stop=False: resume with"):
        auto_trainer(tmp_path, config=gk.GEKOConfig.uniform()).train(resume_from_checkpoint=checkpoint)
    plain = auto_trainer(tmp_path, config=gk.GEKOConfig.uniform(), max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    other = auto_trainer(tmp_path, config=gk.GEKOConfig.uniform(auto_stop=True, auto_measure="accuracy"))
    with pytest.raises(ResumeError, match="auto_measure was 'loss', is 'accuracy': the kept weights are the best by"):
        other.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ResumeError, match="written with auto_stop=False, but this run has auto_stop=True"):
        auto_trainer(tmp_path).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")


# Who sees the averaged weights


def test_a_checkpoint_has_the_averaged_weights_and_beside_them_the_raw_ones(whole):
    trainer, raw = whole
    folder = Path(trainer.args.output_dir, "checkpoint-21")
    names = [name for name, _ in trainer.model.named_parameters()]
    flat = lambda file: torch.cat([load_file(folder / file)[name].flatten() for name in names])  # noqa: E731
    torch.testing.assert_close(flat("model.safetensors").double(), raw.averaged(21), rtol=1e-4, atol=1e-5)
    assert flat("geko_raw.safetensors").equal(raw.steps[21])


def test_evaluation_sees_the_averaged_weights_and_the_best_is_loaded(tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 9, "save_strategy": "steps", "save_steps": 9}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 54}
    trainer = auto_trainer(tmp_path, eval_dataset=(held := noisy(40, seed=1)), **fields, **best)
    raw, seen = RawWeights(trainer), []
    evaluate = trainer.evaluation_loop
    trainer.evaluation_loop = lambda *a, **n: (seen.append(weights(trainer.model).clone()), evaluate(*a, **n))[1]
    trainer.train()
    assert len(seen) == 6
    for number, values in enumerate(seen, 1):
        torch.testing.assert_close(values.double(), raw.averaged(9 * number), rtol=1e-4, atol=1e-5)
    step = trainer.state.best_global_step
    torch.testing.assert_close(weights(trainer.model).double(), raw.averaged(step), rtol=1e-4, atol=1e-5)
    report = report_of(trainer)["stopping"]
    assert report["kept"] is None and "load_best_model_at_end loaded the best checkpoint's weights" in report["why"]
    assert trainer.evaluate(held)["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


# The rate


def test_a_falling_rate_is_replaced_and_a_ratio_of_warm_up_is_of_one_epoch(tmp_path, caplog):
    trainer = auto_trainer(tmp_path, lr_scheduler_type="cosine", warmup_steps=0.25, num_train_epochs=1)
    trainer.train()
    rates = curve(trainer, "learning_rate")
    assert rates == pytest.approx([min(1.0, k / 10) * 1e-2 for k in range(36)])  # 400 samples make 40 steps
    told = "auto_stop: the run's length is not known before its end, so lr_scheduler_type='cosine' is replaced by "
    assert caplog.text.count(told + "'constant_with_warmup'.") == 1
    assert trainer.args.lr_scheduler_type == "cosine"


def test_a_scheduler_of_ones_own_is_kept(tmp_path, caplog):
    model = tiny_llama()
    optimizer = SGD(model.parameters(), lr=0.5)
    trainer = auto_trainer(tmp_path, model=model, num_train_epochs=1)
    trainer.optimizer, trainer.lr_scheduler = optimizer, LambdaLR(optimizer, lambda step: 0.9**step)
    trainer.train()
    assert curve(trainer, "learning_rate") == pytest.approx([0.5 * 0.9**k for k in range(36)])
    assert "auto_stop: your LambdaLR is kept. If its rate falls over the longest possible run" in caplog.text


# Few samples, and tasks whose held-back samples say nothing


def test_few_samples_are_judged_by_the_evaluation_data(tmp_path, caplog):
    trainer = auto_trainer(tmp_path, noisy(90), eval_dataset=noisy(50, seed=1), num_train_epochs=2)
    trainer.train()
    report = report_of(trainer)["stopping"]
    assert report["looked_at"] == "eval_dataset" and report["held_back"] == [] and len(report["curve"]) == 8
    assert (trainer.sample_state.times_seen == 2).all() and "auto_stop" not in caplog.text


def test_few_samples_without_evaluation_data_train_to_the_end(tmp_path, caplog):
    trainer = auto_trainer(tmp_path, noisy(90), num_train_epochs=2)
    raw = RawWeights(trainer)
    trainer.train()
    report = report_of(trainer)["stopping"]
    assert trainer.state.global_step == 18 and report["kept"] is report["looked_at"] is None
    torch.testing.assert_close(weights(trainer.model).double(), raw.averaged(18), rtol=1e-4, atol=1e-5)
    assert report["why"] == (
        "There was nothing to evaluate, so the run went to its end; the weights are the final average."
    )
    told = "auto_stop: none of the 90 samples of train_dataset is held back (that needs 2,000 samples, in groups of "
    assert caplog.text.count(told + "less than a twentieth), and there is no suitable eval_dataset: the run") == 1


def test_what_is_learnt_by_heart_is_trained_to_its_end_and_cooled_down(tmp_path):
    model = tiny_llama(vocab_size=256, hidden_size=32, intermediate_size=64)
    trainer = auto_trainer(tmp_path, facts(200), model, save_strategy="steps", save_steps=50)
    raw = RawWeights(trainer)
    trainer.train()
    report = report_of(trainer)["stopping"]
    seen, held = trainer.sample_state.times_seen, report["held_back"]
    assert report["by_heart"] and not report["ended"] and report["why"].startswith("The task is learnt by heart: ")
    assert len(held) == 40 and (seen[held] == 9).all() and int(seen.max()) == 12  # from the first quarter on
    assert weights(model).equal(raw.steps[-1])
    progress, rates = curve(trainer, "geko/progress"), curve(trainer, "learning_rate")
    fall = next(i for i, rate in enumerate(rates) if rate < 1e-2 and progress[i] > 0.2)
    expected = [1e-2 * 0.5 * (1 + math.cos(math.pi * share)) for share in progress[fall - 1 : -1]]
    assert rates[fall:] == pytest.approx(expected, rel=1e-3) and rates[-1] < 1e-3 and progress[fall] < 0.35
    again = auto_trainer(tmp_path, facts(200), tiny_llama(vocab_size=256, hidden_size=32, intermediate_size=64))
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-150")
    assert weights(again.model).equal(weights(model)) and report_of(again)["stopping"] == report


def test_a_classifier_is_judged_with_the_labels_of_others(tmp_path):
    data = [{"input_ids": item["input_ids"][:4], "labels": item["input_ids"][4] - 24} for item in noisy(400, 0.1)]
    config = tiny_config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_labels=4)
    trainer = auto_trainer(tmp_path, data, LlamaForSequenceClassification(config), num_train_epochs=4)
    trainer.train()
    report = report_of(trainer)["stopping"]
    assert report["swap_test"] and report["kept"] is not None and report["curve"][-1]["accuracy"] > 0.5


# What does not go together


def test_settings_that_need_the_length_are_refused():
    assert gk.GEKOConfig.auto(light_interval=3) == gk.GEKOConfig.recommended(auto_stop=True, light_interval=3)
    for name in ("use_curriculum", "spend_saved"):
        with pytest.raises(ValueError, match=f"{name} must be False with auto_stop=True, got True: it depends on the"):
            gk.GEKOConfig.auto(**{name: True})
    with pytest.raises(ValueError, match=r"auto_measure must be one of \('loss', 'accuracy'\), got 'f1'"):
        gk.GEKOConfig.auto(auto_measure="f1")
    with pytest.raises(TypeError, match="auto_stop must be True or False, got 1"):
        gk.GEKOConfig.auto(auto_stop=1)


def test_deepspeed_and_fsdp1_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gk.GEKOTrainer, "_check_arguments", lambda self: setattr(self, "is_deepspeed_enabled", True))
    trainer = trainer_of(tmp_path, config=AUTO)
    with pytest.raises(
        ValueError, match="auto_stop averages weights, to which DeepSpeed gives no access: use DDP or FS"
    ):
        trainer._check_stopping()
    plugin = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled, trainer.accelerator = False, True, plugin
    with pytest.raises(ValueError, match="auto_stop needs FSDP2: set fsdp_config={'version': 2}, or use DDP"):
        trainer._check_stopping()


def test_the_report_s_page_shows_the_run_s_length(whole):
    from geko_kernels.training.report.report import write_report

    page = write_report(whole[0].args.output_dir).read_text()
    assert "The run ended because the held-back samples were best after" in page
    assert json.loads(Path(whole[0].args.output_dir, "geko_report.json").read_text())["version"] == 1
