"""`weighted_linear_loss` within a budget: the same values by rows and by blocks of the vocabulary."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.host_copy import HostCopy
from geko_kernels.losses import linear_call, linear_chunks, linear_gradients
from geko_kernels.losses.linear_gradients import HeadGradients
from geko_kernels.losses.linear_head import Budget

ROWS, LENGTH, COLUMNS = 6, 15, 24  # samples, tokens of each, hidden


@pytest.fixture
def batch(device):
    def make(dtype, vocab, learnt=()):
        hidden, weight = torch.randn(ROWS, LENGTH, COLUMNS), torch.randn(vocab, COLUMNS) / 2
        labels = torch.randint(vocab, (ROWS, LENGTH))
        for row in learnt:
            hidden[row] = 8 * weight[labels[row]]
        labels[1, :6] = -100
        tensors = (hidden.to(dtype), weight.to(dtype), torch.randn(vocab).to(dtype))
        return [tensor.to(device) for tensor in (*tensors, labels, torch.arange(ROWS))]

    return make


def results(linear, values, dtype=None, **options):
    """loss, statistics and gradients of hidden, weight and bias; `dtype`: the inputs are cast to it."""
    *inputs, labels, ids = values
    inputs = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in inputs]
    state = gk.SampleState(ROWS, device=labels.device)
    options = {"return_stats": True, **options}
    if linear:
        loss, stats = gk.weighted_linear_loss(*inputs[:2], labels, ids, state, bias=inputs[2], **options)
    else:
        options.pop("chunk_mib", None)
        loss, stats = gk.weighted_loss(F.linear(*inputs), labels, ids, state, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), device=loss.device).view(loss.shape)
    return loss.detach(), *stats, *torch.autograd.grad((loss * upstream).sum(), inputs)


def held(monkeypatch, rows, columns):
    """Buffers of so many rows, or blocks of so many columns (0: rows), for small calls on a CPU too."""
    monkeypatch.setattr(Budget, "rows", lambda self, scored: min(rows, scored))
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: columns > 0)
    monkeypatch.setattr(Budget, "columns", lambda *_: columns)
    monkeypatch.setattr(linear_call, "_AT_ONCE", 0)


@pytest.mark.parametrize(("rows", "columns"), [(7, 0), (7, 16), (7, 64)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("vocab", "shift", "softcap"), [(50, True, None), (56, False, 5.0)])
def test_values_do_not_depend_on_the_budget(
    backend, device, batch, monkeypatch, rows, columns, reduction, vocab, shift, softcap
):
    held(monkeypatch, rows, columns)
    values = batch(torch.float32, vocab, learnt=[0, 2, 4])
    options = {"reduction": reduction, "shift": shift, "softcap": softcap}
    for ours, want in zip(results(True, values, **options), results(False, values, **options), strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [200, 20])
def test_the_host_may_be_ahead_of_the_device(backend, batch, monkeypatch, rows):
    """As on a GPU: no count is there before it is waited for. dW's operand is free before dX is made."""
    held(monkeypatch, rows, 0)
    values = batch(torch.float32, 50, learnt=[0])
    want = results(False, values)
    operands: list[weakref.ref[torch.UntypedStorage]] = []
    scale, add_hidden = HeadGradients.scale, HeadGradients._add_hidden

    def seen(self, *rest):
        operand = scale(self, *rest)
        operands.append(weakref.ref(operand.untyped_storage()))
        return operand

    def freed(self, *rest):
        gc.collect()  # Triton's interpreter leaves cycles
        assert operands[-1]() is None
        add_hidden(self, *rest)

    monkeypatch.setattr(linear_chunks.HostCopy, "arrived", lambda _: False)
    monkeypatch.setattr(HeadGradients, "scale", seen)
    monkeypatch.setattr(HeadGradients, "_add_hidden", freed)
    for ours, theirs in zip(results(True, values), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    assert operands


@pytest.mark.parametrize(("learnt", "rows", "asked"), [([], 20, 2), ([], 7, 2), ([5], 20, 2), ([0], 20, 6)])
def test_the_host_asks_no_more_once_nearly_all_rows_are_kept(backend, device, batch, monkeypatch, learnt, rows, asked):
    """Triton's path takes all rows of the next fills, those of weight 0 as zeros: the same values.

    It asks after the first fill, and at the end for visits that go on in another fill.
    """
    held(monkeypatch, rows, 0)
    values = batch(torch.float32, 50, learnt)
    want, asks, kept_rows = results(False, values), [], ops.direct.kept_rows_
    monkeypatch.setattr(linear_chunks, "SAMPLE", rows)
    monkeypatch.setattr(ops.direct, "kept_rows_", lambda *call: (asks.append(call), kept_rows(*call))[1])
    for ours, theirs in zip(results(True, values), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    assert len(asks) == asked or backend != "triton"


@pytest.mark.parametrize(("rows", "columns"), [(200, 0), (30, 0), (30, 16), (30, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_pytorchs_own_error(backend, device, batch, monkeypatch, dtype, rows, columns):
    held(monkeypatch, rows, columns)
    values = batch(dtype, 136, learnt=[1])
    exact, peer = results(False, values, torch.float64), results(False, values)
    for want, theirs, ours in zip(exact[-3:], peer[-3:], results(True, values)[-3:], strict=True):
        theirs_off, off = (((x.double() - want).norm() / want.norm()).item() for x in (theirs, ours))
        assert off <= 2 * theirs_off + 1e-6


@pytest.mark.parametrize(("rows", "columns", "early"), [(200, 0, 0), (17, 0, 1), (17, 16, 0)])
def test_a_device_that_lags_gets_the_same(backend, device, batch, monkeypatch, rows, columns, early):
    """Counts that have not arrived: first logits or none before that, dW's operand ahead of the count."""
    monkeypatch.setattr(linear_chunks.HostCopy, "arrived", lambda self: False)
    monkeypatch.setattr(linear_chunks, "EARLY_MIB", early)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 4)
    monkeypatch.setattr(linear_chunks, "AHEAD", 11 * 50 * COLUMNS)
    held(monkeypatch, rows, columns)
    values = batch(torch.float32, 50, learnt=[2])
    for ours, want in zip(results(True, values), results(False, values), strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(("rows", "columns"), [(200, 0), (40, 0), (40, 16)])
def test_a_states_later_calls_begin_before_the_count_is_known(backend, batch, monkeypatch, rows, columns):
    """If the last one scored nearly all tokens. The bits do not depend on when a count arrives, however small."""
    held(monkeypatch, rows, columns)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 4)
    monkeypatch.setattr(linear_chunks, "AHEAD", 11 * 50 * COLUMNS)
    events: list[str] = []
    logits, wait = linear_chunks.Head.logits, linear_chunks.HostCopy.wait
    monkeypatch.setattr(linear_chunks.Head, "logits", lambda *args: (events.append("logits"), logits(*args))[1])
    monkeypatch.setattr(linear_chunks.HostCopy, "wait", lambda copy: (events.append("wait"), wait(copy))[1])
    *inputs, labels, ids = batch(torch.float32, 50, learnt=[2])
    inputs = [tensor.requires_grad_() for tensor in inputs]
    masked = torch.where(torch.arange(LENGTH) < 9, -100, labels)
    few = torch.where(torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) < 5, labels, -100)  # fewer than the first logits
    first, found = [], []
    for arrived in (False, True):
        monkeypatch.setattr(linear_chunks.HostCopy, "arrived", lambda self, arrived=arrived: arrived)
        state, plain = gk.SampleState(ROWS), gk.SampleState(ROWS)
        for targets in (labels, labels, masked, masked, labels, few):
            events.clear()
            loss = gk.weighted_linear_loss(inputs[0], inputs[1], targets, ids, state, bias=inputs[2])
            first.append(events[0])
            found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
            loss = gk.weighted_loss(F.linear(*inputs), targets, ids, plain)
            for ours, want in zip(found[-1], [loss, *torch.autograd.grad(loss, inputs)], strict=True):
                torch.testing.assert_close(ours, want, rtol=2e-4, atol=2e-5)
    assert first == ["logits"] * 3 + ["wait"] * 2 + ["logits"] + ["wait"] * 6
    for late, early in zip(found[:6], found[6:], strict=True):
        assert all(one.equal(other) for one, other in zip(late, early, strict=True))


def test_two_calls_give_the_same_bits(backend, device, batch, monkeypatch):
    for rows, columns in ((20, 0), (20, 16)):
        held(monkeypatch, rows, columns)
        values = batch(torch.bfloat16, 50, learnt=[3])
        first, second = results(True, values), results(True, values)
        assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("rows", [200, 20])
def test_with_weights_above_zero_nobody_asks_how_many_rows_are_kept(backend, batch, monkeypatch, rows, changed):
    """Whoever changes the weights by hand still gets the right gradients."""
    held(monkeypatch, rows, 0)
    asked: list[int] = []
    monkeypatch.setattr(linear_chunks, "HostCopy", lambda values: asked.append(1) or HostCopy(values))
    hidden, weight, bias, labels, ids = batch(torch.float32, 50, learnt=[0, 2, 4])
    found = []
    for linear in (True, False):
        state = gk.SampleState(ROWS, gk.GEKOConfig.uniform(), labels.device)
        if changed:
            state.weights[2:] = 0  # LIGHT and FREEZE or FOCUS and HARD, whatever the order
        inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
        if linear:
            loss = gk.weighted_linear_loss(*inputs[:2], labels, ids, state, bias=inputs[2])
            assert state.zero_share.share is None, "nor counts them for later"
        else:
            loss = gk.weighted_loss(F.linear(*inputs), labels, ids, state)
        found.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    assert len(asked) == 1 + (rows < ROWS * LENGTH)  # with several fills: which estimates were wrong, at the end
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("rows", [200, 32])  # all rows at once, or in fills of which the host asks about the first
def test_a_call_expects_what_the_calls_before_it_kept(backend, batch, monkeypatch, rows):
    """Then no first rows have to show it. What was expected wrongly costs time only, and is known from then on."""
    held(monkeypatch, rows, 0)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 4)
    samples, kept_rows = [], ops.direct.kept_rows_
    monkeypatch.setattr(
        ops.direct, "kept_rows_", lambda *call: (samples.append(call[-1] == linear_chunks.SAMPLE), kept_rows(*call))[1]
    )
    state = gk.SampleState(ROWS, device=batch(torch.float32, 50)[0].device)
    seen = []
    for learnt in ([], [], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]):
        hidden, weight, bias, labels, ids = batch(torch.float32, 50, learnt)
        other = copy.deepcopy(state)
        inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
        want = gk.weighted_loss(F.linear(*inputs), labels, ids, other)
        wanted = torch.autograd.grad(want, inputs)
        loss = gk.weighted_linear_loss(*inputs[:2], labels, ids, state, bias=inputs[2])
        for ours, theirs in zip((loss, *torch.autograd.grad(loss, inputs)), (want, *wanted), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
        seen.append((any(samples), round(state.zero_share.share, 2)))
        del samples[:]
    assert seen == [(True, 0.0), (False, 0.0), (False, 0.57), (False, 0.8)]
    gk.weighted_linear_loss(hidden, weight, labels, ids, state)
    assert round(state.zero_share.share, 2) == 0.8, "without gradients it is not asked how many rows are kept"


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("vocab", "needed"), [(50, (True, True)), (64, (True, True)), (64, (True, False)), (64, (False, True))]
)
def test_few_kept_rows_are_summed_without_waiting_for_their_number(backend, batch, monkeypatch, vocab, needed):
    """However many they are in the end. The number is known from the next call on, and decides what that one does."""
    held(monkeypatch, 200, 0)
    monkeypatch.setattr(HeadGradients, "counts_on_device", lambda self: True)
    waits, summed, wait, add_all = [], [], linear_chunks.HostCopy.wait, HeadGradients.add_all
    monkeypatch.setattr(linear_chunks.HostCopy, "wait", lambda copy: (waits.append(copy), wait(copy))[1])
    monkeypatch.setattr(HeadGradients, "add_all", lambda *args: (summed.append(1), add_all(*args))[1])
    state, twin, found = gk.SampleState(ROWS), gk.SampleState(ROWS), []
    for learnt in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5], [], [0, 1, 2, 3, 4, 5], range(6), range(6)):
        hidden, weight, _, labels, ids = batch(torch.float32, vocab, learnt)
        inputs = [tensor.requires_grad_(wanted) for tensor, wanted in zip((hidden, weight), needed, strict=True)]
        inputs = [tensor for tensor in inputs if tensor.requires_grad]
        other = copy.deepcopy(state)
        results = []
        for each in (state, twin):
            waits.clear()
            summed.clear()
            loss = gk.weighted_linear_loss(hidden, weight, labels, ids, each)
            results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
        found.append((len(waits), len(summed)))
        loss = gk.weighted_loss(F.linear(hidden, weight), labels, ids, other)
        for ours, again, want in zip(*results, (loss, *torch.autograd.grad(loss, inputs)), strict=True):
            torch.testing.assert_close(ours, want, rtol=2e-4, atol=2e-5)
            assert ours.equal(again)
    # the number of scored rows; that of kept ones, or of those that the call before kept
    assert found == [(2, 0), (1, 1), (2, 1), (2, 1), (2, 1), (2, 1)]
    assert state.zero_share.share == twin.zero_share.share > 0.6


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("rows", [200, 20])
def test_once_all_rows_were_kept_the_next_call_takes_all(backend, batch, monkeypatch, rows):
    """It does not ask how many are kept, and those of weight 0 are zeros; but the call after it knows."""
    held(monkeypatch, rows, 0)
    asks, kept_rows, shares = [], ops.direct.kept_rows_, []
    monkeypatch.setattr(ops.direct, "kept_rows_", lambda *call: (asks.append(1), kept_rows(*call))[1])
    state = gk.SampleState(ROWS)
    for learnt in ([], [], [0, 5], [0, 5]):
        asks.clear()
        hidden, weight, bias, labels, ids = batch(torch.float32, 50, learnt)
        inputs, other = [tensor.requires_grad_() for tensor in (hidden, weight, bias)], copy.deepcopy(state)
        loss = gk.weighted_linear_loss(hidden, weight, labels, ids, state, bias=bias)
        ours = loss.detach(), *torch.autograd.grad(loss, inputs)
        loss = gk.weighted_loss(F.linear(*inputs), labels, ids, other)
        for one, want in zip(ours, (loss, *torch.autograd.grad(loss, inputs)), strict=True):
            torch.testing.assert_close(one, want, rtol=2e-4, atol=2e-5)
        not_asked = len(asks) == (rows < 84)  # with several fills: which estimates were wrong
        shares.append((not_asked, round(state.zero_share.share, 2)))
    assert shares == [(False, 0.0), (True, 0.0), (True, 0.2), (False, 0.29)]


def test_a_loaded_state_goes_on_with_the_same_bits(backend, device, batch, monkeypatch, tmp_path):
    held(monkeypatch, 20, 0)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 4)
    hidden, weight, _, labels, ids = batch(torch.float32, 50, [0])
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    state = gk.SampleState(ROWS, device=device)
    for _ in range(2):
        gk.weighted_linear_loss(*inputs, labels, ids, state)
    state.save(tmp_path / "state.safetensors")
    loaded = gk.SampleState.load(tmp_path / "state.safetensors", device)
    for _ in range(2):
        losses = [gk.weighted_linear_loss(*inputs, labels, ids, one) for one in (state, loaded)]
        for ours, want in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
            assert ours.equal(want)
        assert losses[0].equal(losses[1]) and loaded.zero_share.values() == state.zero_share.values()
        assert loaded.zero_share.share or backend != "triton"


@pytest.mark.parametrize(
    ("lengths", "room", "stops"),
    [
        ([8] * 8, 30, [24, 48, 64]),  # three visits fit, and a fourth does not
        ([8] * 8, 64, [64]),
        ([20] * 3, 30, [30, 60]),  # a fill of 20 would leave too much unused
        ([100], 30, [25, 50, 75, 100]),
        ([1] * 10, 4, [4, 7, 10]),
    ],
)
def test_a_fill_ends_with_a_visit_where_that_costs_little(lengths, room, stops):
    chunks = object.__new__(linear_chunks.Chunks)
    chunks.visit = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).numpy()

    def found(gradients):
        chunks.gradients, ends = gradients, [0]
        while ends[-1] < sum(lengths):
            ends.append(chunks._next(ends[-1], sum(lengths), room).stop)
        return ends[1:]

    assert found(gradients=True) == stops
    assert len(found(gradients=None)) == -(-sum(lengths) // room), "a call that only scores needs no weights meanwhile"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lengths", [[13, 20], [30, 13, 20]])
def test_a_fill_that_ends_early_is_not_lost(backend, device, monkeypatch, lengths, known):
    """13 of 32 slots are less than half of the buffer, and a fill that takes all rows still is a flush of its own."""
    held(monkeypatch, 32, 0)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)[None]
    inputs = [torch.randn(1, sum(lengths), COLUMNS), torch.randn(50, COLUMNS)]
    inputs = [tensor.to(device).requires_grad_() for tensor in inputs]
    labels = torch.randint(50, ids.shape, device=device)
    state = gk.SampleState(3, gk.GEKOConfig.uniform() if known else None, device=device)
    other = copy.deepcopy(state)
    loss = gk.weighted_linear_loss(*inputs, labels, ids, state)
    want = gk.weighted_loss(F.linear(*inputs), labels, ids, other)
    results = (loss, *torch.autograd.grad(loss, inputs)), (want, *torch.autograd.grad(want, inputs))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("columns", [0, 16])
def test_a_row_of_weight_zero_may_be_infinite(backend, batch, monkeypatch, columns):
    held(monkeypatch, 20, columns)
    hidden, weight, bias, labels, ids = batch(torch.float32, 50)
    weights = torch.ones(ROWS, device=labels.device)
    weights[3], hidden[3] = 0, torch.inf
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    loss = gk.weighted_linear_loss(
        *inputs[:2],
        labels,
        ids,
        gk.SampleState(ROWS, device=labels.device),
        bias=bias,
        sample_weights=weights,
        reduction="sum",
    )
    grads = torch.autograd.grad(loss, inputs)
    assert not grads[0][3].any() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("vocab", "tokens"), [(512, 21), (40, 21), (512, 1), (97, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_product_of_dx_in_the_memory_of_the_logits(reference, dtype, vocab, tokens, monkeypatch):
    """All rows kept, or some; with few classes it does not fit there."""
    monkeypatch.setattr(HeadGradients, "wide", lambda self, tile: torch.float32)  # as on a GPU
    monkeypatch.setattr(linear_gradients, "HIDDEN_BYTES", 16)
    hidden, weight = torch.randn(tokens, COLUMNS).to(dtype), torch.randn(vocab, COLUMNS).to(dtype)
    coeff = torch.rand(tokens) + 0.5
    for kept in {tokens, max(1, tokens // 3)}:
        positions, tile = torch.randperm(tokens)[:kept], torch.randn(kept, vocab).to(dtype)
        want = torch.zeros(tokens, COLUMNS).index_copy_(0, positions, tile.float() @ weight.float())
        gradients = HeadGradients(hidden, weight, True, None, None)
        gradients.add(tile.clone(), positions, coeff, coeff, last=True)
        got, _, _ = gradients.finish()
        torch.testing.assert_close(got.float(), want * coeff[:, None], rtol=2e-2, atol=0.3)
