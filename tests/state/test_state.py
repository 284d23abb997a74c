"""SampleState: its columns, weights, and files that are small, fast, safe and never half written."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import geko_kernels as gk
from geko_kernels.columns import NAMES, SAVED


def visited(num_samples=6, config=None, device="cpu"):
    """A state after some visits."""
    state = gk.SampleState(num_samples, config, device)
    for _ in range(3):
        logits = torch.randn(num_samples, 5, device=device) * 3
        gk.weighted_loss(
            logits, torch.zeros(num_samples, dtype=torch.long, device=device), torch.arange(num_samples), state
        )
    state.quarantined[1] = True
    return state


def assert_same(one, other):
    for name, column in one.state_dict().items():
        assert other.state_dict()[name].equal(column), name
    assert one.config == other.config and len(one) == len(other)


def test_a_new_state():
    state = gk.SampleState(3)
    assert state.q_value.tolist() == [0.5] * 3 and state.bucket.tolist() == [gk.Bucket.FOCUS] * 3
    assert state.quality.tolist() == [1.0] * 3 and state.last_loss.isinf().all() and not state.times_seen.any()
    assert state.bucket_counts().tolist() == [0, 0, 3, 0] and len(state) == 3
    assert state.bucket_weights.tolist() == [0, 0, 1, 3] and state.freeze_weight == 0
    assert repr(state) == "SampleState(num_samples=3, device='cpu')"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "num_samples must be at least 1, got 0"),
        ((2.0,), TypeError, "num_samples must be an int, got 2.0"),
        ((True,), TypeError, "num_samples must be an int, got True"),
        (([0.0] * 9,), TypeError, "num_samples must be an int, got list; pass its length"),
        ((2, {"quality": "std"}), TypeError, "config must be a GEKOConfig, got dict"),
        (
            (2, gk.GEKOConfig.auto),
            TypeError,
            r"got method: call a preset, such as GEKOConfig.recommended\(\)",
        ),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        gk.SampleState(*arguments)


def test_at_most_40_bytes_a_sample():
    state = gk.SampleState(1000)
    held = [x for x in vars(state).values() if isinstance(x, torch.Tensor) and x.dim() and len(x) == 1000]
    assert sum(x.numel() * x.element_size() for x in held) <= 40 * 1000


def test_last_loss_and_quality_follow_the_history():
    state = visited()
    assert state.last_loss.equal(state.loss_history[:, -1])
    rises = (state.loss_history[:, -2:] - state.loss_history[:, -3:-1]).clamp(min=0)
    assert torch.allclose(state.quality, 1 - rises.square().mean(1).sqrt().clamp(max=1))


def test_bucket_weights_can_be_assigned_and_written_into():
    state = gk.SampleState(2)
    memory = state.weights.data_ptr()
    state.bucket_weights = (5, 2, 0.5)
    assert state.weights.tolist() == [0, 0.5, 2, 5]
    state.bucket_weights = torch.tensor([1, 2, 3])
    state.bucket_weights[gk.Bucket.HARD] = 9
    assert state.weights.tolist() == [0, 3, 2, 9] and state.weights.data_ptr() == memory
    state.bucket_weights *= 2
    assert state.weights.tolist() == [0, 6, 4, 18] and state.weights.data_ptr() == memory


def test_the_list_of_columns_is_the_columns():
    """Also after one was replaced, and in a copy: the ops take the list."""
    state = gk.SampleState(3)
    state.bucket = torch.full((3,), int(gk.Bucket.HARD), dtype=torch.uint8)
    for held in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert [id(column) for column in held.columns] == [id(getattr(held, name)) for name in NAMES]
    assert tuple(name for name in NAMES if name not in ("changed", "claim")) == SAVED
    assert "bucket" in SAVED and state.state_dict()["bucket"] is state.bucket


@pytest.mark.parametrize(
    ("column", "got"),
    [
        (torch.ones(2), r"\(2,\) torch.float32 on cpu"),
        (torch.ones(3, dtype=torch.int64), r"\(3,\) torch.int64 on cpu"),
        (torch.ones(6)[::2], r"\(3,\) torch.float32 on cpu, not contiguous"),
        (torch.ones(3, device="meta"), r"\(3,\) torch.float32 on meta"),
        ([0.5] * 3, "list"),
    ],
)
def test_a_column_of_another_kind_is_refused(column, got):
    """A kernel would write past its end: calls that bypass the dispatcher do not look at it."""
    state = gk.SampleState(3)
    mine = state.q_value
    with pytest.raises(ValueError, match=rf"^q_value must be contiguous, \(3,\) torch.float32 on cpu, got {got}$"):
        state.q_value = column
    assert state.q_value is mine is state.columns[0]


@pytest.mark.parametrize("weights", [(1, 2), (1, 2, 3, 4), (1, 2, -3), (1, float("nan"), 3), torch.ones(4)])
def test_bad_bucket_weights_are_refused(weights):
    state = gk.SampleState(2, gk.GEKOConfig(bucket_weights=(3, 1, 0)))
    with pytest.raises(ValueError, match="bucket_weights must"):
        state.bucket_weights = weights
    assert state.bucket_weights.tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize(
    "weights", [3.0, "abc", {gk.Bucket.HARD: 3, gk.Bucket.FOCUS: 1, gk.Bucket.LIGHT: 0}, {3, 1, 0}, (3, "1", 0)]
)
def test_bucket_weights_that_are_not_three_numbers_in_order_are_refused(weights):
    state = gk.SampleState(2)
    with pytest.raises(TypeError, match=r"must be assigned three numbers \(HARD, FOCUS, LIGHT\), got "):
        state.bucket_weights = weights
    assert state.bucket_weights.tolist() == [0, 0, 1, 3]


def test_copies_and_pickles():
    state = visited()
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_same(state, other)
        other.q_value.zero_()
        assert state.q_value.any()


def test_state_dict_round_trip():
    state, other = visited(), gk.SampleState(6)
    other.load_state_dict(state.state_dict())
    assert_same(state, other)
    assert other.q_value.data_ptr() != state.q_value.data_ptr() and not other.changed.any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("bucket"), r"missing \['bucket'\], unknown \[\]"),
        (lambda d: d.update(extra=d["bucket"]), r"missing \[\], unknown \['extra'\]"),
        (
            lambda d: d.update(q_value=d["q_value"][:2]),
            r"state_dict\['q_value'\] must be \(6,\) torch.float32, got \(2,",
        ),
        (lambda d: d.update(bucket=d["bucket"].long()), r"state_dict\['bucket'\] must be \(6,\) torch.uint8"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(spoil, message):
    columns, other = dict(visited().state_dict()), gk.SampleState(6)
    spoil(columns)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(columns)
    assert_same(gk.SampleState(6), other)


def test_save_and_load(tmp_path):
    state = visited(config=gk.GEKOConfig(quality="std", bucket_weights=(4, 2, 1)))
    state.bucket_weights = (7, 1, 1)
    state.save(tmp_path / "state.safetensors")
    state.save(str(tmp_path / "state.safetensors"))
    loaded = gk.SampleState.load(tmp_path / "state.safetensors")
    assert_same(state, loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"], "no temporary file is left"


def test_the_file_is_plain_safetensors(tmp_path):
    visited().save(tmp_path / "s")
    with safe_open(tmp_path / "s", framework="numpy") as file:
        assert set(file.keys()) == {*SAVED, "bucket_weights"}
        assert json.loads(file.metadata()["config"])["freeze_confidence"] == 0.85


def test_load_on_another_device(tmp_path):
    state = visited()
    state.save(tmp_path / "s")
    assert gk.SampleState.load(tmp_path / "s", device="meta").q_value.is_meta
    if torch.cuda.is_available():
        assert_same(gk.SampleState.load(tmp_path / "s", device="cuda"), gk.SampleState.load(tmp_path / "s", "cuda"))


def test_file_mode_follows_the_umask(tmp_path):
    gk.SampleState(2).save(tmp_path / "state")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    state = visited()
    state.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def full_disk(columns, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("geko_kernels._files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        gk.SampleState(9).save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_files_that_are_not_a_state(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError):
        gk.SampleState.load(path)
    visited(config=gk.GEKOConfig.gekolib()).save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
            gk.SampleState.load(path)
    path.write_bytes(pickle.dumps({"q_value": [0.5]}))
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        gk.SampleState.load(path)
    for metadata in (None, {"format": "pt"}, {"format": "geko_kernels.SampleState"}):
        save_file({"times_seen": torch.zeros(3)}, path, metadata)
        with pytest.raises(ValueError, match="but not one that SampleState.save wrote"):
            gk.SampleState.load(path)


def test_a_file_of_another_layout_is_refused(tmp_path):
    state = visited()
    metadata = {"format": "geko_kernels.SampleState", "config": json.dumps(state.config.to_dict())}
    columns = dict(state.state_dict())
    save_file({**columns, "q_value": columns["q_value"][:2].clone()}, tmp_path / "s", metadata)
    with pytest.raises(ValueError, match="q_value"):
        gk.SampleState.load(tmp_path / "s")
    save_file(columns, tmp_path / "s", {**metadata, "config": '{"warp": 9}'})
    with pytest.raises(ValueError, match="warp"):
        gk.SampleState.load(tmp_path / "s")
    save_file(columns, tmp_path / "s", {**metadata, "config": "[1, 2"})
    with pytest.raises(ValueError):
        gk.SampleState.load(tmp_path / "s")


def test_a_million_samples_are_saved_and_loaded_in_a_blink(tmp_path):
    state = gk.SampleState(1_000_000)
    save, load = [], []
    for _ in range(5):
        start = time.perf_counter()
        state.save(tmp_path / "s")
        middle = time.perf_counter()
        gk.SampleState.load(tmp_path / "s")
        save.append(middle - start)
        load.append(time.perf_counter() - middle)
    size = (tmp_path / "s").stat().st_size
    print(f"one million samples: {size / 1e6:.1f} MB, saved in {min(save):.3f} s, loaded in {min(load):.3f} s")
    assert size <= 40e6 + 4096
    assert min(save) < 0.5 and min(load) < 0.5  # under 0.1 s each on an idle machine


KILL = """
import os, random, signal, sys, time, torch, geko_kernels as gk
torch.set_num_threads(1)
path, rounds, survived = sys.argv[1], int(sys.argv[2]), []
gk.SampleState(100_000).save(path)
for round in range(rounds):
    child = os.fork()
    if child == 0:
        for k in range(1, 10_000):
            state = gk.SampleState(100_000 + k % 3)
            state.q_value.fill_(1 / k)
            state.times_seen.fill_(k)
            state.save(path)
    time.sleep(random.uniform(0.005, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = gk.SampleState.load(path)
    k = int(state.times_seen[0])
    q_value = torch.tensor(1 / k if k else 0.5)
    assert (state.times_seen == k).all() and (state.q_value == q_value).all(), "a mixture of two saves"
    assert not k or len(state) == 100_000 + k % 3
    survived.append(k)
print(len(survived), max(survived))
"""


def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "s"), "25"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rounds, last = map(int, run.stdout.split())
    assert rounds == 25 and last > 0, "some child has saved before it was killed"
