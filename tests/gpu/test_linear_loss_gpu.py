"""`weighted_linear_loss` on a CUDA device, at sizes where its buffers, GEMMs and copies are those of real use."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels.losses import linear_chunks, linear_expected
from geko_kernels.losses.linear_gradients import HeadGradients

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

REDUCTIONS = ["mean", "token_mean", "sum", "none"]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setattr(gk.ops, "_override", "triton")
    torch.use_deterministic_algorithms(False)  # its index_copy_ takes other kernels and memory than those of use


def batch(vocab, dtype=torch.bfloat16, rows=16, length=192, columns=256, learnt=0.5, masked=0.25):
    """hidden (requires grad), weight (requires grad), labels, ids; of the samples `learnt` predict their labels."""
    weight = torch.randn(vocab, columns, device="cuda") * 0.3
    labels = torch.randint(vocab, (rows, length), device="cuda")
    hidden = torch.randn(rows, length, columns, device="cuda")
    easy = torch.rand(rows, device="cuda") < learnt
    hidden[easy] = 2 * weight[labels[easy]] + 0.1 * hidden[easy]
    labels[:, : int(masked * length)] = -100
    ids = torch.randperm(rows, device="cuda")
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, ids


def grads_of(loss, inputs):
    upstream = torch.linspace(0.5, 2, loss.numel(), device="cuda").view(loss.shape) if loss.dim() else 3.0
    return torch.autograd.grad((loss * upstream).sum(), inputs)


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("chunk_mib", [None, 8, 40])
@pytest.mark.parametrize("vocab", [1000, 4096, 10007])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_within_twice_pytorchs_own(dtype, vocab, chunk_mib):
    hidden, weight, labels, ids = batch(vocab, dtype)
    found = []
    for cast, linear in ((torch.float64, False), (dtype, False), (dtype, True)):
        inputs = hidden.detach().to(cast).requires_grad_(), weight.detach().to(cast).requires_grad_()
        state = gk.SampleState(16, device="cuda")
        if linear:
            loss = gk.weighted_linear_loss(*inputs, labels, ids, state, chunk_mib=chunk_mib)
        else:
            loss = gk.weighted_loss(F.linear(*inputs), labels, ids, state)
        found.append((loss.detach(), *grads_of(loss, inputs)))
    for exact, torchs, ours in zip(*found, strict=True):
        assert relative(ours, exact) <= 2 * relative(torchs, exact) + 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", ["row", "packed"])
@pytest.mark.parametrize("learnt", [0.0, 0.5, 1.0])
def test_statistics_and_state_equal_those_of_the_logits(reduction, form, learnt):
    hidden, weight, labels, ids = batch(5003, torch.float32, learnt=learnt)
    if form == "packed":
        ids = torch.randint(0, 16, (16, 24), device="cuda").repeat_interleave(8, 1)
    found = []
    for linear in (False, True):
        state = gk.SampleState(16, device="cuda")
        options = {"reduction": reduction, "return_stats": True, "shift": True, "softcap": 20.0}
        if linear:
            loss, stats = gk.weighted_linear_loss(hidden, weight, labels, ids, state, chunk_mib=40, **options)
        else:
            loss, stats = gk.weighted_loss(F.linear(hidden, weight), labels, ids, state, **options)
        found.append((loss, *stats, *grads_of(loss, (hidden, weight)), *state.state_dict().values()))
    for want, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_device(reduction):
    hidden, weight, labels, ids = batch(10007)
    state = gk.SampleState(16, device="cuda")
    bias = torch.zeros(10007, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        options = {
            "bias": bias,
            "reduction": reduction,
            "chunk_mib": 40,
            "num_items": 7 if reduction == "mean" else None,
        }
        loss = gk.weighted_linear_loss(hidden, weight, labels, ids, state, **options)
        loss.sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_gets_the_same():
    hidden, weight, labels, ids = batch(10007)
    state = gk.SampleState(16, device="cuda")
    gk.weighted_linear_loss(hidden, weight, labels, ids, state, update=False, chunk_mib=40)  # what later calls expect
    want = gk.weighted_linear_loss(hidden, weight, labels, ids, state, update=False, chunk_mib=40)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        ours = gk.weighted_linear_loss(hidden, weight, labels, ids, state, update=False, chunk_mib=40)
        grads = torch.autograd.grad(ours, (hidden, weight))
    torch.cuda.current_stream().wait_stream(stream)
    assert ours.equal(want)
    for grad, exact in zip(grads, torch.autograd.grad(want, (hidden, weight)), strict=True):
        assert grad.equal(exact)


@pytest.mark.parametrize("chunk_mib", [64, 256])
def test_memory_keeps_to_the_budget(chunk_mib):
    hidden, weight, labels, ids = batch(50304, rows=32, learnt=0.0, masked=0.0)
    state = gk.SampleState(32, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = gk.weighted_linear_loss(hidden, weight, labels, ids, state, chunk_mib=chunk_mib)
        torch.autograd.grad(loss, (hidden, weight))
    sums = hidden.numel() * 2 + weight.numel() * 4
    assert torch.cuda.max_memory_allocated() - before <= sums + chunk_mib * 2**20


def test_dW_takes_no_more_memory_than_its_elements():
    hidden, weight, labels, ids = batch(50304, rows=32, learnt=0.0)
    state = gk.SampleState(32, device="cuda")
    gk.weighted_linear_loss(hidden, weight, labels, ids, state, chunk_mib=64).backward()
    assert weight.grad.untyped_storage().nbytes() == weight.numel() * 2


def test_more_than_2_to_the_31_logits_in_the_buffer():
    tokens, vocab = 2**16, 2**15 + 64
    hidden = torch.randn(64, 1024, 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, 16, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocab, (64, 1024), device="cuda")
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    loss = gk.weighted_linear_loss(*inputs, labels, chunk_mib=8192)
    grad = torch.autograd.grad(loss, inputs)[0]
    last = hidden.detach()[-1].requires_grad_()
    want = F.cross_entropy(F.linear(last, weight.detach()).float(), labels[-1], reduction="sum") / tokens
    torch.testing.assert_close(grad[-1].float(), torch.autograd.grad(want, last)[0].float(), rtol=0.05, atol=1e-6)


def test_a_capture_is_refused():
    hidden, weight, labels, ids = batch(1000)
    state = gk.SampleState(16, device="cuda")
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        gk.weighted_linear_loss(hidden, weight, labels, ids, state)


def test_the_first_rows_say_whether_gradients_come_with_the_statistics(monkeypatch):
    monkeypatch.setattr(linear_chunks, "AHEAD", 0)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 192)
    seen = []
    score = linear_chunks.ops.direct.score_rows_
    monkeypatch.setattr(
        *(linear_chunks.ops.direct, "score_rows_"),
        lambda *args: (seen.append((args[7], args[4])), score(*args))[1],
    )
    for learnt, fused in ((0.0, True), (1.0, False)):
        seen.clear()
        hidden, weight, labels, ids = batch(4096, learnt=learnt, masked=0.0)
        gk.weighted_linear_loss(hidden, weight, labels, ids, gk.SampleState(16, device="cuda")).backward()
        assert seen == [(192, False), (15 * 192, fused)]


@pytest.mark.parametrize("vocab", [50257, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("learnt", [0.0, 1.0])
def test_entropy(vocab, dtype, learnt):
    """Of each token, in the launches with gradients and without; loss and gradients are those of a call without it."""
    hidden, weight, labels, ids = batch(vocab, dtype, rows=8, learnt=learnt)
    results = []
    for asked in (False, True):
        state = gk.SampleState(8, device="cuda")
        options = {"reduction": "token_mean", "chunk_mib": 64, "return_stats": True, "return_entropy": asked}
        loss, stats, *entropy = gk.weighted_linear_loss(hidden, weight, labels, ids, state, **options)
        results.append((loss.detach(), *stats, *grads_of(loss, [hidden, weight])))
    for plain, more in zip(*results, strict=True):
        torch.testing.assert_close(more, plain, rtol=1e-3, atol=1e-6)
    logits = F.linear(hidden.detach(), weight.detach()).float()
    want = torch.special.entr(logits.softmax(-1)).sum(-1).masked_fill(labels == -100, 0)
    torch.testing.assert_close(entropy[0], want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=2e-2)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Hopper's path")
@pytest.mark.parametrize(("expected", "learnt"), [(1.0, 1.0), (0.9, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize(("vocab", "columns"), [(4096, 256), (10007, 576), (50304, 768), (1024, 48)])
def test_few_rows_are_summed_without_waiting_for_their_number(monkeypatch, vocab, columns, expected, learnt):
    """Within twice torch's error, the same bits each time, no memory beyond that of a call that waits."""
    hidden, weight, labels, ids = batch(vocab, rows=32, columns=columns, learnt=learnt)
    found, peaks, taken = [], [], []
    add_all = HeadGradients.add_all
    monkeypatch.setattr(HeadGradients, "add_all", lambda *args: (taken.append(1), add_all(*args))[1])

    def grads(cast, waits, linear=True):
        inputs = hidden.detach().to(cast).requires_grad_(), weight.detach().to(cast).requires_grad_()
        state = gk.SampleState(32, device="cuda")
        state.zero_share.learn(round(1000 * expected), 1000)
        state.zero_share.scored_share = 0.75
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with monkeypatch.context() as patch:
            patch.setattr(linear_expected, "FEW", -1 if waits else 1e15)
            if linear:
                loss = gk.weighted_linear_loss(*inputs, labels, ids, state)
            else:
                loss = gk.weighted_loss(F.linear(*inputs), labels, ids, state)
            result = loss.detach(), *grads_of(loss, inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        return result

    exact, torchs = grads(torch.float64, True, linear=False), grads(torch.bfloat16, True, linear=False)
    grads(torch.bfloat16, False)  # scratch memory of the libraries
    assert len(taken) == 1
    found = [grads(torch.bfloat16, waits) for waits in (True, False, False)]
    assert len(taken) == 3
    for want, peer, ours in zip(exact, torchs, found[1], strict=True):
        assert (ours.double() - want).norm() <= 2 * (peer.double() - want).norm() + 1e-6 * want.norm()
    assert all(one.equal(other) for one, other in zip(*found[1:], strict=True))
    # a call that waits and keeps no row makes dW once the logits are gone, and no operand for it
    later = (weight.numel() + hidden.numel()) * 2 if learnt == 1 else 0
    assert peaks[-1] <= peaks[-3] + later + 2**21
