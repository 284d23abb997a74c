"""The reference ops against loops over visits in double precision, and against gradcheck."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import Case, cases
from hypothesis import given, settings
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels.columns import SAVED

pytestmark = pytest.mark.usefixtures("reference")
RTOL, ATOL = 2e-5, 2e-6


def table_of(state: gk.SampleState | None) -> list[oracle.Row] | None:
    if state is None:
        return None
    rows = []
    for i in range(len(state)):
        seen = int(state.times_seen[i])
        history = state.loss_history[i].tolist()[5 - min(seen, 5) :]
        rows.append(
            oracle.Row(
                *(history, float(state.q_value[i]), float(state.confidence[i]), seen, int(state.bucket[i])),
                *(int(state.wrong_streak[i]), bool(state.quarantined[i])),
            )
        )
    return rows


def assert_same_table(state: gk.SampleState, table: list[oracle.Row]) -> None:
    for i, row in enumerate(table):
        told = {**vars(row), "loss_history": [0.0] * (5 - len(row.history)) + row.history}
        for name in SAVED:
            value = getattr(state, name)[i].tolist()
            assert value == pytest.approx(told[name], rel=RTOL, abs=ATOL), f"{name} of sample {i}"


def assert_same_stats(stats: gk.SampleStats, visits: list[oracle.Visit]) -> None:
    used = len(visits)
    assert stats.num_tokens[:used].tolist() == [len(v.tokens) for v in visits]
    assert stats.sample_ids[:used].tolist() == [v.sample_id for v in visits]
    counted = [i for i, v in enumerate(visits) if v.tokens]
    for name in ("loss", "confidence", "accuracy", "quality", "q_value", "weight"):
        ours = [float(getattr(stats, name)[i]) for i in counted]
        assert ours == pytest.approx([getattr(visits[i], name) for i in counted], rel=RTOL, abs=ATOL), name
    assert stats.bucket[:used].tolist() == [v.bucket for v in visits]
    assert stats.correct[:used].tolist() == [v.correct for v in visits]
    assert stats.sample_ids[used:].eq(-1).all()
    assert not stats.num_tokens[used:].any() and not stats.loss[used:].any() and not stats.weight[used:].any()


def bucket_weights(case: Case) -> tuple[float, float, float]:
    _, light, focus, hard = case.state.bucket_weights.tolist()
    return hard, focus, light


@settings(max_examples=150)
@given(cases(dtypes=(torch.float32, torch.float64)))
def test_loss_gradient_statistics_and_state_equal_the_oracle(case):
    table, state = table_of(case.state), case.new_state()
    config = state.config if state else gk.GEKOConfig()
    ours = case.logits.clone().requires_grad_()
    loss, stats = gk.weighted_loss(ours, case.labels, case.sample_ids, state, return_stats=True, **case.options)
    exact = case.logits.double().requires_grad_()
    weights = bucket_weights(case) if state else None
    want, visits = oracle.weighted_loss(
        exact, case.labels, case.sample_ids, table, config, bucket_weights=weights, **case.options
    )
    if case.options["reduction"] == "none":
        assert not loss[len(want) :].any()
        upstream = torch.linspace(-1, 2, len(loss))
        loss.backward(upstream.to(loss.dtype))
        want.backward(upstream[: len(want)].double())
        torch.testing.assert_close(loss[: len(want)].double(), want, rtol=RTOL, atol=ATOL)
    else:
        (loss * case.upstream).backward()
        (want * case.upstream).backward()
        torch.testing.assert_close(loss.double(), want, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(ours.grad.double(), exact.grad.nan_to_num(), rtol=RTOL, atol=ATOL * abs(case.upstream))
    assert_same_stats(stats, visits)
    if state is not None:
        assert_same_table(state, table)


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ids", ["row", "token"])
def test_gradcheck(reduction, softcap, ids):
    labels = torch.tensor([[1, -100, 3, 0], [2, 2, -100, 4]])
    by_token = torch.tensor([[0, 0, 2, 2], [1, 1, 1, -1]])
    state = gk.SampleState(3, gk.GEKOConfig(bucket_weights=(3, 2, 1)))
    sample_ids = by_token if ids == "token" else torch.tensor([0, 1])

    def loss(logits):
        return gk.weighted_loss(
            *(logits, labels, sample_ids, state), reduction=reduction, softcap=softcap, shift=True, update=False
        )

    assert torch.autograd.gradcheck(loss, torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_state_token_mean_is_cross_entropy(dtype):
    logits, labels = torch.randn(3, 7, 11, dtype=dtype), torch.randint(11, (3, 7))
    labels[0, :3] = -100
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = gk.weighted_loss(a, labels, reduction="token_mean")
    theirs = F.cross_entropy(b.flatten(0, 1), labels.flatten())
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad)


def test_a_row_per_visit_may_come_without_a_sequence_axis():
    logits, labels, ids = torch.randn(4, 9), torch.randint(9, (4,)), torch.arange(4)
    flat, deep = gk.SampleState(4), gk.SampleState(4)
    a = gk.weighted_loss(logits, labels, ids, flat)
    b = gk.weighted_loss(logits[:, None], labels[:, None], ids, deep)
    assert a == b and flat.q_value.equal(deep.q_value)


def visit(state, sample_ids, target_logits, **options):
    """One call with one token a row; the target's logit against zeros sets the loss."""
    logits = torch.zeros(len(target_logits), 4)
    logits[:, 1] = torch.tensor(target_logits, dtype=torch.float32)
    labels = torch.ones(len(target_logits), dtype=torch.long)
    return gk.weighted_loss(logits, labels, torch.tensor(sample_ids), state, **options)


def test_the_state_keeps_the_last_of_several_visits_in_one_call():
    state, single = gk.SampleState(3), gk.SampleState(3)
    visit(state, [2, 0, 2, 2], [0.0, 1.0, 9.0, -3.0])
    visit(single, [0, 2], [1.0, -3.0])
    assert state.times_seen.tolist() == [1, 0, 1]
    assert state.loss_history.equal(single.loss_history) and state.bucket.equal(single.bucket)


def test_of_several_visits_the_last_finite_one_is_kept():
    state, single = gk.SampleState(2), gk.SampleState(2)
    loss = visit(state, [1, 1, 1], [0.0, 2.0, float("nan")], reduction="none")
    visit(single, [1], [2.0])
    assert loss.isnan().tolist() == [False, False, True]
    assert state.loss_history.equal(single.loss_history) and state.times_seen.tolist() == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_shows_and_leaves_the_row(bad):
    state = gk.SampleState(2)
    visit(state, [0, 1], [1.0, 1.0])
    old = {name: column.clone() for name, column in state.state_dict().items()}
    loss, stats = visit(state, [0], [bad], return_stats=True)
    assert not loss.isfinite() and not stats.loss.isfinite().any() and not stats.correct.any()
    assert all(old[name].equal(column) for name, column in state.state_dict().items())


def test_buckets_of_the_definition():
    state = gk.SampleState(4, gk.GEKOConfig(bucket_weights=(5, 3, 2)))
    logits = torch.tensor([[9.0, 0, 0], [1.2, 0, 0], [0.5, 0.4, 0.4], [0, 9, 0]])  # (visits, V), all labelled 0
    config = gk.GEKOConfig(correct_loss=0.6, bucket_weights=(5, 3, 2))
    state = gk.SampleState(4, config)
    _, stats = gk.weighted_loss(logits, torch.zeros(4, dtype=torch.long), torch.arange(4), state, return_stats=True)
    assert stats.bucket.tolist() == [gk.Bucket.FREEZE, gk.Bucket.LIGHT, gk.Bucket.FOCUS, gk.Bucket.HARD]
    assert stats.weight.tolist() == [0, 2, 3, 5]
    assert state.bucket_counts().tolist() == [1, 1, 1, 1]


def test_a_tie_with_the_maximum_is_a_hit():
    _, stats = gk.weighted_loss(torch.zeros(1, 3), torch.tensor([2]), return_stats=True)
    assert stats.accuracy.tolist() == [1.0] and stats.confidence.tolist() == pytest.approx([1 / 3])


def test_the_last_position_of_a_packed_visit_predicts_nothing():
    labels, ids = torch.arange(6)[None], torch.tensor([[0, 0, 0, 1, 1, -1]])
    _, stats = gk.weighted_loss(torch.zeros(1, 6, 7), labels, ids, gk.SampleState(2), shift=True, return_stats=True)
    assert stats.num_tokens.tolist() == [2, 1, 0, 0, 0, 0] and stats.sample_ids.tolist() == [0, 1, -1, -1, -1, -1]


def test_one_id_in_two_runs_is_two_visits():
    ids = torch.tensor([[3, 3, 1, 3]])
    _, stats = gk.weighted_loss(
        torch.zeros(1, 4, 5), torch.zeros(1, 4, dtype=torch.long), ids, gk.SampleState(4), return_stats=True
    )
    assert stats.sample_ids.tolist() == [3, 1, 3, -1] and stats.num_tokens.tolist() == [2, 1, 1, 0]
