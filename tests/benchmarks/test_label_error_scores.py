"""The benchmark of scores for wrong labels: its measures, its noise, and what the visits of a run say."""

import pytest
import torch

from benchmarks.end_to_end.data import CLASSES, confusable
from benchmarks.training import label_error_scores as scores
from geko_kernels import GEKOConfig


def test_the_measures():
    wrong = torch.tensor([True, False, True, False])
    best, half = torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert scores.ranked(best, wrong) == {"average_precision": 1.0, "precision_at_count": 1.0}
    assert scores.ranked(half, wrong) == {"average_precision": pytest.approx(5 / 6), "precision_at_count": 0.5}
    assert scores.found_set(torch.tensor([True, True, False, False]), wrong) == {
        "size": 2,
        "precision": 0.5,
        "recall": 0.5,
    }
    assert scores.found_set(torch.zeros(4, dtype=torch.bool), wrong)["precision"] is None


@pytest.mark.parametrize("kind", ["symmetric", "neighbour"])
def test_a_share_of_the_labels_is_wrong(kind, tmp_path):
    clean, noisy = (scores.make_samples("toy", kind, noise, 0, tmp_path) for noise in (0.0, 0.3))
    assert int(noisy.wrong.sum()) == round(0.3 * scores.SIZE)
    assert torch.equal(clean.labels != noisy.labels, noisy.wrong)
    if kind == "neighbour":
        assert torch.equal(noisy.labels[noisy.wrong], (clean.labels[noisy.wrong] + 1) % 5)


def test_each_class_is_mixed_up_with_one_other():
    other = confusable()
    assert sorted(other) == list(range(len(CLASSES)))
    assert all(other[other[c]] == c != other[c] for c in other)


def test_the_visits_of_a_run_find_wrong_labels_that_the_first_visit_does_not(tmp_path):
    samples = scores.make_samples("toy", "symmetric", 0.2, 0, tmp_path)
    loader, record = scores.train("toy", samples, GEKOConfig.recommended(), 0)
    assert record.visits.min() >= 1 and (record.visits <= 2 * scores.EPOCHS["toy"]).all()
    torch.testing.assert_close(record.probability.sum(1), record.visits)
    found = scores.scores_of(record, scores.suspects_of(loader.state))
    precision = {name: scores.ranked(score, samples.wrong)["average_precision"] for name, score in found.items()}
    assert precision["mean_probability"] > 0.9 > 0.6 > precision["first_loss"]
