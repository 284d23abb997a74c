"""Two processes (gloo) end where one ends with the same global batch; every rank knows the same."""

from __future__ import annotations

import json
import math

import pytest
import torch
from launching import launch

SCENARIOS = "selection accumulation weighed resumed packed packed_rows uniform questions evaluated sync fsdp2".split()
COMPARED = [name for name in SCENARIOS if name not in ("uniform", "questions", "sync")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{scenario: [one process, rank 0 of two, rank 1 of two]}"""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for code, said in launch(
        folders[1], *((1 + i, "distributed_run.py", str(folder)) for i, folder in enumerate(folders))
    ):
        assert code == 0, said[-4000:]
    places = [(folders[0], 0), (folders[1], 0), (folders[1], 1)]
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for folder, rank in places]
        for name in SCENARIOS
    }


@pytest.mark.parametrize("scenario", COMPARED)
def test_every_rank_knows_the_same(runs, scenario):
    _, first, second = runs[scenario]
    for key in ("plan", "state", "epochs", "counts", "weights", "loss", "shares", "log"):
        assert first[key] == second[key], key
    assert first["changed"] == second["changed"] == 0


@pytest.mark.parametrize("scenario", COMPARED)
def test_two_processes_equal_one(runs, scenario):
    """29 samples in batches of 4: accelerate's repeats count for nothing, in state, loss and report."""
    one, two, _ = runs[scenario]
    assert two["steps"] == one["steps"]
    assert two["plan"] == one["plan"]
    assert two["state"]["times_seen"] == one["state"]["times_seen"]
    assert two["state"]["bucket"] == one["state"]["bucket"]
    assert {name: two["counts"][name] for name in two["counts"]} == one["counts"]
    for key, tolerance in (("loss", 1e-4), ("weights", 1e-4), ("rate", 1e-9), ("shares", 1e-9), ("log", 1e-4)):
        torch.testing.assert_close(torch.tensor(two[key]), torch.tensor(one[key]), rtol=tolerance, atol=tolerance)
    history = [torch.tensor(run["state"]["loss_history"]) for run in (two, one)]
    torch.testing.assert_close(*history, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(two["epochs"], one["epochs"], strict=True):
        for key in ("samples", "probes", "steps", "buckets", "quarantined", "forgotten"):
            assert ours[key] == theirs[key], key


@pytest.mark.parametrize("scenario", ["selection", "accumulation", "resumed", "packed", "packed_rows", "fsdp2"])
def test_every_rank_has_the_visits_of_all(runs, scenario):
    one, first, second = (run["visits"] for run in runs[scenario])
    assert first == second and first[:2] == one[:2]
    for ours, theirs in zip(first[2:], one[2:], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-3)
    if scenario == "resumed":
        assert first == runs["selection"][1]["visits"]
    assert len(one[0]) == runs[scenario][0]["counts"]["samples_forward"]


def test_selection_had_work_to_do(runs):
    one = runs["selection"][0]
    assert min(epoch["samples"] for epoch in one["epochs"]) < 29
    assert one["counts"]["samples_forward"] > one["counts"]["samples_backward"]
    one = runs["packed_rows"][0]
    assert min(epoch["samples"] for epoch in one["epochs"]) < 45
    assert sum(epoch["probes"] for epoch in one["epochs"]) > 0


def test_resuming_changes_nothing(runs):
    for resumed, whole in zip(runs["resumed"], runs["selection"], strict=True):
        for key in ("plan", "state", "epochs", "counts", "weights", "loss", "shares"):
            assert resumed[key] == whole[key], key


def test_resuming_packed_batches_changes_nothing(runs):
    for run in runs["packed"]:
        for key in ("plan", "state", "epochs", "counts", "weights", "loss", "shares"):
            assert run[key] == run["whole"][key], key
        assert min(epoch["samples"] for epoch in run["epochs"]) < 29
        assert run["counts"]["samples_standard"] == 8 * 29


def test_fsdp2_shards(runs):
    assert [run["sharded"] for run in runs["fsdp2"]] == [False, True, True]


def test_uniform_weights_give_the_standard_curve(runs):
    for run in runs["uniform"]:
        ours, theirs = run["ours"], run["theirs"]
        assert ours["steps"] == theirs["steps"] == 12
        for key in ("loss", "rate", "weights"):
            torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(theirs[key]), rtol=1e-5, atol=1e-6)


def test_all_processes_ask_the_model_the_same(runs):
    """Under FSDP each forward takes all of them: with one fewer in one process the run would stand still."""
    _, first, second = runs["questions"]
    assert first["asked"] == second["asked"] and len(first["asked"]) > 5
    assert first["widths"][:-1] == second["widths"][:-1] == [[8]] * len(first["asked"])
    assert [run["trained"][1] for run in (first, second)] == [False, True] and second["widths"][-1] == [6]


def test_other_plans_are_refused(runs):
    alone, first, second = (run["told"] for run in runs["sync"])
    assert first == second and alone == ""
    assert first.startswith(
        "the plan of epoch 0 (drawn from the data's lengths and weights, the config, the seed and the "
    )
    assert "must be the same in all processes, got '4 values with the checksum " in first


def test_sync_resolves_conflicts_alike(runs):
    alone, first, second = runs["sync"]
    assert first == second
    assert first["changed"] == first["claim"] == alone["changed"] == 0
    state = first["state"]
    assert state["times_seen"] == [0, 1, 1, 1, 2, 0]
    losses = [row[-1] for row in state["loss_history"]]
    by_rank = [math.log(math.exp(1.0 + rank) + 4) - (1.0 + rank) for rank in (0, 1)]
    assert losses[1] == pytest.approx(by_rank[0])  # rank 0 alone
    assert losses[2] == pytest.approx(by_rank[1])  # rank 1 alone
    assert losses[3] == pytest.approx(by_rank[1])  # as many visits: the highest rank
    assert losses[4] == pytest.approx(by_rank[0])  # most visits
    assert losses[0] == losses[5] == 0.0
