"""The parts of the linear path: its buffer's size, the sum of dW, the ops on rows of logits."""

from __future__ import annotations

import pytest
import torch
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.losses import linear_head
from geko_kernels.losses.arguments import REDUCTIONS
from geko_kernels.losses.linear_gradients import WeightGradient, narrow_
from geko_kernels.losses.state_arguments import state_arguments
from geko_kernels.reference import rows as reference_rows


def test_the_buffer_keeps_to_its_budget():
    def rows(tokens, columns, vocab, mib, narrow=True, scored=None):
        like = torch.empty(0, dtype=torch.bfloat16, device="meta")
        head = linear_head.Head(like.new_empty(tokens, columns), like.new_empty(vocab, columns), None, vocab)
        return linear_head.Budget(head, mib, narrow, True, True).rows(tokens if scored is None else scored)

    assert rows(8192, 4096, 128256, 1024) == 8192, "2 GiB of logits instead of 1 GiB and 1 GiB more for dW's sum"
    assert rows(8192, 4096, 128256, 1024, narrow=False) * (128256 + 4096) * 2 <= 1004 * 2**20
    assert 800 < rows(8192, 4096, 128256, 256) * 1.0 < 1024
    assert rows(8192, 2048, 151936, None) == 8192 and rows(8192, 2048, 151936, 1024) < 4096
    assert rows(16384, 2048, 151936, None) == rows(16384, 2048, 151936, 1024)
    assert rows(100, 16, 128, 1024) == 100
    assert rows(0, 16, 128, 1024) == 0
    assert rows(32768, 2048, 151936, None, scored=8192) == 8192, "tokens without a label take no memory"


@pytest.mark.parametrize("rows", [3, 200, 4001])
def test_a_float32_sum_narrows_within_the_memory_of_its_result(rows):
    gradient = WeightGradient(rows, 37, torch.bfloat16, torch.bfloat16, torch.device("cpu"))
    tiles = [torch.randn(5, rows).bfloat16() for _ in range(3)]
    hidden = [torch.randn(5, 37).bfloat16() for _ in range(3)]
    for i in range(3):
        gradient.add(tiles[i], hidden[i], last=i == 2)
    want = sum(tile.t().double() @ x.double() for tile, x in zip(tiles, hidden, strict=True))
    torch.testing.assert_close(gradient.finish().double(), want, rtol=0.02, atol=0.05)
    memory = torch.empty(2 * 200_000, dtype=torch.bfloat16)
    wide = memory.view(torch.float32).copy_(torch.randn(200_000))
    exact = wide.bfloat16()
    narrow_(wide, memory)
    assert memory[:200_000].equal(exact)


@given(case=cases(dtypes=(torch.float32,)), held=st.integers(0, 5))
def test_row_lists_of_every_backend(backend, device, case, held):
    labels = case.labels.to(device)
    labels = torch.where(labels == case.logits.shape[-1] - 1, case.logits.shape[-1] + 2, labels)  # outside
    ids = None if case.sample_ids is None else case.sample_ids.to(device)
    arguments = (labels, ids, case.logits.shape[-1], case.options["ignore_index"], case.options["shift"])
    rows, targets, visits = ops.scored_rows(*arguments)
    want_rows, want_targets, want_visits = reference_rows.scored_rows(*arguments)
    count = int(want_visits[0])
    assert rows.equal(want_rows) and targets.equal(want_targets) and visits[0] == count
    assert (visits[1 : 1 + count].diff() != 0).equal(want_visits[1 : 1 + count].diff() != 0)
    coeff = case.logits.to(device).flatten(0, 1)[:, 0].clamp(min=0)
    lists = []
    for kept_rows_ in (ops.kept_rows_, reference_rows.kept_rows_):
        positions, sources = torch.full((2, held + count), -7, device=device)
        end = int(kept_rows_(coeff, rows, positions, sources, held, 0, count))
        lists.append((positions[:end], sources[:end]))
    assert all(ours.equal(want) for ours, want in zip(*lists, strict=True))
    kept, where = lists[0][0][held:], lists[0][1][held:]
    assert sorted(kept.tolist()) == [row for row in rows[:count].tolist() if coeff[row] != 0]
    assert (rows[where - held] == kept).all()


@pytest.mark.parametrize("form", ["row", "packed"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(3, 1200), (7, 1024), (70, 1000)])
def test_row_lists_of_many_tokens(backend, device, form, shift, rows, length):
    """Which several programs of a kernel share."""
    labels = torch.randint(-1, 40, (rows, length), device=device)
    labels[rows // 2], labels[:, :9] = -1, 99  # a row without a label, and labels outside
    ids = torch.arange(rows, device=device)
    if form == "packed":
        ids = torch.arange(length, device=device).div(37, rounding_mode="floor").expand(rows, length).clone()
        ids[:, 50:60] = -1
    found = [lists(labels, ids, 40, -1, shift) for lists in (ops.scored_rows, reference_rows.scored_rows)]
    (listed, targets, visits), (want_listed, want_targets, want) = found
    count = int(want[0])
    assert listed.equal(want_listed) and targets.equal(want_targets) and int(visits[0]) == count
    assert (visits[1 : 1 + count].diff() > 0).equal(want[1 : 1 + count].diff() > 0)
    for share in (0.0, 0.3, 1.0):
        coeff = (torch.rand(rows * length, device=device) < share).float()
        kept = []
        for kept_rows_ in (ops.kept_rows_, reference_rows.kept_rows_):
            positions, sources = torch.full((2, 5 + count), -7, device=device)
            end = int(kept_rows_(coeff, listed, positions, sources, 5, 0, count))
            kept.append((positions[:end], sources[:end]))
        assert kept[0][0].equal(kept[1][0]) and kept[0][1].equal(kept[1][1])


@settings(max_examples=30)
@given(case=cases(dtypes=(torch.float32,)), update=st.booleans())
def test_an_update_in_two_pieces_of_memory_is_the_op(backend, device, case, update):
    labels, ids = case.labels.to(device), None if case.sample_ids is None else case.sample_ids.to(device)
    tokens = torch.rand(5, labels.numel(), device=device)
    found = []
    for run in (ops.sample_update_, ops.direct.sample_update_):
        rules, weights, columns, error = state_arguments(case.new_state(device), torch.device(device), True)
        head = (tokens, labels, ids, rules, weights, None, columns, error)
        reduction = REDUCTIONS[case.options["reduction"]]
        options = (case.logits.shape[-1], reduction, case.options["ignore_index"], case.options["shift"], update)
        found.append((*run(*head, *options), *columns))
    loss = found[1][0]
    assert not loss._is_view(), "in-place arithmetic on the loss would be refused"
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["token_mean", "none"])
def test_statistics_do_not_keep_the_memory_of_tokens(backend, device, reduction):
    """Nor does the backward keep that of the visits' entries, of which packed ids have one a token."""
    labels = torch.randint(50, (2, 128), device=device)
    hidden, weight = torch.randn(2, 128, 8, device=device), torch.randn(50, 8, device=device, requires_grad=True)
    state = gk.SampleState(2, device=device)
    options = {"reduction": reduction, "return_stats": True}
    ids = torch.arange(2, device=device)
    _, stats = gk.weighted_linear_loss(hidden, weight, labels, ids, state, **options)
    for name, column in stats._asdict().items():
        assert column.untyped_storage().nbytes() < labels.numel(), f"a list of {name} would grow with the tokens"
    loss, _ = gk.weighted_linear_loss(hidden, weight, labels, ids[:, None].expand(2, 128), state, **options)
    for kept in loss.grad_fn.saved[1:] if reduction == "none" else ():
        assert kept.untyped_storage().nbytes() <= 9 * labels.numel()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("vocab", "padded"), [(70, 72), (64, 64), (5000, 5056)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_rows_of_every_backend(backend, device, dtype, vocab, padded, softcap):
    logits = (3 * torch.randn(8, padded, device=device)).to(dtype)
    logits[2, :vocab], logits[4, 1] = -torch.inf, -torch.inf
    targets = torch.randint(vocab, (6,), device=device)
    rows, labels = torch.tensor([1, 2, 3, 4, 5, 0], device=device), targets.roll(1)[:, None]
    results = []
    for module in (ops, reference_rows):
        tokens, scored = torch.zeros(5, 6, device=device), logits.clone()
        entropy = torch.zeros(6, device=device)
        # slots 1 to 6, the first two without their gradients
        module.score_rows_(scored, rows, targets, tokens, False, 1, 0, 2, vocab, softcap)
        fused = backend != "cpp"
        module.score_rows_(scored, rows, targets, tokens, fused, 3, 2, 4, vocab, softcap, entropy)
        positions = torch.tensor([0, 1, 2, 0, 4], device=device)
        sources, end = torch.tensor([0, 1, 2, 6, 5], device=device), torch.tensor(4, dtype=torch.int32, device=device)
        where = (labels, tokens, 1, 6, 3 if fused else 7, vocab, False, softcap)
        module.gradient_rows_(scored, positions, sources, end, *where)
        again = logits.clone()
        where = (labels, tokens, 0, 6, 6, vocab, False, softcap)
        module.gradient_rows_(again[1:7], rows, None, None, *where)
        results.append((tokens, scored[:4], again, entropy))
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, want, equal_nan=True, rtol=1e-5 if ours.dtype == torch.float32 else 0.016, atol=1e-5
        )
    tokens, scored, again, entropy = results[0]
    z = logits[3:7, :vocab].float()
    logp = (softcap * (z / softcap).tanh() if softcap else z).log_softmax(-1)
    want = -torch.where(logp == -torch.inf, 0, logp.exp() * logp).sum(-1)
    torch.testing.assert_close(entropy[rows[2:]], want, rtol=1e-4, atol=1e-4)
    assert not entropy[rows[:2]].any(), "not asked for there"
    torch.testing.assert_close(scored[1:3], again[1:3], equal_nan=True)
    torch.testing.assert_close(scored[3], again[6], equal_nan=True)
    assert not scored[1:, vocab:].any() and again[0].equal(logits[0]) and again[7].equal(logits[7])


def test_moved_rows_of_every_backend(backend, device):
    hidden, positions = torch.randn(9, 37, device=device).bfloat16(), torch.tensor([8, 2, 5, 0], device=device)
    coeff = torch.randn(9, device=device)
    got, want = (m.gather_rows(hidden, positions, coeff, 3) for m in (ops, reference_rows))
    torch.testing.assert_close(got, want)
    product, outs = torch.randn(2, 37, device=device), [hidden.clone(), hidden.clone()]
    for module, out in zip((ops, reference_rows), outs, strict=True):
        module.scatter_rows_(out, product, positions, coeff, 1)
    torch.testing.assert_close(*outs)
    assert not outs[0][2].equal(hidden[2]) and outs[0][8].equal(hidden[8])


def test_a_coefficient_of_zero_clears_its_row(backend, device):
    """Whatever the row holds."""
    hidden, positions = torch.randn(9, 37, device=device).bfloat16(), torch.tensor([8, 2, 5, 0], device=device)
    coeff = torch.randn(9, device=device)
    coeff[[2, 5]] = 0
    hidden[2], hidden[3, :2] = torch.nan, torch.inf
    gathered, scattered, tile = ops.gather_rows(hidden, positions, coeff, 4), hidden.clone(), hidden[2:6].clone()
    ops.scatter_rows_(scattered, tile, positions, coeff, 0)
    ops.clear_rows_(tile, positions, coeff)
    assert not gathered[1:3].any() and gathered[[0, 3]].all()
    assert not scattered[[2, 5]].any() and scattered[8].isnan().all() and scattered[1].equal(hidden[1])
    assert not tile[1:3].any() and tile[0].isnan().all() and tile[3].equal(hidden[5])


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_rescale_of_every_backend(backend, device, factor):
    values = torch.randn(100, 173, device=device).bfloat16()
    want = (values.float() * factor).bfloat16()
    ops.rescale_(values, torch.tensor(factor, device=device))
    torch.testing.assert_close(values, want)  # Triton's interpreter rounds bfloat16 toward 0


@pytest.mark.parametrize("count", [0, 1, 37, 120, 200, 400])
@pytest.mark.parametrize(("vocab", "columns"), [(320, 48), (192, 384), (192, 512), (100, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_every_backend(backend, device, dtype, vocab, columns, count):
    """Over rows whose number is on the device; behind them are any values, and any tokens or none."""
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices")
    tile, weight = (
        torch.randn(400, vocab, device=device).to(dtype),
        torch.randn(vocab, columns, device=device).to(dtype),
    )
    hidden, coeff = torch.randn(500, columns, device=device).to(dtype), torch.rand(500, device=device) + 0.5
    positions = torch.randperm(500, device=device)[:400]
    tile[count:], positions[count::2] = torch.nan, 2**40
    end = torch.tensor(count, dtype=torch.int32, device=device)
    left, right, at = tile[:count].double(), hidden[positions[:count]].double(), positions[:count]
    of_weight, of_hidden = torch.full_like(weight, torch.nan), torch.full_like(hidden, torch.nan)
    ops.weight_product_(of_weight, tile, hidden, positions, coeff, end)
    ops.hidden_product_(of_hidden, tile, weight, positions, coeff, end)
    scaled = (right * coeff[at, None]).to(dtype).double()
    want = torch.zeros(500, columns, dtype=torch.float64, device=device)
    want[at] = left @ weight.double() * coeff[at, None]
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(of_weight.double(), left.t() @ scaled, **close)
    torch.testing.assert_close(of_hidden.double(), want, **close)
    again = torch.full_like(hidden, torch.nan)
    ops.hidden_product_(again, tile, weight, positions, coeff, end)
    assert again.equal(of_hidden), "parts are added in a fixed order"
    tile[: count // 2], coeff[at[: count // 2]] = torch.inf, 0
    ops.hidden_product_(of_hidden, tile, weight, positions, coeff, end)
    want[at[: count // 2]] = 0
    torch.testing.assert_close(of_hidden.double(), want, **close)
