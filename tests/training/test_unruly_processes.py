"""Two processes of which one is killed, stopped, cannot read an item, or was started with something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import unruly_run
from auto_run import few_samples
from launching import launch

from geko_kernels import ops
from geko_kernels.training import planned

SMALL = {"small 0": (0, {}), "small 1": (1, {}), "small 3": (3, {}), "small steps": (0, {"max_steps": 3})}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, {name of a launch: its stderr}); the folder also has a run of one process, "one"."""
    folder, said = tmp_path_factory.mktemp("unruly"), {}
    before, ops._override = ops._override, "reference"
    (folder / "one.json").write_text(json.dumps(unruly_run.whole(folder, "one")))
    ops._override = before
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(unruly_run.__file__)
    environment = {
        "PYTHONPATH": ":".join([str(script.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("killed", "broken"):  # by torchrun itself: which process it blames is part of the test
        command = [*torchrun, str(script), str(folder), name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode != 0, done.stderr[-4000:]
        said[name] = done.stderr
    [(code, text)] = launch(folder, (2, "unruly_run.py", str(folder), "rest"))
    assert code == 0, text[-4000:]
    said["rest"] = text
    return folder, said


def results(runs, name):
    """Of rank 0 and rank 1."""
    return [json.loads((runs[0] / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def assert_close(ours, theirs):
    """Equal up to the rounding of another number of processes."""
    epochs = [[{k: v for k, v in epoch.items() if k != "loss"} for epoch in run["epochs"]] for run in (ours, theirs)]
    assert epochs[0] == epochs[1]
    for key in ("plan", "counts"):
        assert ours[key] == theirs[key], key
    for key in ("times_seen", "bucket", "quarantined"):
        assert ours["state"][key] == theirs["state"][key], key
    torch.testing.assert_close(torch.tensor(ours["weights"]), torch.tensor(theirs["weights"]), rtol=1e-4, atol=1e-4)
    losses = [torch.tensor([entry["loss"] for entry in run["curve"]]) for run in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, undisturbed", [("killed", "whole"), ("broken", "automatic")])
def test_resumed_after_the_end_of_one_it_is_the_undisturbed_run(runs, name, undisturbed):
    """From the last checkpoint, in the middle of an epoch; the uninterrupted run is met bit for bit."""
    assert results(runs, name) == results(runs, undisturbed)
    first, second = results(runs, name)
    assert first == second and first["curve"][-1]["step"] > unruly_run.TROUBLE


def test_the_launcher_says_which_process_ended_and_why(runs):
    assert "exitcode: -9) local_rank: 1" in runs[1]["killed"]
    assert "OSError: item " in runs[1]["broken"] and "exitcode: 1) local_rank: 1" in runs[1]["broken"]


def test_a_process_that_is_stopped_for_a_while_changes_nothing(runs):
    assert results(runs, "stopped") == results(runs, "whole")
    assert min(epoch["samples"] for epoch in results(runs, "whole")[0]["epochs"]) < 29


def test_every_process_has_as_many_batches(runs):
    """29 samples in batches of 4, however accelerate divides them."""
    assert results(runs, "split_batches") == results(runs, "whole")
    assert results(runs, "even_batches") == results(runs, "dispatch_batches")
    assert results(runs, "even_batches")[0]["epochs"][0]["samples"] == 29


@pytest.mark.parametrize("name", SMALL)
def test_a_plan_smaller_than_the_processes_is_that_of_one_process(runs, name, tmp_path, reference):
    left, fields = SMALL[name]
    one = json.loads(json.dumps(unruly_run.small(tmp_path, left, **fields)))
    two, other = results(runs, name)
    assert two == other and two["steps"] == one["steps"] == {"small 0": 0, "small steps": 3}.get(name, 2)
    assert_close(two, one)


@pytest.mark.parametrize(
    "name, said",
    [
        ("shorter", "len(train_dataset) must be the same in all processes, got 29 in rank 0 and 27 in rank 1"),
        ("reversed", "train_dataset[0] must be the same in all processes, got 'an item with the digest "),
        ("config", "config.correct_loss must be the same in all processes, got 3.3 in rank 0 and 2.0 in rank 1"),
        ("epochs", "args.num_train_epochs must be the same in all processes, got 3 in rank 0 and 2 in rank 1"),
        (
            "batch",
            "args.per_device_train_batch_size must be the same in all processes, got 2 in rank 0 and 4 in rank 1",
        ),
        ("seed", "the seed of the order (args.data_seed, or args.seed) must be the same in all processes, got 42 in "),
        ("steps between checkpoints", "args.save_steps must be the same in all processes, got 5 in rank 0 and 6 in "),
        ("checkpoint", "the checkpoint to resume from must be the same in all processes, got 'checkpoint-5' in rank 0"),
        (
            "weights of some",
            "the weight columns of train_dataset's items (all must have them, or none) must be the same in",
        ),
        ("visits", "the epochs in the checkpoint's geko_visits.safetensors must be the same in all processes, got "),
        ("state", "the learning state in the checkpoint must be the same in all processes, got '29 values with the "),
        ("made-up items", "the made-up items of auto_stop's swap test must be the same in all processes, got '"),
        ("tensor parallel", "GEKOTrainer does not combine with a model whose parameters were made DTensors before"),
    ],
)
def test_processes_that_disagree_are_refused_by_name(runs, name, said):
    for messages in results(runs, "refused"):
        assert messages[name].startswith(said)


def test_items_that_are_drawn_when_they_are_read_are_planned_alike(runs):
    first, second = results(runs, "drawn")
    for key in ("held", "made", "plan", "weights"):
        assert first[key] == second[key] and first[key], key
    assert sorted(first["plan"]) == list(range(29)) and set(first["state"]["times_seen"]) == {3}


def test_what_happens_in_one_process_alone_is_no_other_way_for_it(runs):
    first, second = results(runs, "alone")
    assert first == second
    assert first["form"] and not first["head"] and len(first["logged"]) == 2


def test_two_processes_resume_the_checkpoint_of_one(runs):
    one = json.loads((runs[0] / "one.json").read_text())
    for two in results(runs, "from one"):
        assert_close(two, one)
    assert "processes was 1, is 2: each has other random numbers" in runs[1]["rest"]


@pytest.mark.parametrize("name", ["whole", "automatic"])
def test_one_process_resumes_the_checkpoint_of_two(runs, name, monkeypatch, reference):
    said: list[str] = []
    monkeypatch.setattr(planned.logger, "warning", said.append)
    make = {"whole": unruly_run.selecting, "automatic": unruly_run.automatic}[name]
    with few_samples(20):
        trainer = make(runs[0] / name)
        trainer.train(resume_from_checkpoint=str(runs[0] / name / f"checkpoint-{2 * unruly_run.SAVED}"))
    assert_close(json.loads(json.dumps(unruly_run.summary(trainer))), results(runs, name)[0])
    assert any("processes was 2, is 1: each has other random numbers" in warning for warning in said)
