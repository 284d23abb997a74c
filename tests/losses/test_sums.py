"""Long sums are as near to float64 as PyTorch's own, within a factor of 2: loss, means of a visit, head gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.losses import linear_call
from geko_kernels.losses.linear_gradients import BiasGradient
from geko_kernels.losses.linear_head import Budget
from geko_kernels.reference import rows as reference_rows

LONG = 262_144  # tokens
SHORTER = 2_500  # for Triton's interpreter
ROUNDING = 2.0**-24  # float32's, as a share


def losses_of(kind: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (count, 4), labels): random, or one token again and again, whose rounding errors all have one sign."""
    logits, labels = torch.randn(count, 4), torch.randint(4, (count,))
    if kind == "equal":
        logits[:], labels[:] = logits[0], 0
    return logits, labels


def share(value: float, exact: float) -> float:
    return abs(value - exact) / abs(exact)


@pytest.mark.parametrize("kind", ["random", "equal"])
def test_a_visit_of_many_tokens(backend, device, kind):
    logits, labels = losses_of(kind, SHORTER if backend == "triton" else LONG)
    tokens = F.cross_entropy(logits.double(), labels, reduction="none")
    sure = logits.double().softmax(1).amax(1)
    own = share(F.cross_entropy(logits, labels).item(), tokens.mean().item())
    allowed = 2 * own + 2 * ROUNDING
    batch = logits.to(device)[None], labels.to(device)[None]
    state = gk.SampleState(1, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    for reduction, options in (("token_mean", ()), ("mean", (ids, state))):
        loss, stats = gk.weighted_loss(*batch, *options, reduction=reduction, return_stats=True)
        weight = float(stats.weight[0]) if reduction == "mean" else 1
        assert share(float(loss), weight * tokens.mean().item()) <= allowed
        assert share(float(stats.loss[0]), tokens.mean().item()) <= allowed
        assert share(float(stats.confidence[0]), sure.mean().item()) <= allowed
    assert share(float(state.last_loss[0]), tokens.mean().item()) <= allowed


@pytest.mark.parametrize("packed", [False, True])
def test_equal_losses_have_that_mean(backend, device, packed):
    """65,536 times 0.1: added up one by one in float32, each step rounds to the same side."""
    count = 4096 if packed and backend == "triton" else 65_536  # the interpreter is slow
    tokens, labels = torch.full((5, count), 0.1), torch.zeros(1, count, dtype=torch.int64)
    ids = labels if packed else labels[0, :1]
    state = gk.SampleState(1, device=device)
    head = (tokens.to(device), labels.to(device), ids.to(device), state.rules, torch.ones(4, device=device), None)
    loss, *_, floats, _, _ = ops.sample_update_(*head, state.columns, state.error, 4, 1, -100, False, True)
    got = torch.stack([loss, *floats[:3, 0], state.last_loss[0], state.confidence[0]]).cpu()
    torch.testing.assert_close(got, torch.full((6,), 0.1), rtol=6 * ROUNDING, atol=0)  # a GPU's division rounds too


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
def test_a_batch_of_many_visits(backend, device, reduction, kind):
    """Rows, and packed runs: here the sum over visits is the long one."""
    count = 64 if backend == "triton" and device == "cpu" else LONG  # one by one, float32 adds 64 of these wrongly too
    logits, labels = losses_of(kind, count)
    tokens = F.cross_entropy(logits.double(), labels, reduction="none")
    exact = (tokens.sum() if reduction == "sum" else tokens.mean()).item()
    torchs = F.cross_entropy(logits, labels, reduction="sum" if reduction == "sum" else "mean")
    allowed = 2 * share(torchs.item(), exact) + 2 * ROUNDING
    logits, labels = logits.to(device), labels.to(device)
    assert share(gk.weighted_loss(logits, labels, reduction=reduction).item(), exact) <= allowed
    ids = torch.arange(count, device=device)[None]
    loss = gk.weighted_loss(logits[None], labels[None], ids, reduction=reduction)
    assert share(loss.item(), exact) <= allowed


def rms(error: torch.Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def head_gradients(function, dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    function(*leaves).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("rows_held", [8192, 700])
def test_gradients_of_the_head_over_many_rows(rows_held, kind, monkeypatch):
    """8192 rows, held at once or in fills of 700."""
    rows, vocab = 8192, 300
    hidden, weight, bias = torch.randn(rows, 16), torch.randn(vocab, 16) / 4, torch.randn(vocab)
    labels = torch.randint(vocab, (rows,))
    if kind == "equal":
        hidden[:], labels[:] = hidden[0], 0

    def torchs(x, w, b):
        return F.cross_entropy(F.linear(x, w, b), labels)

    exact = head_gradients(torchs, torch.float64, hidden, weight, bias)
    own = head_gradients(torchs, torch.float32, hidden, weight, bias)
    monkeypatch.setattr(Budget, "rows", lambda *_: rows_held)
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)
    monkeypatch.setattr(linear_call, "_AT_ONCE", 0)
    ours = head_gradients(
        lambda x, w, b: gk.weighted_linear_loss(x, w, labels, bias=b, reduction="token_mean"),
        *(torch.float32, hidden, weight, bias),
    )
    for name, mine, theirs, true in zip(("hidden", "weight", "bias"), ours, own, exact, strict=True):
        scale = ROUNDING * true.abs().max().item() / 4
        assert rms(mine - true) <= 2 * rms(theirs - true) + scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(2048, 260), (700, 5), (1, 700), (63, 257), (0, 9)])
def test_column_sums(backend, device, dtype, rows, columns):
    tile = (torch.rand(rows, columns) - 0.1).to(dtype)
    by_row = torch.rand(rows) + 0.5
    exact = (tile.double() * by_row.double()[:, None]).sum(0)
    ours = ops.column_sums(tile.to(device), by_row.to(device)).cpu()
    assert ours.dtype == torch.float64 and ours.shape == (columns,)
    own = (tile.float() * by_row[:, None]).sum(0)
    if rows:
        assert rms(ours - exact) <= 2 * rms(own.double() - exact) + ROUNDING / 4 * exact.abs().max()
    torch.testing.assert_close(ours, reference_rows.column_sums(tile, by_row), rtol=1e-6, atol=1e-6)


def test_a_sum_in_parts_is_narrowed_once():
    gradient = BiasGradient(2, torch.float16, torch.device("cpu"))
    tile = torch.full((64, 2), 1.0)
    for factor in (1000.0, 1000.0, -1990.0):  # 64,000 and twice that, which float16 does not hold
        gradient.add(tile, torch.full((64,), factor))
    assert gradient.finish().tolist() == [640.0, 640.0] and gradient.finish().dtype == torch.float16


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_stays_what_it_is(backend, device, special):
    """The sums hold what rounding took from them apart, and that is NaN once they are infinite."""
    tokens, labels = torch.ones(5, 3000, device=device), torch.zeros(1, 3000, dtype=torch.int64, device=device)
    tokens[0, 5] = special
    state = gk.SampleState(1, device=device)
    rest = (None, state.rules, state.weights, None, [], None, 9, 3, -100, False, False)
    loss, *_, floats, _, _ = ops.sample_update_(tokens, labels, *rest)
    torch.testing.assert_close(torch.stack([loss, floats[0, 0]]).cpu(), torch.tensor([special] * 2), equal_nan=True)
