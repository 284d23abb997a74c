"""The predicted gradient on the GPU it is for; skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.kernels.one_pass import hopper
from geko_kernels.zero_share import INTERVAL

predicted_plan = pytest.importorskip("geko_kernels.kernels.one_pass.plan", exc_type=ImportError)
CUDA = torch.device("cuda", 0)
REASON = hopper.missing(CUDA) if torch.cuda.is_available() else "needs a CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"{REASON}")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a row in: one block of half a multiprocessor; an odd one; two blocks; eight
VOCABS = (2000, 50257, 128256, 600_000)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(predicted_plan, "SMALLEST", 0)
    monkeypatch.setattr(predicted_plan, "SMALLEST_ROW", 0)
    monkeypatch.setattr(ops, "_override", "")


def batch(rows, length, vocab, dtype, kind="plain"):
    logits = torch.randn(rows, length, vocab, device="cuda", dtype=dtype)
    labels = torch.randint(0, vocab, (rows, length), device="cuda")
    logits[: rows // 2].scatter_add_(2, labels[: rows // 2, :, None], logits.new_full((rows // 2, length, 1), 20.0))
    labels[:, ::7] = -100
    if kind == "far":
        logits += 10000 if dtype == torch.float32 else 200
    if kind == "padded":
        logits[..., -vocab // 4 :] = -torch.inf
        labels = torch.where(labels >= 0, labels % (vocab // 2), labels)
    return logits, labels


def truth(logits, labels, coeff, upstream):
    """The gradient in float64 and how far off it is once rounded."""
    z = logits.double().requires_grad_()
    each = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none")
    (grad,) = torch.autograd.grad((each * coeff).sum() * upstream, z)
    return grad


def coefficients(stats, labels):
    per_token = stats.weight / stats.num_tokens.clamp(min=1) / (stats.num_tokens > 0).sum()
    return per_token.double().repeat_interleave(labels.shape[1])


def error(grad, want):
    return float((grad.double() - want).norm() / want.norm())


def limit(want, dtype):
    """Twice what rounding the true gradient costs."""
    return 2 * error(want.to(dtype), want) + 2e-6


@pytest.mark.parametrize("bucket", ["right", "zero", "one", "random"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_gradients_equal_float64_whatever_was_predicted(vocab, dtype, inplace, bucket):
    if vocab == VOCABS[-1] and dtype == torch.float32:
        vocab //= 2
    logits, labels = batch(6, 9, vocab, dtype)
    state = gk.SampleState(8, device="cuda")
    ids = torch.tensor([5, 1, 7, 0, 2, 3], device="cuda")
    for step, upstream in enumerate((1.0, 3.0, 3.0, 2.0**-4)):
        if bucket != "right":
            state.bucket.copy_(
                {"zero": torch.zeros(8), "one": torch.full((8,), 3), "random": torch.arange(8) % 4}[bucket]
            )
        leaf = logits.clone().requires_grad_()
        used = leaf * 1
        before = state.predictions.clone()
        loss, stats = gk.weighted_loss(used, labels, ids, state, return_stats=True, inplace=inplace)
        (loss * upstream).backward()
        want = truth(logits, labels, coefficients(stats, labels), upstream)
        assert error(leaf.grad, want) <= limit(want, dtype)
        hits, misses = (state.predictions - before).tolist()
        if inplace and dtype == torch.float16:
            assert (hits, misses) == (0, 0)
        else:
            assert hits + misses > 0
            if bucket == "right" and step == 2:
                assert misses == 0


@pytest.mark.parametrize("kind", ["far", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_equal_the_triton_path(monkeypatch, dtype, kind):
    logits, labels = batch(6, 9, 50257, dtype, kind)
    ids = torch.arange(6, device="cuda")
    results = []
    for override in ("", "triton"):
        monkeypatch.setattr(ops, "_override", override)
        state = gk.SampleState(8, device="cuda")
        leaf = logits.clone().requires_grad_()
        loss, stats = gk.weighted_loss(leaf, labels, ids, state, return_stats=True)
        loss.backward()
        results.append((loss.detach(), *stats, leaf.grad))
        assert bool(state.predictions.any()) == (override == "")
    for ours, theirs in zip(*results, strict=True):
        rtol = 2e-2 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("form", ["none", "rows", "packed"])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
@pytest.mark.parametrize("shift", [False, True])
def test_every_form_equals_the_triton_path(monkeypatch, form, reduction, shift):
    logits, labels = batch(4, 300, 5003, torch.bfloat16)
    ids = {"none": None, "rows": torch.arange(4, device="cuda")}.get(form)
    if form == "packed":
        ids = (torch.arange(300, device="cuda") // 37).repeat(4, 1) + 9 * torch.arange(4, device="cuda")[:, None]
        ids[:, -20:] = -1
    results = []
    for override in ("", "triton"):
        monkeypatch.setattr(ops, "_override", override)
        state = None if ids is None else gk.SampleState(40, device="cuda")
        for _ in range(2):
            leaf = logits.clone().requires_grad_()
            items = 7.0 if reduction == "token_mean" else None
            loss = gk.weighted_loss(leaf, labels, ids, state, reduction=reduction, shift=shift, num_items=items)
            loss.backward()
        results.append((loss.detach(), leaf.grad))
        if state is not None and override == "":
            assert state.predictions[0] > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if ours.dim() else 1e-5, atol=1e-7)


def test_a_step_never_waits_and_a_captured_one_replays():
    logits, labels = batch(8, 64, 32000, torch.bfloat16)
    ids, state = torch.arange(8, device="cuda"), gk.SampleState(8, device="cuda")
    leaf = logits.clone().requires_grad_()

    def run():
        leaf.grad = None
        loss = gk.weighted_loss(leaf, labels, ids, state)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    grad, before = leaf.grad, state.predictions.clone()
    fresh, _ = batch(8, 64, 32000, torch.bfloat16)
    leaf.data.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert (state.predictions - before).sum() > 0
    other = gk.SampleState(8, device="cuda")
    other.load_state_dict(state.state_dict())
    leaf.grad = None
    want = gk.weighted_loss(leaf, labels, ids, other)
    want.backward()
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grad, leaf.grad, rtol=2e-2, atol=1e-7)


def test_nan_and_infinite_logits_show_as_on_the_triton_path(monkeypatch):
    logits, labels = batch(4, 8, 9000, torch.float32)
    labels[:] = 5
    logits[0, 0, 17], logits[1, 1, 8999], logits[2, 2] = torch.nan, torch.inf, -torch.inf
    results = []
    for override in ("", "triton"):
        monkeypatch.setattr(ops, "_override", override)
        leaf = logits.clone().requires_grad_()
        loss, stats = gk.weighted_loss(leaf, labels, None, None, return_stats=True, reduction="sum")
        loss.backward()
        results.append((loss.detach(), stats.loss, leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-7)


def test_a_second_backward_computes_anew():
    logits, labels = batch(2, 40, 9000, torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    loss = gk.weighted_loss(leaf, labels)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second, rtol=2e-2, atol=1e-8)


def rows_of(logits, target, coeff, most):
    """Gradient, statistics and factors by `hopper.RowsLaunch`, at most `most` rows a launch."""
    rows, vocab = logits.shape
    grad, one, outputs = torch.full_like(logits, 7.0), torch.ones(1, device="cuda"), []
    for first in range(0, rows, most):
        count = min(most, rows - first)
        inputs = (each[first : first + count] for each in (logits, grad, target, coeff))
        launch = hopper.RowsLaunch(CUDA, logits.dtype, (1, count, vocab), (0, vocab), (0, vocab), 0)
        outputs.append((torch.empty(5, count, device="cuda"), torch.empty(count, device="cuda")))
        launch(*inputs, None, None, one, *outputs[-1])
    return grad, *(torch.cat(parts, -1) for parts in zip(*outputs, strict=True))


@pytest.mark.parametrize(("rows", "vocab"), [(5280, 20000), (2640, 50257), (1320, 128256), (330, 600_000)])
def test_a_row_does_not_see_what_its_slots_held_before(rows, vocab):
    # some twenty rows a cluster, against one launch a row, in which no slot of the ring and no sum is used twice
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    logits *= torch.linspace(0.1, 4, rows, device="cuda", dtype=torch.bfloat16)[:, None]
    target = torch.randint(0, vocab, (rows,), device="cuda", dtype=torch.int32)
    target[::10] = -1
    coeff = torch.tensor([0.0, 0.5, 2.0], device="cuda")[torch.randint(0, 3, (rows,), device="cuda")]
    coeff[::10] = 0
    want = rows_of(logits, target, coeff, 1)
    for _ in range(20):
        for ours, theirs in zip(rows_of(logits, target, coeff, rows), want, strict=True):
            assert torch.equal(ours, theirs)


@pytest.fixture
def one_passes(monkeypatch):
    """Grows by one for each call that takes the one-pass path."""
    seen, launch = [], hopper.RowsLaunch.__call__
    monkeypatch.setattr(hopper.RowsLaunch, "__call__", lambda *args: (seen.append(None), launch(*args))[1])
    return seen


def learnt_batch(share, seed, vocab=9000):
    """Of the 20 samples of a batch, `share` are learnt and weigh 0 by `weighing`; the others weigh 1."""
    random = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(20, 8, vocab, device="cuda", dtype=torch.bfloat16, generator=random)
    labels = torch.randint(0, vocab, (20, 8), device="cuda", generator=random)
    learnt = round(20 * share)
    logits[:learnt].scatter_(2, labels[:learnt, :, None], 30.0)
    labels[:, ::4] = -100
    return logits, labels


def weighing():
    return gk.SampleState(20, gk.GEKOConfig(bucket_weights=(1, 1, 0)), device="cuda")


def run_of(share, calls, state, one_passes, check=False):
    """For each call: whether it took one pass; its loss, and a checksum of its gradient's bits."""
    ids, paths, bits = torch.arange(20, device="cuda"), [], []
    for call in range(calls):
        logits, labels = learnt_batch(share, call)
        leaf, before = logits.clone().requires_grad_(), len(one_passes)
        loss, stats = gk.weighted_loss(leaf, labels, ids, state, return_stats=True)
        loss.backward()
        paths.append(len(one_passes) > before)
        bits.append((loss.detach().view(torch.int32).long(), leaf.grad.view(torch.int16).long().sum()))
        if check:
            want = truth(logits, labels, coefficients(stats, labels), 1.0)
            assert error(leaf.grad, want) <= limit(want, torch.bfloat16)
    return paths, bits


def test_the_path_follows_the_zero_share_there_and_back(one_passes):
    runs = []
    for check in (True, False):
        state, paths, bits = weighing(), [], []
        for share in (0.0, 0.9, 0.0):
            more = run_of(share, 5 * INTERVAL, state, one_passes, check)
            paths, bits = paths + more[0], bits + more[1]
        runs.append((paths, torch.tensor(bits)))
    paths = runs[0][0]
    late = slice(4 * INTERVAL, 5 * INTERVAL)
    kinds = [set(paths[part * 5 * INTERVAL :][late]) for part in range(3)]
    assert kinds == [{True}, {False}, {True}]
    assert sum(now != after for now, after in zip(paths, paths[1:], strict=False)) == 2
    assert runs[1][0] == paths and runs[1][1].equal(runs[0][1])


def test_a_resumed_state_goes_on_with_the_same_bits(one_passes, tmp_path):
    state = weighing()
    run_of(0.9, INTERVAL + 7, state, one_passes)
    state.save(tmp_path / "state.safetensors")
    resumed = gk.SampleState.load(tmp_path / "state.safetensors", "cuda")
    runs = []
    for each in (state, resumed):
        paths, bits = zip(*(run_of(share, 3 * INTERVAL, each, one_passes) for share in (0.9, 0.0)), strict=True)
        runs.append((paths, torch.tensor(bits)))
    assert runs[0][0] == runs[1][0] and runs[0][1].equal(runs[1][1])
    assert {path for part in runs[0][0] for path in part} == {True, False}


def test_a_look_never_stops_the_host_of_a_step(one_passes):
    logits, labels = learnt_batch(0.9, 0)
    ids, state, leaf = torch.arange(20, device="cuda"), weighing(), logits.requires_grad_()

    def run():
        leaf.grad = None
        gk.weighted_loss(leaf, labels, ids, state).backward()

    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3 * INTERVAL):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(one_passes) == INTERVAL


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_captured_step_keeps_the_path(one_passes, share):
    logits, labels = learnt_batch(share, 0)
    ids, state, leaf = torch.arange(20, device="cuda"), weighing(), logits.clone().requires_grad_()

    def run():
        leaf.grad = None
        loss = gk.weighted_loss(leaf, labels, ids, state)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2 * INTERVAL):  # the next call is due
            want = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph, before, values = torch.cuda.CUDAGraph(), len(one_passes), state.zero_share.values()
    want_grad = leaf.grad.clone()
    with torch.cuda.graph(graph):
        loss = run()
    grad = leaf.grad
    for _ in range(3):
        graph.replay()
    assert (len(one_passes) > before) == (share == 0.0) and state.zero_share.values() == values
    assert loss.equal(want) and grad.equal(want_grad)
