"""The report of `GEKOLoader`, and loops that it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import geko_kernels as gk
from geko_kernels.training.report.samples import read_samples


class Items(torch.utils.data.Dataset):
    def __init__(self, collate=lambda x, y: (x, y), size=60):
        self.labels = torch.arange(size) % 3
        self.inputs = torch.eye(3)[self.labels] * 3
        self.make = collate

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.make(self.inputs[index], self.labels[index])


def train(loader, of=lambda data: data):
    """Train a linear model; the statistics of each training visit."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, hits, probes = {}, {}, 0
    for batch in loader:
        with torch.set_grad_enabled(batch.trains):
            inputs, labels = of(batch.data)
            state = loader.state
            loss, stats = gk.weighted_loss(model(inputs), labels, batch.ids, state, update=True, return_stats=True)
        if batch.trains:
            losses.setdefault(batch.epoch, []).append(stats.loss)
            hits.setdefault(batch.epoch, []).append(stats.accuracy)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            probes += len(batch.ids)
    return losses, hits, probes


def test_report_says_what_was_seen(tmp_path):
    loader = gk.GEKOLoader(Items(), batch_size=8, num_epochs=5, device="cpu")
    losses, hits, probes = train(loader)
    page = loader.write_report(tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "geko_report.json").read_text())
    work = figures["efficiency"]
    assert page == tmp_path / "run" / "report.html" and "Not measured: validation" in page.read_text()
    trained = sum(len(part) for parts in losses.values() for part in parts)
    assert work["samples_backward"] == trained == work["tokens_backward"]
    assert work["samples_forward"] == trained + probes == work["tokens_forward"]
    assert work["samples_standard"] == 300 and work["samples_uncounted"] == 0
    assert work["saved_compute"] == pytest.approx(1 - (3 * trained + probes) / 900)
    assert [epoch["steps"] for epoch in work["epochs"]] == [len(losses.get(epoch, [])) for epoch in range(5)]
    for epoch in losses:
        assert work["epochs"][epoch]["loss"] == pytest.approx(float(torch.cat(losses[epoch]).mean()), rel=1e-5)
        assert work["epochs"][epoch]["accuracy"] == pytest.approx(float(torch.cat(hits[epoch]).mean()))
    assert sum(work["epochs"][-1]["buckets"].values()) == 60
    seconds = work["seconds"]
    assert seconds["evaluation"] is None and seconds["checkpoints"] is None
    parts = [seconds[part] for part in ("steps", "probes", "selection")]
    assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(seconds["total"])
    assert figures["num_samples"] == 60 and gk.GEKOConfig.from_dict(figures["config"]) == loader.state.config


def test_samples_have_every_visit_and_the_report_shows_them(tmp_path):
    items = [{"x": x, "labels": y, "text": f"<{i}>", "id": f"row {i}"} for i, (x, y) in enumerate(Items())]
    loader = gk.GEKOLoader(items, batch_size=8, num_epochs=5, device="cpu")
    losses, hits, probes = train(loader, of=lambda data: (data["x"], data["labels"]))
    page = loader.write_report(tmp_path)
    rows = read_samples(tmp_path)
    assert [(row["id"], row["record_id"], row["text"]) for row in rows[:2]] == [
        (0, "row 0", "<0>"),
        (1, "row 1", "<1>"),
    ]
    assert [row["times_seen"] for row in rows] == loader.state.times_seen.tolist() == [len(r["losses"]) for r in rows]
    assert sum(len(row["losses"]) for row in rows) == probes + sum(len(p) for parts in losses.values() for p in parts)
    first = [row["losses"][0] for row in rows]  # epoch 0 trains all
    assert sum(first) == pytest.approx(float(torch.cat(losses[0]).sum()), rel=1e-5)
    assert sum(row["hits"][0] for row in rows) == float(torch.cat(hits[0]).sum())
    last = [row["losses"][-1] for row in rows]
    assert last == pytest.approx(loader.state.loss_history[:, -1].tolist(), abs=1e-6)
    assert "Data map" in page.read_text()
    loader.write_samples(tmp_path / "samples.csv")
    assert (tmp_path / "samples.csv").read_text().count("\n") == 61


def test_hits_that_do_not_show_are_null(tmp_path):
    loader = gk.GEKOLoader(Items(lambda x, y: (x, y, 0)), batch_size=8, num_epochs=1, device="cpu")
    train(loader, of=lambda data: data[:2])
    loader.write_samples(tmp_path / "samples.jsonl")
    assert {row["hits"] for row in read_samples(tmp_path)} == {None}


def test_report_says_that_it_has_not_seen_labels(tmp_path):
    loader = gk.GEKOLoader(Items(lambda x, y: (x, y, 0)), batch_size=8, num_epochs=2, device="cpu")
    train(loader, of=lambda data: data[:2])
    text = loader.write_report(tmp_path).read_text()
    work = json.loads((tmp_path / "geko_report.json").read_text())["efficiency"]
    assert work["tokens_forward"] is None and work["tokens_backward"] is None
    assert [epoch["accuracy"] for epoch in work["epochs"]] == [None, None]
    assert work["epochs"][0]["loss"] > 0
    assert "tokens (known from attention_mask and input_ids, or from labels)" in text
    assert "accuracy (known if batches have one label a sample)" in text


def test_tokens_are_those_of_the_mask(tmp_path):
    def item(inputs, label):
        mask = torch.arange(3) <= label
        return {"x": inputs, "labels": label, "input_ids": torch.zeros(3).long(), "attention_mask": mask.long()}

    loader = gk.GEKOLoader(Items(item), batch_size=8, num_epochs=1, device="cpu")
    train(loader, of=lambda data: (data["x"], data["labels"]))
    assert loader.counts.report()["tokens_backward"] == 20 * (1 + 2 + 3)


def test_a_loop_that_takes_the_labels_out_of_the_dict_is_measured():
    loader = gk.GEKOLoader(Items(lambda x, y: {"x": x, "labels": y}), batch_size=8, num_epochs=1, device="cpu")
    _, hits, _ = train(loader, of=lambda data: (data["x"], data.pop("labels")))
    (epoch,) = loader.counts.report()["epochs"]
    assert epoch["accuracy"] == pytest.approx(float(torch.cat(hits[0]).mean()))


def test_a_repeat_has_no_part_in_the_loss():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    state = gk.SampleState(2)
    alone = gk.weighted_loss(logits[:2], labels[:2], torch.tensor([0, 1]), gk.SampleState(2), update=True)
    filled = gk.weighted_loss(logits, labels, torch.tensor([0, 1, -1]), state, update=True)
    assert torch.equal(filled, alone) and state.times_seen.tolist() == [1, 1]
    logits.requires_grad_()
    gk.weighted_loss(logits, labels, torch.tensor([-1, -1, -1]), state, update=True).backward()
    assert logits.grad.abs().sum() == 0


def test_the_report_survives_a_checkpoint(tmp_path):
    whole = gk.GEKOLoader(Items(), batch_size=8, num_epochs=4, device="cpu")
    torch.manual_seed(0)
    train(whole)
    first = gk.GEKOLoader(Items(), batch_size=8, num_epochs=4, device="cpu")
    torch.manual_seed(0)
    train(first)
    second = gk.GEKOLoader(Items(), batch_size=8, num_epochs=4, device="cpu")
    second.load_state_dict(first.state_dict())
    assert list(second) == []
    second.write_report(tmp_path)
    ours = json.loads((tmp_path / "geko_report.json").read_text())["efficiency"]
    theirs = whole.counts.report()
    strip = [{**epoch, "seconds": 0} for epoch in theirs["epochs"]]
    assert [{**epoch, "seconds": 0} for epoch in ours["epochs"]] == strip
    assert ours["saved_compute"] == 1 - (theirs["samples_forward"] + 2 * theirs["samples_backward"]) / 720


def test_visits_that_are_not_counted_show(tmp_path):
    """Labels of -100, and the ids of half of the batch alone."""
    loader = gk.GEKOLoader(Items(), batch_size=10, num_epochs=1, device="cpu")
    for batch in loader:
        labels = batch.data[1].clone()
        labels[:5] = -100
        gk.weighted_loss(torch.zeros(10, 3), labels, batch.ids, loader.state, update=True)
    work = loader.counts.report()
    assert work["samples_uncounted"] == 30 and work["samples_idle"] == 30
    assert work["epochs"][0]["loss"] == pytest.approx(float(torch.tensor(3.0).log()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)])
def test_idle_samples_are_those_of_weight_0(weights, dtype):
    """Of samples in each bucket; torch's default dtype has no part in it."""
    weight, idle = torch.eye(3) * 9, 0
    config = gk.GEKOConfig(bucket_weights=weights, selection=False)
    torch.set_default_dtype(dtype)
    try:
        loader = gk.GEKOLoader(Items(), batch_size=10, num_epochs=3, config=config, device="cpu")
        for batch in loader:
            labels, ids = batch.data[1], batch.ids
            logits = weight[labels] * torch.where(ids % 4 < 2, 1.0, -1.0)[:, None].float() * (ids % 2)[:, None]
            _, stats = gk.weighted_loss(logits, labels, ids, loader.state, update=True, return_stats=True)
            idle += int((stats.weight == 0).sum()) * batch.trains
        work = loader.counts.report()
        visits = loader.state_dict()["visits"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert work["samples_idle"] == idle > 0
    assert (visits["loss"].dtype, visits["hit"].dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize("wrong", ["no ids", "no state", "no update", "NaN"])
def test_an_epoch_without_a_counted_visit_is_an_error(wrong):
    loader = gk.GEKOLoader(Items(), batch_size=8, num_epochs=2, device="cpu")
    message = (
        r"no visit was counted in the batches of epoch 0: train and probe with weighted_loss\(logits, labels, "
        r"batch.ids, loader.state, update=True\), and finish a batch before you fetch the next one. If the loop does "
        "both, no sample has a label that counts, or every loss is NaN or infinite"
    )
    logits = torch.full((8, 3), float("nan") if wrong == "NaN" else 0.0)
    seen = 0
    with pytest.raises(RuntimeError, match=message):
        for batch in loader:
            seen += len(batch.ids)
            ids, state = batch.ids, loader.state
            labels = batch.data[1]
            given = {"no ids": (None, None), "no state": (ids, None)}.get(wrong, (ids, state))
            update = None if given[1] is None else wrong != "no update"
            gk.weighted_loss(logits[: len(ids)], labels, *given, update=update)
    assert seen == 60


def test_fetching_ahead_is_an_error():
    loader = gk.GEKOLoader(Items(), batch_size=8, num_epochs=2, device="cpu")
    batches = iter(loader)
    at_hand = next(batches)
    with pytest.raises(RuntimeError, match="finish a batch before you fetch the next one"):
        for ahead in batches:
            ids = at_hand.ids
            gk.weighted_loss(torch.zeros(len(ids), 3), at_hand.data[1], ids, loader.state, update=True)
            at_hand = ahead


def test_a_batch_trained_before_the_loop_was_left_does_not_come_again():
    loader = gk.GEKOLoader(Items(), batch_size=8, num_epochs=1, device="cpu")
    seen = []
    while loader.epoch < 1:
        for batch in loader:
            gk.weighted_loss(torch.zeros(len(batch.ids), 3), batch.data[1], batch.ids, loader.state, update=True)
            seen += batch.ids.tolist()
            break
    assert sorted(seen) == list(range(60))


def test_a_process_group_made_later_is_refused(monkeypatch):
    loader = gk.GEKOLoader(Items(), device="cpu")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(RuntimeError, match=r"made as process 0 of 1, but now torch.distributed says .* \(1, 2\)"):
        next(iter(loader))


def test_report_without_matplotlib_leaves_the_figures(tmp_path, monkeypatch):
    loader = gk.GEKOLoader(Items(), device="cpu", num_epochs=1)
    train(loader)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "geko_kernels.training.report.report", raising=False)
    with pytest.raises(ImportError, match=r"report.html needs jinja2: pip install matplotlib jinja2. The figures are"):
        loader.write_report(tmp_path)
    assert (tmp_path / "geko_report.json").exists()


def test_report_comes_without_transformers(tmp_path):
    code = (
        "import sys, torch, geko_kernels as gk; sys.modules['transformers'] = None\n"
        "loader = gk.GEKOLoader(torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3)), num_epochs=1)\n"
        "for b in loader: gk.weighted_loss(b.data[0], b.data[1], b.ids, loader.state, update=True)\n"
        f"loader.write_report({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()


def test_a_device_that_the_processes_cannot_share_is_named(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("No backend type associated with device type cpu")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    with pytest.raises(ValueError, match=r"device must be one that torch.distributed's backend nccl supports, got cpu"):
        gk.GEKOLoader(Items(), device="cpu")
