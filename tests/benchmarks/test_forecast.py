"""The table of forecasts in benchmarks/end_to_end/LOG.md comes from the recorded runs."""

from benchmarks.end_to_end.report import EVIDENCE, LARGE, SMALL
from benchmarks.results import read
from benchmarks.training.forecast import epochs_of, table


def test_the_evidence_holds_the_table_of_the_recorded_runs():
    lines = table([*read(LARGE), *read(SMALL)])
    assert "\n".join(lines) in EVIDENCE.read_text(), "run python -m benchmarks.training.forecast"


def test_looks_at_left_out_samples_are_what_the_cost_has_beyond_training():
    history = [
        {"buckets": [0, 6, 3, 1], "rows_trained": 10, "cost": 0.5, "progress": 0.5, "quarantined": 0},
        {"buckets": [2, 6, 1, 1], "rows_trained": 16, "cost": 0.85, "progress": 1.0, "quarantined": 1},
    ]
    first, second = epochs_of({"epochs": 2, "samples": 10, "history": history}, 2)
    assert (first["samples"], first["probes"], first["quarantined"]) == (10, 0, 0)
    assert (second["samples"], second["probes"], second["quarantined"]) == (6, 3, 1)
    assert second["buckets"] == {"FREEZE": 2, "LIGHT": 6, "FOCUS": 1, "HARD": 1}
