"""A state whose rows hold anything, as a damaged file brings: nothing is read outside of it, all backends agree."""

from __future__ import annotations

import pytest
import torch

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.reference import one_pass as reference_predicted

INT32_MAX = 2**31 - 1
SEEN = [-(2**31), -(2**31) + 1, -77, -6, -5, -1, 0, 1, 4, 5, 6, INT32_MAX - 1, INT32_MAX]
FLOATS = [0.0, -0.0, 0.3, 1.0, -5.0, 1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]
N = 143  # every count with every float


def hostile_state(config: gk.GEKOConfig, device: str) -> gk.SampleState:
    state = gk.SampleState(N, config, device=device)
    at = torch.arange(N)
    floats = torch.tensor(FLOATS)[at % 11]
    state.times_seen.copy_(torch.tensor(SEEN, dtype=torch.int32)[at % 13])
    state.q_value.copy_(floats)
    state.confidence.copy_(floats.flip(0))
    state.loss_history.copy_(torch.stack([floats.roll(i) for i in (0, 3, 7, 11, 20)], 1))
    state.bucket.copy_((at * 37 % 256).byte())
    state.wrong_streak.copy_((at * 101 % 256).byte())
    quarantined = torch.where(at % 3 == 0, at * 7 % 256, 0).byte()
    state.quarantined.view(torch.uint8).copy_(quarantined)
    state.changed.view(torch.uint8).copy_((at * 13 % 256).byte())
    state.claim.copy_(torch.tensor([-(2**31), INT32_MAX, -1, 7, 0])[at % 5])
    return state


def visit(backend: str, device: str, config: gk.GEKOConfig, packed: bool, reduction: str = "none"):
    before, ops._override = ops._override, backend
    try:
        state = hostile_state(config, device)
        random = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (N, 2), generator=random)
        logits = torch.randn(N, 2, 4, generator=random)
        logits.scatter_add_(2, labels[..., None], 6.0 * (torch.arange(N) % 2)[:, None, None].expand(N, 2, 1))
        labels[5::9] = -100  # visits without a token leave the row, bucket too, as it is
        ids = torch.arange(N)[:, None].expand(N, 2) if packed else torch.arange(N)
        seen = []
        for _ in range(2):
            loss, stats = gk.weighted_loss(
                *(logits.to(device), labels.to(device), ids.to(device), state),
                reduction=reduction,
                return_stats=True,
            )
            seen += [loss, *stats]
    finally:
        ops._override = before
    return [x.cpu() for x in seen], state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quality", ["rise", "std"])
def test_any_row_is_judged_alike_by_all_backends(backend, device, quality, packed):
    config = gk.GEKOConfig(quality=quality, min_q_for_freeze=0.2)
    seen, state = visit(backend, device, config, packed)
    want, want_state = visit("reference", "cpu", config, packed)
    for ours, theirs in zip(seen, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6, equal_nan=True)
    for name, column in want_state.state_dict().items():
        torch.testing.assert_close(
            state.state_dict()[name].cpu().view(torch.uint8)
            if column.dtype == torch.bool
            else state.state_dict()[name].cpu(),
            column.view(torch.uint8) if column.dtype == torch.bool else column,
            rtol=1e-5,
            atol=2e-6,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    quality_now = state.quality
    assert ((quality_now >= 0) & (quality_now <= 1)).all()


def test_counts_saturate_and_negative_ones_start_anew(backend, device):
    _, state = visit(backend, device, gk.GEKOConfig(), False)
    visited = torch.ones(N, dtype=torch.bool)
    visited[5::9] = False
    before = torch.tensor(SEEN)[torch.arange(N) % 13]
    want = torch.where(visited, (before.clamp(min=0) + 2).clamp(max=INT32_MAX), before)
    assert state.times_seen.tolist() == want.tolist()
    assert (state.bucket.cpu()[visited] <= 3).all()
    assert state.loss_history[visited][:, -2:].isfinite().all()


def test_a_quarantined_byte_need_not_be_one(backend, device):
    seen, state = visit(backend, device, gk.GEKOConfig.uniform(), False)
    weight = seen[10]
    counted, shut_out = seen[2] > 0, state.quarantined.view(torch.uint8).cpu() != 0
    assert weight.tolist() == (counted & ~shut_out).float().tolist() and 20 < shut_out.sum() < 60


def test_prediction_from_any_bucket():
    predict = pytest.importorskip("geko_kernels.kernels.one_pass.predict", exc_type=ImportError)
    if torch.cuda.is_available():
        pytest.skip("runs the kernel under the interpreter")
    from geko_kernels.kernels.sample_update.prepare import scratch_words
    from geko_kernels.kernels.table import prepared_of

    state = hostile_state(gk.GEKOConfig(), "cpu")
    labels, ids = torch.zeros(N, 2, dtype=torch.int64), torch.arange(N)
    target, coeff = torch.empty(2 * N, dtype=torch.int32), torch.empty(2 * N)
    counts = torch.empty(predict.predict_parts(labels, False), dtype=torch.int32)
    launch = predict.predict_launch(labels, ids, N, 4, 1, -100, False, False)
    columns = (*prepared_of(state.columns), state.quarantined)
    scratch = torch.empty(scratch_words(labels, False), dtype=torch.int32)
    launch(labels, ids, state.weights, *columns, state.error, scratch, target, coeff, counts)
    want = reference_predicted.predict(labels, ids, state.weights, state.bucket, state.quarantined, 4, 1, -100, False)
    assert target.equal(want[0]) and coeff.equal(want[1]) and counts.sum() == want[2]
