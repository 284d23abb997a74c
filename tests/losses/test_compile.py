"""opcheck of every op, and torch.compile(fullgraph=True) against eager."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.ops import _SCHEMAS


def op_arguments(name: str, device: str, packed: bool, with_state: bool, reduction: int):
    """Positional arguments of the op `name` for a small batch."""
    logits = torch.randn(2, 3, 5, device=device)
    labels = torch.tensor([[1, 4, -100], [0, 2, 3]], device=device)
    sample_ids = torch.tensor([[1, 1, 1], [0, -1, 2]] if packed else [1, 2], device=device)
    state = gk.SampleState(3, device=device)
    table = (state.rules, state.weights, None, *((state.columns, state.error) if with_state else ([], None)))
    if name == "token_stats":
        return logits, labels, sample_ids, -100, True, 3.0
    tokens = ops.token_stats(logits, labels, sample_ids, -100, True, 3.0)
    if name == "sample_update_":
        return tokens, labels, sample_ids, *table, 5, reduction, -100, True, True
    if name == "loss_forward_":
        return logits, labels, sample_ids, *table, reduction, -100, True, 3.0, True
    loss, scale, coeff, token_visit, *_ = ops.sample_update_(
        tokens, labels, sample_ids, state.rules, state.weights, None, [], None, 5, reduction, -100, True, True
    )
    return torch.rand_like(loss), logits, labels, tokens, coeff, scale, token_visit, True, 3.0


@pytest.mark.parametrize("packed", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "plain"])
@pytest.mark.parametrize("reduction", [0, 1], ids=["none", "mean"])
@pytest.mark.parametrize("name", ["token_stats", "sample_update_", "loss_forward_", "logits_grad", "logits_grad_"])
def test_opcheck(backend, device, name, packed, with_state, reduction):
    arguments = op_arguments(name, device, packed, with_state, reduction)
    torch.library.opcheck(getattr(torch.ops.geko, name).default, arguments)


def test_every_op_of_the_logits_path_is_checked():
    assert {"token_stats", "sample_update_", "loss_forward_", "logits_grad", "logits_grad_"} <= set(_SCHEMAS)


def setup(device="cpu", vocab=9):
    hidden, labels = torch.randn(4, 3, 6, device=device), torch.randint(vocab, (4, 3), device=device)
    labels[1, 1] = -100
    weight = torch.randn(vocab, 6, device=device)
    ids = torch.tensor([[0, 0, 1], [2, 2, 2], [-1, 3, 3], [1, 1, 1]], device=device)
    return hidden, weight, labels, ids


def both(step, hidden, calls=2, **options):
    """Results of `calls` steps with eager and compiled code: (losses, gradient, state columns) each."""
    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, **options)):
        state, leaf = gk.SampleState(4), hidden.clone().requires_grad_()
        losses = []
        for _ in range(calls):
            loss = run(leaf, state)
            loss.sum().backward()
            losses.append(loss.detach())
        results.append((torch.stack(losses), leaf.grad, state))
    return results


def assert_equal(results):
    (loss, grad, state), (compiled_loss, compiled_grad, compiled_state) = results
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_grad, grad)
    for name, column in state.state_dict().items():
        torch.testing.assert_close(compiled_state.state_dict()[name], column, msg=name)
    assert state.times_seen.sum() > 0


@pytest.mark.parametrize("form", ["plain", "row", "token", "stats"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("reference")
def test_compiled_equals_eager(form, reduction):
    hidden, weight, labels, ids = setup()

    def step(x, state):
        logits = x @ weight.T
        if form == "stats":
            loss, stats = gk.weighted_loss(logits, labels, ids, state, reduction=reduction, return_stats=True)
            return loss + 0 * stats.q_value.sum()
        sample_ids = {"plain": None, "row": ids[:, 2], "token": ids}[form]
        gk.weighted_loss(logits, labels, ids, state, shift=True, softcap=4.0)
        table = None if form == "plain" else state
        return gk.weighted_loss(logits, labels, sample_ids, table, reduction=reduction, inplace=True)

    assert_equal(both(step, hidden, backend="aot_eager"))


def test_inductor(backend, device):
    hidden, weight, labels, ids = setup(device)

    def step(x, state):
        return gk.weighted_loss(x @ weight.T, labels, ids, state, shift=True)

    if device == "cpu":
        (loss, *_), (compiled, *_) = results = both(step, hidden)
        assert_equal(results)
        assert compiled.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("reference")
def test_compiled_code_that_checkpoints_counts_once(compiler):
    hidden, weight, labels, ids = setup()

    def step(x, state):
        def head(h):
            return gk.weighted_loss(h @ weight.T, labels, ids, state)

        return checkpoint(head, x, use_reentrant=False)

    assert_equal(both(step, hidden, backend=compiler))


@pytest.mark.usefixtures("reference")
def test_a_checkpoint_around_compiled_code_counts_once():
    hidden, weight, labels, ids = setup()
    state, leaf = gk.SampleState(4), hidden.clone().requires_grad_()
    torch._dynamo.reset()
    step = torch.compile(lambda x: gk.weighted_loss(x @ weight.T, labels, ids, state), backend="aot_eager")
    checkpoint(step, leaf, use_reentrant=False).backward()
    assert state.times_seen.tolist() == [1, 1, 1, 1]


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("change", ["weights", "assigned", "num_items_tensor", "num_items_float", "num_items_int"])
def test_nothing_recompiles_when_the_phase_or_the_divisor_changes(change):
    hidden, weight, labels, ids = setup()
    state = gk.SampleState(4)
    torch._dynamo.reset()
    counters.clear()

    def step(x, items):
        return gk.weighted_loss(x @ weight.T, labels, ids, state, update=False, num_items=items)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses, eager = [], []
    for i in range(2, 8):
        items = {"num_items_tensor": torch.tensor(i), "num_items_float": i + 0.5, "num_items_int": i}.get(change)
        if change == "weights":
            state.weights[1:4] = float(i)
        if change == "assigned":
            state.bucket_weights = (i, i, i)
        losses.append(compiled(hidden, items).item())
        eager.append(step(hidden, items).item())
    assert losses == pytest.approx(eager) and len({*losses}) == 6
    # a Python number is a constant at first and a symbol from its second value on
    assert counters["stats"]["unique_graphs"] <= (2 if change in ("num_items_float", "num_items_int") else 1)


@pytest.mark.usefixtures("reference")
def test_dynamic_shapes_compile_once():
    # no size is 5: dynamo takes it for the length of a history, which has the same
    state = gk.SampleState(20)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(gk.weighted_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, length in ((3, 6), (4, 7), (7, 9)):
        logits, labels = torch.randn(rows, length, 8, requires_grad=True), torch.randint(8, (rows, length))
        step(logits, labels, torch.arange(rows), state, shift=True).backward()
        assert logits.grad.isfinite().all()
    assert counters["stats"]["unique_graphs"] == 1 and state.times_seen[0] == 3


@pytest.mark.usefixtures("reference")
def test_compiled_bad_values_are_flagged_and_found_by_check():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, 3], [0, 9, 0]])
    state = gk.SampleState(2)
    torch._dynamo.reset()
    step = torch.compile(gk.weighted_loss, fullgraph=True, backend="aot_eager")
    loss = step(logits, labels, torch.arange(2), state)
    assert loss.isfinite() and state.times_seen.tolist() == [1, 0]
    with pytest.raises(IndexError, match=r"labels: 9 \(token 4 of the flattened batch\)"):
        state.check()
    state.check()


@pytest.mark.usefixtures("reference")
def test_export_and_fake_tensors_see_shapes_only():
    from torch._subclasses.fake_tensor import FakeTensorMode

    gk.weighted_loss(torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))  # fills the cache of plain rules
    with FakeTensorMode():
        logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
        loss = gk.weighted_loss(logits, labels, reduction="none")
        loss.sum().backward()
        assert loss.shape == (2,) and logits.grad.shape == (2, 3, 5)
    gk.weighted_loss(torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))
