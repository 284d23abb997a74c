"""On Hopper the share of tokens of weight 0 in earlier calls chooses the path. The CUDA launch is emulated."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import geko_kernels as gk
from geko_kernels import zero_share
from geko_kernels.host_copy import HostCopy
from geko_kernels.zero_share import ZeroShare

GPU = torch.cuda.is_available()
INTERVAL = 2


@pytest.fixture(autouse=True)
def interval(monkeypatch):
    monkeypatch.setattr(zero_share, "INTERVAL", INTERVAL)


@pytest.fixture
def emulated(monkeypatch):
    pytest.importorskip("geko_kernels.kernels", exc_type=ImportError)
    if GPU:
        pytest.skip("with a GPU the kernels are compiled: see test_predicted_gpu.py")
    from predicted import EmulatedRows, emulate

    emulate(monkeypatch)
    return EmulatedRows


def told(share, zero, tokens):
    """`share` after one more look, at a call of which `zero` of `tokens` have weight 0."""
    while not share.due(torch.device("cpu")):
        pass
    share.look(torch.tensor([zero, tokens]), torch.Tensor.tolist)
    return share


def test_a_look_counts_from_the_next_one_on():
    share, seen = ZeroShare(), []
    for _ in range(3 * INTERVAL):
        due = share.due(torch.device("cpu"))
        if due:
            share.look(torch.tensor([9, 10]), torch.Tensor.tolist)
        seen.append((due, share.three_passes))
    rest = [(False, False)] * (INTERVAL - 1)
    assert seen[: 2 * INTERVAL] == [(True, False), *rest, (True, True), *[(False, True)] * (INTERVAL - 1)]


@pytest.mark.parametrize(
    ("shares", "paths"),
    [
        ([0.0, 0.69, 0.69, 0.69], [False] * 4),
        ([0.7, 0.66, 0.66, 0.64, 0.63, 0.62], [True, True, True, True, False, False]),  # 0.7, 0.67, 0.664, 0.651, 0.64
        ([0.0, 0.9, 0.9], [False, False, True]),  # 0, 0.6, 0.77
        ([1.0, 0.0, 0.0], [True, False, False]),
    ],
)
def test_the_path_changes_where_the_figures_say_so_and_not_at_each_look(shares, paths):
    share, seen = ZeroShare(), []
    for each in shares:
        told(share, round(1000 * each), 1000)
        seen.append(told(copy.copy(share), 0, 0).three_passes)  # the copy's next look is the first to know
    assert seen == paths


def test_tokens_count_and_not_visits():
    share = told(told(ZeroShare(), 90, 100), 0, 0)
    assert share.three_passes
    share = told(told(told(ZeroShare(), 10, 10), 10, 1000), 0, 0)
    assert not share.three_passes


def test_a_batch_without_labels_changes_nothing():
    share = told(told(ZeroShare(), 90, 100), 0, 0)
    for _ in range(3):
        assert told(share, 0, 0).three_passes
    assert not told(told(ZeroShare(), 0, 0), 0, 0).three_passes


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda share: pickle.loads(pickle.dumps(share))])
@pytest.mark.parametrize("calls", range(3 * INTERVAL))
def test_a_copy_goes_on_as_the_object_itself(again, calls):
    def paths(share, first, last):
        seen = []
        for call in range(first, last):
            if share.due(torch.device("cpu")):
                share.look(torch.tensor([9 - call % 7, 10]), torch.Tensor.tolist)
            seen.append(share.three_passes)
        return seen

    share = ZeroShare()
    paths(share, 0, calls)
    other = again(share)
    assert paths(other, calls, 50) == paths(share, calls, 50)
    assert other.values() == share.values()


def test_a_captured_call_is_not_looked_at(monkeypatch):
    share = told(told(ZeroShare(), 90, 100), 0, 100)
    values = share.values()
    for _ in range(values[0]):
        share.due(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2 * INTERVAL):
        assert not share.due(torch.device("cuda")) and share.three_passes
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert share.due(torch.device("cuda")) and not share.three_passes


BAD = (
    *([], None, "123456", b"000000", [0] * 5, [True] * 6, [0, 0, 0, 0, 0, "1"]),
    *([-1, 0, 0, 0, 0, 0], [INTERVAL, 0, 0, 0, 0, 0], [0.5, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0]),
    *([0, 0, 2, 1, 0, 0], [0, 0, 0, 0, 2, 1], [0, 0, -1, 0, 0, 0], [0, 0, 0, float("nan"), 0, 0]),
    *([0, 0, 0, 0, 0, float("inf")], [0, 0, 0, 0, 10**400, 10**400]),
)


def test_a_list_that_changes_later_changes_nothing():
    values = [0, 0, 0, 0, 9, 10]
    share = ZeroShare(values)
    values[4] = 0
    assert share.values() == [0, 0, 0, 0, 9, 10]


def interrupted(name, values, other):
    """A share: after the next read of its attribute `name`, another thread's call `other(share)` comes between."""

    class Shared(ZeroShare):
        waiting = False

        def read(self):
            value = self.__dict__[name]
            if self.waiting:
                self.waiting = False
                other(self)
            return value

        def write(self, value):
            self.__dict__[name] = value

    setattr(Shared, name, property(Shared.read, Shared.write))
    share = Shared(values)
    share.waiting = True
    return share


def test_calls_of_two_threads_do_not_count_below_0():
    """The second thread runs between the first one's look at the number of calls left and its count."""
    share = interrupted("_left", [1, 0, 0, 0, 0, 0], lambda share: share.due(torch.device("cpu")))
    assert not share.due(torch.device("cpu"))
    assert share.due(torch.device("cpu")), "both counted the same call"


def test_linear_calls_of_two_threads_leave_a_share():
    """The second thread's call comes between the first one's reads: what is left has to be one of a state file."""
    share = interrupted("_seen", [0, 0, 100, 100, 0, 0], lambda share: share.learn(0, 8))
    share.learn(8, 8)
    assert ZeroShare(share.values()).share == share.share == 1


def test_a_call_that_fails_after_its_look_was_due_changes_nothing():
    share = told(told(ZeroShare(), 90, 100), 90, 100)
    for _ in range(5 * INTERVAL):
        share.due(torch.device("cpu"))  # and no look follows
        assert share.three_passes
    assert ZeroShare(share.values()).values() == share.values()


@pytest.mark.parametrize("values", BAD)
def test_values_that_no_object_has_are_refused(values):
    with pytest.raises(ValueError, match="zero_share must be six numbers as a state has them, got"):
        ZeroShare(values)


def test_a_state_file_holds_it(tmp_path):
    state = gk.SampleState(3)
    told(told(state.zero_share, 90, 100), 5, 7).due(torch.device("cpu"))
    state.save(tmp_path / "state.safetensors")
    assert gk.SampleState.load(tmp_path / "state.safetensors").zero_share.values() == state.zero_share.values()
    assert copy.deepcopy(state).zero_share.values() == state.zero_share.values() == [0, 1, 90, 100, 5, 7]


@pytest.mark.parametrize("values", ["[0, 0]", "{", json.dumps([0] * 5 + [-1])])
def test_a_state_file_with_another_thing_in_its_place_is_refused(tmp_path, values):
    from geko_kernels._files import load_tensors, save_tensors
    from geko_kernels.state import _FORMAT, _VERSION

    path = tmp_path / "state.safetensors"
    gk.SampleState(3).save(path)
    columns, metadata = load_tensors(path, _FORMAT, "", _VERSION)
    kept = {name: metadata[name] for name in ("config", "upstream")}
    save_tensors(path, _FORMAT, columns, kept, _VERSION)  # as an earlier release wrote it
    assert gk.SampleState.load(path).zero_share.values() == [0] * 6
    save_tensors(path, _FORMAT, columns, {**kept, "zero_share": values}, _VERSION)
    with pytest.raises(ValueError, match=r"state.safetensors is damaged: "):
        gk.SampleState.load(path)


def test_several_processes_start_anew_at_a_sync(monkeypatch):
    state = gk.SampleState(3)
    told(state.zero_share, 90, 100)
    state.sync()
    assert state.zero_share.values()[4:] == [90, 100]
    monkeypatch.setattr("geko_kernels.state.sync_rows_", lambda *_: True)
    state.sync()
    assert state.zero_share.values() == [0] * 6


ROWS, LENGTH, VOCAB = 10, 2, 40


def batch(share, length=LENGTH, unlabelled=0):
    """Logits and labels of which `share` of the samples are learnt; the first `unlabelled` tokens of each have none."""
    labels = torch.randint(0, VOCAB, (ROWS, length))
    logits = torch.randn(ROWS, length, VOCAB)
    learnt = torch.arange(ROWS) < round(share * ROWS)
    logits.scatter_add_(2, labels[..., None], torch.where(learnt, 15.0, -5.0)[:, None, None].expand(-1, length, 1))
    labels[:, :unlabelled] = -100
    return logits, labels


def truth(logits, labels, stats):
    z = logits.double().requires_grad_()
    each = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    factor = stats.weight / stats.num_tokens.clamp(min=1) / (stats.num_tokens > 0).sum()
    (grad,) = torch.autograd.grad((each * factor[:, None]).sum(), z)
    return grad.float()


def new_state():
    return gk.SampleState(ROWS, gk.GEKOConfig(bucket_weights=(1, 1, 0)))


def step(state, logits, labels, rows, **options):
    """Whether the call took one pass, after its gradient was compared with the truth."""
    before, leaf = rows.calls, logits.clone().requires_grad_()
    ids = None if state is None else torch.arange(ROWS)
    loss, stats = gk.weighted_loss(leaf * 1, labels, ids, state, return_stats=True, **options)
    loss.backward()
    torch.testing.assert_close(leaf.grad, truth(logits, labels, stats), rtol=1e-4, atol=1e-7)
    return rows.calls > before


@pytest.mark.no_cover
@pytest.mark.parametrize("inplace", [False, True])
def test_the_path_follows_the_data_there_and_back(emulated, inplace):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        state, paths = new_state(), []
        for share, calls in ((0.0, 3), (0.9, 9), (0.0, 6)):
            paths += [step(state, *batch(share), emulated, inplace=inplace) for _ in range(calls)]
        runs.append((paths, state.upstream, *state.columns))
    # every second call is looked at: call 8 knows of 0, 0, 0.9 and 0.9, call 14 of the first 0 afterwards
    assert runs[0][0] == [True] * 8 + [False] * 6 + [True] * 4
    for ours, again in zip(*runs, strict=True):
        assert ours == again if isinstance(ours, list) else torch.equal(ours, again)


@pytest.mark.no_cover
def test_a_saved_state_goes_on_by_the_same_paths(emulated, tmp_path):
    def go_on(state):
        torch.manual_seed(4)
        return [step(state, *batch(share), emulated) for share in (0.9,) * 5 + (0.0,) * 5]

    state = new_state()
    for _ in range(3):
        step(state, *batch(0.9), emulated)
    state.save(tmp_path / "state.safetensors")
    resumed, copied = gk.SampleState.load(tmp_path / "state.safetensors"), copy.deepcopy(state)
    paths = go_on(state)
    assert go_on(resumed) == go_on(copied) == paths
    assert set(paths) == {False, True}


@pytest.mark.no_cover
def test_tokens_without_a_label_do_not_count(emulated):
    # 4 of 10 samples weigh 0, and of all tokens 3 of 4 have no label
    state = new_state()
    assert all(step(state, *batch(0.4, 4, 3), emulated) for _ in range(3 * INTERVAL))
    assert state.zero_share.values()[4:] == [4, 10]


@pytest.mark.no_cover
@pytest.mark.parametrize("stats", [False, True])
def test_visits_of_a_packed_row_count_by_their_tokens(emulated, stats):
    logits, labels = batch(0.9)
    ids = torch.arange(ROWS).repeat_interleave(LENGTH)[None]
    ids[:, -2:] = -1  # padding
    labels, logits = labels.view(1, -1), logits.view(1, -1, VOCAB)
    labels[0, :1] = -100
    state, paths = new_state(), []
    for _ in range(2 * INTERVAL):
        before = emulated.calls
        gk.weighted_loss(logits.clone().requires_grad_(), labels, ids, state, return_stats=stats)
        paths.append(emulated.calls > before)
    assert paths == [True] * INTERVAL + [False] * INTERVAL
    assert state.zero_share.values()[2:4] == [9 * LENGTH - 1, ROWS * LENGTH - 3]


@pytest.mark.no_cover
def test_only_calls_that_could_predict_are_counted(emulated):
    state = new_state()
    step(state, *batch(0.9), emulated)
    logits, labels = batch(0.9)
    values = state.zero_share.values()
    with torch.no_grad():
        gk.weighted_loss(logits, labels, torch.arange(ROWS), state)
    gk.weighted_loss(logits.requires_grad_(), labels, torch.arange(ROWS), state, softcap=5.0)
    with torch.profiler.profile():
        gk.weighted_loss(logits, labels, torch.arange(ROWS), state)
    assert state.zero_share.values() == values


@pytest.mark.no_cover
def test_without_a_state_no_weight_is_0(emulated):
    assert all(step(None, *batch(0.9), emulated) for _ in range(3 * INTERVAL))


@pytest.mark.no_cover
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_prediction_is_in_float32_whatever_the_default_dtype(emulated, dtype):
    inputs = batch(0.4)
    torch.set_default_dtype(dtype)
    try:
        for state in (None, new_state()):
            assert step(state, *inputs, emulated)
        assert state.upstream.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


SHARES = {
    "itself": lambda share: share,
    "values": lambda share: ZeroShare(share.values()),
    "a copy": copy.deepcopy,
    "pickled": lambda share: pickle.loads(pickle.dumps(share)),
}


@pytest.mark.parametrize("of", SHARES)
def test_a_linear_call_counts_at_the_next_question(of):
    """However it is looked at first, it counts once, and before the next one."""
    share = ZeroShare()
    share.learn_later(HostCopy(torch.tensor(25)), 100)
    assert SHARES[of](share).share == share.share == 0.75
    share.learn_later(HostCopy(torch.tensor(100)), 100)
    assert SHARES[of](share).share == share.share == 0.25
    told(share, 0, 0)
    assert share.share == 0.25


def test_a_look_counts_linear_calls_before_it():
    share = ZeroShare()
    share.learn_later(HostCopy(torch.tensor(10)), 100)
    assert told(share, 0, 0).three_passes
