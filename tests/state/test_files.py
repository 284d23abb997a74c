"""Files of states and checkpoints: whole or not there, and refused by name where they are damaged or foreign."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path

import damage
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import geko_kernels as gk
from geko_kernels._files import load_tensors, save_tensors, write_whole
from geko_kernels.state import _VERSION
from geko_kernels.training.checkpoint import EFFICIENCY_NAME, SAMPLER_NAME, STATE_NAME, _checksum, load_files
from geko_kernels.training.report.efficiency import Efficiency, write_json

FORMAT = "geko_kernels.SampleState"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    damage.write_checkpoint(tmp_path)
    return tmp_path


def visited(rows: int = 6) -> gk.SampleState:
    state = gk.SampleState(rows)
    damage.visit_all(state)
    return state


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, fails)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(TypeError):
        write_json(path, {"not JSON": object()})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_every_file_has_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        damage.write_checkpoint(tmp_path)
    finally:
        os.umask(before)
    for name in damage.FILES:
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name


def test_a_state_file_of_the_first_layout_loads():
    state = gk.SampleState.load(damage.FIRST_LAYOUT)
    assert state.config == gk.GEKOConfig(quality="std", bucket_weights=(4, 2, 1))
    assert state.times_seen.tolist() == [3] * 6 and state.bucket.tolist() == [1, 2, 2, 3, 3, 2]
    assert state.quarantined.tolist() == [False, True, False, False, False, False]
    assert state.bucket_weights.tolist() == [0, 1, 1, 7] and float(state.upstream) == 0.25
    assert state.last_loss[0].item() == pytest.approx(0.3697022795677185)


def test_a_state_file_with_the_weights_of_hard_first_loads(tmp_path):
    """state_2.safetensors is of the release before `bucket_weights` lay by Bucket: 7, 3, 0.5 and, for FREEZE, 0.25."""
    path = Path(__file__).with_name("state_2.safetensors")
    state = gk.SampleState.load(path)
    assert state.config == gk.GEKOConfig(bucket_weights=(5, 2, 1), freeze_weight=0.25, quality="std")
    assert state.bucket_weights.tolist() == [0.25, 0.5, 3, 7] and float(state.upstream) == 0.125
    assert state.times_seen.tolist() == [4, 4, 4, 4, 4, 2] and state.bucket.tolist() == [0, 0, 2, 2, 2, 2]
    assert state.wrong_streak.tolist() == [0, 0, 4, 4, 4, 2] and state.quarantined.tolist() == [
        *[False] * 3,
        True,
        *[False] * 2,
    ]
    assert state.last_loss[1].item() == pytest.approx(0.03597636520862579)
    old = {name: column.clone() for name, column in load_file(path).items()}  # as its `state_dict()` was
    other = gk.SampleState(6)
    other.load_state_dict(old)
    assert other.bucket_weights.tolist() == [0.25, 0.5, 3, 7] and "weights" in old
    state.save(tmp_path / "s")
    assert gk.SampleState.load(tmp_path / "s").bucket_weights.tolist() == [0.25, 0.5, 3, 7]
    old["weights"][1] = -1
    with pytest.raises(ValueError, match=r"state_dict\['bucket_weights'\]\[2\] must be finite and >= 0, got -1.0"):
        other.load_state_dict(old)
    with pytest.raises(ValueError, match=r"state_dict does not fit: missing \[\], unknown \['weights'\]"):
        other.load_state_dict({**old, "bucket_weights": old["weights"]})


def test_a_checkpoint_of_the_release_before_loads(checkpoint):
    """Its other files are as they were."""
    columns, metadata = load_tensors(checkpoint / STATE_NAME, FORMAT, "", _VERSION)
    columns["weights"] = columns.pop("bucket_weights").flip(0)
    kept = {name: metadata[name] for name in ("config", "upstream")}
    before = load(checkpoint)[0]
    save_tensors(checkpoint / STATE_NAME, FORMAT, columns, kept, "2")
    state = load(checkpoint)[0]
    assert state.bucket_weights.tolist() == before.bucket_weights.tolist() == [0, 0, 2, 5]


def test_a_file_of_a_newer_layout_is_refused(tmp_path):
    columns, metadata = dict(visited().state_dict()), {"format": FORMAT, "config": "{}", "version": "4", "crc32": "0"}
    save_file(columns, tmp_path / "s", metadata)
    with pytest.raises(ValueError, match=r"/s has version 4, this geko_kernels reads 2 and 3; update geko_kernels"):
        gk.SampleState.load(tmp_path / "s")


def rewritten(path: Path, column: str, row: object, value: object) -> None:
    """The state file with another value, and a checksum that fits it."""
    columns, metadata = load_tensors(path, FORMAT, "", _VERSION)
    columns = {name: tensor.clone() for name, tensor in columns.items()}
    target = columns[column].view(torch.uint8) if columns[column].dtype == torch.bool else columns[column]
    target[row] = value
    save_tensors(path, FORMAT, columns, {"config": metadata["config"], "upstream": metadata["upstream"]}, _VERSION)


BAD_VALUES = [
    ("times_seen", 3, -1, r"\['times_seen'\]\[3\] must be from 0 to 2147483646, got -1"),
    ("times_seen", 0, 2**31 - 1, r"\['times_seen'\]\[0\] must be from 0 to 2147483646, got 2147483647"),
    ("bucket", 2, 4, r"\['bucket'\]\[2\] must be a Bucket, from 0 to 3, got 4"),
    ("quarantined", 5, 2, r"\['quarantined'\]\[5\] must be 0 or 1, got 2"),
    ("confidence", 1, 1.5, r"\['confidence'\]\[1\] must be in \[0, 1\], got 1.5"),
    ("confidence", 1, float("nan"), r"\['confidence'\]\[1\] must be in \[0, 1\], got nan"),
    ("q_value", 4, -0.5, r"\['q_value'\]\[4\] must be in \[0, 1\], got -0.5"),
    ("loss_history", (2, 4), float("-inf"), r"\['loss_history'\]\[2\] must be finite and >= 0, got \[0.0, .*-inf\]"),
    ("loss_history", (2, 1), float("nan"), r"\['loss_history'\]\[2\] must be finite and >= 0"),
    ("wrong_streak", 1, 2, r"\['wrong_streak'\]\[1\] must be at most times_seen, got 2"),
    ("bucket_weights", 2, float("inf"), r"\['bucket_weights'\]\[2\] must be finite and >= 0, got inf"),
    ("bucket_weights", 0, -1.0, r"\['bucket_weights'\]\[0\] must be finite and >= 0, got -1.0"),
]


@pytest.mark.parametrize(("column", "row", "value", "message"), BAD_VALUES)
def test_a_value_that_no_visit_leaves_is_refused(tmp_path, column, row, value, message):
    """The file is whole and its checksum fits: it was made so."""
    visited().save(tmp_path / "s")
    rewritten(tmp_path / "s", column, row, value)
    with pytest.raises(ValueError, match=r"/s" + message):
        gk.SampleState.load(tmp_path / "s")


@pytest.mark.parametrize(("column", "row", "value", "message"), [bad for bad in BAD_VALUES if bad[0] != "wrong_streak"])
def test_load_state_dict_refuses_the_same(column, row, value, message):
    columns = {name: tensor.clone() for name, tensor in visited().state_dict().items()}
    target = columns[column].view(torch.uint8) if columns[column].dtype == torch.bool else columns[column]
    target[row] = value
    state = gk.SampleState(6)
    with pytest.raises(ValueError, match="^state_dict" + message):
        state.load_state_dict(columns)
    assert not state.times_seen.any()


def test_what_a_run_leaves_can_be_loaded(tmp_path):
    """Losses that are not numbers, huge ones, tiny ones, a spoilt upstream gradient."""
    state = gk.SampleState(6, gk.GEKOConfig(q_value_lr=1.0))
    logits = torch.tensor([[1e38, 0], [0, 3e38], [-50, 50], [float("nan"), 0], [float("inf"), 0], [0, 0]])
    for _ in range(300):
        gk.weighted_loss(logits.float(), torch.zeros(6, dtype=torch.long), torch.arange(6), state)
    state.upstream.fill_(float("nan"))
    state.save(tmp_path / "s")
    loaded = gk.SampleState.load(tmp_path / "s")
    assert all(column.equal(state.state_dict()[name]) for name, column in loaded.state_dict().items())
    assert float(loaded.upstream) == 1.0 and loaded.wrong_streak[2] == 255


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "[1, 2"}, "/s is damaged: Expecting"),
        ({"config": "7"}, "/s is damaged: fields must be a dict, as to_dict.. returns, got int"),
        ({"config": '{"warp": 9}'}, "/s is damaged: config has unknown fields"),
        ({"config": '{"quality": 3}'}, "/s is damaged: quality must be one of"),
        ({"config": '{"bucket_weights": [1' + "0" * 400 + ", 1, 1]}"}, "/s is damaged: int too large"),
        ({"config": "[" * 100_000}, "/s is damaged"),
        ({"config": "{}", "upstream": "inf"}, "/s is damaged: upstream must be a finite float32, got inf"),
        ({"config": "{}", "upstream": "x"}, "/s is damaged: could not convert"),
        ({"config": "{}", "warp": "9"}, r"/s is damaged: it has metadata \['config', 'format', 'warp'\]"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path, metadata, message):
    save_file(dict(visited().state_dict()), tmp_path / "s", {"format": FORMAT, **metadata})
    with pytest.raises(ValueError, match=message):
        gk.SampleState.load(tmp_path / "s")


def test_columns_that_do_not_fit(tmp_path):
    columns, metadata = dict(visited().state_dict()), {"config": "{}"}
    for spoilt, message in (
        ({**columns, "extra": columns["bucket"].clone()}, r"/s does not fit: missing \[\], unknown \['extra'\]"),
        ({**columns, "bucket": columns["bucket"].long()}, r"/s\['bucket'\] must be \(6,\) torch.uint8, got \(6,"),
        ({**columns, "bucket": columns["bucket"][:3].clone()}, r"/s\['bucket'\] must be \(6,\) torch.uint8, got \(3,"),
        ({name: column[:0].clone() for name, column in columns.items()}, "num_samples must be at least 1, got 0"),
        ({"times_seen": columns["times_seen"]}, r"/s does not fit: missing \['bucket', "),
    ):
        save_tensors(tmp_path / "s", FORMAT, spoilt, metadata, _VERSION)
        with pytest.raises(ValueError, match=message):
            gk.SampleState.load(tmp_path / "s")


def test_a_header_that_claims_gigabytes_is_refused(tmp_path):
    path = tmp_path / "s"
    for size in (2**62, 2**31, 90_000_000):
        path.write_bytes(size.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="/s is truncated or not a safetensors file"):
            gk.SampleState.load(path)
    claim = json.dumps({"times_seen": {"dtype": "I32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(claim).to_bytes(8, "little") + claim + b"1234")
    with pytest.raises(ValueError, match="/s is truncated or not a safetensors file"):
        gk.SampleState.load(path)


def test_any_flip_or_cut_is_refused_by_name_or_harmless(checkpoint):
    """`python tests/helpers/damage.py` does 5,000 of each."""
    outcomes = {}
    for name, path, use in damage.files_of(checkpoint):
        for kind in damage.DAMAGES:
            outcomes[name, kind] = damage.damaged(path, use, kind, 200, seed=1)
    for (name, kind), outcome in outcomes.items():
        if name != damage.FIRST_LAYOUT.name or kind == "cut":
            assert outcome == Counter(refused=200), (name, kind)  # a checksum tells


def test_a_flipped_bit_in_a_version_does_not_pass_for_the_first_layout(checkpoint):
    path = checkpoint / STATE_NAME
    path.write_bytes(path.read_bytes().replace(b'"version"', b'"versiom"'))
    with pytest.raises(ValueError, match="geko_state.safetensors is damaged: it has a checksum but no version"):
        gk.SampleState.load(path)


def position(checkpoint: Path) -> dict:
    return load(checkpoint)[1]


def load(checkpoint: Path) -> tuple:
    like = Efficiency(torch.device("cpu")).state_dict()
    return load_files(checkpoint, damage.SAMPLES, torch.device("cpu"), like)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": -1}, r"'epoch'\] must be an integer from 0 to 2147483647, got -1"),
        ({"epoch": True}, r"'epoch'\] must be an integer"),
        ({"position": 8}, r"'position'\] is 8 of 7, 'finished' False"),
        ({"position": 7}, r"'position'\] is 7 of 7, 'finished' False"),
        ({"finished": True}, r"'position'\] is 3 of 7, 'finished' True"),
        ({"finished": 1}, r"'finished'\] must be True or False, got 1"),
        ({"guarded": "yes"}, r"'guarded'\] must be True, False or None, got 'yes'"),
        ({"hurried": None}, r"'hurried'\] must be an integer from -1 to"),
        ({"num_epochs": 0.0}, r"'num_epochs'\] must be a number above 0, got 0.0"),
        ({"plan": torch.arange(12)}, r"'plan'\] must be \(n,\) torch.int32, got \(12,\) torch.int64"),
        ({"plan": torch.arange(1, 13).int()}, r"'plan'\]\[11\] must be a sample from 0 to 11, got 12"),
        ({"plan": torch.arange(-1, 11).int()}, r"'plan'\]\[0\] must be a sample from 0 to 11, got -1"),
        ({"plan": torch.zeros(12).int()}, r"'plan'\] draws samples twice: 12 ids of 1"),
        ({"plan": None}, "has no plan, but a position in one"),
        ({"spans": [7, 0.5, 0.7, 1.5]}, r"'spans'\] must be \[head, start, turn, end\].* got \[7, 0.5, 0.7, 1.5\]"),
        ({"spans": [7, float("nan"), 0.7, 0.8]}, r"'spans'\] must be"),
        ({"spans": [13, 0.5, 0.7, 0.8]}, r"'spans'\] must be \[head, start, turn, end\] with head from 0 to 7"),
        ({"spans": [1]}, r"'spans'\] must be"),
        ({"interval": torch.full((12,), 65, dtype=torch.uint8)}, r"'interval'\]\[0\] must be from 0 to 64"),
        ({"interval": torch.zeros(12)}, r"'interval'\] must be \(12,\) torch.uint8, got \(12,\) torch.float32"),
        ({"interval": [0] * 12}, r"'interval'\] must be \(12,\) torch.uint8, got list"),
        ({"next_probe": torch.full((12,), -1).int()}, r"'next_probe'\]\[0\] must be an epoch"),
        ({"was_correct": torch.full((12,), 3, dtype=torch.uint8).view(torch.bool)}, r"'was_correct'\]\[0\] must be 0"),
        ({"forgotten": torch.zeros(3, dtype=torch.uint8)}, "is of a sampler over 3 samples, this one has 12"),
        ({"warp": 9}, r"does not fit: missing \[\], unknown \['warp'\]"),
    ],
)
def test_another_runs_or_a_damaged_sampler_is_refused(checkpoint, changes, message):
    sampler = gk.GEKOSampler(gk.SampleState(damage.SAMPLES), num_epochs=4)
    good = position(checkpoint)
    with pytest.raises(ValueError, match="state_dict.*" + message):
        sampler.load_state_dict({**good, **changes})
    assert sampler.plan is None and sampler.epoch == 0
    for name in good:
        with pytest.raises(ValueError, match=rf"does not fit: missing \['{name}'\]"):
            sampler.load_state_dict({key: value for key, value in good.items() if key != name})
    sampler.load_state_dict(good)


def test_a_sampler_file_without_version_is_refused_by_a_sentence(checkpoint):
    columns = {name: value for name, value in position(checkpoint).items() if isinstance(value, torch.Tensor)}
    save_file(columns, checkpoint / SAMPLER_NAME, {"format": "geko_kernels.GEKOSampler", "rest": "{}"})
    with pytest.raises(ValueError, match="geko_sampler.safetensors was written by an earlier geko_kernels, whose"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "geko_efficiency.json is truncated or not JSON"),
        ("[" * 100_000, "geko_efficiency.json is truncated or not JSON"),
        ("[]", "geko_efficiency.json is damaged: it must hold an object, got list"),
        ("{}", "geko_efficiency.json has version None, this geko_kernels reads 2; resume with the geko_kernels that"),
        ('{"version": 2, "crc32": "0"}', "geko_efficiency.json is damaged: its contents do not match its checksum"),
        (json.dumps({"version": 2, "crc32": _checksum({})}), r"geko_efficiency.json must hold \['epochs', 'mark', "),
    ],
)
def test_counts_that_are_no_counts_are_refused(checkpoint, text, message):
    (checkpoint / EFFICIENCY_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epoch": 2.', "trainer_state.json is truncated or not JSON"),
        ("[]", "trainer_state.json is damaged: it must hold an object, got list"),
        ("{}", "trainer_state.json is damaged: it has no global_step"),
        ('{"warp": 9}', "trainer_state.json is damaged or of another version of Transformers: .*warp"),
        (
            '{"global_step": "7", "epoch": 2.5, "train_batch_size": 2, "log_history": []}',
            "trainer_state.json is damaged: global_step must be an integer of at least 0, got '7'",
        ),
        (
            '{"global_step": 7, "epoch": 2.5, "train_batch_size": 2, "log_history": [3]}',
            "trainer_state.json is damaged: log_history must be a list of objects",
        ),
        (
            '{"global_step": 7, "epoch": null, "train_batch_size": 2, "log_history": []}',
            "trainer_state.json is damaged: epoch and train_batch_size must be numbers, got None and 2",
        ),
    ],
)
def test_a_damaged_trainer_state_is_refused(checkpoint, text, message):
    (checkpoint / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_a_checkpoint_that_was_not_saved_to_its_end_is_refused(checkpoint):
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="cannot be resumed by GEKOTrainer: it has no trainer_state.json"):
        load(checkpoint)


def test_counts_that_are_not_numbers_any_more_come_back(checkpoint):
    """A model gone NaN: the file is strict JSON all the same."""
    efficiency = Efficiency(torch.device("cpu"))
    efficiency.train["loss"] = float("nan")
    state = gk.SampleState(damage.SAMPLES)
    sampler = gk.GEKOSampler(state)
    damage.save_files(checkpoint, state, sampler.state_dict(0), efficiency.state_dict())
    json.loads((checkpoint / EFFICIENCY_NAME).read_text(), parse_constant=pytest.fail)
    assert load(checkpoint)[2]["train"]["loss"] != load(checkpoint)[2]["train"]["loss"]


def test_the_state_file_says_its_version(tmp_path):
    visited().save(tmp_path / "s")
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.metadata()["version"] == "3" and len(file.metadata()["crc32"]) == 8
