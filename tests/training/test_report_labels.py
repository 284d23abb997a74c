"""What became of the samples of each label, in the report: a rare class that is lost is seen."""

import json
import logging
import re

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from test_report import run_figures, write
from tiny_model import save_tiny_model
from torch.utils.data import TensorDataset
from training import arguments, classified, standard, tiny_classifier, tiny_llama, trainer_of
from transformers import AutoTokenizer

import geko_kernels as gk
from geko_kernels.training.formats.encode import EncodedDataset
from geko_kernels.training.report.labels import MOST_ANSWERS, label_figures

COMMON, RARE = 30, 20


def state_of(num_samples, config=None):
    state = gk.SampleState(num_samples, config or gk.GEKOConfig.recommended())
    state.times_seen.fill_(3)
    state.bucket.fill_(gk.Bucket.FOCUS)
    return state


def listed(dataset, **named):
    """(label, samples) in the order listed; None where there are no labels."""
    labels = label_figures(dataset, state_of(len(dataset)), **named)["labels"]
    return labels and [(row["label"], row["samples"]) for row in labels["listed"]]


def test_shares_and_visits_of_each_label(caplog):
    data = [{"label": "rare" if i < RARE else "common"} for i in range(COMMON + RARE)]
    state = state_of(len(data))
    state.quarantined[:11] = True  # of 20
    state.bucket[5:35] = gk.Bucket.FREEZE  # quarantined ones count once
    state.times_seen[:RARE] = 2
    held_back = torch.zeros(len(data), dtype=torch.bool)
    held_back[[11, 40]] = True
    found = label_figures(data, state, held_back)["labels"]
    rare = {"samples": 20, "left_out": 0.4, "quarantined": 0.55, "held_back": 0.05, "right": 0.75, "visits": 2.0}
    common = {"samples": 30, "left_out": 0.5, "quarantined": 0.0, "held_back": 1 / 30, "right": 0.5, "visits": 3.0}
    everything = {"samples": 50, "left_out": 0.46, "quarantined": 0.22, "held_back": 0.04, "right": 0.6, "visits": 2.6}
    rows = [{"label": "rare", **rare}, {"label": "common", **common}]
    sentence = (
        "Most samples of 1 label were quarantined or held back, so that the model may not learn it: 'rare' (60% of "
        "20); of all samples 26%. If they are right, train with noise_guard=False or with a larger "
        "noise_guard_min_share (here 0.05)."
    )
    assert found == {"num_labels": 2, "all": pytest.approx(everything), "listed": rows, "warning": sentence}
    assert caplog.messages == [sentence]


@pytest.mark.parametrize("change", ["few samples", "half", "not twice as many"])
def test_no_warning(change, caplog):
    data = [{"label": int(i >= RARE)} for i in range(COMMON + RARE - (change == "few samples"))]
    data = data[1:] if change == "few samples" else data
    state = state_of(len(data))
    state.quarantined[: 10 if change == "half" else 12] = True
    if change == "not twice as many":
        state.quarantined[-4:] = True  # 12 of 20, of all 16 of 50
    assert label_figures(data, state)["labels"]["warning"] is None and not caplog.messages


def test_held_back_groups_have_advice_of_their_own():
    data = [{"label": int(i >= RARE)} for i in range(COMMON + RARE)]
    held_back = torch.arange(len(data)) < 12
    warning = label_figures(data, state_of(len(data)), held_back)["labels"]["warning"]
    assert warning.endswith("auto_stop holds whole `groups` back: give it smaller ones, or train with auto_stop=False.")


def test_light_of_weight_zero_is_left_out_and_nothing_where_all_is_trained():
    data = [{"label": i % 2} for i in range(8)]
    shares = []
    for fields in ({}, {"use_curriculum": False}, {"selection": False}):
        state = state_of(8, gk.GEKOConfig(**fields))
        state.bucket[:4], state.bucket[4:6] = gk.Bucket.LIGHT, gk.Bucket.FREEZE
        shares.append(label_figures(data, state)["labels"]["all"]["left_out"])
    assert shares == [0.25, 0.75, 0.0]
    observed = label_figures(data, state_of(8), observed=torch.tensor([5, 1] * 4))["labels"]
    assert [(row["label"], row["visits"], row["left_out"]) for row in observed["listed"]] == [("0", 5, 0), ("1", 1, 0)]
    empty = gk.SampleState(8)  # of a model without logits
    labels = label_figures(data, empty, observed=torch.ones(8))["labels"]
    assert [row["right"] for row in (*labels["listed"], labels["all"])] == [None] * 3


def answering(*answers):
    return [{"input_ids": [5, 6, *answer], "labels": [-100, -100, *answer]} for answer in answers]


def test_labels_are_found_in_each_kind_of_data():
    datasets = pytest.importorskip("datasets")
    two_and_one = [("b", 1), ("a", 2)]
    assert listed([{"labels": torch.tensor(i)} for i in (0, 0, 1)]) == [("1", 1), ("0", 2)]
    assert listed([{"label": flag} for flag in (True, False, True)]) == [("False", 1), ("True", 2)]
    assert listed([(torch.zeros(2), i) for i in (3, 4, 3)]) == [("4", 1), ("3", 2)]
    assert listed(TensorDataset(torch.zeros(3, 2), torch.tensor([3, 4, 3]))) == [("4", 1), ("3", 2)]
    assert listed([{"label": "a"}, {"label": -100}, {"label": "a"}, {"label": "b"}]) == two_and_one
    assert listed([{"mine": "a", "label": 1}, {"mine": "b", "label": 1}, {"mine": "a"}], label_names=["mine"]) == (
        two_and_one
    )
    encoded = EncodedDataset([{"input_ids": [1], "labels": i} for i in (0, 0, 1)], [], 0)
    encoded.class_names = ["a", "b"]
    assert listed(encoded) == two_and_one
    named = type("Named", (list,), {"class_names": ("a", "b")})([{"labels": i} for i in (0, 0, 1)])
    assert listed(named) == two_and_one
    for unlike in (None, {0: "a", 1: "b"}, [0, 1], len):
        named.class_names = unlike
        assert listed(named) == [("1", 1), ("0", 2)]
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b"]), "x": datasets.Value("float32")})
    table = datasets.Dataset.from_dict({"label": [0, 0, 1], "x": [0.0] * 3}, features=features)
    assert listed(table) == two_and_one and listed(table.with_format("torch")) == two_and_one


def test_a_language_model_s_answers_are_labels_where_they_are_few():
    datasets = pytest.importorskip("datasets")
    data = answering([7, 2], [8, 2], [7, 2], [7, 2], [7, 2], [8, 2])
    assert listed(data) == listed(datasets.Dataset.from_list(data)) == [("tokens 8 2", 2), ("tokens 7 2", 4)]
    spell = lambda tokens, skip_special_tokens: " " + "".join("abcdefghij"[t] for t in tokens[:-1])  # noqa: E731
    assert listed(data, decode=spell) == [("i", 2), ("h", 4)]
    trl = [{"input_ids": row["input_ids"], "completion_mask": [0, 0, 1, 1]} for row in data]
    assert listed(datasets.Dataset.from_list(trl)) == listed(data)
    many = answering(*([7 + i % (MOST_ANSWERS + 1)] for i in range(200)))
    assert listed(many) is None and listed(many[:MOST_ANSWERS] * 4) is not None
    assert listed(many[:MOST_ANSWERS]) is None  # each its own


def test_what_has_no_labels_to_count():
    lengths = [{"input_ids": [1, 2, 3], "labels": [1, 0, 1]}] * 3  # one a token
    for data in ([{"label": 0.5}] * 3, lengths, [torch.zeros(2)] * 3, [{"label": 1}] * 3, [{"x": 1}] * 3):
        assert listed(data) is None
    assert label_figures([{"label": i % 2} for i in range(4)], state_of(5)) == {"labels": None}


def imbalanced(config):
    """A classifier of 1,900 common and 100 rare samples; its report, and the share of rare samples found."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    label = (torch.arange(2000) < 100).long()
    inputs = torch.randn(2000, 8) + 1.6 * label[:, None] * torch.eye(8)[0]
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    loader = gk.GEKOLoader(TensorDataset(inputs, label), batch_size=32, num_epochs=6, config=config)
    for batch in loader:
        x, y = batch.data
        with torch.set_grad_enabled(batch.trains):
            given = y, batch.ids, loader.state
            loss = gk.weighted_loss(net(x), *given, sample_weights=batch.weights, update=True)
        if batch.trains:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loader, (net(inputs[:100]).argmax(1) == 1).float().mean().item()


def test_a_rare_class_that_the_guard_holds_back_is_seen(reference, tmp_path, caplog):
    (kept, recall), (lost, lost_recall) = (
        imbalanced(gk.GEKOConfig.recommended(noise_guard_min_share=share)) for share in (0.05, 0.0)
    )
    assert lost_recall < 0.5 * recall
    kept.write_report(tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "geko_report.json").read_text())["labels"]["warning"] is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    page = lost.write_report(tmp_path / "lost").read_text()
    labels = json.loads((tmp_path / "lost" / "geko_report.json").read_text())["labels"]
    rare, common = labels["listed"]
    assert rare["label"] == "1" and rare["quarantined"] > 0.5 and common["quarantined"] < 0.1
    assert labels["warning"] in caplog.messages
    assert "<b>Check whether rare labels are lost.</b> Most samples of 1 label were quarantined" in page
    row = re.search(r'<tr><td dir="auto">1</td><td>100</td><td>[\d.]+%</td><td>([\d.]+)%</td>', page)
    assert float(row[1]) == pytest.approx(100 * rare["quarantined"], abs=0.1)
    assert "<th>learnt</th><th>quarantined</th><th>right</th><th>visits a sample</th>" in page


def test_a_run_without_a_label_that_counts_is_warned_of(tmp_path, caplog):
    data = [{"input_ids": [3, 4], "labels": -100} for _ in range(8)]
    trainer_of(tmp_path, data, model=tiny_classifier(), num_train_epochs=1).train()
    assert [text for text in caplog.messages if "Nothing was learnt" in text] == [
        "Nothing was learnt in this run: none of its samples has a label that counts (are all -100?), or every loss "
        "was NaN or infinite."
    ]


def test_reports_of_a_trainer_and_of_an_observation(tmp_path):
    trainer = trainer_of(tmp_path, classified(24), model=tiny_classifier(), num_train_epochs=2)
    trainer.train()
    labels = json.loads((tmp_path / "geko_report.json").read_text())["labels"]
    assert labels["num_labels"] == 4 and labels["all"]["samples"] == 24 and labels["all"]["visits"] > 1
    watched = standard(tiny_llama(), arguments(tmp_path, num_train_epochs=2), answering(*([7, 2], [8, 2]) * 6))
    observation = gk.observe(watched)
    watched.train()
    text = observation.write_report(tmp_path).read_text()
    seen = json.loads((tmp_path / "geko_report.json").read_text())["labels"]
    right = (observation.state.bucket <= gk.Bucket.LIGHT).float().mean().item()
    shares = {"samples": 12, "left_out": 0, "quarantined": 0, "held_back": 0, "right": right, "visits": 2}
    assert seen["all"] == pytest.approx(shares) and "<th>learnt" not in text
    assert re.search(r'<td dir="auto">tokens 7 2</td><td>6</td><td>0.0%</td><td>[\d.]+%</td><td>2.0</td>', text)


def test_answers_are_shown_as_text_and_held_back_samples_counted(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "model"))
    asked = [{"prompt": f"is {i} odd? ", "completion": "yes" if i % 2 else "no"} for i in range(24)]
    data = gk.load_dataset(asked, tokenizer, max_length=64)
    trainer = trainer_of(tmp_path, data, model=tiny_llama(vocab_size=260), num_train_epochs=1)
    trainer.processing_class = tokenizer
    trainer.train()
    labels = json.loads((tmp_path / "geko_report.json").read_text())["labels"]
    assert [(row["label"], row["samples"]) for row in labels["listed"]] == [("no", 12), ("yes", 12)]
    auto = {"config": gk.GEKOConfig.auto(), "num_train_epochs": 1, "per_device_train_batch_size": 50}
    trainer = trainer_of(tmp_path, classified(2000), model=tiny_classifier(), logging_steps=100, **auto)
    trainer.train()
    labels = json.loads((tmp_path / "geko_report.json").read_text())["labels"]
    assert labels["all"]["held_back"] == 0.05 and labels["all"]["visits"] == pytest.approx(0.95)
    assert sum(row["held_back"] * row["samples"] for row in labels["listed"]) == pytest.approx(100)


def test_the_page_cuts_and_escapes_labels(tmp_path):
    data = [{"label": f"<b>{i % 30} " + "x" * 80} for i in range(60)]
    labels = label_figures(data, state_of(60))
    assert labels["labels"]["num_labels"] == 30 and len(labels["labels"]["listed"]) == 20
    text = write(tmp_path, run_figures(2, num_samples=60) | labels).read_text()
    assert "10 more labels with 20 samples." in text and "the first 20 of 30" in text
    assert "<td>–</td>" not in text and "<b>0 " not in text and f"&lt;b&gt;0 {'x' * 55}…" in text
    stopping = {"why": "It was best.", "held_back": [3, 4], "looked_at": "held_back", "swap_test": True, "curve": []}
    text = write(tmp_path, run_figures(2, num_samples=60) | labels | {"stopping": stopping}, painted=False).read_text()
    assert "<th>held back</th><th>right</th><th>visits a sample</th>" in text
    with pytest.raises(ValueError, match=r"is damaged: labels.listed\[0\].label is int"):
        labels["labels"]["listed"][0]["label"] = 3
        write(tmp_path, run_figures(2, num_samples=60) | labels)
