"""A run that finds its own length on two processes (gloo): all decide alike, and as one does."""

from __future__ import annotations

import json

import pytest
import torch
from launching import launch

RUNS = ("swaps", "stops", "fsdp2", "saved", "resumed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: [one process, rank 0 of two, rank 1 of two]}"""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    launches = ((1 + i, "auto_run.py", str(folder)) for i, folder in enumerate(folders))
    for code, said in launch(folders[1], *launches):
        assert code == 0, said[-4000:]
    places = [(folders[0], 0), (folders[1], 0), (folders[1], 1)]
    return {name: [json.loads((f / f"{name}-{rank}.json").read_text()) for f, rank in places] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_every_rank_sees_and_decides_the_same(runs, name):
    _, first, second = runs[name]
    for key in ("curve", "looks", "kept", "ended", "held", "steps", "weights", "evaluated"):
        assert str(first[key]) == str(second[key]), key  # nan too
    assert first["files"] == second["files"] == []


@pytest.mark.parametrize("name", RUNS[:3])
def test_two_processes_equal_one(runs, name):
    one, two, _ = runs[name]
    for key in ("kept", "ended", "held", "steps"):
        assert two[key] == one[key], key
    for key in ("curve", "looks", "weights", "evaluated"):
        close = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": True}
        torch.testing.assert_close(torch.tensor(two[key]), torch.tensor(one[key]), **close)


def test_a_resumed_run_is_the_one_that_never_stopped(runs):
    """In the middle of an epoch, between looks; each process has its own shards of the files."""
    for whole, resumed in zip(runs["saved"], runs["resumed"], strict=True):
        assert whole["steps"] > 23
        for key in ("curve", "kept", "ended", "held", "steps", "weights"):
            assert resumed[key] == whole[key], key


def test_the_runs_had_something_to_decide(runs):
    stops, swaps = runs["stops"][0], runs["swaps"][0]
    assert stops["ended"] and stops["kept"] < len(stops["curve"]) - 1 and stops["steps"] < 45
    assert not swaps["ended"] and len(swaps["looks"][0]) == 4 and swaps["looks"][0][0] != swaps["looks"][0][1]
    assert [run["sharded"] for run in runs["fsdp2"]] == [False, True, True]
