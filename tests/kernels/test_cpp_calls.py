"""Eager losses on the CPU: which ops they call, bad values, and batches that several threads share."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.reference import ops as reference

cpp = pytest.importorskip("geko_kernels.cpu", exc_type=ImportError)


class OpsCalled(TorchDispatchMode):
    """The names of geko's ops, in order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "geko":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(8,), (2, 4)], ids=["classifier", "tokens"])
def test_a_step_is_one_op_forward_and_one_backward(shape):
    logits, labels = torch.randn(*shape, 10, requires_grad=True), torch.randint(10, shape)
    with OpsCalled() as called:
        gk.weighted_loss(logits, labels, torch.arange(shape[0]), gk.SampleState(8)).backward()
    assert called.names == ["geko.loss_forward_.cpu", "geko.logits_grad.cpu"]


@pytest.mark.parametrize("statistics", [False, True])
def test_statistics_are_made_where_they_are_asked_for(statistics):
    state = gk.SampleState(4)
    table = state.rules, state.weights, None, state.columns, state.error
    call = torch.randn(4, 5), torch.arange(4), torch.arange(4), *table, 1, -100, False, 0.0, True, None, None
    *_, floats, ints, flags, _ = cpp.loss_forward_(*call, True, statistics)
    entries = 4 if statistics else 0
    assert floats.shape == (6, entries) and ints.shape == (2, entries) and flags.shape == (2, entries)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize(
    ("labels", "ids", "message"),
    [
        ([0, 7, 1], [0, 1, 2], r"labels: 7 \(token 1 of the flattened batch\)"),
        ([0, -3, 1], [0, 1, 2], r"labels: -3 \(token 1 of the flattened batch\)"),
        ([0, 1, 2], [0, 1, 3], r"sample_ids: 3 \(token 2 of the flattened batch\)"),
        ([0, 1, 2], [-2, 1, 0], r"sample_ids: -2 \(token 0 of the flattened batch\)"),
    ],
)
def test_a_bad_value_raises_before_anything_is_counted(linear, labels, ids, message):
    state, hidden = gk.SampleState(3), torch.randn(3, 5, requires_grad=True)
    batch = torch.tensor(labels), torch.tensor(ids), state
    with pytest.raises(IndexError, match=message):
        gk.weighted_linear_loss(hidden, torch.randn(5, 5), *batch) if linear else gk.weighted_loss(hidden, *batch)
    assert not state.times_seen.any() and not state.changed.any()
    state.check()  # nothing is left behind


@pytest.mark.parametrize("vocab", [2, 5, 8, 16, 31, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_small_vocabulary_in_groups(vocab, dtype):
    """More rows than a vector has lanes, some of them without a label or a weight."""
    logits, labels = (3 * torch.randn(1, 53, vocab)).to(dtype), torch.randint(vocab, (1, 53))
    labels[0, [3, 16, 17, 52]] = -100
    tokens, want = (op.token_stats(logits, labels, None, -100, False, 4.0) for op in (cpp, reference))
    torch.testing.assert_close(tokens, want, rtol=2e-6, atol=2e-6)
    coeff = torch.rand(53) * (torch.rand(53) < 0.7) * (labels[0] != -100)
    rest = labels, want, coeff, torch.tensor(0.5), torch.empty(0, dtype=torch.int32), False, 4.0
    got, want = (op.logits_grad(torch.tensor(2.0), logits, *rest) for op in (cpp, reference))
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)
    overwritten = logits.clone()
    cpp.logits_grad_(torch.tensor(2.0), overwritten, *rest)
    assert overwritten.equal(got)


@pytest.mark.parametrize("form", ["classifier", "tokens", "packed"])
def test_a_batch_that_threads_share_is_the_reference_and_the_same_bits_on_any_number(form, monkeypatch):
    shape = (6000,) if form == "classifier" else (1500, 4)
    logits = torch.randn(*shape, 6, requires_grad=True)
    labels, ids = torch.randint(6, shape), torch.randint(400, shape[:1])  # each sample about 15 times
    if form == "packed":
        ids = torch.randint(-1, 400, (1500, 2)).repeat_interleave(2, 1)

    def call():
        logits.grad, state = None, gk.SampleState(400)
        loss, stats = gk.weighted_loss(logits, labels, ids, state, return_stats=True)
        loss.backward()
        return loss.detach(), logits.grad, *stats, *state.state_dict().values()

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))
    monkeypatch.setattr(ops, "_override", "reference")
    for got, want in zip(results[0], call(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def row_call(name, **changes):
    """A C++ op on rows: a buffer of 6 x 16 logits, 4 tokens; with some arguments replaced."""
    index, positions = torch.arange(4), torch.zeros(6, dtype=torch.int64)
    logits, tokens, coeff = torch.zeros(6, 16), torch.zeros(5, 4), torch.ones(4)
    call = {
        "score_rows_": [logits, index, index, tokens, False, 0, 0, 4, 16, 0.0],
        "kept_rows_": [coeff, index, positions, torch.arange(6), 0, 0, 4],
        "gradient_rows_": [logits, positions, torch.arange(6), None, index[:, None], tokens, 0, 6, 6, 16, False, 0.0],
        "gather_rows": [torch.zeros(4, 3), index, coeff, 4],
        "scatter_rows_": [torch.zeros(4, 3), torch.zeros(4, 3), index, coeff, 0],
        "column_sums": [torch.zeros(4, 3), coeff],
        "rescale_": [torch.zeros(4), torch.tensor(2.0)],
    }[name]
    for place, value in changes.items():
        call[int(place.removeprefix("at"))] = value
    return getattr(cpp, name)(*call)


@pytest.mark.parametrize("bad", [-1, 16, 2**40, -(2**63)])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("score_rows_", 1), ("score_rows_", 2), ("kept_rows_", 1), ("gradient_rows_", 1), ("gradient_rows_", 2)),
        *(("gather_rows", 1), ("scatter_rows_", 2)),
    ],
)
def test_an_index_that_a_tensor_holds_is_never_followed_outside(name, place, bad):
    row_call(name)
    values = torch.arange(6 if name == "gradient_rows_" else 4)
    values[2] = bad
    with pytest.raises(RuntimeError, match="hold an index out of range"):
        row_call(name, **{f"at{place}": values})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("score_rows_", {"at4": True}, "fused must be False on the CPU"),
        ("score_rows_", {"at7": 5}, "rows .* must lie in"),
        ("score_rows_", {"at5": 2**62, "at7": 2**62}, "slots .* must lie in"),
        ("score_rows_", {"at8": -1}, "columns .* must lie in"),
        ("kept_rows_", {"at4": 3}, "slots .* must lie in"),
        ("gradient_rows_", {"at6": -1}, "slots .* must lie in"),
        ("gradient_rows_", {"at0": torch.zeros(6, 32)[:, ::2]}, "logits must be a contiguous matrix"),
        ("gather_rows", {"at0": torch.zeros(4, 3).double()}, "hidden must be float32, bfloat16 or float16"),
        ("gather_rows", {"at3": -1}, "positions .* must lie in"),
        ("scatter_rows_", {"at1": torch.zeros(4, 4)}, "product must have the columns of out"),
        ("column_sums", {"at1": torch.ones(5)}, "by_row must be a contiguous CPU tensor of 4"),
        ("rescale_", {"at1": torch.ones(2)}, "factor must be a contiguous CPU tensor of 1"),
    ],
)
def test_rows_that_do_not_fit_are_refused_in_cpp(name, changes, message):
    with pytest.raises(RuntimeError, match=message):
        row_call(name, **changes)
