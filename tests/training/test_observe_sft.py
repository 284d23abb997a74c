"""`observe` on TRL's SFTTrainer, whose head computes no logits, and on packed rows."""

from __future__ import annotations

import json

import pytest
import torch
from training import tiny_llama, weights

import geko_kernels as gk

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("tokenizers")

from test_sft import rows, trainer_of  # noqa: E402
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments  # noqa: E402


def sft(folder, observed, kind="text", number=12, dropout=0.0, **fields):
    trainer = trainer_of(trl.SFTTrainer, folder, rows(kind, number), **fields)
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    observation = gk.observe(trainer) if observed else None
    torch.manual_seed(7)
    trainer.train()
    return trainer, observation


def apart(model, row):
    """Loss, p(label) and hit of one row's items, by its logits."""
    tokens = torch.tensor(row["input_ids"])[None]
    labels = torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        logs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    keep = labels != -100
    logs, labels = logs[keep], labels[keep]
    chosen = logs.gather(1, labels[:, None])[:, 0]
    return [float(part.mean()) for part in (-chosen, chosen.exp(), (logs.argmax(1) == labels).float())]


@pytest.mark.parametrize("kind", ["text", "prompt"])
@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 16}])
def test_sft_observed_is_bit_for_bit_the_same(tmp_path, kind, fields):
    common = {"max_steps": -1, "num_train_epochs": 2, "dropout": 0.1, "eval_dataset": rows(kind, 5), **fields}
    common["eval_strategy"] = "epoch"
    plain, _ = sft(tmp_path / "a", False, kind, **common)
    observed, observation = sft(tmp_path / "b", True, kind, **common)
    assert torch.equal(weights(observed.model), weights(plain.model))
    for key in ("loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens"):
        curves = [[e[key] for e in t.state.log_history if key in e] for t in (plain, observed)]
        assert curves[0] == curves[1] and curves[0], key
    assert observation.losses.shape[0] == 2 and observation.losses.isfinite().all()


@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_the_fused_head_gives_losses_label_probabilities_and_hits(tmp_path, kind, caplog):
    fields = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
    trainer, observation = sft(tmp_path / "run", True, kind, **fields)
    expected = torch.tensor([apart(trainer.model, row) for row in trainer.train_dataset]).T
    found = torch.stack([observation.losses[0], observation.label_probabilities[0], observation.hits[0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert observation.confidences is None and observation.margins is None
    assert observation.state.times_seen.tolist() == [0] * 12
    assert "computes no logits. Losses, label probabilities and hits are recorded; confidences" in caplog.text
    observation.write_samples(tmp_path / "samples.jsonl")
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[3])
    assert row.pop("duplicate_group") is None and 0 <= row.pop("label_error") <= 0.5
    assert row == {
        "id": 3,
        "text": rows(kind, 12)[3][kind] + ("<eos>" if kind == "text" else ""),  # TRL's
        "losses": [float(found[0, 3])],
        "label_probabilities": [float(found[1, 3])],
        "hits": [float(found[2, 3])],
        "bucket": None,
    }


def test_the_report_of_sft_says_what_is_missing(tmp_path):
    trainer, observation = sft(tmp_path / "run", True, max_steps=-1, num_train_epochs=3, learning_rate=0.5)
    text = observation.write_report(tmp_path / "report").read_text()
    assert (
        "buckets, confidences and margins (the model&#39;s head is fused with its loss and computes no logits)" in text
    )
    figures = json.loads((tmp_path / "report" / "geko_report.json").read_text())
    work = figures["efficiency"]
    assert [epoch["samples"] for epoch in work["epochs"]] == [12] * 3
    assert work["epochs"][0]["buckets"] == dict.fromkeys(("FREEZE", "LIGHT", "FOCUS", "HARD"))
    assert work["tokens_forward"] == 3 * sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert not (tmp_path / "report" / "report_buckets.png").exists()


def test_packed_rows_are_told_apart_by_seq_lengths(tmp_path):
    fields = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, "packing": True, "max_length": 16}
    trainer, observation = sft(tmp_path / "run", True, **fields)
    packs = trainer.train_dataset
    sequences = []
    for number, pack in enumerate(packs):
        start = 0
        for part, length in enumerate(pack["seq_lengths"]):
            row = {name: pack[name][start : start + length] for name in ("input_ids", "labels")}
            sequences.append((number, part, apart(trainer.model, row)))
            start += length
    assert len(packs) < len(sequences) == len(observation.state) == 12
    found = torch.stack([observation.losses[0], observation.label_probabilities[0], observation.hits[0]], 1)
    torch.testing.assert_close(found, torch.tensor([values for *_, values in sequences]), rtol=1e-4, atol=1e-5)
    observation.write_samples(tmp_path / "samples.jsonl")
    written = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["row"], row["part"]) for row in written] == [(number, part) for number, part, _ in sequences]


def test_padding_free_batches(tmp_path):
    fields = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, "padding_free": True, "max_length": None}
    trainer, observation = sft(tmp_path / "run", True, number=9, **fields)
    expected = [apart(trainer.model, row)[0] for row in trainer.train_dataset]
    torch.testing.assert_close(observation.losses[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_cross_entropy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="observe needs a loss that is the cross-entropy of the logits"):
        sft(tmp_path, True, loss_type="dft")


def flattened(folder, items, collator, epochs=1):
    args = TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=3, learning_rate=0.0, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    return Trainer(tiny_llama(), args, train_dataset=items, data_collator=collator)


def items_of(number=7):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 32, (3 + i % 4,), generator=generator).tolist()} for i in range(number)]


def test_rows_joined_with_position_ids(tmp_path):
    """A model with logits: confidences, margins and the learning state as well."""
    items = items_of()
    trainer = flattened(tmp_path, items, DataCollatorWithFlattening())
    observation = gk.observe(trainer)
    trainer.train()
    for number, item in enumerate(items):
        expected = apart(trainer.model, {**item, "labels": item["input_ids"]})
        found = [observation.losses[0, number], observation.label_probabilities[0, number], observation.hits[0, number]]
        assert [float(value) for value in found] == pytest.approx(expected, rel=1e-4)
    assert observation.state.times_seen.tolist() == [1] * 7
    torch.testing.assert_close(observation.confidences[0], observation.state.confidence)
    torch.testing.assert_close(observation.losses[0], observation.state.last_loss)


def test_packed_rows_without_seq_lengths_are_refused(tmp_path):
    items = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "position_ids": [0, 1, 2, 0, 1]} for _ in range(4)
    ]
    trainer = flattened(tmp_path, items, None)
    gk.observe(trainer)
    with pytest.raises(
        ValueError, match="position_ids restart within a row, but the dataset has no column seq_lengths"
    ):
        trainer.train()


def test_lengths_that_do_not_fit_the_positions_are_refused(tmp_path):
    items = [
        {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "position_ids": [0, 1, 2, 0], "seq_lengths": [2, 2]}
        for _ in range(4)
    ]

    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "position_ids")}

    trainer = flattened(tmp_path, items, collate)
    gk.observe(trainer)
    with pytest.raises(ValueError, match="position_ids do not restart where the next sample begins"):
        trainer.train()
