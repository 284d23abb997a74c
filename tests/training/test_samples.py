"""`samples.jsonl`: the losses of each sample by visit, its label error score, and the formats it is written in."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from resume_run import learnable
from training import MapDataset, arguments, sentences, standard, tiny_llama, trainer_of

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.training.report.label_errors import label_error_scores
from geko_kernels.training.report.samples import MOST_SAMPLES, duplicate_groups, read_samples, told_of, write_rows
from geko_kernels.training.report.visits import VISITS_NAME, VisitLog

RUN = {"num_train_epochs": 6, "learning_rate": 2e-2}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


class Told(gk.GEKOTrainer):
    """Keeps what each forward found."""

    found: list

    def _forward_loss(self, *args, **named):
        outcome = super()._forward_loss(*args, **named)
        stats, epoch = outcome.stats, self.efficiency.open_epoch
        columns = (stats.sample_ids.tolist(), stats.loss.tolist(), stats.accuracy.tolist())
        self.found += [(i, epoch, loss, hit) for i, loss, hit in zip(*columns, strict=True) if i >= 0]
        return outcome


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which samples are left out and probed; the last two of its 26 samples are equal to the first two."""
    torch.set_num_threads(1)  # as in the tests: the threads decide the last digits
    before, ops._override = ops._override, "reference"
    folder = tmp_path_factory.mktemp("run")
    data = sentences(24) + sentences(2)
    args = arguments(folder, **{**RUN, "num_train_epochs": 12}, save_strategy="steps", save_steps=5)
    trainer = Told(tiny_llama(), args, train_dataset=data, config=learnable())
    trainer.found = []
    trainer.train()
    ops._override = before
    return trainer


def rows_of(trainer):
    rows = read_samples(trainer.args.output_dir)
    assert rows is not None
    return rows


def visits_of(rows):
    names = ("epochs", "losses", "hits")
    return [(row["id"], *visit) for row in rows for visit in zip(*(row[name] for name in names), strict=True)]


def test_every_visit_is_recorded_with_its_epoch(run):
    rows = rows_of(run)
    assert [row["id"] for row in rows] == list(range(26))
    report = run.get_efficiency_report()
    assert report["samples_forward"] > report["samples_backward"], "it had probes"
    assert len(visits_of(rows)) == report["samples_forward"] == len(run.found)
    assert len({len(row["losses"]) for row in rows}) > 1, "and selection"
    expected = sorted(run.found, key=lambda visit: visit[0])
    np.testing.assert_allclose(np.array(visits_of(rows)), np.array(expected), atol=1e-3)
    for row, loss in zip(rows, run.sample_state.last_loss.tolist(), strict=True):
        assert row["losses"][-1] == pytest.approx(loss, abs=1e-6) and row["times_seen"] == len(row["losses"])
        assert row["label_probabilities"] == pytest.approx(np.exp(-np.array(row["losses"])), abs=1e-5)


def test_the_other_columns_are_the_states(run):
    rows, state = rows_of(run), run.sample_state
    assert [row["bucket"] for row in rows] == [gk.Bucket(bucket).name for bucket in state.bucket.tolist()]
    assert [row["times_forgotten"] for row in rows] == run.sampler.forgotten.tolist()
    assert [row["quarantined"] for row in rows] == state.quarantined.tolist()
    assert [row["duplicate_group"] for row in rows] == [0, 1, *[None] * 22, 0, 1]
    assert all(0 <= row["label_error"] <= 1 for row in rows)


@pytest.mark.parametrize("step", [5, 15])
def test_a_resumed_run_has_all_visits(run, tmp_path, step):
    data, config = sentences(24) + sentences(2), learnable()
    fields = {**RUN, "num_train_epochs": 12, "save_strategy": "steps", "save_steps": 5}
    again = trainer_of(tmp_path, data, config, **fields)
    again.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-{step}")
    assert rows_of(again) == rows_of(run)


def test_a_checkpoint_without_visits_is_told(run, tmp_path, caplog):
    checkpoint = tmp_path / "checkpoint-15"
    shutil.copytree(f"{run.args.output_dir}/checkpoint-15", checkpoint)
    (checkpoint / VISITS_NAME).unlink()
    fields = {**RUN, "num_train_epochs": 12, "save_strategy": "steps", "save_steps": 5}
    again = trainer_of(tmp_path, sentences(24) + sentences(2), learnable(), **fields)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert "checkpoint-15 has no geko_visits.safetensors, as an earlier geko_kernels wrote it" in caplog.text
    rows = rows_of(again)
    assert min(row["epochs"][0] for row in rows if row["epochs"]) == 2 and rows != rows_of(run)


def test_a_damaged_or_foreign_file_is_refused(run, tmp_path):
    log = VisitLog(26, torch.device("cpu"))
    (tmp_path / VISITS_NAME).write_bytes(b"no")
    with pytest.raises(ValueError, match="geko_visits.safetensors is truncated or not a safetensors file"):
        log.load(tmp_path)
    VisitLog(3, torch.device("cpu")).save(tmp_path)
    with pytest.raises(ValueError, match="does not hold the visits of 26 samples: resume with the dataset that"):
        log.load(tmp_path)
    assert not log.load(tmp_path / "none") and log.mark() == 0


def test_what_is_no_visit_is_left_out():
    """Repeats, ids out of range, visits without a label, losses that are not finite."""
    log, count = VisitLog(4, torch.device("cpu")), 6
    stats = gk.SampleStats(*[torch.zeros(count)] * 10)._replace(
        sample_ids=torch.tensor([0, -1, 4, 1, 2, 3]),
        num_tokens=torch.tensor([1, 1, 1, 0, 1, 1]),
        loss=torch.tensor([0.5, 0.1, 0.2, 0.3, float("nan"), float("inf")]),
        accuracy=torch.ones(count),
    )
    log.add(stats)
    log.flush(7)
    visits = log.visits()
    assert [column.tolist() for column in visits] == [[0], [7], [0.5], [1.0]]
    log.add(stats)
    log.rewind(0)
    log.flush(8)
    assert len(log.visits().sample) == 0


def test_label_error_scores():
    """Means of p: 0.5, 0.125, 0.5, none, 0.75; the third is suspected."""
    sample, p = np.array([0, 0, 1, 2, 4]), np.array([0.25, 0.75, 0.125, 0.5, 0.75])
    scores = label_error_scores(sample, p, np.array([False, False, True, False, False]))
    np.testing.assert_allclose(scores, [0.25, 0.5, 0.75, np.nan, 0.0])
    assert label_error_scores(np.array([0]), np.array([0.2]), np.array([False])).tolist() == [0.0]


@pytest.mark.parametrize("guard", [True, False])
def test_wrong_labels_are_found(tmp_path, guard):
    """All tokens of a class repeat one answer, but for three samples; too few for the guard to hold any back."""
    data = [{"input_ids": [1 + i % 4] * 6, "labels": [9 if i in (3, 8, 40) else 5] * 6} for i in range(60)]
    fields = {"correct_loss": 2.0, "focus_confidence": 0.3, "noise_guard_margin": 0.5, "noise_guard_min_share": 0.9}
    config = gk.GEKOConfig(noise_guard=guard, **fields)
    trainer = trainer_of(tmp_path, data, config, **{**RUN, "num_train_epochs": 2})
    trainer.train()
    rows = rows_of(trainer)
    worst = sorted(rows, key=lambda row: row["label_error"])[-3:]
    assert sorted(row["id"] for row in worst) == [3, 8, 40] and not any(row["quarantined"] for row in rows)
    if guard:
        assert [row["id"] for row in rows if row["suspected"]] == [3, 8, 40]
        assert min(row["label_error"] for row in worst) > 0.5
    else:
        assert {row["suspected"] for row in rows} == {None}


def test_formats(run, tmp_path):
    rows = rows_of(run)
    for name in ("samples.csv", "samples.parquet", "samples.jsonl"):
        run.write_samples(tmp_path / name)
    assert read_samples(tmp_path) == rows
    with open(tmp_path / "samples.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(rows[0]) and len(table) == 26
    assert json.loads(table[3]["losses"]) == rows[3]["losses"] and table[3]["duplicate_group"] == ""
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(tmp_path / "samples.parquet")
    assert frame["losses"][3].tolist() == rows[3]["losses"] and frame["id"].tolist() == list(range(26))
    with pytest.raises(ValueError, match=r"path must end in .jsonl, .csv or .parquet, got '.*samples.txt'"):
        run.write_samples(tmp_path / "samples.txt")


def test_parquet_without_pyarrow(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs pyarrow: pip install pandas pyarrow; or write a .jsonl or .csv file"):
        run.write_samples(tmp_path / "samples.parquet")
    assert not list(tmp_path.iterdir())


def test_before_train(tmp_path):
    with pytest.raises(RuntimeError, match="nothing has been recorded yet; call it after train"):
        trainer_of(tmp_path).write_samples(tmp_path / "samples.jsonl")


def test_many_samples_are_written_on_request(tmp_path, monkeypatch):
    assert MOST_SAMPLES == 200_000
    monkeypatch.setattr("geko_kernels.training.samples.MOST_SAMPLES", 23)
    trainer = trainer_of(tmp_path, num_train_epochs=1)
    trainer.train()
    assert read_samples(tmp_path) is None
    trainer.write_samples(tmp_path / "samples.jsonl")
    assert len(rows_of(trainer)) == 24 and {row["suspected"] for row in rows_of(trainer)} == {None}


def test_a_damaged_samples_file(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"id": 0}\n{"id"')
    with pytest.raises(ValueError, match="samples.jsonl is damaged: line 2 is not JSON"):
        read_samples(tmp_path)


def test_duplicates_of_each_kind_of_dataset():
    items = [{"input_ids": tokens} for tokens in ([1, 2], [3], [1, 2], [1, 2, 3], [3])]
    expected = [0, 1, 0, None, 1]
    assert duplicate_groups(items, 5) == expected
    datasets = pytest.importorskip("datasets")
    assert duplicate_groups(datasets.Dataset.from_list(items), 5) == expected
    assert duplicate_groups(datasets.Dataset.from_list(items).with_format("torch"), 5) == expected
    assert duplicate_groups(MapDataset(items), 5) == [None] * 5, "made when they are read, perhaps"
    assert duplicate_groups([{"x": 1}], 1) == [None]


def test_an_observed_run_has_scores_and_groups_too(tmp_path):
    items = [{"input_ids": [1 + i % 4] * 6, "labels": [9 if i == 3 else 5] * 6} for i in range(20)]
    trainer = standard(tiny_llama(), arguments(tmp_path), items)
    observation = gk.observe(trainer)
    trainer.train()
    observation.write_samples(tmp_path / "samples.jsonl")
    observation.write_samples(tmp_path / "samples.csv")
    rows = rows_of(trainer)
    assert [row["duplicate_group"] for row in rows] == [0, 1, 2, 3] * 5
    mean = observation.label_probabilities.mean(0)
    assert rows[3]["label_error"] == 0.5 and int(mean.argmin()) == 3
    order = sorted(range(20), key=lambda i: rows[i]["label_error"])
    assert (mean[order].diff() <= 1e-6).all() and rows[order[0]]["label_error"] == 0
    with open(tmp_path / "samples.csv", newline="") as file:
        assert [json.loads(row["losses"]) for row in csv.DictReader(file)] == [row["losses"] for row in rows]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"a.jsonl cannot be written: there is no directory {tmp_path / 'none'}"
    ):
        write_rows(tmp_path / "none" / "a.jsonl", [{"id": 0}])


def test_texts_and_ids_of_the_users_own_data():
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "ask"}]
    rows = [{"id": "a", "text": "x" * 300, "input_ids": [1]}, {"id": "b", "text": None, "input_ids": [2]}]
    told = [{"record_id": "a", "text": "x" * 200}, {"record_id": "b", "text": None}]
    datasets = pytest.importorskip("datasets")
    assert told_of(rows) == told and told_of(datasets.Dataset.from_list(rows).with_format("torch")) == told
    assert told_of(datasets.Dataset.from_list(rows).with_transform(lambda row: row)) == told
    assert told_of([{"id": 7, "input_ids": [1]}, {"id": 8}]) == [{"record_id": 7}, {"record_id": 8}]
    assert told_of([{"messages": chat}, {"messages": "broken"}, {"messages": [1]}]) == [
        {"text": "ask"},
        {"text": "broken"},
        {"text": None},
    ]
    assert told_of([{"conversations": [{"from": "human", "value": "ask"}]}]) == [{"text": "ask"}]
    assert told_of([{"id": "\ud83d", "text": "a\ud83d"}]) == [{"record_id": "?", "text": "a?"}]
    assert told_of([{"input_ids": [1]}]) == [] == told_of([]) == told_of(range(3)) == told_of([(1, 2)])


def test_a_report_of_an_observation_has_the_samples_and_their_texts(tmp_path):
    items = [{"input_ids": [1 + i % 4] * 6, "labels": [9 if i == 3 else 5] * 6} for i in range(20)]
    items = [{**item, "text": f"<b>'\"&\n\0{i}é\u2028", "id": f"row {i}"} for i, item in enumerate(items)]
    trainer = standard(tiny_llama(), arguments(tmp_path, num_train_epochs=3), items)
    observation = gk.observe(trainer)
    trainer.train()
    text = observation.write_report(tmp_path / "report").read_text()
    rows = read_samples(tmp_path / "report")
    assert [(row["record_id"], row["text"]) for row in rows] == [(item["id"], item["text"]) for item in items]
    assert "Data map" in text and "&lt;b&gt;&#39;&#34;&amp;" in text and "<b>'" not in text
    observation.write_samples(tmp_path / "samples.csv")
    with open(tmp_path / "samples.csv", newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [item["text"] for item in items]
