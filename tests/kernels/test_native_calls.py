"""`torch.ops.geko.*` called directly: arguments that do not fit are refused by name, in every backend.

`python tests/helpers/sanitize.py` runs many more of the random calls, under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import pytest
import torch
from native_calls import Calls

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.columns import NAMES


@pytest.fixture(autouse=True)
def on_device(request):
    """New tensors are where the backend runs."""
    with torch.device(request.getfixturevalue("device") if "backend" in request.fixturenames else "cpu"):
        yield


def test_random_calls_return_or_raise(monkeypatch):
    cpp = pytest.importorskip("geko_kernels.cpu", exc_type=ImportError)
    taken = [Calls(seed).run(module)[1] for module in (cpp, ops) for seed in range(150)]
    assert 90 < sum(taken) < 210, "some calls fit and some do not"


def forward(**changes):
    """`loss_forward_` of 2 x 3 tokens over 5 logits and 4 samples, with some arguments replaced."""
    state = gk.SampleState(4, device=torch.get_default_device())
    arguments = {
        **{"logits": torch.randn(2, 3, 5), "labels": torch.zeros(2, 3, dtype=torch.int64)},
        **{"sample_ids": torch.tensor([0, 3]), "rules": state.rules, "weights": state.weights, "num_items": None},
        **{name: getattr(state, name) for name in (*NAMES, "error")},
        **{"reduction": 1, "ignore_index": -100, "shift": False, "softcap": 0.0, "update": True},
    }
    assert changes.keys() <= arguments.keys()
    arguments |= here(changes)
    columns = [arguments.pop(name) for name in NAMES]
    head = [arguments.pop(name) for name in ("logits", "labels", "sample_ids", "rules", "weights", "num_items")]
    return ops.loss_forward_(*head, [column for column in columns if column is not None], *arguments.values())


def here(changes):
    """Tensors that parameters hold, where the others are; strided ones would lose their strides."""
    moves = {
        name: value for name, value in changes.items() if isinstance(value, torch.Tensor) and value.is_contiguous()
    }
    return changes | {name: value.to(torch.get_default_device()) for name, value in moves.items() if value.data_ptr()}


def many(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confidence": None}, f"must be given all or none, got {len(NAMES) - 1} of {len(NAMES)}"),
        ({"quarantined": None}, f"must be given all or none, got {len(NAMES) - 1} of {len(NAMES)}"),
        ({"q_value": None}, f"must be given all or none, got {len(NAMES) - 1} of {len(NAMES)}"),
        ({"confidence": many(3)}, "confidence must be .*4.* got .*3"),
        ({"loss_history": many(20)}, "loss_history must be .*4, 5.* got .*20"),
        ({"loss_history": many(5, 4).t()}, "loss_history must be .*contiguous.*4, 5"),
        ({"times_seen": torch.zeros(4, dtype=torch.int64)}, "times_seen must be "),
        ({"bucket": torch.zeros(4, dtype=torch.int8)}, "bucket must be "),
        ({"claim": torch.zeros(1, dtype=torch.int32).expand(4)}, "claim must be "),
        ({"changed": many(4)}, "changed must be "),
        ({"rules": many(9)}, "rules must be .*10.*9"),
        ({"weights": many(4).double()}, "weights must be .*4"),
        ({"weights": many(8)[::2]}, "weights must be .*contiguous"),
        ({"num_items": many(2)}, "num_items must be .*2"),
        ({"error": torch.zeros(2, dtype=torch.int64)}, "error must be .*2"),
        ({"error": torch.zeros((), dtype=torch.int32)}, "error must be "),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, "labels must .*2, 3.*2, 2"),
        ({"labels": torch.zeros(2, 3)}, "labels must "),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "labels must "),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, "sample_ids must be .*3"),
        ({"sample_ids": torch.zeros(3, 2, dtype=torch.int64)}, "sample_ids must be .*3, 2"),
        ({"sample_ids": torch.zeros(2, dtype=torch.int32)}, "sample_ids must be "),
        ({"logits": many(2, 15)}, "logits must be .*2, 15"),
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.int64)}, "logits must be "),
        ({"reduction": 4}, "reduction must be 0, 1, 2 or 3, got 4"),
    ],
)
def test_a_forward_that_does_not_fit(backend, changes, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        forward(**changes)


def gradient(op=None, **changes):
    arguments = {
        **{"grad_output": torch.ones(2), "logits": torch.randn(2, 3, 5), "labels": torch.zeros(2, 3).long()},
        **{"tokens": many(5, 6), "coeff": torch.ones(6), "scale": torch.ones(())},
        **{"token_visit": torch.zeros(0, dtype=torch.int32), "shift": False, "softcap": 0.0},
    }
    assert changes.keys() <= arguments.keys()
    return (op or ops.logits_grad)(*(arguments | here(changes)).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_output": torch.ones(3)}, "grad_output must be .*2.*3"),
        ({"grad_output": torch.ones(2, 1)}, "grad_output must be .*2.*2, 1"),
        ({"grad_output": torch.ones(2, dtype=torch.int64)}, "grad_output must be "),
        ({"token_visit": torch.zeros(5, dtype=torch.int32)}, "token_visit must be .*6.*5"),
        ({"token_visit": torch.zeros(6, dtype=torch.int64)}, "token_visit must be "),
        ({"coeff": torch.ones(5)}, "coeff must be .*6.*5"),
        ({"coeff": torch.ones(1).expand(6)}, "coeff must be .*contiguous"),
        ({"scale": torch.ones(6)}, "scale must be .*6"),
        ({"tokens": many(6, 5)}, "tokens must be .*5, 6.*6, 5"),
        ({"tokens": many(6, 5).t()}, "tokens must be .*contiguous"),
        ({"labels": torch.zeros(3, 2).long()}, "labels must .*2, 3.*3, 2"),
        ({"logits": many(2, 3)}, "logits must be .*2, 3"),
    ],
)
def test_a_gradient_that_does_not_fit(backend, changes, message):
    for op in (ops.logits_grad, ops.logits_grad_):
        with pytest.raises((ValueError, RuntimeError), match=message):
            gradient(op, **changes)


def test_logits_that_overlap_themselves_are_not_written_over(backend):
    for logits in (many(1, 3, 5).expand(2, 3, 5), torch.as_strided(many(30), (2, 3, 5), (3, 1, 1))):
        with pytest.raises((ValueError, RuntimeError), match="logits must not overlap themselves"):
            gradient(ops.logits_grad_, logits=logits)
        gradient(logits=logits)


@pytest.mark.parametrize("entry", [6, -1, -7, 2**31 - 1, -(2**31)])
def test_a_foreign_token_visit(backend, entry):
    visits = torch.tensor([0, 0, 1, 1, 2, entry], dtype=torch.int32)
    call = {"grad_output": torch.ones(6), "token_visit": visits}
    if backend == "triton":  # the host does not see it
        grad = gradient(**call)
        assert grad[1, 2].isnan().all() and grad.view(6, 5)[:5].isfinite().all()
    elif backend == "cpp":
        with pytest.raises(RuntimeError, match=r"token 5 has a coefficient, but its .* visit outside \[0, 6\)"):
            gradient(**call)
    elif entry != -1 and abs(entry) > 6:
        with pytest.raises((RuntimeError, IndexError)):
            gradient(**call)


@pytest.mark.parametrize("label", [5, -100, 2**40, -(2**63)])
def test_labels_that_are_not_those_of_the_forward(label):
    cpp = pytest.importorskip("geko_kernels.cpu", exc_type=ImportError)
    labels = torch.tensor([[0, 1, 2], [3, label, 4]])
    with pytest.raises(RuntimeError, match=r"token 4 has a coefficient, but its label is outside \[0, 5\)"):
        gradient(cpp.logits_grad, labels=labels)
    gradient(cpp.logits_grad, labels=labels, coeff=torch.tensor([1.0, 1, 1, 1, 0, 1]))


def test_a_tensor_whose_memory_is_gone(backend):
    weights = torch.ones(4)
    weights.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="weights must be .*without memory"):
        forward(weights=weights)


@pytest.mark.parametrize(("batch", "length", "vocab"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty_sizes(backend, batch, length, vocab):
    logits, labels = many(batch, length, vocab), torch.full((batch, length), -100)
    loss, scale, coeff, *_ = forward(logits=logits, labels=labels, sample_ids=torch.zeros(batch).long())
    assert loss == 0 and scale == 0 and coeff.shape == (batch * length,) and not coeff.any()
    tokens = many(5, batch * length)
    grad = gradient(grad_output=torch.ones(()), logits=logits, labels=labels, coeff=coeff, tokens=tokens)
    assert grad.shape == logits.shape and not grad.any()


def rows_call(op, **changes):
    """An op on rows of a buffer (6, 16) and 4 tokens, with some arguments replaced."""
    index = torch.arange(4)
    common = {"logits": many(6, 16), "rows": index, "targets": index, "tokens": many(5, 4)}
    lists = {"positions": torch.zeros(6).long(), "sources": torch.arange(6)}
    call = {
        "score_rows_": common
        | {"fused": False, "slot": 0, "start": 0, "count": 4, "vocab": 16, "softcap": 0.0}
        | {"entropy": None},
        "kept_rows_": {"coeff": torch.ones(4), "rows": index, **lists, "held": 0, "start": 0, "count": 4},
        "gradient_rows_": {
            **{"logits": many(6, 16), **lists, "end": None, "labels": index[:, None], "tokens": many(5, 4)},
            **{"first": 0, "last": 6, "ready_from": 6, "vocab": 16, "shift": False, "softcap": 0.0},
        },
        "gather_rows": {"hidden": many(4, 3), "positions": index, "coeff": torch.ones(4), "count": 4},
        "scatter_rows_": {
            **{"out": many(4, 3), "product": many(4, 3), "positions": index, "coeff": torch.ones(4), "first": 0},
        },
        "clear_rows_": {"tile": many(4, 3), "positions": index, "coeff": torch.ones(4)},
        "column_sums": {"tile": many(4, 3), "by_row": torch.ones(4)},
        "rescale_": {"values": many(4), "factor": torch.ones(())},
        "scored_rows": {"labels": index[:, None], "sample_ids": None, "vocab": 5, "ignore_index": -100, "shift": False},
    }[op]
    assert changes.keys() <= call.keys()
    return getattr(ops, op)(*(call | changes).values())


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("score_rows_", {"count": 5}, r"rows \[start, start \+ count\) must lie in \[0, 4\), got \[0, 5\)"),
        ("score_rows_", {"entropy": many(5)}, r"entropy must be .*\(4,\).*\(5,\)"),
        ("score_rows_", {"slot": 3}, r"slots must lie in \[0, 6\), got \[3, 7\)"),
        ("score_rows_", {"slot": -1}, r"slots must lie in \[0, 6\), got \[-1, 3\)"),
        ("score_rows_", {"vocab": 17}, r"columns must lie in \[0, 16\), got \[0, 17\)"),
        ("score_rows_", {"logits": many(6, 32)[:, ::2]}, "logits must be contiguous"),
        ("kept_rows_", {"held": 3}, r"slots \[held, held \+ count\) must lie in \[0, 6\), got \[3, 7\)"),
        ("kept_rows_", {"rows": torch.arange(4).int()}, "rows must be .* int64"),
        ("gradient_rows_", {"last": 7}, r"slots \[first, last\) must lie in \[0, 6\), got \[0, 7\)"),
        ("gradient_rows_", {"tokens": many(5, 3)}, r"tokens must be .*\(5, 4\).*\(5, 3\)"),
        ("gather_rows", {"count": 5}, r"positions must lie in \[0, 4\), got \[0, 5\)"),
        ("gather_rows", {"coeff": torch.ones(3)}, r"coeff must be .*\(4,\).*\(3,\)"),
        ("scatter_rows_", {"first": 1}, r"positions must lie in \[0, 4\), got \[1, 5\)"),
        ("scatter_rows_", {"product": many(4, 4)}, r"product must be .*\(any, 3\).*\(4, 4\)"),
        ("clear_rows_", {"positions": torch.arange(3)}, r"positions must be .*\(4,\).*\(3,\)"),
        ("column_sums", {"by_row": torch.ones(5)}, r"by_row must be .*\(4,\).*\(5,\)"),
        ("rescale_", {"factor": torch.ones(2)}, r"factor must be .*\(\).*\(2,\)"),
        ("scored_rows", {"sample_ids": torch.zeros(2).long()}, r"sample_ids must be .*\(4,\).*\(2,\)"),
        ("scored_rows", {"labels": None}, "labels must be a tensor, got None"),
    ],
)
def test_rows_that_do_not_fit(backend, op, changes, message):
    rows_call(op)
    with pytest.raises(ValueError, match=message):
        rows_call(op, **changes)


@pytest.mark.parametrize("bad", [-1, 4, 2**31, -(2**63), 2**62])
def test_indices_outside_are_masked_in_triton(bad, monkeypatch):
    """A GPU cannot raise for what a tensor holds, but nothing is read or written elsewhere; elsewhere it raises."""
    pytest.importorskip("geko_kernels.kernels", exc_type=ImportError)
    if torch.cuda.is_available():
        pytest.skip("is about the interpreter, which reads and writes where the GPU would")
    monkeypatch.setattr(ops, "_override", "triton")
    index = torch.tensor([0, bad, 2, 3])
    hidden = torch.ones(4, 3)
    assert ops.gather_rows(hidden, index, torch.ones(4), 4).tolist() == [[1.0] * 3, [0.0] * 3, [1.0] * 3, [1.0] * 3]
    out = many(4, 3)
    ops.scatter_rows_(out, hidden, index, torch.ones(4), 0)
    assert out.sum(1).tolist() == [3, 0, 3, 3]
    positions, sources = torch.full((2, 4), 9)
    assert ops.kept_rows_(torch.ones(4), index, positions, sources, 0, 0, 4) == 3
    assert positions[:3].tolist() == [0, 3, 2]
    tokens = torch.full((5, 4), 7.0)
    ops.score_rows_(torch.zeros(4, 16), index, torch.zeros(4).long(), tokens, True, 0, 0, 4, 16, 0.0)
    assert tokens[1].tolist() == [0, 7, 0, 0]
    ops.score_rows_(torch.zeros(4, 16), torch.arange(4), index + 12 * (index == 4), tokens, True, 0, 0, 4, 16, 0.0)
    assert tokens[0].isnan().tolist() == [False, True, False, False]
    logits = torch.zeros(4, 16)
    where = (torch.zeros(4, 1).long(), many(5, 4), 0, 4, 9, 16, True, 0.0)
    ops.gradient_rows_(logits, index, torch.arange(4), None, *where)
    assert logits.isnan().all(1).tolist() == [False, True, False, False]
    logits = torch.zeros(4, 16)
    ops.gradient_rows_(logits, torch.arange(4), index, None, *where[:4], 2**63 - 1, *where[5:])
    assert logits.isnan().all(1).tolist() == [False, True, False, False]
