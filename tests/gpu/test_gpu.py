"""The Triton kernels compiled, at real sizes; skipped without a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import geko_kernels as gk
from geko_kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch(rows, length, vocab, dtype=torch.bfloat16, right=0.5, seed=0):
    """Logits whose target leads in a share `right` of the rows, so that all buckets occur; a tenth ignored."""
    random = torch.Generator("cuda").manual_seed(seed)
    labels = torch.randint(0, vocab, (rows, length), device="cuda", generator=random)
    logits = torch.randn(rows, length, vocab, device="cuda", generator=random, dtype=dtype)
    bonus = 20.0 * (torch.rand(rows, 1, 1, device="cuda", generator=random) < right)
    logits.scatter_add_(2, labels[..., None], bonus.to(dtype).expand(rows, length, 1))
    ignored = torch.rand(rows, length, device="cuda", generator=random) < 0.1
    return logits, torch.where(ignored, -100, labels)


def packed_ids(rows, length, num_samples):
    random = torch.Generator("cuda").manual_seed(1)
    starts = torch.rand(rows, length, device="cuda", generator=random) < 8 / length
    starts[:, 0] = True
    order = starts.flatten().cumsum(0).view(rows, length)
    ids = torch.randperm(num_samples, device="cuda", generator=random)[order % num_samples]
    ids[:, -length // 50 :] = -1
    return ids


def step(logits, labels, ids, state, **options):
    logits = logits.detach().requires_grad_()
    loss, stats = gk.weighted_loss(logits, labels, ids, state, return_stats=True, **options)
    (loss * torch.linspace(0.5, 2, loss.numel(), device=loss.device).view(loss.shape)).sum().backward()
    return loss.detach(), stats, logits.grad


def assert_as_reference(monkeypatch, logits, labels, ids, num_samples, **options):
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setattr(ops, "_override", backend)
        state = gk.SampleState(num_samples, device="cuda") if num_samples else None
        for _ in range(2 if num_samples else 1):  # twice, so that the old row matters
            out = step(logits, labels, ids, state, **options)
        results.append((*out, state))
    (loss, stats, grad, state), (want_loss, want_stats, want_grad, want_state) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6)
    for name, ours, theirs in zip(stats._fields, stats, want_stats, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    eps = torch.finfo(logits.dtype).eps
    smallest = torch.finfo(logits.dtype).smallest_normal * eps  # one step of fp16 near zero
    torch.testing.assert_close(grad, want_grad, rtol=2 * eps if eps > 1e-5 else 1e-4, atol=max(1e-8, smallest))
    if num_samples:
        for name, column in want_state.state_dict().items():
            torch.testing.assert_close(getattr(state, name), column, rtol=1e-4, atol=1e-5)
        assert not state.claim.any()


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("form", ["row", "packed"])
@pytest.mark.parametrize("vocab", [50257, 128256])
def test_real_vocabularies_equal_the_reference(monkeypatch, vocab, form, reduction):
    logits, labels = batch(8, 128, vocab)
    ids = torch.randperm(20, device="cuda")[:8] if form == "row" else packed_ids(8, 128, 200)
    assert_as_reference(monkeypatch, logits, labels, ids, 200, reduction=reduction, shift=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocab", [2, 1000, 1025, 32000, 50257])
def test_dtypes_and_softcap_equal_the_reference(monkeypatch, vocab, softcap, dtype):
    logits, labels = batch(16, 33, vocab, dtype)
    assert_as_reference(monkeypatch, logits, labels, torch.arange(16, device="cuda"), 16, softcap=softcap)


@pytest.mark.parametrize("how", ["padded", "sliced", "transposed", "expanded"])
def test_strides_equal_the_reference(monkeypatch, how):
    logits, labels = batch(4, 20, 5003)
    if how == "padded":
        logits = F.pad(logits, (0, 3))[..., :5003]
    elif how == "sliced":
        logits, labels = logits[:, 1:], labels[:, 1:]
    elif how == "transposed":
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        logits = logits[:, :1].expand(4, 20, 5003)
    assert_as_reference(monkeypatch, logits, labels, torch.arange(4, device="cuda"), 4)


def test_more_than_2_31_logits():
    rows, vocab = 17000, 128256  # 2.18e9 elements, 4.4 GB
    logits = torch.randn(rows, 1, vocab, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (rows, 1), device="cuda")
    loss, _, grad = step(logits, labels, None, None, reduction="token_mean")
    sample = torch.cat([torch.arange(3), torch.arange(rows - 3, rows)]).cuda()
    few = logits[sample, 0].double().requires_grad_()
    exact = F.cross_entropy(few, labels[sample, 0], reduction="none")
    (0.5 * exact / rows).sum().backward()  # `step` has an upstream gradient of 0.5
    by_rows = gk.weighted_loss(logits[sample], labels[sample], reduction="none")
    torch.testing.assert_close(by_rows.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[sample, 0].double(), few.grad, rtol=1e-2, atol=1e-12)
    assert loss.isfinite() and abs(float(loss) - 12.26) < 0.05  # log V + 1/2


@pytest.mark.parametrize("form", ["row", "packed"])
def test_runs_are_bit_identical(form):
    logits, labels = batch(64, 256, 8192)
    ids = torch.arange(64, device="cuda") % 50 if form == "row" else packed_ids(64, 256, 50)
    first = None
    for _ in range(5):
        state = gk.SampleState(50, device="cuda")
        loss, stats, grad = step(logits, labels, ids, state, reduction="token_mean")
        result = (loss, *stats, grad, *state.state_dict().values())
        first = first or result
        assert all(a.equal(b) for a, b in zip(result, first, strict=True))


def test_a_step_never_waits_for_the_device():
    logits, labels = batch(4, 64, 32000)
    ids, state = torch.arange(4, device="cuda"), gk.SampleState(4, device="cuda")
    step(logits, labels, ids, state)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "token_mean", "sum", "none"):
            step(logits, labels, ids, state, reduction=reduction)
            weights = {"token_weights": torch.ones_like(labels, dtype=torch.float32), "sample_weights": ids.float()}
            step(logits, labels, ids, state, reduction=reduction, **weights)
        state.bucket_weights = (5, 2, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("form", ["row", "packed"])
def test_a_captured_step_replays_as_eager(form, weighted):
    logits, labels = batch(8, 64, 32000)
    ids = torch.arange(8, device="cuda") if form == "row" else packed_ids(8, 64, 100)
    by_token = torch.rand(8, 64, device="cuda")
    by_sample = by_token[:, 0].clone() if form == "row" else by_token + 1
    weights = {"token_weights": by_token, "sample_weights": by_sample} if weighted else {}
    eager, captured = gk.SampleState(100, device="cuda"), gk.SampleState(100, device="cuda")
    leaf = logits.clone().requires_grad_()

    def run(state):
        leaf.grad = None
        loss = gk.weighted_loss(leaf, labels, ids, state, **weights)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run(captured)
    grad = leaf.grad
    captured.load_state_dict(gk.SampleState(100, device="cuda").state_dict())
    for seed in (1, 2, 3):
        fresh, _ = batch(8, 64, 32000, seed=seed)
        leaf.data.copy_(fresh)
        graph.replay()
        replayed, replayed_grad = loss.clone(), grad.clone()
        assert replayed.equal(run(eager)) and replayed_grad.equal(leaf.grad)
        assert all(a.equal(b) for a, b in zip(captured.state_dict().values(), eager.state_dict().values(), strict=True))


def test_a_compiled_step_equals_eager():
    logits, labels = batch(4, 64, 50257)
    ids = torch.arange(4, device="cuda")
    eager, compiled = gk.SampleState(4, device="cuda"), gk.SampleState(4, device="cuda")
    compiled_loss = torch.compile(gk.weighted_loss, fullgraph=True)
    for _ in range(2):
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        one, two = gk.weighted_loss(a, labels, ids, eager), compiled_loss(b, labels, ids, compiled)
        one.backward()
        two.backward()
        assert one.equal(two) and a.grad.equal(b.grad)
    assert all(x.equal(y) for x, y in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_loss_scale(dtype):
    head = torch.nn.Linear(64, 1000, device="cuda")
    hidden = torch.randn(4, 16, 64, device="cuda")
    labels = torch.randint(0, 1000, (4, 16), device="cuda")
    grads = []
    for scale in (1.0, 2.0**16):
        head.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = gk.weighted_loss(head(hidden), labels)
        assert loss.dtype == torch.float32
        (loss * scale).backward()
        grads.append(head.weight.grad.double() / scale)
    torch.testing.assert_close(grads[0], grads[1], rtol=0.05, atol=1e-3)
    want = torch.autograd.grad(
        F.cross_entropy(F.linear(hidden, head.weight, head.bias).flatten(0, 1), labels.flatten()), head.weight
    )[0]
    torch.testing.assert_close(grads[1], want.double(), rtol=0.05, atol=2e-3)


def kernels_launched(work):
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("form", ["none", "row", "packed"])
def test_two_launches_forward_one_backward(form, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # poisoning launches fills
    logits, labels = batch(4, 64, 32000)
    ids = {"none": None, "row": torch.arange(4, device="cuda"), "packed": packed_ids(4, 64, 90)}[form]
    state = None if ids is None else gk.SampleState(90, device="cuda")
    leaf = logits.requires_grad_()
    assert len(kernels_launched(lambda: gk.weighted_loss(leaf, labels, ids, state))) <= 2
    loss, one = gk.weighted_loss(leaf, labels, ids, state), torch.ones((), device="cuda")
    backward = kernels_launched(lambda: torch.autograd.grad(loss, leaf, one, retain_graph=True))
    assert len(backward) == 1, backward


def test_checkpointing_counts_a_visit_once():
    head = torch.nn.Linear(32, 1000, device="cuda")
    hidden = torch.randn(4, 8, 32, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1000, (4, 8), device="cuda")
    ids, state = torch.arange(4, device="cuda"), gk.SampleState(4, device="cuda")
    checkpoint(lambda x: gk.weighted_loss(head(x), labels, ids, state), hidden, use_reentrant=False).backward()
    assert state.times_seen.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("inplace", [False, True])
def test_memory_beyond_one_gradient_is_negligible(inplace):
    base, labels = batch(4, 1024, 50257)
    base.requires_grad_()
    logits = base * 1
    size = logits.numel() * logits.element_size()
    state = gk.SampleState(4, device="cuda")
    ids = torch.arange(4, device="cuda")
    one = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = gk.weighted_loss(logits, labels, ids, state, inplace=inplace)
    grad = torch.autograd.grad(loss, logits, one)[0]
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (0 if inplace else size) + size / 1000
    assert (grad.data_ptr() == logits.data_ptr()) == inplace


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_logits_device_need_not_be_current():
    logits, labels = batch(2, 8, 2000)
    want = step(logits, labels, None, None)
    with torch.cuda.device(1):
        assert step(logits, labels, None, None)[0].equal(want[0])


def test_bad_values_are_flagged_and_left_out():
    logits, labels = batch(4, 8, 2000)
    labels[1, 3] = 2000
    state = gk.SampleState(4, device="cuda")
    loss, stats, grad = step(logits, labels, torch.tensor([0, 1, 7, 2], device="cuda"), state)
    assert loss.isfinite() and stats.num_tokens.tolist()[1:3] == [0, 0] and not grad[1:3].any()
    assert state.times_seen.tolist() == [1, 0, 1, 0]
    with pytest.raises(IndexError, match=r"labels: 2000 \(token 11"):
        state.check()
