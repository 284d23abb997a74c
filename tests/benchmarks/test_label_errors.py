"""The benchmark of wrong labels: what a run's samples find of them."""

import pytest

pytest.importorskip("transformers")

from benchmarks.training import label_errors


def test_a_run_ranks_wrong_labels_first(monkeypatch):
    monkeypatch.setattr(label_errors, "SAMPLES", 2000)
    row = label_errors.run("geko_margin_1", 0.1, 0)
    assert row["wrong"] == 200 and row["at_errors"] > 0.85
    assert row["found_wrong"] > 0.85 * 200 and row["found_wrong"] > 0.8 * row["found"]
    row = label_errors.run("uniform", 0.1, 0)
    assert row["found"] == 0 and row["at_errors"] > 0.8
