"""`token_weights` and `sample_weights` of both losses: the maths, and what they must not change."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import Case, cases, weighted_cases
from comparing import TINY, assert_close_stats, assert_same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_loss import few_rows  # noqa: F401 (a fixture)
from test_linear_loss import run as run_head
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels import ops

LOSSES = ["logits", "linear"]


def run(case: Case, backend: str, device: str, dtype: torch.dtype | None = None, **changes):
    """loss, statistics, gradient of the logits and state after one call and its backward."""
    before, ops._override = ops._override, backend
    try:
        logits = case.logits.to(device, dtype or case.logits.dtype).detach().requires_grad_()
        ids = None if case.sample_ids is None else case.sample_ids.to(device)
        state, options = case.new_state(device), {**case.options, **changes, "return_stats": True}
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        loss, stats = gk.weighted_loss(logits, case.labels.to(device), ids, state, **options)
        upstream = torch.linspace(-1, 2, loss.numel(), device=device).view(loss.shape) if loss.dim() else 1.0
        (loss * upstream * case.upstream).sum().backward()
    finally:
        ops._override = before
    return loss.detach().cpu(), gk.SampleStats(*(x.cpu() for x in stats)), logits.grad.cpu(), state


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.nan_to_num().equal(b.nan_to_num()) and a.isnan().equal(b.isnan())


def assert_same_bits(ours, want):
    (loss, stats, grad, state), (want_loss, want_stats, want_grad, want_state) = ours, want
    assert equal(loss, want_loss) and equal(grad, want_grad)
    for name, mine, theirs in zip(stats._fields, stats, want_stats, strict=True):
        assert equal(mine, theirs), name
    if state is not None:
        for name, column in want_state.state_dict().items():
            assert equal(state.state_dict()[name], column), name


def table_of(state):
    """The rows of `state` for the oracle."""
    if state is None:
        return None
    seen = state.times_seen.tolist()
    return [
        oracle.Row(
            state.loss_history[i].tolist()[5 - min(seen[i], 5) :],
            *(float(state.q_value[i]), float(state.confidence[i]), seen[i], int(state.bucket[i])),
            *(int(state.wrong_streak[i]), bool(state.quarantined[i])),
        )
        for i in range(len(state))
    ]


@settings(max_examples=150)
@given(case=weighted_cases(dtypes=(torch.float64, torch.float32)))
def test_loss_gradient_statistics_and_state_equal_the_oracle(reference, case):
    loss, stats, grad, state = run(case, "reference", "cpu")
    config = state.config if state else gk.GEKOConfig()
    table, exact = table_of(case.state), case.logits.double().requires_grad_()
    buckets = case.state.bucket_weights.tolist()[:0:-1] if state else None  # (HARD, FOCUS, LIGHT)
    want, visits = oracle.weighted_loss(
        exact, case.labels, case.sample_ids, table, config, bucket_weights=buckets, **case.options
    )
    upstream = torch.linspace(-1, 2, loss.numel()).double()[: want.numel()] if loss.dim() else 1.0
    (want * upstream * case.upstream).sum().backward()
    got = loss[: len(want)] if loss.dim() else loss
    torch.testing.assert_close(got.double(), want.detach(), rtol=2e-5, atol=TINY)
    torch.testing.assert_close(
        grad.double(), exact.grad.nan_to_num(), rtol=2e-5, atol=TINY * max(1, abs(case.upstream))
    )
    counted = [i for i, visit in enumerate(visits) if visit.tokens]
    assert stats.num_tokens[: len(visits)].tolist() == [len(visit.tokens) for visit in visits]
    for name in ("loss", "confidence", "accuracy", "quality", "q_value", "weight"):
        mine = [float(getattr(stats, name)[i]) for i in counted]
        assert mine == pytest.approx([getattr(visits[i], name) for i in counted], rel=2e-5, abs=TINY), name
    for i, row in enumerate(table or []):
        assert (int(state.times_seen[i]), int(state.bucket[i])) == (row.times_seen, row.bucket)
        assert float(state.q_value[i]) == pytest.approx(row.q_value, rel=2e-5, abs=TINY)
        assert float(state.confidence[i]) == pytest.approx(row.confidence, rel=2e-5, abs=TINY)
        assert state.loss_history[i].tolist()[5 - len(row.history) :] == pytest.approx(row.history, rel=2e-5, abs=TINY)


@settings(max_examples=40)
@given(case=weighted_cases())
def test_every_backend_equals_the_reference(backend, device, case):
    loss, stats, grad, state = run(case, backend, device)
    want_loss, want_stats, peer, want_state = run(case, "reference", "cpu")
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=TINY)
    assert_close_stats(stats, want_stats)
    assert_same_state(state, want_state)
    _, _, exact, _ = run(case, "reference", "cpu", torch.float64)
    own = (peer.double() - exact).abs()
    rounding = exact.abs() * torch.finfo(case.logits.dtype).eps
    allowed = 2 * torch.maximum(own, rounding) + TINY * max(1, abs(case.upstream))
    assert grad.dtype == case.logits.dtype
    assert ((grad.double() - exact).abs() <= allowed).all()


@given(case=weighted_cases(dtypes=(torch.float32,)), with_bias=st.booleans())
def test_the_linear_loss_equals_the_loss_of_all_logits(reference, few_rows, case, with_bias):  # noqa: F811
    loss, stats, grads, state = run_head(case, "cpu", True, with_bias=with_bias)
    want_loss, want_stats, want_grads, want_state = run_head(case, "cpu", False, with_bias=with_bias)
    torch.testing.assert_close(loss, want_loss, rtol=1e-9, atol=1e-9)
    for grad, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-9 * max(1, abs(case.upstream)))
    assert_close_stats(stats, want_stats)
    assert_same_state(state, want_state)


@given(case=weighted_cases(dtypes=(torch.float32,)))
def test_the_linear_loss_on_every_backend(backend, device, few_rows, case):  # noqa: F811
    case.options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
    loss, stats, grads, state = run_head(case, device, True, torch.float32)
    want_loss, want_stats, want_grads, want_state = run_head(case, device, False, torch.float32)
    torch.testing.assert_close(loss, want_loss, rtol=1e-4, atol=1e-4)
    for grad, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4 * max(1, want.abs().max().item()))
    for ours, want in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4)
    assert state is None or state.times_seen.equal(want_state.times_seen)


@given(case=cases())
def test_weights_of_one_change_no_bit(backend, device, case):
    packed = case.sample_ids is not None and case.sample_ids.dim() == 2
    ones = torch.ones(case.labels.shape)
    plain = run(case, backend, device)
    assert_same_bits(run(case, backend, device, token_weights=ones), plain)
    assert_same_bits(run(case, backend, device, sample_weights=ones if packed else ones[:, 0]), plain)


@given(case=cases(), seed=st.integers(0, 2**20))
def test_a_token_weight_of_zero_is_an_ignored_label(backend, device, case, seed):
    dropped = torch.rand(case.labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    labels = torch.where(dropped, case.options["ignore_index"], case.labels)
    want = run(Case(case.logits, labels, case.sample_ids, case.state, case.options, case.upstream), backend, device)
    case.labels = torch.where(dropped, 10**6, case.labels)  # a wrong label counts for as little
    assert_same_bits(run(case, backend, device, token_weights=(~dropped).float()), want)


def both_losses(kind, logits, labels, ids=None, state=None, **options):
    if kind == "logits":
        return gk.weighted_loss(logits, labels, ids, state, **options)
    return gk.weighted_linear_loss(logits, torch.eye(logits.shape[-1]).to(logits), labels, ids, state, **options)


@pytest.mark.parametrize("kind", LOSSES)
def test_token_mean_is_cross_entropy_with_class_weights(backend, device, kind):
    logits, labels = torch.randn(6, 4, 9, device=device), torch.randint(9, (6, 4), device=device)
    by_class = torch.rand(9, device=device)
    by_class[2] = 0
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = both_losses(kind, ours, labels, reduction="token_mean", token_weights=by_class[labels])
    want = F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), by_class)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", LOSSES)
def test_weights_that_sum_to_less_than_one(backend, device, kind):
    logits, labels = torch.randn(2, 3, 5, device=device), torch.zeros(2, 3, dtype=torch.long, device=device)
    small = torch.full((2, 3), 1e-6, device=device)
    for reduction in ("mean", "token_mean", "sum", "none"):
        plain = both_losses(kind, logits, labels, reduction=reduction)
        scaled = both_losses(kind, logits, labels, reduction=reduction, token_weights=small)
        torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_state_sees_the_weighted_means_and_no_sample_weight(backend, device, kind):
    logits, labels = torch.randn(3, 2, 5, device=device), torch.zeros(3, 2, dtype=torch.long, device=device)
    ids, weights = torch.arange(3, device=device), torch.tensor([[3.0, 1], [0, 2], [0, 0]], device=device)
    v = torch.tensor([0.0, 2, 5], device=device)
    state = gk.SampleState(3, device=device)
    before = {name: column.clone() for name, column in state.state_dict().items()}
    loss, stats = both_losses(
        kind, logits, labels, ids, state, token_weights=weights, sample_weights=v, reduction="none", return_stats=True
    )
    token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    sure = logits.softmax(-1).amax(-1)
    means = torch.stack([(3 * token[0, 0] + token[0, 1]) / 4, token[1, 1]])
    torch.testing.assert_close(state.last_loss[:2], means)
    torch.testing.assert_close(state.confidence[:2], torch.stack([(3 * sure[0, 0] + sure[0, 1]) / 4, sure[1, 1]]))
    assert state.times_seen.tolist() == [1, 1, 0] and stats.num_tokens.tolist() == [2, 1, 0]
    assert all(column[2].equal(before[name][2]) for name, column in state.state_dict().items() if column.dim())
    fresh = gk.SampleState(3, device=device)
    plain = both_losses(kind, logits, labels, ids, fresh, token_weights=weights, return_stats=True)[1]
    assert all(column.equal(fresh.state_dict()[name]) for name, column in state.state_dict().items())
    assert plain.weight[:2].all() and stats.weight.equal(plain.weight * v)
    torch.testing.assert_close(loss[:2], stats.weight[:2] * means)
    assert loss[2] == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_packed_sample_weights_are_those_at_the_first_token(backend, device, kind):
    logits, labels = torch.randn(2, 5, 4, device=device), torch.ones(2, 5, dtype=torch.long, device=device)
    ids = torch.tensor([[-1, 7, 7, 3, 3], [3, 3, -1, 8, 8]], device=device)
    v = torch.tensor([[99, 2, 50, 3, 50], [4, 50, 50, 5, 50.0]], device=device)
    options = {"shift": True, "reduction": "none", "sample_weights": v, "return_stats": True}
    loss, stats = both_losses(kind, logits, labels, ids, **options)
    assert stats.weight[:4].tolist() == [2, 3, 4, 5] and not stats.weight[4:].any()
    plain = both_losses(kind, logits, labels, ids, shift=True, reduction="none")
    torch.testing.assert_close(loss, plain * stats.weight)
    total = both_losses(kind, logits, labels, ids, shift=True, sample_weights=v)
    torch.testing.assert_close(total, loss.sum() / 4)  # N does not see them


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
def test_nothing_left_gives_zero_with_the_graph_connected(backend, device, kind, reduction):
    labels = torch.zeros(2, 3, dtype=torch.long, device=device)
    for weights in (
        {"token_weights": torch.zeros(2, 3, device=device)},
        {"sample_weights": torch.zeros(2, device=device)},
    ):
        logits = torch.randn(2, 3, 5, device=device, requires_grad=True)
        loss = both_losses(kind, logits, labels, reduction=reduction, **weights)
        loss.sum().backward()
        assert not loss.any() and not logits.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_two_dimensions_and_other_dtypes_of_the_weights(backend, device, kind):
    logits, labels = torch.randn(4, 5, device=device), torch.tensor([1, 0, -100, 4], device=device)
    u, v = torch.tensor([0.5, 2, 1, 0], device=device), torch.tensor([1.0, 0.25, 3, 2], device=device)
    token = F.cross_entropy(logits, labels, reduction="none")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weights = {"token_weights": u.to(dtype), "sample_weights": v.to(dtype)}
        torch.testing.assert_close(both_losses(kind, logits, labels, **weights), (v * token)[:2].sum() / 2)
        loss = both_losses(kind, logits, labels, reduction="token_mean", **weights)
        torch.testing.assert_close(loss, (u * v * token)[:2].sum() / 2.5)
        loss = both_losses(kind, logits, labels, reduction="token_mean", num_items=10, **weights)
        torch.testing.assert_close(loss, (u * v * token)[:2].sum() / 10)
    strided = torch.stack([u, u * 0 - 1], 1)[:, 0]
    assert both_losses(kind, logits, labels, token_weights=strided) == both_losses(
        kind, logits, labels, token_weights=u
    )


@pytest.mark.parametrize("packed", [False, True], ids=["row", "token"])
def test_sums_of_many_weighted_tokens_lose_nothing(backend, device, packed):
    count = 3000
    logits, labels = torch.randn(1, count, 3), torch.randint(3, (1, count))
    u = torch.rand(1, count) * 10
    exact = F.cross_entropy(logits.double()[0], labels[0], reduction="none")
    want = (u[0].double() * exact).sum() / u.double().sum()
    ids = torch.zeros(1, count, dtype=torch.long) if packed else None
    where = [x if x is None else x.to(device) for x in (logits, labels, ids)]
    for reduction in ("mean", "token_mean"):
        loss = gk.weighted_loss(*where, reduction=reduction, token_weights=u.to(device))
        assert loss.item() == pytest.approx(want.item(), rel=3e-7)
