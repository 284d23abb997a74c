"""Bad input: the error names the argument, what came and what is allowed; the state is unharmed."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.losses.arguments import num_items_tensor

LOGITS, LABELS, IDS = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.arange(2)


class ModelOutput(NamedTuple):
    logits: torch.Tensor


def call(**changes):
    arguments = {"logits": LOGITS, "labels": LABELS, "sample_ids": IDS, "state": gk.SampleState(2), **changes}
    return gk.weighted_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": None}, TypeError, "logits must be a torch.Tensor, got NoneType; this model returned no logits"),
        ({"logits": ModelOutput(LOGITS)}, TypeError, "logits must be a torch.Tensor, got ModelOutput; pass its logits"),
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": LOGITS.int()}, TypeError, "logits must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"logits": LOGITS[0, 0]}, ValueError, "logits must be (B, S, V) or (B, V) with V >= 1, got (5,)"),
        ({"logits": LOGITS[..., :0]}, ValueError, "logits must be (B, S, V) or (B, V) with V >= 1, got (2, 3, 0)"),
        ({"labels": None}, TypeError, "labels must be a torch.Tensor, got NoneType"),
        ({"labels": LABELS.int()}, TypeError, "labels must be int64, got torch.int32; use labels.long()"),
        ({"labels": LABELS[:, 1:]}, ValueError, "labels must be (2, 3) for logits of (2, 3, 5), got (2, 2)"),
        (
            {"labels": LABELS.flatten()},
            ValueError,
            "labels must be (2, 3) for logits of (2, 3, 5), got (6,); do not flatten",
        ),
        ({"labels": LABELS.to("meta")}, ValueError, "labels must be on the device of logits, cpu, got meta"),
        ({"sample_ids": None}, ValueError, "sample_ids must be given with a state"),
        (
            {"sample_ids": [0, 1]},
            TypeError,
            "sample_ids must be a torch.Tensor, got list; use torch.as_tensor(sample_ids)",
        ),
        (
            {"sample_ids": gk.SampleState(2)},
            TypeError,
            "sample_ids must be a torch.Tensor, got SampleState; the ids come before the state",
        ),
        ({"labels": ("cat", "dog")}, TypeError, "labels must be a torch.Tensor, got tuple of texts; number them from"),
        ({"logits": (LOGITS,)}, TypeError, "logits must be a torch.Tensor, got tuple; pass the one of them that holds"),
        ({"labels": LABELS[..., None]}, ValueError, "for logits of (2, 3, 5), got (2, 3, 1); use labels.squeeze(-1)"),
        ({"sample_weights": [1.0, 2.0]}, TypeError, "or None, got list; use torch.as_tensor(sample_weights)"),
        (
            {"labels": LABELS.numpy()},
            TypeError,
            "labels must be a torch.Tensor, got ndarray; use torch.as_tensor(labels)",
        ),
        (
            {"logits": LOGITS.flatten(0, 1), "labels": LABELS.flatten()},
            ValueError,
            "sample_ids must be (6,), got (2,); do not flatten a batch of (B, S, ...): each row would be a visit",
        ),
        ({"sample_ids": IDS.int()}, TypeError, "sample_ids must be int64, got torch.int32; use sample_ids.long()"),
        ({"sample_ids": torch.arange(3)}, ValueError, "sample_ids must be (2,) or (2, 3), got (3,)"),
        ({"sample_ids": IDS.to("meta")}, ValueError, "sample_ids must be on the device of logits, cpu, got meta"),
        ({"state": {}}, TypeError, "state must be a SampleState or None, got dict"),
        (
            {"state": gk.SampleState(2, device="meta")},
            ValueError,
            "state must be on the device of the labels, cpu, got",
        ),
        ({"reduction": "avg"}, ValueError, "reduction must be one of ('none', 'mean', 'token_mean', 'sum'), got 'avg'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"softcap": 0.0}, ValueError, "softcap must be a finite number above 0 or None, got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be a finite number above 0 or None, got inf"),
        ({"softcap": "30"}, TypeError, "softcap must be a number above 0 or None, got '30'"),
        ({"num_items": 0}, ValueError, "num_items must be a finite number above 0, got 0"),
        ({"num_items": float("nan")}, ValueError, "num_items must be a finite number above 0, got nan"),
        ({"num_items": "3"}, TypeError, "num_items must be a number or a tensor of one element, got str"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must be a number or a tensor of one element, got shape"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items divides only reduction='mean' or 'token_mean'"),
        ({"num_items": 1e-50}, ValueError, "num_items must be in float32's range, 1.18e-38 to 3.4e+38, got 1e-50"),
        ({"num_items": True}, TypeError, "num_items must be a number or a tensor of one element, got bool"),
        ({"num_items": torch.tensor(True)}, TypeError, "num_items must be a tensor of real numbers, got torch.bool"),
        *(
            ({"num_items": torch.tensor(bad)}, ValueError, "num_items must be a finite number above 0, got ")
            for bad in (0, -2, 0.0, -1.5, torch.nan, torch.inf, -torch.inf)
        ),
        ({"shift": 2}, TypeError, "shift must be True or False, got 2"),
        ({"shift": "yes"}, TypeError, "shift must be True or False, got 'yes'"),
        ({"update": "no"}, TypeError, "update must be None, True or False, got 'no'"),
        ({"update": 0}, TypeError, "update must be None, True or False, got 0"),
        ({"return_stats": 1}, TypeError, "return_stats must be True or False, got 1"),
        ({"reduction": ["mean"]}, ValueError, "reduction must be one of ('none', 'mean', 'token_mean', 'sum'), got ["),
        ({"softcap": 1e-50}, ValueError, "softcap must be in float32's range, 1.18e-38 to 3.4e+38, got 1e-50"),
        ({"softcap": 1e39}, ValueError, "softcap must be in float32's range, 1.18e-38 to 3.4e+38, got 1e+39"),
        ({"softcap": True}, TypeError, "softcap must be a number above 0 or None, got True"),
        (
            {"ignore_index": 2**63},
            ValueError,
            "ignore_index must be within int64, as labels are, got 9223372036854775808",
        ),
        ({"ignore_index": -(10**5000)}, ValueError, "as labels are, got an int of 16610 bits"),
        ({"num_items": 10**5000}, ValueError, "num_items must be in float32's range, 1.18e-38 to 3.4e+38, got an int"),
        ({"softcap": 10**5000}, ValueError, "softcap must be in float32's range, 1.18e-38 to 3.4e+38, got an int of"),
        ({"num_items": torch.ones((), device="meta")}, ValueError, "num_items must hold a value, got a tensor on the"),
        ({"ignore_index": np.float64(1)}, TypeError, "ignore_index must be an int, got "),
        ({"ignore_index": False}, TypeError, "ignore_index must be an int, got False"),
        (
            {"labels": LABELS.to_sparse()},
            TypeError,
            "labels must be a dense tensor, got one of layout torch.sparse_coo",
        ),
        ({"sample_ids": IDS.to_sparse()}, TypeError, "sample_ids must be a dense tensor, got one of layout"),
        ({"labels": LABELS.bool()}, TypeError, "labels must be int64, got torch.bool; use labels.long()"),
        ({"labels": LABELS.float()}, TypeError, "labels must be int64 class indices, got torch.float32; use labels"),
    ],
)
def test_what_python_can_see(changes, error, message):
    state = gk.SampleState(2)
    with pytest.raises(error, match=re.escape(message)):
        call(**{"state": state, **changes})
    assert not state.times_seen.any() and not state.changed.any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": LOGITS.to_sparse()}, TypeError, "must be a dense tensor, got one of layout torch.sparse_coo; use"),
        ({"logits": LOGITS.to_mkldnn()}, TypeError, "must be a dense tensor, got one of layout torch._mkldnn; use"),
        ({"logits": torch.nested.nested_tensor([LOGITS[0]])}, TypeError, "must be a dense tensor, got a nested one"),
        (
            {"logits": torch.nested.nested_tensor([LOGITS[0]], layout=torch.jagged)},
            TypeError,
            "must be a dense tensor, got a nested one; use torch.nested.to_padded_tensor",
        ),
        ({"labels": LOGITS.softmax(-1)}, TypeError, "class probabilities are not supported; use F.cross_entropy"),
        ({"labels": LOGITS.long()}, ValueError, "got (2, 3, 5); one-hot labels need labels.argmax(-1)"),
        ({"logits": LOGITS.transpose(1, 2)}, ValueError, "F.cross_entropy takes them, need logits.transpose(1, 2)"),
    ],
)
def test_other_layouts_of_logits_and_labels(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)
    if "logits" in changes:
        changes = {"hidden": changes["logits"]}
    arguments = {"hidden": LOGITS, "weight": torch.randn(4, 5), "labels": LABELS, **changes}
    with pytest.raises(error, match=re.escape(message.replace("logits", "hidden"))):
        gk.weighted_linear_loss(**arguments)


def test_class_probabilities_for_the_linear_loss_which_have_the_shape_of_no_argument():
    with pytest.raises(TypeError, match=r"float32 of shape \(2, 3, 4\): class probabilities are not supported"):
        gk.weighted_linear_loss(LOGITS, torch.randn(4, 5), torch.rand(2, 3, 4))


def test_the_classes_in_dimension_1_of_a_square_batch_cannot_be_told():
    logits, labels = torch.randn(2, 4, 4), torch.randint(4, (2, 4))
    want = torch.nn.functional.cross_entropy(logits, labels)
    assert gk.weighted_loss(logits, labels) != want
    torch.testing.assert_close(gk.weighted_loss(logits.transpose(1, 2), labels), want)


@pytest.mark.parametrize(
    "number",
    [np.int64(2), np.int32(2), np.uint8(2), np.float32(2), np.float64(2), torch.tensor(2), torch.tensor([2.0])],
)
def test_numbers_of_numpy_and_tensors(backend, device, number):
    where = {name: value.to(device) for name, value in (("logits", LOGITS), ("labels", LABELS))}
    want = gk.weighted_loss(**where, reduction="token_mean", num_items=2)
    assert gk.weighted_loss(**where, reduction="token_mean", num_items=number).equal(want)
    if not isinstance(number, torch.Tensor):
        assert gk.weighted_loss(**where, softcap=number).equal(gk.weighted_loss(**where, softcap=2.0))
    if isinstance(number, np.integer):
        labels = torch.tensor([[0, 2, 1], [2, 2, 3]], device=device)
        want = gk.weighted_loss(LOGITS.to(device), labels, ignore_index=2)
        assert gk.weighted_loss(LOGITS.to(device), labels, ignore_index=number).equal(want)


@pytest.mark.parametrize("items", [0.0, -3.0, torch.nan, torch.inf, -torch.inf])
def test_a_divisor_that_nobody_looks_at_shows_in_the_loss(backend, device, items):
    """As on a GPU, where looking would wait, and in compiled code."""
    bad = num_items_tensor(torch.tensor(items, device=device), "token_mean", torch.device(device), eager=False)
    state = gk.SampleState(2, device=device)
    where = (
        LOGITS.to(device),
        LABELS.to(device),
        IDS.to(device),
        state.rules,
        state.weights,
        bad,
        state.columns,
        state.error,
    )
    assert not ops.loss_forward_(*where, 2, -100, False, 0.0, True)[0].isfinite()


def test_flat_logits_take_one_id_a_row_and_no_shift():
    flat = {"logits": torch.randn(2, 5), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=re.escape("sample_ids must be (2,), got (2, 3)")):
        call(**flat, sample_ids=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="shift=True needs logits of 3 dimensions"):
        call(**flat, shift=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (0, 2, 5)}, "labels: 5 (token 2 of the flattened batch) is neither ignore_index nor in [0, 5)"),
        ({"labels": (1, 1, -7)}, "labels: -7 (token 4 of the flattened batch) is neither ignore_index nor in [0, 5)"),
        ({"labels": (1, 0, -100), "ignore_index": -1}, "labels: -100 (token 3 of the flattened batch)"),
        ({"ids": 2}, "sample_ids: 2 (token 3 of the flattened batch) is neither -1 (padding) nor in [0, 2)"),
        ({"ids": -2}, "sample_ids: -2 (token 3 of the flattened batch) is neither -1 (padding) nor in [0, 2)"),
        ({"ids": 2**40}, "sample_ids: 2147483647 (token 3 of the flattened batch)"),
    ],
)
def test_bad_values_raise_at_once_on_the_cpu(backend, device, changes, message):
    if device != "cpu":
        pytest.skip("a GPU flags them")
    labels, ids, state = LABELS.clone(), IDS.clone(), gk.SampleState(2)
    if "labels" in changes:
        row, position, value = changes["labels"]
        labels[row, position] = value
    ids[1] = changes.get("ids", 1)
    with pytest.raises(IndexError, match=re.escape(message)) as raised:
        call(labels=labels, sample_ids=ids, state=state, ignore_index=changes.get("ignore_index", -100))
    advice = "raise num_labels, or check" if "labels" in changes else "SampleState(len(dataset))"
    assert "; no loss was computed, no visit counted. " in str(raised.value) and advice in str(raised.value)
    assert not state.times_seen.any() and not state.changed.any()
    state.check()


def test_a_label_that_nothing_predicts_may_be_anything():
    labels, ids = torch.tensor([[99, 1, 2], [3, 4, 99]]), torch.tensor([[0, 0, 0], [1, 1, -1]])
    call(labels=labels, sample_ids=ids, shift=True)


def forward_op(logits, labels, sample_ids, state):
    """The forward without the look at the values that `weighted_loss` takes on the CPU: what a GPU does."""
    where = (logits, labels, sample_ids, state.rules, state.weights, None, state.columns, state.error)
    return ops.loss_forward_(*where, 0, -100, False, 0.0, True)


@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_value_leaves_its_visit_out_and_sets_the_flag(backend, device, packed):
    state, clean = gk.SampleState(4, device=device), gk.SampleState(4, device=device)
    logits = torch.randn(4, 3, 5, device=device)
    labels = torch.tensor([[1, 2, 3], [0, 5, 1], [1, -3, 1], [2, 2, 2]], device=device)
    ids = torch.tensor([0, 1, 2, 9], device=device)
    many = ids[:, None].expand(4, 3) if packed else ids
    loss, scale, coeff, token_visit, *_, tokens = forward_op(logits, labels, many, state)
    forward_op(logits[:1], labels[:1], many[:1], clean)
    assert loss.isfinite().all() and loss.count_nonzero() == 1
    assert all(column.equal(clean.state_dict()[name]) for name, column in state.state_dict().items())
    grad = ops.logits_grad(torch.ones_like(loss), logits, labels, tokens, coeff, scale, token_visit, False, 0.0)
    assert grad[0].any() and not grad[1:].any()
    with pytest.raises(IndexError, match=re.escape("labels: 5 (token 4 of the flattened batch)")) as raised:
        state.check()
    assert "; its visit was left out of the loss and the state. Labels count from 0" in str(raised.value)
    state.check()


@pytest.mark.parametrize("wild", [2**31, -(2**31), 2**40, -(2**62), 2**63 - 1])
def test_wild_values_are_never_an_address(backend, device, wild):
    for labels, ids in (
        (torch.tensor([[0, wild]]), torch.tensor([0])),
        (torch.tensor([[0, 1]]), torch.tensor([wild])),
        (torch.tensor([[0, 1]]), torch.tensor([[0, wild]])),
    ):
        state = gk.SampleState(1, device=device)
        forward_op(torch.randn(1, 2, 3, device=device), labels.to(device), ids.to(device), state)
        with pytest.raises(IndexError):
            state.check()


def test_the_flag_names_the_lowest_position_of_several_calls_in_one(backend, device):
    state = gk.SampleState(2, device=device)
    ids = torch.tensor([[0, 0, 7, -1, 8, 1]], device=device)
    forward_op(torch.randn(1, 6, 5, device=device), torch.zeros(1, 6, dtype=torch.long, device=device), ids, state)
    with pytest.raises(IndexError, match=re.escape("sample_ids: 7 (token 2 ")):
        state.check()


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_debug_checks_every_call(monkeypatch, value):
    monkeypatch.setenv("GEKO_DEBUG", value)
    state = gk.SampleState(2)
    state.error.copy_((3 << 33) | 9)  # as a kernel would
    if value == "1":
        with pytest.raises(IndexError, match=re.escape("sample_ids: 9 (token 3 ")):
            call(state=state)
    else:
        call(state=state)


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setattr(ops, "_override", "cuda")
    with pytest.raises(ValueError, match=re.escape("GEKO_BACKEND must be one of ['cpp', 'reference', 'triton'], got")):
        call()


def test_a_missing_backend_falls_back_with_one_warning(monkeypatch, recwarn):
    monkeypatch.setattr(ops, "_override", "")
    monkeypatch.setattr(ops, "_loaded", {})
    monkeypatch.setitem(ops._MODULES, "cpp", "geko_kernels.not_built")
    for _ in range(3):
        call()
    assert [str(w.message) for w in recwarn if "'cpp' backend is not available" in str(w.message)].__len__() == 1


def test_an_asked_for_backend_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(ops, "_override", "cpp")
    monkeypatch.setattr(ops, "_loaded", {})
    monkeypatch.setitem(ops._MODULES, "cpp", "geko_kernels.not_built")
    with pytest.raises(ImportError):
        call()
