"""`weighted_linear_loss` against `weighted_loss` of all the logits: values, gradients, statistics, state."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases
from comparing import assert_close_stats, assert_same_state
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels.losses import linear_call, linear_chunks
from geko_kernels.losses.linear_head import Budget
from geko_kernels.reference import rows as reference_rows

SMALL = 3  # rows of the buffer: most visits of the random cases then cross several fills


@pytest.fixture
def few_rows(monkeypatch):
    """A buffer of few rows, and kept shares that change which kernels run."""
    monkeypatch.setattr(linear_chunks, "AHEAD", 100)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 1)
    monkeypatch.setattr(linear_chunks, "FUSED_SHARE", 0.5)
    monkeypatch.setattr(Budget, "rows", lambda self, scored: min(SMALL, scored))
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)


def make_head(case: Case, dtype: torch.dtype, device: str, with_bias: bool):
    """hidden (B, S, V) and weight (V, V) whose logits are about those of the case; bias (V,) or None."""
    vocab = case.logits.shape[-1]
    random = torch.Generator().manual_seed(vocab)
    values = case.logits.nan_to_num(neginf=case.logits.max().item() - 50)
    hidden = (values - values.median()).to(device, dtype)  # a common offset would cost a GEMM its precision
    weight = torch.eye(vocab) + 0.1 * torch.randn(vocab, vocab, generator=random)
    bias = torch.randn(vocab, generator=random).to(device, dtype) if with_bias else None
    return hidden, weight.to(device, dtype), bias


def run(case: Case, device: str, fused: bool, dtype=torch.float64, with_bias=True, chunk_mib=None):
    """loss, statistics, gradients and state of one call and its backward; `fused` is the linear path."""
    hidden, weight, bias = make_head(case, dtype, device, with_bias)
    inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    bias = inputs[2] if with_bias else None
    labels = case.labels.to(device)
    ids = None if case.sample_ids is None else case.sample_ids.to(device)
    state = case.new_state(device)
    options = {**case.options, "return_stats": True}
    if fused:
        head = {"bias": bias, "chunk_mib": chunk_mib}
        loss, stats = gk.weighted_linear_loss(*inputs[:2], labels, ids, state, **head, **options)
    else:
        loss, stats = gk.weighted_loss(F.linear(*inputs[:2], bias), labels, ids, state, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), device=device).view(loss.shape) if loss.dim() else 1.0
    grads = torch.autograd.grad((loss * upstream * case.upstream).sum(), inputs)
    return loss.detach().cpu(), gk.SampleStats(*(x.cpu() for x in stats)), [grad.cpu() for grad in grads], state


@given(case=cases(dtypes=(torch.float32,)), with_bias=st.booleans())
def test_a_call_equals_the_loss_of_all_logits(reference, few_rows, case, with_bias):
    loss, stats, grads, state = run(case, "cpu", True, with_bias=with_bias)
    want_loss, want_stats, want_grads, want_state = run(case, "cpu", False, with_bias=with_bias)
    torch.testing.assert_close(loss, want_loss, rtol=1e-9, atol=1e-9)
    for grad, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-9 * abs(case.upstream))
    assert_close_stats(stats, want_stats)
    assert_same_state(state, want_state)


@given(case=cases(dtypes=(torch.float32,)))
def test_every_backend_in_float32(backend, device, few_rows, case):
    loss, stats, grads, state = run(case, device, True, torch.float32)
    want_loss, want_stats, want_grads, want_state = run(case, device, False, torch.float32)
    torch.testing.assert_close(loss, want_loss, rtol=1e-4, atol=1e-4)
    for grad, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4 * max(1, want.abs().max().item()))
    for ours, want in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4)
    assert state is None or state.times_seen.equal(want_state.times_seen)


def batch(device="cpu", rows=4, length=16, columns=24, vocab=50, dtype=torch.float32, learnt=()):
    """hidden, weight, labels, ids; samples in `learnt` have the label with the largest logit, and by far."""
    hidden = torch.randn(rows, length, columns, device=device)
    weight = torch.randn(vocab, columns, device=device)
    labels = torch.randint(vocab, (rows, length), device=device)
    for row in learnt:
        hidden[row] = 3 * weight[labels[row]]
    return hidden.to(dtype), weight.to(dtype), labels, torch.arange(rows, device=device)


def peer_and_ours(hidden, weight, labels, ids, config=None, **options):
    """(loss, dX, dW) of the logits path in float64 and in the dtype of hidden, and of the linear path."""
    for cast, linear in ((torch.float64, False), (hidden.dtype, False), (hidden.dtype, True)):
        state = gk.SampleState(len(hidden), config, device=hidden.device)
        inputs = [tensor.detach().to(cast).requires_grad_() for tensor in (hidden, weight)]
        if linear:
            loss = gk.weighted_linear_loss(*inputs, labels, ids, state, **options)
        else:
            loss = gk.weighted_loss(F.linear(*inputs), labels, ids, state)
        yield loss.detach(), *torch.autograd.grad(loss * 3, inputs)


@pytest.mark.parametrize("rows_held", [5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_within_twice_pytorchs_own_error(backend, device, monkeypatch, dtype, rows_held):
    monkeypatch.setattr(Budget, "rows", lambda *_: rows_held)
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)
    exact, peer, ours = peer_and_ours(*batch(device, dtype=dtype, learnt=[2]))
    for want, theirs, mine in zip(exact, peer, ours, strict=True):
        scale = want.abs().max()
        theirs_off, mine_off = (((x.double() - want).norm() / want.norm()).item() for x in (theirs, mine))
        assert mine_off <= 2 * theirs_off + 1e-6, (scale, theirs_off, mine_off)


def count_rows(monkeypatch):
    """Record the rows of every GEMM: {"logits": [...], "gradients": [...]}."""
    seen: dict[str, list[int]] = {"logits": [], "gradients": []}
    logits, add = linear_chunks.Head.logits, linear_chunks.HeadGradients.add
    monkeypatch.setattr(
        *(linear_chunks.Head, "logits"),
        lambda self, rows, out: (seen["logits"].append(len(out)), logits(self, rows, out))[1],
    )
    monkeypatch.setattr(
        *(linear_chunks.HeadGradients, "add"),
        lambda self, tile, *rest: (seen["gradients"].append(len(tile)), add(self, tile, *rest))[1],
    )
    products = linear_call.products
    monkeypatch.setattr(
        *(linear_call, "products"),
        lambda tile, *rest: (seen["gradients"].append(len(tile)), products(tile, *rest))[1],
    )
    return seen


def test_only_rows_that_learn_are_paid_for(reference, monkeypatch):
    seen = count_rows(monkeypatch)
    hidden, weight, labels, ids = batch(learnt=[0, 3])
    labels[1, 4:] = -100
    state = gk.SampleState(4)
    gk.weighted_linear_loss(hidden.requires_grad_(), weight.requires_grad_(), labels, ids, state).backward()
    assert sum(seen["gradients"]) == 16 + 4, "samples 0 and 3 have weight 0, 12 tokens of sample 1 no label"
    assert state.bucket.tolist()[0] == gk.Bucket.FREEZE


def test_tokens_without_a_label_are_not_scored(reference, monkeypatch):
    monkeypatch.setattr(linear_chunks, "SAMPLE", 1)
    seen = count_rows(monkeypatch)
    hidden, weight, labels, ids = batch()
    labels[:, 4:] = -100
    gk.weighted_linear_loss(hidden, weight, labels, ids, gk.SampleState(4), update=False)
    assert sum(seen["logits"]) == 16


def test_kept_rows_of_several_fills_share_a_gradient_gemm(reference, monkeypatch):
    monkeypatch.setattr(Budget, "rows", lambda *_: 32)
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)
    monkeypatch.setattr(linear_chunks, "AHEAD", 0)
    monkeypatch.setattr(linear_chunks, "SAMPLE", 4)
    seen = count_rows(monkeypatch)
    hidden, weight, labels, ids = batch(rows=8, learnt=[0, 1, 2, 4, 5, 6])
    hidden.requires_grad_()
    gk.weighted_linear_loss(hidden, weight, labels, ids, gk.SampleState(8)).backward()
    assert seen["gradients"] == [32], "samples 3 and 7 in one"


def test_a_weight_that_was_not_foreseen_is_put_right(reference, monkeypatch):
    monkeypatch.setattr(Budget, "rows", lambda *_: 8)
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)
    hidden, weight, labels, ids = batch(rows=2, dtype=torch.float64, learnt=[0])
    hidden[0, 12:] = -hidden[0, 12:]  # looks learnt, until its last tokens
    hidden[1, 4:] = 3 * weight[labels[1, 4:]]  # looks wrong at first
    exact, _, ours = peer_and_ours(hidden, weight, labels, ids, gk.GEKOConfig(correct_loss=60.0))
    for want, mine in zip(exact, ours, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(backend, device, frozen, monkeypatch):
    hidden, weight, labels, ids = batch(device)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    seen = count_rows(monkeypatch)
    state = gk.SampleState(4, device=device)
    loss = gk.weighted_linear_loss(hidden, weight, labels, ids, state)
    assert loss.requires_grad == (frozen != "both") and bool(seen["gradients"]) == (frozen != "both")
    assert state.times_seen.tolist() == [1] * 4
    if frozen != "both":
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_no_grad_scores_only(backend, device):
    hidden, weight, labels, ids = batch(device)
    state = gk.SampleState(4, device=device)
    with torch.no_grad():
        loss, stats = gk.weighted_linear_loss(
            hidden.requires_grad_(), weight, labels, ids, state, return_stats=True, chunk_mib=0.001
        )
    want = gk.weighted_loss(F.linear(hidden, weight), labels, ids, state, update=False)
    torch.testing.assert_close(loss, want.detach())
    assert not loss.requires_grad and not stats.loss.requires_grad and state.times_seen.sum() == 0


def test_two_dimensions_and_expanded_inputs(backend, device):
    hidden, weight, labels, ids = batch(device)
    flat = hidden[:, 0].clone().requires_grad_()
    loss = gk.weighted_linear_loss(flat, weight, labels[:, 0], ids, gk.SampleState(4, device=device))
    want = gk.weighted_loss(F.linear(flat, weight), labels[:, 0], ids, gk.SampleState(4, device=device))
    torch.testing.assert_close(loss, want)
    same = hidden[:1].expand(4, -1, -1)
    loss = gk.weighted_linear_loss(same, weight.t().contiguous().t(), labels, ids, gk.SampleState(4, device=device))
    want = gk.weighted_loss(F.linear(same, weight), labels, ids, gk.SampleState(4, device=device))
    torch.testing.assert_close(loss, want)


def test_bad_values_raise_on_the_cpu_before_anything_is_counted(reference):
    hidden, weight, labels, ids = batch()
    state = gk.SampleState(4)
    labels[1, 2] = 50
    with pytest.raises(IndexError, match="labels: 50"):
        gk.weighted_linear_loss(hidden, weight, labels, ids, state)
    labels[1, 2] = 0
    with pytest.raises(IndexError, match="sample_ids: 4"):
        gk.weighted_linear_loss(hidden, weight, labels, ids + 1, state)
    assert state.times_seen.sum() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": None}, TypeError, "hidden must be a torch.Tensor"),
        ({"hidden": torch.zeros(4, 16, 24, dtype=torch.int64)}, TypeError, "hidden must be float32"),
        ({"weight": torch.zeros(50, 23)}, ValueError, r"weight must be \(V, 24\)"),
        (
            {"weight": torch.zeros(50, 24, dtype=torch.bfloat16)},
            TypeError,
            r"weight must be torch.float32 like hidden, got torch.bfloat16: pass weight.to\(hidden.dtype\), or "
            r'run under torch.autocast\("cpu"\)$',
        ),
        (
            {"hidden": torch.zeros(4, 16, 24, dtype=torch.float64)},
            TypeError,
            r"weight must be torch.float64 like hidden, got torch.float32: pass weight.to\(hidden.dtype\)$",
        ),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor"),
        ({"weight": torch.nn.Linear(24, 50)}, TypeError, "got Linear; pass its weight, and its bias as bias"),
        ({"bias": torch.zeros(49)}, ValueError, r"bias must be \(50,\)"),
        ({"bias": torch.zeros(50, dtype=torch.int64)}, TypeError, "bias must be of a floating-point dtype"),
        ({"labels": torch.zeros(4, 15, dtype=torch.int64)}, ValueError, "labels must be"),
        ({"chunk_mib": 0}, ValueError, "chunk_mib must be above 0"),
        ({"chunk_mib": "1"}, TypeError, "chunk_mib must be a number"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
        ({"num_items": 0}, ValueError, "num_items must be"),
        ({"shift": 2}, TypeError, "shift must be True or False, got 2"),
        ({"update": "no"}, TypeError, "update must be None, True or False, got 'no'"),
        ({"return_stats": None}, TypeError, "return_stats must be True or False, got None"),
        ({"weight": torch.zeros(50, 24).to_sparse()}, TypeError, "weight must be a dense tensor, got one of layout"),
        ({"weight": torch.zeros(50, 24).to_mkldnn()}, TypeError, "weight must be a dense tensor, got one of layout"),
        ({"bias": torch.zeros(50).to_sparse()}, TypeError, "bias must be a dense tensor, got one of layout"),
        ({"chunk_mib": float("nan")}, ValueError, "chunk_mib must be above 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    hidden, weight, labels, ids = batch()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "sample_ids": ids, "state": gk.SampleState(4)}
    with pytest.raises(error, match=message):
        gk.weighted_linear_loss(**{**arguments, **change})


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    logp = logits.log_softmax(-1)
    return -torch.where(logp == -torch.inf, 0, logp.exp() * logp).sum(-1)


@given(case=cases(dtypes=(torch.float32,)))
def test_the_entropy_of_each_token(backend, device, few_rows, case):
    """Of the tokens that predict something; it changes neither loss nor gradients nor state."""
    hidden, weight, bias = make_head(case, torch.float32, device, True)
    labels, ids = case.labels.to(device), None if case.sample_ids is None else case.sample_ids.to(device)
    results = []
    for asked in ({}, {"return_entropy": True}):
        state, x = case.new_state(device), hidden.detach().requires_grad_()
        options = {"bias": bias, **case.options, "return_stats": True, **asked}
        loss, stats, *entropy = gk.weighted_linear_loss(x, weight, labels, ids, state, **options)
        results.append((loss.detach(), *stats, *torch.autograd.grad(loss.sum(), x)))
    for plain, more in zip(*results, strict=True):
        torch.testing.assert_close(more, plain, rtol=0, atol=0, equal_nan=True)
    logits, cap = F.linear(hidden, weight, bias), case.options.get("softcap")
    want = entropy_of(cap * (logits / cap).tanh() if cap else logits)
    found = entropy[0]
    assert found.shape == labels.shape and found.dtype == torch.float32 and not found.requires_grad
    predicts = torch.zeros(labels.numel(), dtype=torch.bool)
    rows, _, visits = reference_rows.scored_rows(
        labels if labels.dim() == 2 else labels[:, None],
        *(ids, logits.shape[-1], case.options["ignore_index"], case.options["shift"]),
    )
    predicts[rows[: int(visits[0])].cpu()] = True
    predicts = predicts.view(labels.shape).to(device)
    want = want.view(labels.shape)
    torch.testing.assert_close(found, torch.where(predicts, want, 0), rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("chunk_mib", [None, 0.1])
def test_entropy_of_a_large_vocabulary(chunk_mib):
    """As TRL's `entropy_from_logits`, in one buffer and in several, with gradients and without; confident rows too."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(2, 40, 16), torch.randn(5000, 16), torch.randint(5000, (2, 40))
    hidden[0, :8] *= 8
    labels[1, 30:] = -100
    want = entropy_of(hidden @ weight.t()).masked_fill(labels.roll(-1, 1) == -100, 0)
    want[:, -1] = 0
    for grad in (False, True):
        loss, entropy = gk.weighted_linear_loss(
            hidden.clone().requires_grad_(grad), weight, labels, shift=True, return_entropy=True, chunk_mib=chunk_mib
        )
        assert loss.requires_grad == grad
        torch.testing.assert_close(entropy, want, rtol=1e-4, atol=1e-4)


def test_entropy_is_asked_for_by_true_or_false():
    with pytest.raises(TypeError, match="return_entropy must be True or False, got 'sum'"):
        gk.weighted_linear_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), return_entropy="sum")
