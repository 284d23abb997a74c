"""What the page says of the run itself, of each kind of run, and how it fits narrow and dark screens."""

import json
import re

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from test_report import run_figures, write
from training import arguments, sentences, standard, tiny_llama

import geko_kernels as gk
from geko_kernels.training.report.facts import checkpoint_facts, trainer_facts
from geko_kernels.training.report.report import write_report


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def report_of(folder):
    return json.loads((folder / "geko_report.json").read_text()), (folder / "report.html").read_text()


def test_trainer_run(tmp_path):
    args = arguments(tmp_path, num_train_epochs=2, seed=7, gradient_accumulation_steps=2)
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=sentences(16), eval_dataset={"a": sentences(4)})
    trainer.train()
    write_report(tmp_path)
    figures, text = report_of(tmp_path)
    facts = figures["run"]
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert facts["model"] == f"LlamaForCausalLM, {size:,} parameters"
    assert facts["data"] == "16 samples (list); evaluation: a: 4 samples (list)"
    assert facts["learning rate"] == "0.01, linear" and facts["batch"] == "4 samples a device, 2 batches a step"
    assert (facts["length"], facts["seed"], facts["device"]) == ("2 epochs", "7", "CPU, 1 thread, float32")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["date"])
    assert f"geko_kernels {gk.__version__}, torch {torch.__version__}, transformers " in facts["versions"]
    assert all(f"<dt>{name}</dt>" in text for name in facts)
    trainer.args.max_steps, trainer.model.lm_head.weight.requires_grad = 9, False
    changed = trainer_facts(trainer)
    assert changed["length"] == "9 steps" and " of them trained" in changed["model"]


def test_loader_run(tmp_path):
    loader = gk.GEKOLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4, num_epochs=1, seed=3)
    for batch in loader:
        gk.weighted_loss(torch.randn(len(batch.ids), 3), batch.ids % 3, batch.ids, loader.state, update=True)
    loader.write_report(tmp_path)
    figures, text = report_of(tmp_path)
    facts = figures["run"]
    assert sorted(facts) == ["batch", "data", "date", "device", "length", "seed", "versions"]
    assert (facts["data"], facts["batch"]) == ("8 samples (TensorDataset)", "4 samples a device")
    assert "<dt>learning rate</dt>" not in text and "Not measured: " in text


def test_observed_run(tmp_path):
    trainer = standard(tiny_llama(), arguments(tmp_path, num_train_epochs=2), sentences(16))
    observation = gk.observe(trainer)
    trainer.train()
    observation.write_report(tmp_path)
    figures, text = report_of(tmp_path)
    assert figures["observed"] and figures["run"]["model"].startswith("LlamaForCausalLM")
    assert figures["forecast"]["after_epoch"] == 2 and figures["forecast"]["text"] in text
    assert "trained; the run was only observed" in text and "GEKO left none out of an epoch." in text
    assert "are left out" not in text and "None: this run held nothing back." in text


def test_checkpoint_says_what_its_settings_do():
    settings = {
        "num_train_epochs": 5,
        "max_steps": -1,
        "samples in a batch of all processes": 16,
        "seed of the order": 7,
    }
    assert checkpoint_facts(settings) == {"length": "5 epochs", "batch": "16 samples", "seed": "7"}
    assert checkpoint_facts({"num_train_epochs": 5, "max_steps": 40}) == {"length": "40 steps"}
    assert checkpoint_facts({}) == {}


def test_every_chart_has_a_narrow_layout_and_the_page_dark_colours(tmp_path):
    text = write(tmp_path, run_figures()).read_text()
    narrow = re.findall(r'<source media="\(max-width: 600px\)" srcset="data:image/png;base64,(\w+)', text)
    assert len(narrow) == 5 and "prefers-color-scheme: dark" in text


def test_what_to_act_on_stands_before_charts_and_lists_are_folded(tmp_path):
    figures = run_figures() | {
        "forecast": {"after_epoch": 2, "text": "As <b>.", "runs": [{"epochs": 3, "saved": 0.084}]}
    }
    figures["most_forgotten"] = [{"id": i, "times": 2, "loss": 0.5, "bucket": "HARD"} for i in range(100)]
    text = write(tmp_path, figures).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    first = ["What to do", "Quarantined samples", "Most forgotten samples", "Forecast", "Work and time", "Learning"]
    assert headings[:6] == first and "Check the labels of 200 quarantined samples</b> (1.0%)" in text
    assert "<summary>90 more</summary>" in text and "<li>As &lt;b&gt;.</li>" in text and "<td>8%</td>" in text
    with pytest.raises(ValueError, match="is damaged: forecast lacks after_epoch"):
        write(tmp_path, run_figures(1) | {"forecast": {"text": "a"}})
    with pytest.raises(ValueError, match="is damaged: run is list"):
        write(tmp_path, run_figures(1) | {"run": []})
