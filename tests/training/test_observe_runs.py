"""`observe` on two processes (gloo), its report, and what it records beside the losses."""

from __future__ import annotations

import json

import pytest
import torch
from launching import launch
from training import arguments, classified, sentences, standard, tiny_classifier, tiny_llama
from transformers import TrainerCallback

import geko_kernels as gk
from geko_kernels.training.observed_batches import _restarts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """[one process, rank 0 of two, rank 1 of two], and the folder of the two."""
    one, both = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launches = (1, "observe_run.py", str(one)), (2, "observe_run.py", str(both))
    for code, said in launch(both, *launches):
        assert code == 0, said[-3000:]
    places = (one, 0), (both, 0), (both, 1)
    return [json.loads((folder / f"{rank}.json").read_text()) for folder, rank in places], both


def test_observed_ranks_train_bit_for_bit_the_same(runs):
    for run in runs[0]:
        assert run["weights"][0] == run["weights"][1]
        assert run["losses"][0] == run["losses"][1]


def test_every_rank_has_the_records_of_all(runs):
    one, first, second = runs[0]
    for key in ("records", "state", "epochs"):
        assert first[key] == second[key], key
    records = torch.tensor(first["records"])
    assert records.shape == (5, 3, 29) and records.isfinite().all()
    alone = torch.tensor(one["records"])[:, 0]
    close = torch.isclose(records[:, 0], alone, rtol=1e-3, atol=1e-3).all(0)
    assert close.sum() >= 26  # all but those that accelerate repeats in the last batch, after the model has moved on
    repeated = (torch.tensor(first["state"]["times_seen"]) > 3).sum()
    assert 0 < repeated <= 9 and one["state"]["times_seen"] == [3] * 29


def test_two_processes_write_one_report(runs):
    work = json.loads((runs[1] / "report" / "geko_report.json").read_text())["efficiency"]
    assert [epoch["samples"] for epoch in work["epochs"]] == [32] * 3  # three are repeats of accelerate's
    assert work["saved_compute"] == 0.0
    assert (runs[1] / "report" / "report.html").exists()


def test_confidences_and_margins(tmp_path):
    trainer = standard(tiny_classifier(), arguments(tmp_path, num_train_epochs=1, learning_rate=0.0), classified(10))
    observation = gk.observe(trainer)
    trainer.train()
    tokens, labels = (torch.tensor([item[name] for item in classified(10)]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = trainer.model(tokens).logits
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(observation.margins[0], logits.gather(1, labels[:, None])[:, 0] - others)
    torch.testing.assert_close(observation.confidences[0], logits.softmax(1).amax(1))
    torch.testing.assert_close(observation.state.confidence, observation.confidences[0])
    observation.write_samples(tmp_path / "samples.jsonl")
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[4])
    assert row["margins"] == [float(observation.margins[0, 4])]
    recorded = {"losses", "label_probabilities", "hits", "confidences", "margins"}
    assert set(row) == {"id", "bucket", "label_error", "duplicate_group", *recorded}


def test_report_of_an_observed_run(tmp_path):
    data = sentences(20, ragged=True)
    trainer = standard(tiny_llama(), arguments(tmp_path / "run", num_train_epochs=4, learning_rate=0.05), data)
    trainer.data_collator = gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), train_dataset=data).data_collator
    observation = gk.observe(trainer)
    trainer.train()
    page = observation.write_report(tmp_path / "report")
    text = page.read_text()
    assert "Not measured: evaluation and checkpoints (within an epoch they are part of the steps&#39; time)." in text
    figures = json.loads((tmp_path / "report" / "geko_report.json").read_text())
    work, epochs = figures["efficiency"], figures["efficiency"]["epochs"]
    tokens = sum(len(item["input_ids"]) for item in data)
    assert work["samples_standard"] == work["samples_backward"] == work["samples_forward"] == 80
    assert work["tokens_backward"] == 4 * tokens and work["saved_compute"] == 0.0 and work["samples_idle"] == 0
    assert [epoch["steps"] for epoch in epochs] == [5] * 4
    assert [epoch["end"] for epoch in epochs] == [1.0, 2.0, 3.0, 4.0]
    labels = torch.tensor([len(item["input_ids"]) - 1 for item in data])
    for epoch, losses, hits in zip(epochs, observation.losses, observation.hits, strict=True):
        assert epoch["loss"] == pytest.approx(float((losses * labels).sum() / labels.sum()), rel=1e-5)
        assert epoch["accuracy"] == pytest.approx(float((hits * labels).sum() / labels.sum()), rel=1e-5)
        assert sum(epoch["buckets"].values()) == 20 and epoch["probes"] == 0
    assert epochs[-1]["buckets"] == {b.name: int(observation.state.bucket_counts()[b]) for b in gk.Bucket}
    right = observation.losses < 0.5
    lost = [0, *(int((before & ~now).sum()) for before, now in zip(right[:-1], right[1:], strict=True))]
    assert [epoch["forgotten"] for epoch in epochs] == lost
    assert figures["log_history"] == json.loads(json.dumps(trainer.state.log_history))
    seconds = work["seconds"]
    assert seconds["steps"] > 0 and seconds["evaluation"] is None and seconds["total"] >= seconds["steps"]


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    trainer = standard(tiny_llama(), arguments(tmp_path), sentences(4))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="does not combine with DataParallel: start the script with torchrun"):
        gk.observe(trainer)


@pytest.mark.parametrize("fields", [{"torch_compile": True, "torch_compile_backend": "eager"}, {"bf16": True}])
def test_compiled_and_low_precision_training_stays_the_same(tmp_path, fields):
    weights = []
    for observed in (False, True):
        torch.compiler.reset()
        trainer = standard(tiny_classifier(), arguments(tmp_path, num_train_epochs=2, **fields), classified(12))
        observation = gk.observe(trainer) if observed else None
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)
    assert observation.losses.isfinite().all() and observation.state.times_seen.tolist() == [2] * 12


@pytest.mark.parametrize(
    ("positions", "mask", "packed"),
    [
        ([0, 1, 2, 0, 1], None, True),
        ([0, 1, 2, 3, 0], [1, 1, 1, 1, 0], False),  # padded on the right,
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], False),  # on the left,
        ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1], False),  # as Transformers does
        ([0, 0, 0, 1, 2], None, False),
        ([0, 0, 1, 2, 3], [1, 1, 1, 1, 1], True),  # a sequence of one token first
    ],
)
def test_padding_is_not_taken_for_packing(positions, mask, packed):
    mask = None if mask is None else torch.tensor([mask])
    labels = torch.tensor([[5] * 5])
    if mask is not None:
        labels = labels.masked_fill(mask == 0, -100)
    elif positions[2] == 0:
        labels[0, :2] = -100
    assert bool(_restarts(torch.tensor([positions]), labels, mask).any()) == packed


def test_an_attempt_that_trained_nothing_is_no_epoch(tmp_path):
    args = arguments(tmp_path, num_train_epochs=2, auto_find_batch_size=True)
    trainer = standard(tiny_classifier(), args, classified(12))
    observation = gk.observe(trainer)
    step, calls = trainer.training_step, []

    def short_of_memory(*given, **named):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory.")
        return step(*given, **named)

    trainer.training_step = short_of_memory
    trainer.train()
    assert observation.losses.shape == (2, 12) and observation.losses.isfinite().all()


def test_a_loss_that_is_nan_from_the_start_is_left_to_the_trainer(tmp_path):
    trainer = standard(tiny_classifier(), arguments(tmp_path, num_train_epochs=1), classified(12))
    with torch.no_grad():
        trainer.model.score.weight.fill_(torch.nan)
    observation = gk.observe(trainer)
    trainer.train()
    assert observation.losses.isnan().all() and observation.state.times_seen.tolist() == [0] * 12


class _Fails(TrainerCallback):
    """Raises once, at the end of step `at`."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **named):
        if state.global_step == self.at:
            self.at = -1
            raise KeyError("broken off")


def test_epochs_of_a_run_that_was_broken_off_and_of_the_next(tmp_path):
    args = arguments(tmp_path, num_train_epochs=2, per_device_train_batch_size=4)
    trainer = standard(tiny_classifier(), args, classified(12), callbacks=[_Fails(4)])
    observation = gk.observe(trainer)
    with pytest.raises(KeyError, match="broken off"):
        trainer.train()
    trainer.train()
    assert observation.losses.isfinite().sum(1).tolist() == [12, 4, 12, 12]
    observation.write_report(tmp_path / "report")
    figures = json.loads((tmp_path / "report" / "geko_report.json").read_text())
    epochs = figures["efficiency"]["epochs"]
    assert [(epoch["epoch"], epoch["samples"], epoch["steps"]) for epoch in epochs] == [
        (0, 12, 3),
        (1, 4, 1),
        (2, 12, 3),
        (3, 12, 3),
    ]
    assert [epoch["end"] for epoch in epochs] == pytest.approx([1, 4 / 3, 7 / 3, 10 / 3])
    assert figures["log_history"][-1]["epoch"] == pytest.approx(10 / 3)
    assert "4 epochs trained; the run was only observed" in (tmp_path / "report" / "report.html").read_text()


def test_the_epochs_of_a_resumed_run_keep_their_numbers_on_the_axis(tmp_path):
    args = arguments(tmp_path, num_train_epochs=2, save_strategy="epoch", per_device_train_batch_size=4)
    standard(tiny_classifier(), args, classified(12)).train()
    trainer = standard(tiny_classifier(), args, classified(12))
    observation = gk.observe(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [epoch["end"] for epoch in observation.counts.epochs] == [2.0]


def test_a_report_before_any_training_says_so(tmp_path):
    observation = gk.observe(standard(tiny_classifier(), arguments(tmp_path), classified(12)))
    text = observation.write_report(tmp_path / "report").read_text()
    assert "Nothing was trained while this was recorded" in text and "Nothing stands out" not in text


@pytest.mark.parametrize("number", [8, 20])
def test_other_data_than_those_observed_are_refused(tmp_path, number):
    trainer = standard(tiny_classifier(), arguments(tmp_path), classified(12))
    gk.observe(trainer)
    trainer.train_dataset = classified(number)
    message = (
        f"had 12 items when observe was called, and has {number} now: close\\(\\) the observation and call observe"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
