"""`GEKOLoader` on two processes (gloo), killed and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from multiprocessing import get_context

import loader_run
import pytest
import torch
from launching import launch


def killed(folder, at=-1):
    """The exit code of a process that `loader_run.kill`s itself at batch `at`; it shares our imports.

    Workers just forked may miss that their parent is gone, and so are ended with their group.
    """

    def work():
        os.setsid()
        with (folder / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            torch.set_num_threads(1)
            loader_run.kill(folder, at)

    process = get_context("fork").Process(target=work)
    process.start()
    try:
        process.join(200)
        return process.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """[one process, rank 0 of two, rank 1 of two], and the folder of the two."""
    one, both = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launches = (1, "loader_run.py", str(one)), (2, "loader_run.py", str(both))
    for code, said in launch(both, *launches, shared="geko_kernels.training.loader"):
        assert code == 0, said[-3000:]
    return [
        json.loads((folder / f"{rank}.json").read_text()) for folder, rank in ((one, 0), (both, 0), (both, 1))
    ], both


def test_ranks_share_the_plan_of_one_process(runs):
    one, first, second = (run["whole"] for run in runs[0])
    assert len(first["seen"]) == len(second["seen"]) == len(one["seen"])
    repeats = 0
    for alone, *parts in zip(one["seen"], first["seen"], second["seen"], strict=True):
        assert parts[0][:2] == parts[1][:2] == alone[:2]
        assert parts[0][3] == parts[1][3] == alone[3]  # progress
        assert len(parts[0][2]) == len(parts[1][2])
        ids = parts[0][2] + parts[1][2]
        repeats += ids.count(-1)
        assert sorted(i for i in ids if i >= 0) == sorted(alone[2])
    assert repeats > 0  # 93 samples
    assert {trains for _, trains, _, _ in one["seen"]} == {True, False}


def test_every_rank_ends_as_one_process_does(runs):
    one, first, second = (run["whole"] for run in runs[0])
    for key in ("state", "weights", "epochs", "counts", "visits"):
        assert first[key] == second[key], key
    assert first["visits"][:2] == one["visits"][:2] and first["visits"][3] == one["visits"][3]
    assert first["state"]["times_seen"] == one["state"]["times_seen"]
    assert first["state"]["bucket"] == one["state"]["bucket"]
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(one["weights"]), rtol=1e-4, atol=1e-5)
    assert first["counts"] == one["counts"]
    for ours, theirs in zip(first["epochs"], one["epochs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert {**ours, "loss": 0} == {**theirs, "loss": 0}


@pytest.mark.parametrize("number", [8, 15])
def test_resumed_ranks_equal_those_that_never_stopped(runs, number):
    for run in runs[0]:
        for key in ("seen", "state", "weights", "epochs", "counts", "visits"):
            assert run[f"resumed {number}"][key] == run["whole"][key], key


def test_the_first_rank_writes_the_report(runs):
    figures = json.loads((runs[1] / "report" / "geko_report.json").read_text())
    assert figures["efficiency"]["samples_forward"] == runs[0][0]["whole"]["counts"]["samples_forward"]
    assert (runs[1] / "report" / "report.html").exists()


def test_ranks_with_other_arguments_are_refused(runs):
    one, *both = runs[0]
    assert "other seeds" not in one
    for run in both:
        assert run["other seeds"] == "seed must be the same in all processes, got 0 in rank 0 and 1 in rank 1"
        assert run["other config"].startswith(
            "config.light_interval must be the same in all processes, got 2 in rank 0"
        )
        told = (
            "the position in the run (load_state_dict in all processes, or in none) must be the same in all processes, "
        )
        assert run["one loaded"].startswith(told + "got {'epoch': ")
        assert run["other order"].startswith("dataset[0] must be the same in all processes, got 'an item with the dig")


def test_killed_and_resumed_in_mid_epoch_is_bit_for_bit_the_same(tmp_path):
    """Two workers; the SIGKILL hits a batch after one that was saved, so that some work is lost."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert killed(whole) == 0, (whole / "log").read_text()[-3000:]
    for at in (8, 17):
        assert killed(broken, at) == -signal.SIGKILL, (broken / "log").read_text()[-3000:]
        assert (broken / "checkpoint.pt").exists() and not (broken / "model.pt").exists()
    assert killed(broken) == 0, (broken / "log").read_text()[-3000:]
    ours, theirs = torch.load(broken / "model.pt"), torch.load(whole / "model.pt")
    assert ours["weights"] == theirs["weights"]
    for name, column in theirs["state"].items():
        assert torch.equal(ours["state"][name], column), name
    assert (broken / "trained").read_text() == (whole / "trained").read_text()
