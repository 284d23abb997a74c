"""The scored rows of the linear loss by the CUDA kernel, on the GPU it is for; skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.kernels.one_pass import hopper
from geko_kernels.reference import rows as reference_rows

score_hopper = pytest.importorskip("geko_kernels.kernels.rows.score_hopper", exc_type=ImportError)
CUDA = torch.device("cuda", 0)
REASON = hopper.missing(CUDA) if torch.cuda.is_available() else "needs a CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"{REASON}")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a row in one block of half a multiprocessor; in one or two; in two to eight
VOCABS = (2000, 32000, 49152, 50257, 50304, 128256, 151936, 300_000)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(score_hopper, "SMALLEST", 0)
    monkeypatch.setattr(score_hopper, "SMALLEST_ROW", 0)
    monkeypatch.setattr(ops, "_override", "")


@pytest.fixture
def launches(monkeypatch):
    """The (slot, count) of each launch."""
    seen = []
    call = score_hopper.ScoreLaunch.__call__

    def counted(self, *args):
        seen.append((args[4], args[6]))
        call(self, *args)

    monkeypatch.setattr(score_hopper.ScoreLaunch, "__call__", counted)
    return seen


def buffer(count, vocab, dtype):
    """Logits (count, ld) with NaN beyond `vocab`; rows and targets of three more, half of them peaked at the target."""
    stride = vocab if vocab % 8 == 0 else -(-vocab // 64) * 64
    logits = torch.randn(count, stride, device="cuda", dtype=dtype)
    logits *= torch.linspace(0.1, 4, count, device="cuda")[:, None].to(dtype)
    targets = torch.randint(vocab, (count + 3,), device="cuda")
    logits[::2].scatter_(1, targets[2:-1][::2, None], 20.0)
    logits[:, vocab:] = torch.nan
    return logits, torch.randperm(count + 3, device="cuda"), targets


def spoil(logits, targets, vocab):
    """Rows of slots 1 to 6 with NaN and infinite logits; those of the targets included."""
    logits[1, 17], logits[2, vocab - 1], logits[3, :vocab] = torch.nan, torch.inf, -torch.inf
    logits[4, vocab // 3 : vocab], targets[6] = -torch.inf, vocab - 1
    logits[5, : vocab // 2], targets[7] = -torch.inf, vocab - 2
    logits[6, targets[8]] = torch.nan


def scored(score_rows_, logits, rows, targets, vocab, *where):
    """The buffer and the statistics after `score_rows_`; where: slot, start, count, by default all but both ends."""
    slot, start, count = where or (1, 3, len(logits) - 2)
    out, statistics = logits.clone(), torch.full((5, len(rows)), 7.0, device="cuda")
    score_rows_(out, rows, targets, statistics, True, slot, start, count, vocab, 0.0)
    return out, statistics


def assert_close(ours, want, targets, dtype):
    """Args: targets: that of each slot."""
    rtol, atol = {torch.float32: (1e-4, 1e-9), torch.bfloat16: (2**-7, 1e-9), torch.float16: (2**-9, 1e-7)}[dtype]
    at = targets.clamp(0, ours[0].shape[1] - 1)[:, None]
    at_target, rest = zip(*((each[0].gather(1, at), each[0].scatter(1, at, 0.0)) for each in (ours, want)), strict=True)
    torch.testing.assert_close(*rest, rtol=rtol, atol=atol, equal_nan=True)
    torch.testing.assert_close(*at_target, rtol=rtol, atol=1e-6, equal_nan=True)  # 1 - p, with p near 1
    torch.testing.assert_close(ours[1], want[1], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ours[1][4].equal(want[1][4])


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_the_reference(launches, dtype, vocab):
    logits, rows, targets = buffer(200, vocab, dtype)
    spoil(logits, targets, vocab)
    ours = scored(ops.direct.score_rows_, logits, rows, targets, vocab)
    assert launches == [(1, 198)]
    assert_close(ours, scored(reference_rows.score_rows_, logits, rows, targets, vocab), targets[2:-1], dtype)
    assert not ours[0][1:-1, vocab:].any()
    assert bits(ours[0][[0, -1]]).equal(bits(logits[[0, -1]])), "rows of other slots stay"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_targets_and_tokens_are_as_in_triton(monkeypatch, launches, dtype):
    logits, rows, targets = buffer(60, 50257, dtype)
    spoil(logits, targets, 50257)
    targets[10:14] = torch.tensor([-1, 50257, 50300, 2**40 + 3], device="cuda")
    rows[14:18] = torch.tensor([-1, 63, 2**40 + 3, -(2**40)], device="cuda")
    ours = scored(ops.direct.score_rows_, logits, rows, targets, 50257)
    monkeypatch.setattr(ops, "_override", "triton")
    assert_close(ours, scored(ops.direct.score_rows_, logits, rows, targets, 50257), targets[2:-1], dtype)
    assert len(launches) == 1
    assert ours[1][0, rows[10:14]].isnan().all() and ours[1][1:, rows[10:14]].isfinite().all()


@pytest.mark.parametrize(("count", "vocab"), [(5280, 20000), (2640, 50257), (1320, 128256), (330, 600_000)])
def test_a_row_does_not_see_what_its_slots_held_before(count, vocab):
    # some twenty rows a cluster, against one launch a row, in which no slot of the ring and no sum is used twice
    logits, rows, targets = buffer(count, vocab, torch.bfloat16)
    want, statistics = logits.clone(), torch.full((5, len(rows)), 7.0, device="cuda")
    for i in range(count):
        ops.direct.score_rows_(want, rows, targets, statistics, True, i, i, 1, vocab, 0.0)
    for _ in range(20):
        ours = scored(ops.direct.score_rows_, logits, rows, targets, vocab, 0, 0, count)
        assert bits(ours[0]).equal(bits(want)) and ours[1].equal(statistics)


def test_more_than_2_to_the_31_logits():
    vocab, count = 32768, 70_000
    logits = torch.zeros(count, vocab, device="cuda", dtype=torch.bfloat16)
    logits[-3:] = torch.randn(3, vocab, device="cuda")
    targets, rows = torch.randint(vocab, (count,), device="cuda"), torch.arange(count, device="cuda")
    last = logits[-3:].clone()
    statistics, want = torch.zeros(2, 5, count, device="cuda")
    ops.direct.score_rows_(logits, rows, targets, statistics, True, 0, 0, count, vocab, 0.0)
    reference_rows.score_rows_(last, rows, targets, want, True, 0, count - 3, 3, vocab, 0.0)
    assert_close((logits[-3:], statistics[:, -3:]), (last, want[:, -3:]), targets[-3:], torch.bfloat16)


def batch(vocab, dtype):
    """hidden, weight, labels, ids; no sample is learnt, so all rows are kept; a quarter of the tokens has no label."""
    weight = torch.randn(vocab, 256, device="cuda") * 0.3
    labels = torch.randint(vocab, (32, 192), device="cuda")
    hidden = torch.randn(32, 192, 256, device="cuda")
    labels[:, :48] = -100
    return hidden.to(dtype), weight.to(dtype), labels, torch.randperm(32, device="cuda")


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("chunk_mib", [None, 80])
@pytest.mark.parametrize("vocab", [10007, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_the_linear_loss_is_within_twice_pytorchs(launches, dtype, vocab, chunk_mib, with_state):
    hidden, weight, labels, ids = batch(vocab, dtype)
    found = []
    for cast, linear in ((torch.float64, False), (dtype, False), (dtype, True)):
        inputs = hidden.to(cast).requires_grad_(), weight.to(cast).requires_grad_()
        table = (ids, gk.SampleState(32, device="cuda")) if with_state else (None, None)
        if linear:
            loss = gk.weighted_linear_loss(*inputs, labels, *table, chunk_mib=chunk_mib)
        else:
            loss = gk.weighted_loss(F.linear(*inputs), labels, *table)
        found.append((loss.detach(), *torch.autograd.grad(3 * loss, inputs)))
    assert launches
    for exact, torchs, ours in zip(*found, strict=True):
        assert relative(ours, exact) <= 2 * relative(torchs, exact) + 1e-6


@pytest.mark.parametrize("vocab", [10007, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_linear_loss_equals_that_of_the_triton_kernel(monkeypatch, launches, dtype, vocab):
    hidden, weight, labels, ids = batch(vocab, dtype)
    inputs, results = (hidden.requires_grad_(), weight.requires_grad_()), []
    for override in ("", "triton"):
        monkeypatch.setattr(ops, "_override", override)
        state = gk.SampleState(32, device="cuda")
        loss, stats = gk.weighted_linear_loss(*inputs, labels, ids, state, return_stats=True)
        grads = torch.autograd.grad(loss, inputs)
        results.append((*grads, loss.detach(), *stats, *state.state_dict().values()))
        assert len(launches) == 1
    (dx, dw, *ours), (want_dx, want_dw, *want) = results
    limit = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert relative(dx, want_dx.double()) <= limit and relative(dw, want_dw.double()) <= limit
    for mine, theirs in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_another_stream_gets_the_same_and_nothing_waits(launches):
    torch.use_deterministic_algorithms(False)  # its index_copy_ takes other kernels than those of use
    hidden, weight, labels, ids = batch(20000, torch.bfloat16)
    inputs, state = (hidden.requires_grad_(), weight.requires_grad_()), gk.SampleState(32, device="cuda")

    def step():
        loss = gk.weighted_linear_loss(*inputs, labels, ids, state, update=False)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    step()  # the next ones know how many rows it has kept
    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        ours = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(mine.equal(theirs) for mine, theirs in zip(ours, want, strict=True))
    assert len(launches) == 4
